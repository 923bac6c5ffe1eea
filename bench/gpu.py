"""What the kernels are worth on this machine's GPU: right first, then fast, then whole training steps.

    python bench/gpu.py                                  everything, within 8 minutes; bench/results/<GPU>.json
    python bench/gpu.py --parts check attention          some parts
    python bench/gpu.py --device cpu --tiny              does this file work? seconds, in Triton's interpreter

Needs torch and triton; what else is importable (Liger, TRL) is compared with. Every part runs in a process of its own,
so a crash or a hang costs that part alone; rows are written as they come. Times are medians of CUDA events around
single calls with a cold L2 (TRL's steps: a clock read after synchronizing). Shares are of what a plain matmul and a
plain copy reach here, measured first; that of a training step is its MFU by the same yardstick, real tokens only.

Letters: T tokens, H query heads, G key/value heads, E head size, M scored tokens, D width, V vocabulary.
"""

# ruff: noqa: B023  (closures over loop variables are called before the loop goes on)
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from layout import host_layout
from model import parameter_count

ROOT = Path(__file__).resolve().parents[1]
PARTS = {  # seconds at most
    "ceilings": 40, "check": 100, "attention": 120, "logprob": 70, "small": 50, "steps": 150, "trl": 150,
}  # fmt: skip
MODELS = {
    "1B": dict(
        vocab=128256, width=2048, layers=16, heads=32, kv_heads=8, head_size=64, ffn=8192, tied=True
    ),
    "7B": dict(vocab=32000, width=4096, layers=32, heads=32, kv_heads=8, head_size=128, ffn=14336),
    "tiny": dict(vocab=300, width=64, layers=2, heads=4, kv_heads=2, head_size=16, ffn=96),
}


# ---- measuring -------------------------------------------------------------------------------------------------------


class Bench:
    """One part's surroundings: device, sizes, clock and where rows go."""

    def __init__(self, args: argparse.Namespace):
        import torch

        self.torch, self.tiny, self.out = torch, args.tiny, Path(args.rows)
        self.device = torch.device(args.device)
        self.dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
        self.deadline = time.monotonic() + args.seconds
        self.flush = (
            torch.empty(1 << 28, dtype=torch.int8, device=self.device)
            if args.device == "cuda"
            else None
        )
        torch.manual_seed(0)

    def row(self, part: str, name: str, **values) -> None:
        """Writes down a result at once, with its share of the ceiling measured before."""
        for key in [k for k in values if k.endswith(("tflops", "gbs")) and part != "ceilings"]:
            unit = "tflops" if key.endswith("tflops") else "gbs"
            if ceiling := os.environ.get(f"BENCH_{unit.upper()}"):
                values[key.replace(unit, "share")] = values[key] / float(ceiling)
        with open(self.out, "a") as file:
            file.write(json.dumps({"part": part, "name": name, **values}) + "\n")
        print(
            f"{part:10} {name:58} " + "  ".join(f"{k} {brief(v)}" for k, v in values.items()),
            flush=True,
        )

    def attempt(self, part: str, name: str, work: Callable[[], dict]) -> dict:
        """Runs one measurement; its failure is a row, not the end."""
        if time.monotonic() > self.deadline:
            self.row(part, name, skipped="no time left")
            return {}
        try:
            values = work()
            self.row(part, name, **values)
            return values
        except Exception as error:  # noqa: BLE001
            self.row(part, name, error=f"{type(error).__name__}: {str(error)[:300]}")
            if self.device.type == "cuda":
                self.torch.cuda.empty_cache()
            return {}

    def seconds(self, work: Callable[[], object], least: int = 5, budget: float = 1.5) -> float:
        """Median time of a call."""
        torch, times = self.torch, []
        for _ in range(1 if self.tiny else 2):
            work()
        end = time.monotonic() + (0.01 if self.tiny else budget)
        while len(times) < (1 if self.tiny else least) or (
            time.monotonic() < end and len(times) < 100
        ):
            if self.device.type == "cuda":
                self.flush.zero_()
                start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                work()
                stop.record()
                stop.synchronize()
                times.append(start.elapsed_time(stop) / 1000)
            else:
                begin = time.perf_counter()
                work()
                times.append(time.perf_counter() - begin)
        return statistics.median(times)

    def randn(self, *shape: int, dtype=None):
        return self.torch.randn(*shape, device=self.device).to(dtype or self.dtype)


def brief(value) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def layout_of(bench: Bench, spans: list):
    """TreeLayout of (prompt, [responses]) on the device, and how many pairs of tokens it makes visible."""
    from kernels import attention

    kv_end, positions = (bench.torch.from_numpy(x) for x in host_layout(spans))
    pairs = sum(
        p * (p + 1) // 2 + sum(n * p + n * (n + 1) // 2 for n in sizes) for p, sizes in spans
    )
    layout = attention.TreeLayout(spans, kv_end.int().to(bench.device), positions.to(bench.device))
    return layout, pairs


# ---- parts -----------------------------------------------------------------------------------------------------------


def check(bench: Bench) -> None:
    """Every kernel against its plain twin in float64, on fresh inputs, with all fresh memory full of NaN."""
    torch = bench.torch
    from kernels.attention import tree_attention, tree_attention_fused
    from kernels.device import fused
    from kernels.logprob import linear_logprob
    from kernels.rmsnorm import add_rms_norm, rms_norm
    from kernels.rope import rope
    from kernels.swiglu import swiglu
    from layout import share_rows

    # torch.empty gives NaN in this mode: what a kernel forgets to write shows.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(8, device=bench.device).isnan().all()

    def compare(name: str, ours: Callable, twin: Callable, *inputs, dtype) -> None:
        def work() -> dict:
            leaves = [x.detach().to(dtype).clone().requires_grad_() for x in inputs]
            exact = [x.detach().double().requires_grad_() for x in leaves]
            assert fused(leaves[0]), "the kernel does not run here"
            a, b = ours(*leaves), twin(*exact)
            a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
            slopes = [torch.randn_like(x) for x in a]
            a = [*a, *torch.autograd.grad(a, leaves, slopes)]
            b = [*b, *torch.autograd.grad(b, exact, [s.double() for s in slopes])]
            pairs = [(x.detach().double(), y.detach()) for x, y in zip(a, b)]
            errors = [float((x - y).abs().max() / y.abs().max().clamp(min=1)) for x, y in pairs]
            limit = 1e-5 if dtype == torch.float32 else 2e-2
            return {
                "ok": all(e < limit for e in errors),
                "errors": [float(f"{e:.1e}") for e in errors],
            }

        bench.attempt("check", f"{name} {str(dtype)[6:]}", work)

    odd = [(37, [20, 31]), (1, [1, 1, 9]), (0, [23]), (5, []), (70, [3, 1])] + [(1, [])] * 5
    wide = [(400, [111, 90, 130, 70, 100, 120, 80, 60, 1, 50, 140, 30, 90, 20, 60, 70]), (9, [4])]
    cases = [(odd, 2, 1, 32, 0), (odd, 2, 2, 40, 13)]
    if not bench.tiny:
        cases += [
            (wide, 8, 2, size, window) for size in (32, 64, 80, 128, 256) for window in (0, 100)
        ]
        cases += [
            ([(0, [1024]), (300, [724])], 4, 4, 128, 0),
            ([(3000, [500, 600])] * 2, 32, 8, 128, 0),
        ]
    types = (
        [torch.float32]
        if bench.device.type == "cpu"
        else [torch.bfloat16, torch.float16, torch.float32]
    )
    for spans, heads, kv_heads, size, window in cases:
        layout, _ = layout_of(bench, spans)
        total = len(layout.kv_end)
        q, k, v = (
            torch.randn(total, h, size, device=bench.device) for h in (heads, kv_heads, kv_heads)
        )
        third = share_rows(spans, 3)[1]
        for dtype in types:
            if dtype == torch.float32 and size > 128:
                continue
            name = f"attention T{total} H{heads} G{kv_heads} E{size} window {window}"
            for share, at, own in (
                ("", layout, q),
                (", a third of the queries", layout.shard(third), q[third]),
            ):
                compare(
                    name + share, lambda *x, at=at, w=window: tree_attention_fused(*x, at, w),
                    lambda *x, at=at, w=window: tree_attention(*x, at, w), own, k, v, dtype=dtype,
                )  # fmt: skip
    if bench.device.type == "cuda":
        plain = [(0, [700]), (300, [724]), (1, [1])]
        layout, _ = layout_of(bench, plain)
        q, k, v = (torch.randn(len(layout.kv_end), h, 128, device=bench.device) for h in (8, 2, 2))
        torch.use_deterministic_algorithms(False)  # else plain packing is not given to varlen_attn
        compare(
            "attention by dispatch, plain packing", lambda *x: tree_attention(*x, layout),
            lambda *x: tree_attention(*x, layout), q, k, v, dtype=torch.bfloat16,
        )  # fmt: skip
        torch.use_deterministic_algorithms(True, warn_only=True)
    rows, width, vocab = (9, 32, 300) if bench.tiny else (777, 1024, 33001)
    hidden, weight = (
        torch.randn(rows, width, device=bench.device),
        torch.randn(vocab, width, device=bench.device) / 32,
    )
    target = torch.randint(0, vocab, (rows,), device=bench.device)
    x, gain = (
        torch.randn(rows, width, device=bench.device),
        torch.rand(width, device=bench.device) + 0.5,
    )
    heads = torch.randn(rows, 5, 64, device=bench.device)
    angle = torch.rand(rows, 24, device=bench.device) * 9
    for dtype in types:
        for entropy in (False, True):

            def logprob(h, w, entropy=entropy):
                return linear_logprob(h, w, target, 0.8, entropy)

            compare(
                f"logprob V{vocab} entropy {entropy}", logprob, logprob, hidden, weight, dtype=dtype
            )
        norm = lambda x, w: rms_norm(x, w, 1e-5)  # noqa: E731
        compare("rms_norm", norm, norm, x, gain, dtype=dtype)
        both = lambda x, m, w: add_rms_norm(x, m, w, 1e-5)  # noqa: E731
        compare("add_rms_norm", both, both, x, x.flip(0), gain, dtype=dtype)
        turn = lambda x: rope(x, angle.cos(), angle.sin())  # noqa: E731
        exact = lambda x: rope(x, angle.cos().double(), angle.sin().double())  # noqa: E731
        compare("rope", turn, exact, heads, dtype=dtype)
        compare("swiglu", swiglu, swiglu, x, x.flip(0), dtype=dtype)


def ceilings(bench: Bench) -> None:
    """What a plain matmul and a plain copy reach: the yardstick of all shares."""
    n = 128 if bench.tiny else 8192
    a, b = bench.randn(n, n), bench.randn(n, n)
    big = bench.randn(1 << (16 if bench.tiny else 29))
    bench.attempt(
        "ceilings",
        f"matmul {n}",
        lambda: {"tflops": 2 * n**3 / bench.seconds(lambda: a @ b) / 1e12},
    )
    copied = bench.torch.empty_like(big)
    moved = 2 * big.numel() * big.element_size()
    bench.attempt(
        "ceilings", "copy", lambda: {"gbs": moved / bench.seconds(lambda: copied.copy_(big)) / 1e9}
    )


def attention(bench: Bench) -> None:
    """Forward and backward against what else could compute the same."""
    torch = bench.torch
    import torch.nn.functional as F

    from kernels.attention import _varlen, _varlen_serves, tree_attention_fused

    layouts = {
        "8 sequences of 1024": [(0, [1024])] * 8, "1 sequence of 8192": [(0, [8192])],
        "8 pairs, prompt 512, answers 256": [(512, [256, 256])] * 8,
        "groups of 16, prompt 1024, answers 192": [(1024, [192] * 16)] * 2,
    }  # fmt: skip
    shapes = [(32, 8, 128), (32, 32, 128), (32, 8, 64)]
    if bench.tiny:
        layouts, shapes = {"2 sequences": [(0, [20])] * 2, "a tree": [(20, [10, 9])]}, [(2, 1, 32)]
    for heads, kv_heads, size in shapes:
        for layout_name, spans in layouts.items():
            layout, pairs = layout_of(bench, spans)
            total = len(layout.kv_end)
            q, k, v = (
                bench.randn(total, h, size).requires_grad_() for h in (heads, kv_heads, kv_heads)
            )
            slope = bench.randn(total, heads, size)

            def measure(
                function: Callable, q=q, k=k, v=v, slope=slope, flop=4 * pairs * heads * size
            ) -> dict:
                out = function(q, k, v)
                forward = bench.seconds(lambda: function(q, k, v))
                grad = torch.autograd.grad
                backward = bench.seconds(lambda: grad(out, (q, k, v), slope, retain_graph=True))
                return {
                    "forward_ms": forward * 1e3, "forward_tflops": flop / forward / 1e12, "backward_ms": backward * 1e3,
                    "backward_tflops": 2.5 * flop / backward / 1e12,
                }  # fmt: skip

            name = f"H{heads} G{kv_heads} E{size}, {layout_name}"
            bench.attempt(
                "attention", f"{name}: plumb",
                lambda at=layout: measure(lambda q, k, v: tree_attention_fused(q, k, v, at)),
            )  # fmt: skip
            segments = layout.segments()
            if segments and _varlen_serves(q, k, 0):
                bench.attempt(
                    "attention", f"{name}: varlen_attn",
                    lambda s=segments: measure(lambda q, k, v: _varlen(q, k, v, *s)),
                )  # fmt: skip
            if len(spans) == 1 and segments:

                def sdpa(q, k, v):
                    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
                    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[
                        0
                    ].transpose(0, 1)

                bench.attempt("attention", f"{name}: SDPA", lambda: measure(sdpa))  # noqa: B023
            if not segments and (heads, size) == (32, 128) and bench.device.type == "cuda":

                def flex(at=layout, total=total):
                    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

                    end, compiled = at.kv_end, torch.compile(flex_attention)

                    def visible(b, h, i, j):
                        return (j <= i) & (i < end[j])

                    mask = create_block_mask(
                        visible, None, None, total, total, device=str(bench.device)
                    )

                    def attend(q, k, v):
                        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
                        return compiled(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(
                            0, 1
                        )

                    return measure(attend)  # noqa: B023

                bench.attempt("attention", f"{name}: flex_attention", flex)


def logprob(bench: Bench) -> None:
    """Forward and backward against the matmuls alone, cross_entropy on whole logits, and Liger."""
    torch = bench.torch
    import torch.nn.functional as F

    from kernels.logprob import linear_logprob

    for rows, width, vocab in (
        [(16, 32, 300)] if bench.tiny else [(8192, 4096, 32000), (8192, 2048, 128256)]
    ):
        hidden, weight = (
            bench.randn(rows, width).requires_grad_(),
            (bench.randn(vocab, width) / 50).requires_grad_(),
        )
        target = torch.randint(0, vocab, (rows,), device=bench.device)
        name = f"M{rows} D{width} V{vocab}"

        def measure(function: Callable, h=hidden, w=weight) -> dict:
            if bench.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
            spent = bench.seconds(lambda: torch.autograd.grad(function(h, w).sum(), (h, w)))
            peak = torch.cuda.max_memory_allocated() - held if bench.device.type == "cuda" else 0
            return {"ms": spent * 1e3, "extra_gb": peak / 2**30}

        def floor(h=hidden, w=weight) -> dict:
            h, w = h.detach(), w.detach()
            z = h @ w.t()
            return {
                "ms": 1e3
                * (bench.seconds(lambda: h @ w.t()) + bench.seconds(lambda: (z @ w, z.t() @ h)))
            }

        bench.attempt("logprob", f"{name}: its three matmuls", floor)
        bench.attempt(
            "logprob", f"{name}: plumb", lambda t=target: measure(lambda h, w: linear_logprob(h, w, t))
        )  # fmt: skip
        entropy = lambda t=target: measure(lambda h, w: sum(linear_logprob(h, w, t, 1.0, True)))  # noqa: E731
        bench.attempt("logprob", f"{name}: plumb with entropy", entropy)
        whole = lambda t=target: measure(
            lambda h, w: -F.cross_entropy((h @ w.t()).float(), t, reduction="none")
        )  # noqa: E731
        bench.attempt("logprob", f"{name}: cross_entropy", whole)

        def liger(t=target) -> dict:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss()
            return measure(lambda h, w: loss(w, h, t))  # noqa: B023

        bench.attempt("logprob", f"{name}: Liger (mean only)", liger)


def small(bench: Bench) -> None:
    """Memory-bound ones, in GB/s of what has to move, kernel against twin."""
    torch = bench.torch
    from kernels import rmsnorm, rope, swiglu

    tokens, width, ffn, heads = (8, 32, 48, 2) if bench.tiny else (8192, 4096, 14336, 32)
    x, more = (
        bench.randn(tokens, width).requires_grad_(),
        bench.randn(tokens, width).requires_grad_(),
    )
    gain = bench.randn(width).requires_grad_()
    gate, up = bench.randn(tokens, ffn).requires_grad_(), bench.randn(tokens, ffn).requires_grad_()
    q = bench.randn(tokens, heads, width // heads).requires_grad_()
    angle = torch.rand(tokens, width // heads // 2, device=bench.device)
    cos, sin, size = angle.cos(), angle.sin(), x.element_size()
    cases = {  # tensors that have to be read or written, forward and backward together
        "add_rms_norm": (
            lambda: sum(rmsnorm.add_rms_norm(x, more, gain, 1e-5)),
            (x, more, gain),
            8 * x.numel(),
        ),
        "rope": (lambda: rope.rope(q, cos, sin), (q,), 4 * q.numel()),
        "swiglu": (lambda: swiglu.swiglu(gate, up), (gate, up), 8 * gate.numel()),
    }
    for name, (function, leaves, moved) in cases.items():
        for label in ("plumb", "twin"):

            def work(function=function, leaves=leaves, moved=moved, label=label) -> dict:
                modules, real = (rmsnorm, rope, swiglu), rmsnorm.fused
                for module in modules:
                    module.fused = real if label == "plumb" else lambda x: False
                try:
                    out = function()
                    slope = torch.randn_like(out)
                    forward = bench.seconds(function)
                    backward = bench.seconds(
                        lambda: torch.autograd.grad(out, leaves, slope, retain_graph=True)
                    )
                finally:
                    for module in modules:
                        module.fused = real
                gbs = moved * size / (forward + backward) / 1e9
                return {"forward_ms": forward * 1e3, "backward_ms": backward * 1e3, "gbs": gbs}

            bench.attempt("small", f"{name}: {label}", work)


def examples(bench: Bench, responses: int):
    """Token counts of one step's examples, like UltraFeedback's: prompts (n,), answers (n, responses)."""
    import numpy as np

    rng, count, scale = np.random.default_rng(0), 2 if bench.tiny else 32, 10 if bench.tiny else 1

    def lengths(n: int, median: int) -> np.ndarray:
        return np.clip(rng.lognormal(np.log(median // scale), 0.8, n).astype(int), 4, 512 // scale)

    return lengths(count, 160), lengths(count * responses, 280).reshape(count, responses)


def shapes(bench: Bench):
    """The Llama shapes to train, with as many layers as fit: (label, GPTConfig, whether activations are recomputed)."""
    from model import GPTConfig

    for shape in ["tiny"] if bench.tiny else ["1B", "7B"]:
        sizes = dict(MODELS[shape])
        label = shape
        if bench.device.type == "cuda":  # 18 bytes a weight, and room for activations
            room = bench.torch.cuda.mem_get_info()[1] - 14e9
            whole = sizes["layers"]
            while (
                sizes["layers"] > 1
                and 18 * parameter_count(GPTConfig(family="llama", **sizes)) > room
            ):
                sizes["layers"] -= 1
            label += (
                f" shape with {sizes['layers']} of {whole} layers"
                if sizes["layers"] < whole
                else ""
            )
        yield label, GPTConfig(family="llama", **sizes), shape == "7B"


def steps(bench: Bench) -> None:
    """Whole optimizer steps of random models on lengths like UltraFeedback's, prompts shared or not."""
    torch = bench.torch
    import numpy as np

    import losses
    from data.dataset import Dataset
    from data.trees import make_batch, micro_batches
    from model import GPT, GPTConfig
    from optimizer import AdamW

    pairs, budget = (2, 200) if bench.tiny else (32, 16384)

    def data_of(c: GPTConfig, responses: int) -> Dataset:
        rng, (prompts, answers) = np.random.default_rng(0), examples(bench, responses)
        sizes = [(int(p), [int(n) for n in row]) for p, row in zip(prompts, answers, strict=True)]
        total = [p + sum(row) for p, row in sizes]
        scored = np.concatenate([np.repeat([0, 1], [p, sum(row)]) for p, row in sizes]).astype(
            np.uint8
        )
        return Dataset(
            rng.integers(0, c.vocab, sum(total)).astype(np.int32), scored, np.cumsum([0, *total]),
            prompts.astype(np.int32), np.arange(0, pairs * responses + 1, responses),
            answers.ravel().astype(np.int32), {}, {}, "bench",
        )  # fmt: skip

    for label, c, recomputed in shapes(bench):
        try:
            with torch.device(bench.device):
                model = GPT(c).to(bench.dtype)
            for p in model.parameters():
                torch.nn.init.normal_(p, std=0.02) if p.dim() > 1 else None
            model.checkpoint_activations = recomputed
            optimizer = AdamW(model, (0.9, 0.95), 1e-8, 0.0)
        except Exception as error:  # noqa: BLE001
            bench.row("steps", label, error=f"{type(error).__name__}: {str(error)[:300]}")
            continue
        tasks = (("DPO", 2, True), ("DPO", 2, False), ("SFT", 1, True))
        for task, responses, shared in tasks[: 1 if bench.tiny else 3]:
            data = data_of(c, responses)
            bins = micro_batches(data.tree_lengths(shared), np.arange(pairs), budget)
            batches = [make_batch(data, items, shared) for items in bins]

            def step(task=task, batches=batches, model=model, optimizer=optimizer) -> None:
                for batch in batches:
                    batch = batch.to(bench.device)
                    sums = batch.sum_by_response(model.logps(model(batch), batch))
                    if task == "DPO":
                        chosen, rejected = sums.view(-1, 2).unbind(1)
                        loss = (
                            losses.sigmoid(
                                chosen - chosen.detach(), rejected - rejected.detach(), 0.1
                            ).sum()
                            / pairs
                        )
                    else:
                        loss = -sums.sum() / 1e4
                    loss.backward()
                optimizer.step(1e-7, 1.0)

            def work(step=step, batches=batches, model=model, c=c) -> dict:
                if bench.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                spent = bench.seconds(
                    step, least=3, budget=6
                )  # the first calls compile and warm up
                tokens = sum(len(b.tokens) for b in batches)
                scored = sum(len(b.target) for b in batches)
                seen = sum(b.context * len(b.tokens) for b in batches)
                head = c.vocab * c.width
                # Only scored tokens meet the head; recomputed activations do not count as work.
                flop = (
                    sum(len(b.tokens) * c.flops_per_token(b.context) for b in batches)
                    - 6 * (tokens - scored) * head
                )
                values = {
                    "seconds": spent, "examples_per_s": pairs / spent, "tokens_per_s": tokens / spent,
                    "tokens": tokens, "context": seen / tokens, "tflops": flop / spent / 1e12,
                }  # fmt: skip
                if bench.device.type == "cuda":
                    values["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
                return values

            how = "prompts shared" if shared else "prompts repeated"
            bench.attempt("steps", f"{label} {task}, {how if task == 'DPO' else 'packed'}", work)
        del model, optimizer
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def trl(bench: Bench) -> None:
    """The same examples on the same shapes by TRL's trainers at what is fair to them, and how much faster plumb is.

    Rows are sorted by length, micro-batches hold as many tokens as plumb's, collating is not timed, the reference is
    computed before. The weights are bf16 without the fp32 master that plumb keeps.
    """
    import gc
    from importlib.util import find_spec

    if missing := [name for name in ("trl", "transformers", "datasets") if not find_spec(name)]:
        return bench.row("trl", "TRL", skipped=f"not importable: {', '.join(missing)}")
    for label, c, recomputed in shapes(bench):
        for task in ("DPO", "SFT"):
            bench.attempt(
                "trl", f"{label} {task}, TRL", lambda: trl_steps(bench, task, label, c, recomputed)
            )
            gc.collect()  # a trainer and its model hold each other
            if bench.device.type == "cuda":
                bench.torch.cuda.empty_cache()


def trl_steps(bench: Bench, task: str, label: str, c, recomputed: bool) -> dict:
    """Median optimizer step of TRL's DPOTrainer or SFTTrainer on token ids."""
    torch, cuda = bench.torch, bench.device.type == "cuda"
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    import numpy as np
    from datasets import Dataset, disable_progress_bars
    from tokenizers import Tokenizer, models
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PreTrainedTokenizerFast,
        PrinterCallback,
        TrainerCallback,
    )
    from transformers.utils import is_flash_attn_2_available
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    disable_progress_bars()
    warm, least, budget, times = (1, 1, 0, []) if bench.tiny else (2, 3, 6, [])

    class Clock(TrainerCallback):
        def now(self) -> float:
            if cuda:
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_begin(self, args, state, control, **_):
            if cuda and len(times) == warm:
                torch.cuda.reset_peak_memory_stats()
            self.begin = self.now()

        def on_step_end(self, args, state, control, **_):
            times.append(self.now() - self.begin)
            done = len(times) >= warm + least and sum(times[warm:]) > budget
            control.should_training_stop = done or (
                len(times) > warm and time.monotonic() > bench.deadline
            )

    class OnTokens(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # token ids already; SFTTrainer sees that by itself

    prompts, answers = examples(bench, 2 if task == "DPO" else 1)
    order, rows = np.argsort(-prompts - answers.max(1)), []
    for sizes in np.column_stack([prompts, answers])[order].tolist():
        ids = [torch.randint(2, c.vocab, (n,)).tolist() for n in sizes]
        if task == "DPO":
            rows.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), ids, strict=True)))
        else:
            rows.append(
                {"input_ids": sum(ids, []), "completion_mask": [0] * sizes[0] + [1] * sizes[1]}
            )
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="</s>"))
    words = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")

    attention = "flash_attention_2" if cuda and is_flash_attn_2_available() else "sdpa"
    shape = dict(
        vocab_size=c.vocab, hidden_size=c.width, num_hidden_layers=c.layers, num_attention_heads=c.heads,
        num_key_value_heads=c.kv_heads, head_dim=c.head_size, intermediate_size=c.ffn, tie_word_embeddings=c.tied,
        attn_implementation=attention,
    )  # fmt: skip
    # TRL hashes all weights of the reference on the CPU. A small one does: it is outside the step.
    small = dict(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=64,
    )
    with torch.device(bench.device):
        model = LlamaForCausalLM(LlamaConfig(**shape)).to(bench.dtype)
        reference = LlamaForCausalLM(LlamaConfig(**shape | small | {"intermediate_size": 64})).to(
            bench.dtype
        )
    if model.num_parameters() != parameter_count(c):
        raise ValueError(
            f"transformers' model has {model.num_parameters()} weights, plumb's has {parameter_count(c)}"
        )
    micro = 1 if bench.tiny else 16 // answers.shape[1]  # sixteen sequences of at most 1024 tokens
    with tempfile.TemporaryDirectory() as folder:
        common = dict(
            output_dir=folder, per_device_train_batch_size=micro, gradient_accumulation_steps=len(rows) // micro,
            max_steps=100, max_length=None, train_sampling_strategy="sequential", gradient_checkpointing=recomputed,
            learning_rate=1e-7, bf16=cuda, use_cpu=not cuda, dataloader_pin_memory=cuda,
            logging_strategy="no", save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        more = dict(
            train_dataset=Dataset.from_list(rows), processing_class=words, callbacks=[Clock()]
        )
        if task == "DPO":
            config = DPOConfig(precompute_ref_log_probs=True, **common)
            trainer = OnTokens(model, reference, args=config, **more)
        else:
            config = SFTConfig(
                padding_free=attention != "sdpa", completion_only_loss=True, **common
            )
            trainer = SFTTrainer(model, args=config, **more)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    spent, tokens = (
        statistics.median(times[warm:]),
        int(prompts.sum()) * answers.shape[1] + int(answers.sum()),
    )
    values = {
        "seconds": spent,
        "examples_per_s": len(rows) / spent,
        "tokens_per_s": tokens / spent,
        "tokens": tokens,
    }
    if cuda:
        values["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30
    ours = f"{label} {task}, {'prompts shared' if task == 'DPO' else 'packed'}"
    for row in read_rows(bench.out):
        if row["name"] == ours and "seconds" in row:
            values["plumb_faster"] = spent / row["seconds"]
            if cuda:
                values["plumb_memory_share"] = row["peak_gb"] / values["peak_gb"]
    how = f"{attention}, {micro} rows x {len(rows) // micro}, {'' if recomputed else 'no '}checkpointing"
    return values | {"how": how + ", reference precomputed" * (task == "DPO")}


# ---- all of them -----------------------------------------------------------------------------------------------------


def run_part(args: argparse.Namespace) -> None:
    """One part, in this process."""
    sys.path.insert(0, str(ROOT))
    globals()[args.part](Bench(args))


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="smallest sizes: only to see that it runs"
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--minutes",
        type=float,
        default=8.0,
        help="all parts together; a part that is late is ended",
    )
    parser.add_argument(
        "--json", help="where to; default bench/results/<GPU>.json, nowhere with --tiny"
    )
    for hidden in ("--part", "--rows", "--seconds"):
        parser.add_argument(
            hidden, help=argparse.SUPPRESS, type=float if hidden == "--seconds" else str
        )
    args = parser.parse_args()
    if args.part:
        run_part(args)
        return 0

    environment = {
        "CUDA_VISIBLE_DEVICES": "0",
        **os.environ,
    }  # TRL refuses to see more than one GPU
    environment |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    if args.device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "PLUMB_KERNELS": "on"}
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        for part in args.parts:
            left = min(PARTS[part], end - time.monotonic())
            failed = "no time left" if left < 5 else ""
            if not failed:
                command = [
                    sys.executable,
                    __file__,
                    "--part",
                    part,
                    "--rows",
                    rows,
                    "--device",
                    args.device,
                ]
                command += ["--seconds", f"{0.8 * left:.0f}"] + ["--tiny"] * args.tiny
                try:
                    done = subprocess.run(list(map(str, command)), env=environment, timeout=left)
                    failed = f"ended with status {done.returncode}" if done.returncode else ""
                except subprocess.TimeoutExpired:
                    failed = f"ended after {left:.0f} s"
            if failed:
                with open(rows, "a") as file:
                    file.write(
                        json.dumps({"part": part, "name": "the whole part", "error": failed}) + "\n"
                    )
            for row in read_rows(rows):
                for unit in ("tflops", "gbs"):
                    if row["part"] == "ceilings" and unit in row:
                        environment[f"BENCH_{unit.upper()}"] = str(row[unit])
        found = read_rows(rows)

    import torch
    import triton

    gpu = (
        torch.cuda.get_device_name()
        if args.device == "cuda" and torch.cuda.is_available()
        else "cpu"
    )
    report = {
        "device": gpu,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "rows": found,
    }
    path = args.json or (
        None if args.tiny else ROOT / "bench" / "results" / f"{gpu.replace(' ', '_')}.json"
    )
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{gpu}, torch {torch.__version__}, triton {triton.__version__}")
    for row in found:
        values = {k: v for k, v in row.items() if k not in ("part", "name", "errors")}
        print(
            f"{row['part']:10} {row['name']:58} "
            + "  ".join(f"{k} {brief(v)}" for k, v in values.items())
        )
    wrong = [row["name"] for row in found if row.get("ok") is False]
    broken, peers = [], []
    for row in found:
        if "error" in row:  # another library's failure is not ours
            kind = peers if row["part"] == "trl" or "Liger" in row["name"] else broken
            kind.append(f"{row['part']}, {row['name']}")
    print("every checked kernel is right" if not wrong else f"WRONG: {'; '.join(wrong)}")
    print("every part ran" if not broken else f"failed: {'; '.join(broken)}")
    if peers:
        print(f"not compared with: {'; '.join(peers)}")
    return int(bool(wrong or (broken and args.tiny)))


if __name__ == "__main__":
    sys.exit(main())
