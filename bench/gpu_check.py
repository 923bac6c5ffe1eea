"""Part check of bench/gpu.py: every kernel against its plain twin in float64.

Inputs are fresh, and all memory that torch.empty returns is full of NaN.
"""

from collections.abc import Callable
from functools import partial

import torch
from harness import Bench
from torch import Tensor

from kernels.attention import tree_attention, tree_attention_fused
from kernels.device import fused
from kernels.grouped import grouped_mlp
from kernels.kl import DIVERGENCES, linear_kl
from kernels.logprob import linear_logprob
from kernels.quantized import FORMATS, quantize, quantized_linear
from kernels.rmsnorm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu
from layout import Spans, TreeLayout, share_rows

LIMITS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}  # relative errors
ODD = [(37, [20, 31]), (1, [1, 1, 9]), (0, [23]), (5, []), (70, [3, 1])] + [(1, [])] * 5
WIDE = [(400, [111, 90, 130, 70, 100, 120, 80, 60, 1, 50, 140, 30, 90, 20, 60, 70]), (9, [4])]
PLAIN = [(0, [700]), (300, [724]), (1, [1])]


def check(bench: Bench) -> None:
    """Check attention, then the other kernels, those of every step first."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8, device=bench.device).isnan().all()
    check_attention(bench)
    if bench.cuda:
        check_plain_packing(bench)
    check_logprob(bench)
    check_small(bench)
    check_quantized(bench)
    check_kl(bench)
    check_experts(bench)


def compare(bench: Bench, name: str, kernel: Callable, *inputs: Tensor, twin=None) -> None:
    """Record the errors of outputs and gradients in every dtype.

    `twin` is the kernel's own function by default, which takes the plain path for float64.
    """
    for dtype in [torch.bfloat16, torch.float16, torch.float32] if bench.cuda else [torch.float32]:
        if "attention" in name and dtype == torch.float32 and inputs[0].shape[2] > 128:
            continue  # there is no kernel
        bench.attempt(f"{name} {str(dtype)[6:]}", errors, kernel, twin or kernel, inputs, dtype)


def errors(kernel: Callable, twin: Callable, inputs: tuple[Tensor, ...], dtype) -> dict:
    """Compare a kernel in `dtype` with its twin in float64: outputs, then gradients."""
    leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    assert fused(leaves[0]), "the kernel does not run here"
    ours, wanted = kernel(*leaves), twin(*exact)
    ours, wanted = (x if isinstance(x, tuple) else (x,) for x in (ours, wanted))
    slopes = [torch.randn_like(x) for x in ours]
    ours = [*ours, *torch.autograd.grad(ours, leaves, slopes)]
    wanted = [*wanted, *torch.autograd.grad(wanted, exact, [s.double() for s in slopes])]
    sizes = [y.detach().abs().max().clamp(min=1) for y in wanted]
    gaps = [(x.detach().double() - y.detach()).abs().max() for x, y in zip(ours, wanted)]
    relative = [float(gap / size) for gap, size in zip(gaps, sizes)]
    return {
        "ok": all(error < LIMITS[dtype] for error in relative),
        "errors": [float(f"{error:.1e}") for error in relative],
    }


def attention_cases(tiny: bool) -> list[tuple[Spans, int, int, int, int]]:
    """List trees, query heads, key/value heads, head size and window."""
    cases = [(ODD, 2, 1, 32, 0), (ODD, 2, 2, 40, 13)]
    if not tiny:
        for size in (32, 64, 80, 128, 256):
            cases += [(WIDE, 8, 2, size, window) for window in (0, 100)]
        cases.append(([(0, [1024]), (300, [724])], 4, 4, 128, 0))
        cases.append(([(3000, [500, 600])] * 2, 32, 8, 128, 0))
    return cases


def check_attention(bench: Bench) -> None:
    """Check attention over trees, for all queries and for one rank's third of them."""
    for spans, heads, kv_heads, size, window in attention_cases(bench.tiny):
        layout = TreeLayout.from_spans(spans, bench.device)
        total = len(layout.kv_end)
        q, k, v = (
            bench.randn(total, h, size, dtype=torch.float32) for h in (heads, kv_heads, kv_heads)
        )
        name = f"attention T{total} H{heads} G{kv_heads} E{size} window {window}"
        compare_attention(bench, name, layout, window, q, k, v)
        if window:
            compare_attention(bench, f"{name} capped", layout, window, q, k, v, cap=2.0)
        if bench.pretended:
            continue  # autograd fills gradients of unused rows with zeros of the host
        third = share_rows(spans, 3)[1]
        name += ", a third of the queries"
        compare_attention(bench, name, layout.shard(third), window, q[third], k, v)


def compare_attention(
    bench: Bench, name: str, layout: TreeLayout, window: int, *qkv, cap: float = 0.0
) -> None:
    """Compare the kernels themselves, not what the dispatch would take, with the plain twin."""
    kernel = partial(tree_attention_fused, layout=layout, window=window, cap=cap)
    twin = partial(tree_attention, layout=layout, window=window, cap=cap)
    compare(bench, name, kernel, *qkv, twin=twin)


def check_plain_packing(bench: Bench) -> None:
    """Check what the dispatch takes for plain sequences: torch's varlen_attn, if there is one."""
    layout = TreeLayout.from_spans(PLAIN, bench.device)
    q, k, v = (bench.randn(len(layout.kv_end), h, 128, dtype=torch.float32) for h in (8, 2, 2))
    torch.use_deterministic_algorithms(False)  # under them the dispatch never takes varlen_attn
    dispatched = partial(tree_attention, layout=layout)
    name = "attention by dispatch, plain packing bfloat16"
    bench.attempt(name, errors, dispatched, dispatched, (q, k, v), torch.bfloat16)
    torch.use_deterministic_algorithms(True, warn_only=True)


def check_logprob(bench: Bench) -> None:
    """Check the log-prob of a vocabulary of odd size, with and without entropy."""
    rows, width, vocab = (9, 32, 300) if bench.tiny else (777, 1024, 33001)
    hidden = bench.randn(rows, width, dtype=torch.float32)
    weight = bench.randn(vocab, width, dtype=torch.float32) / 32
    target = torch.randint(0, vocab, (rows,), device=bench.device)
    for entropy, cap in ((False, 0.0), (True, 0.0), (True, 3.0)):

        def logprob(h, w, entropy=entropy, cap=cap):
            return linear_logprob(h, w, target, 0.8, entropy, cap=cap)

        name = f"logprob V{vocab} entropy {entropy}{' capped' * (cap > 0)}"
        compare(bench, name, logprob, hidden, weight)


def check_small(bench: Bench) -> None:
    """Check RMSNorm, rotary embedding and SwiGLU."""
    rows, width = (9, 32) if bench.tiny else (777, 1024)
    x = bench.randn(rows, width, dtype=torch.float32)
    weight = torch.rand(width, device=bench.device) + 0.5
    heads = bench.randn(rows, 5, 64, dtype=torch.float32)
    angle = torch.rand(rows, 24, device=bench.device) * 9
    cos, sin = angle.cos(), angle.sin()

    def exact_rope(x):
        return rope(x, cos.double(), sin.double())

    compare(bench, "rms_norm", lambda x, w: rms_norm(x, w, 1e-5), x, weight)
    compare(bench, "add_rms_norm", lambda *x: add_rms_norm(*x, 1e-5), x, x.flip(0), weight)
    compare(bench, "rope", lambda x: rope(x, cos, sin), heads, twin=exact_rope)
    compare(bench, "swiglu", swiglu, x, x.flip(0))


def check_experts(bench: Bench) -> None:
    """Check the MLPs of experts, for few rows of each and for many; one has none."""
    width, hidden = (32, 48) if bench.tiny else (1024, 1408)
    for counts in ((3, 0, 5), (9, 1, 0, 12)) if bench.tiny else ((9, 0, 1, 16), (700, 0, 133, 1)):
        n = len(counts)
        x = bench.randn(sum(counts), width, dtype=torch.float32)
        shapes = [(hidden, width)] * 2 * n + [(width, hidden)] * n
        weights = [bench.randn(*shape, dtype=torch.float32) / shape[1] ** 0.5 for shape in shapes]

        def mlp(x, *w, counts=counts, n=n):
            return grouped_mlp(x, counts, w[:n], w[n : 2 * n], w[2 * n :])

        compare(bench, f"experts {counts}", mlp, x, *weights)


def check_quantized(bench: Bench) -> None:
    """Check the linear over quantised weights, for few tokens and for many."""
    outputs, width = (80, 96) if bench.tiny else (1100, 1056)
    weight = bench.randn(outputs, width, dtype=torch.float32)
    for name in FORMATS:
        q = quantize(weight, name)
        for tokens in (9,) if bench.tiny else (9, 50, 777):
            x = bench.randn(tokens, width, dtype=torch.float32)
            compare(bench, f"quantized {name} T{tokens}", lambda x, q=q: quantized_linear(x, q), x)


def check_kl(bench: Bench) -> None:
    """Check the divergences of a student and a teacher over one vocabulary."""
    rows, width, vocab = (9, 32, 300) if bench.tiny else (777, 1024, 33001)
    hidden = bench.randn(rows, width, dtype=torch.float32)
    weight = bench.randn(vocab, width, dtype=torch.float32) / 32
    # The teacher's numbers are those of bfloat16, so that every dtype has the same.
    teacher = (hidden + bench.randn(rows, width)).bfloat16()
    teacher_weight = weight.flip(1).bfloat16()
    for name in DIVERGENCES[:3:2] if bench.tiny else DIVERGENCES:

        def divergence(h, w, name=name):
            return linear_kl(h, w, teacher.to(h.dtype), teacher_weight.to(h.dtype), name, 0.3)

        compare(bench, f"kl {name}", divergence, hidden, weight)
