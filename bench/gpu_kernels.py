"""Parts ceilings, attention, logprob, small and experts of bench/gpu.py: how fast the kernels are.

Letters: T tokens, H query heads, G key/value heads, E head size, M scored tokens, D width, V
vocabulary.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from harness import Bench
from torch import Tensor

from kernels import grouped, rmsnorm, rope, swiglu
from kernels.attention import segments, tree_attention_fused, varlen_attention, varlen_serves
from kernels.logprob import linear_logprob
from layout import Spans, TreeLayout

# ---- ceilings ------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> None:
    """Measure a plain matmul and a plain copy: the yardstick of all shares."""
    n = 128 if bench.tiny else 8192
    a, b = bench.randn(n, n), bench.randn(n, n)
    source = bench.randn(1 << (16 if bench.tiny else 29))
    target = torch.empty_like(source)

    def matmul() -> dict:
        return {"tflops": 2 * n**3 / bench.seconds(lambda: a @ b) / 1e12}

    def copy() -> dict:
        moved = 2 * source.numel() * source.element_size()
        return {"gbs": moved / bench.seconds(lambda: target.copy_(source)) / 1e9}

    bench.attempt(f"matmul {n}", matmul)
    bench.attempt("copy", copy)


# ---- attention -----------------------------------------------------------------------------------


def attention(bench: Bench) -> None:
    """Time forward and backward, and what else could compute the same."""
    rows = {
        "8 sequences of 1024": [(0, [1024])] * 8,
        "1 sequence of 8192": [(0, [8192])],
        "8 pairs, prompt 512, answers 256": [(512, [256, 256])] * 8,
        "groups of 16, prompt 1024, answers 192": [(1024, [192] * 16)] * 2,
    }
    shapes = [(32, 8, 128), (32, 32, 128), (32, 8, 64)]
    if bench.tiny:
        rows = {"2 sequences": [(0, [20])] * 2, "a tree": [(20, [10, 9])]}
        shapes = [(2, 1, 32)]
    for heads, kv_heads, size in shapes:
        for row, spans in rows.items():
            name = f"H{heads} G{kv_heads} E{size}, {row}"
            layout = TreeLayout.from_spans(spans, bench.device)
            total = len(layout.kv_end)
            q, k, v = (bench.leaf(total, h, size) for h in (heads, kv_heads, kv_heads))
            work = (bench, visible_pairs(spans), q, k, v)
            plumb = partial(tree_attention_fused, layout=layout)
            bench.attempt(f"{name}: plumb", time_passes, *work, plumb)
            if varlen_serves(q, k, layout, 0):
                varlen = partial(varlen_attention, layout=layout)
                bench.attempt(f"{name}: varlen_attn", time_passes, *work, varlen)
            is_plain = segments(layout) is not None
            if is_plain and len(spans) == 1:
                bench.attempt(f"{name}: SDPA", time_passes, *work, causal_sdpa)
            if not is_plain and (heads, size) == (32, 128) and bench.cuda:
                bench.attempt(f"{name}: flex_attention", time_flex_attention, layout, *work)


def visible_pairs(spans: Spans) -> int:
    """Count the (query, key) pairs that the trees make visible."""
    pairs = 0
    for prompt, responses in spans:
        pairs += prompt * (prompt + 1) // 2
        pairs += sum(n * prompt + n * (n + 1) // 2 for n in responses)
    return pairs


def time_passes(
    bench: Bench, pairs: int, q: Tensor, k: Tensor, v: Tensor, function: Callable
) -> dict:
    """Time forward and backward of an attention function of (q, k, v)."""
    _, heads, size = q.shape
    flop = 4 * pairs * heads * size
    out = function(q, k, v)
    slope = torch.randn_like(out)
    forward = bench.seconds(lambda: function(q, k, v))
    backward = bench.seconds(lambda: torch.autograd.grad(out, (q, k, v), slope, retain_graph=True))
    return {
        "forward_ms": forward * 1e3,
        "forward_tflops": flop / forward / 1e12,
        "backward_ms": backward * 1e3,
        "backward_tflops": 2.5 * flop / backward / 1e12,
    }


def causal_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute plain causal attention with torch, (T, H, E)."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def time_flex_attention(layout: TreeLayout, bench: Bench, *work) -> dict:
    """Time compiled flex_attention with the mask of the trees."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, kv_end, total = torch.compile(flex_attention), layout.kv_end, len(layout.kv_end)

    def visible(b, h, i, j):
        return (j <= i) & (i < kv_end[j])

    mask = create_block_mask(visible, None, None, total, total, device=str(bench.device))

    def attend(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)

    return time_passes(bench, *work, attend)


# ---- log-prob ------------------------------------------------------------------------------------


def logprob(bench: Bench) -> None:
    """Time forward and backward, the matmuls alone, cross_entropy on whole logits, and Liger."""
    sizes = [(16, 32, 300)] if bench.tiny else [(8192, 4096, 32000), (8192, 2048, 128256)]
    for rows, width, vocab in sizes:
        hidden = bench.leaf(rows, width)
        weight = (bench.randn(vocab, width) / 50).requires_grad_()
        target = torch.randint(0, vocab, (rows,), device=bench.device)
        name = f"M{rows} D{width} V{vocab}"
        bench.attempt(f"{name}: its three matmuls", time_matmuls, bench, hidden, weight)

        def plumb(h, w, target=target):
            return linear_logprob(h, w, target)

        def plumb_with_entropy(h, w, target=target):
            return sum(linear_logprob(h, w, target, entropy=True))

        def cross_entropy(h, w, target=target):
            return -F.cross_entropy((h @ w.t()).float(), target, reduction="none")

        work = (bench, hidden, weight)
        bench.attempt(f"{name}: plumb", time_logprob, *work, plumb)
        bench.attempt(f"{name}: plumb with entropy", time_logprob, *work, plumb_with_entropy)
        bench.attempt(f"{name}: cross_entropy", time_logprob, *work, cross_entropy)
        bench.attempt(f"{name}: Liger (mean only)", time_liger, *work, target)


def time_logprob(bench: Bench, hidden: Tensor, weight: Tensor, function: Callable) -> dict:
    """Time forward and backward together, and the memory that they add."""
    bench.reset_peak()
    held = torch.cuda.memory_allocated() / 2**30 if bench.cuda else 0.0
    leaves = (hidden, weight)
    seconds = bench.seconds(lambda: torch.autograd.grad(function(*leaves).sum(), leaves))
    return {"ms": seconds * 1e3, "extra_gb": bench.peak_gb() - held}


def time_matmuls(bench: Bench, hidden: Tensor, weight: Tensor) -> dict:
    """Time the logits and both gradients as plain matmuls."""
    h, w = hidden.detach(), weight.detach()
    z = h @ w.t()
    forward = bench.seconds(lambda: h @ w.t())
    backward = bench.seconds(lambda: (z @ w, z.t() @ h))
    return {"ms": 1e3 * (forward + backward)}


def time_liger(bench: Bench, hidden: Tensor, weight: Tensor, target: Tensor) -> dict:
    """Time Liger's fused linear cross-entropy, which returns the mean alone."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return time_logprob(bench, hidden, weight, lambda h, w: loss(w, h, target))


# ---- memory-bound kernels ------------------------------------------------------------------------


def small(bench: Bench) -> None:
    """Time RMSNorm, rotary embedding and SwiGLU, kernel and twin, in GB/s of what must move."""
    tokens, width, ffn, heads = (8, 32, 48, 2) if bench.tiny else (8192, 4096, 14336, 32)
    x, more, weight = bench.leaf(tokens, width), bench.leaf(tokens, width), bench.leaf(width)
    gate, up = bench.leaf(tokens, ffn), bench.leaf(tokens, ffn)
    q = bench.leaf(tokens, heads, width // heads)
    angle = torch.rand(tokens, width // heads // 2, device=bench.device)
    cos, sin = angle.cos(), angle.sin()

    def add_norm():
        return sum(rmsnorm.add_rms_norm(x, more, weight, 1e-5))

    cases = {  # numbers that must be read or written, forward and backward together
        "add_rms_norm": (add_norm, (x, more, weight), 8 * x.numel()),
        "rope": (lambda: rope.rope(q, cos, sin), (q,), 4 * q.numel()),
        "swiglu": (lambda: swiglu.swiglu(gate, up), (gate, up), 8 * gate.numel()),
    }
    for name, case in cases.items():
        bench.attempt(f"{name}: plumb", time_bandwidth, bench, *case)
        bench.attempt(f"{name}: twin", time_twin, bench, *case)


def experts(bench: Bench) -> None:
    """Time the MLPs of 64 experts, forward and backward: in three kernels, and in a loop."""
    n, tokens, width, hidden = (4, 24, 32, 48) if bench.tiny else (64, 32768, 2048, 1024)
    x = bench.leaf(tokens, width)
    weights = [bench.leaf(*s) for s in [(hidden, width)] * 2 * n + [(width, hidden)] * n]
    kinds = weights[:n], weights[n : 2 * n], weights[2 * n :]
    for name, counts in (
        ("even", [tokens // n] * n),
        ("half in one", [tokens // 2, *[tokens // 2 // (n - 1)] * (n - 1)]),
    ):
        rows = x[: sum(counts)]

        def loop(rows=rows, counts=counts):
            parts = zip(rows.split(counts), *kinds, strict=True)
            return torch.cat([swiglu.swiglu(r @ g.t(), r @ u.t()) @ d.t() for r, g, u, d in parts])

        def kernels(rows=rows, counts=counts):
            return grouped.grouped_mlp(rows, counts, *kinds)

        flops = 18 * sum(counts) * width * hidden
        for kind, function in (("plumb", kernels), ("a loop", loop)):
            bench.attempt(f"{n} experts, {name}: {kind}", time_experts, bench, function, x, flops)


def time_experts(bench: Bench, function: Callable, x: Tensor, flops: int) -> dict:
    """Time forward and backward together, and FLOPs a second. Weights get gradients too."""

    def both() -> None:
        function().sum().backward()

    seconds = bench.seconds(both)
    return {"ms": seconds * 1e3, "tflops": flops / seconds / 1e12}


def time_bandwidth(bench: Bench, function: Callable, leaves: tuple, moved: int) -> dict:
    """Time forward and backward, and the bandwidth at `moved` numbers for both."""
    out = function()
    slope = torch.randn_like(out)
    forward = bench.seconds(function)
    backward = bench.seconds(lambda: torch.autograd.grad(out, leaves, slope, retain_graph=True))
    gbs = moved * out.element_size() / (forward + backward) / 1e9
    return {"forward_ms": forward * 1e3, "backward_ms": backward * 1e3, "gbs": gbs}


def time_twin(bench: Bench, *case) -> dict:
    """Time the plain twin, with the kernels off."""
    modules = (rmsnorm, rope, swiglu)
    fused = rmsnorm.fused
    try:
        for module in modules:
            module.fused = lambda x: False
        return time_bandwidth(bench, *case)
    finally:
        for module in modules:
            module.fused = fused
