"""Law 8, first half: every kernel, forward and backward, against float64, in Triton's interpreter.

    TRITON_INTERPRET=1 PLUMB_KERNELS=on python -m pytest tests/unit/test_kernels.py    one by one

Attention, divergences and quantised weights have files of their own. The last test here starts all
of them in a process with the interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import dataset_of
from interpreter import EXACT, INTERPRETED, TOLERANCE, gradients, law, relative_error

from kernels import logprob, tiles
from kernels.linear import BLOCK, linear
from kernels.rmsnorm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu
from layout import TreeLayout

# ---- linear --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("outputs", [1, BLOCK - 1, BLOCK, 2 * BLOCK + 7])
def test_few_rows_of_a_linear(outputs: int, dtype):
    """Sums of products in float64, by every way of asking for them, bias and slices included.

    Without gradients, as in sampling, and with them.
    """
    torch.manual_seed(0)
    for rows in (0, 1, 2, 3, 4, 7, 15, 16, 64, 65, 129):
        wide = torch.randn(rows, 2 * 40, dtype=dtype)
        weight, bias = torch.randn(outputs, 40, dtype=dtype), torch.randn(outputs, dtype=dtype)
        for x, b in ((wide[:, :40].contiguous(), None), (wide[:, ::2], bias)):
            want = (x.double()[:, None] * weight.double()).sum(-1)
            want = want if b is None else want + b.double()
            with torch.no_grad():
                y = linear(x, weight, b)
            assert y.is_contiguous() and y.dtype == dtype and y.shape == (rows, outputs)
            step = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float64: 1e-13}[dtype]
            torch.testing.assert_close(y.double(), want, rtol=step, atol=10 * step)
            weight.requires_grad_()
            linear(x, weight, b).sum().backward()
            expected = x.double().sum(0).expand(outputs, -1)
            torch.testing.assert_close(weight.grad.double(), expected, rtol=step, atol=10 * step)
            weight = weight.detach()


# ---- linear + log-prob ---------------------------------------------------------------------------


@law
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    ("temperature", "entropy", "cap"),
    [(1.0, False, 0.0), (0.7, True, 0.0), (1.0, False, 1.5), (0.7, True, 1.5)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_softmax(dtype, temperature, entropy, cap, kept, monkeypatch):
    """Log-probs, entropies and both gradients equal log_softmax in float64, for chunks of odd width
    and slopes of both signs; two shards of the vocabulary, merged, give the same. A cap bends the
    logits."""
    monkeypatch.setattr(logprob, "GPU_CHUNK", 192)
    monkeypatch.setattr(logprob, "BLOCK", 128)
    monkeypatch.setattr(logprob, "GPU_KEEP_BYTES", 1 << 30 if kept else 0)
    torch.manual_seed(0)
    rows, width, vocab, split = 33, 48, 517, 259
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(vocab, width) / 8).to(dtype)
    target = torch.randint(0, vocab, (rows,))
    target[:4] = torch.tensor([0, split - 1, split, vocab - 1])
    slopes = (torch.randn(rows), torch.randn(rows))
    slopes[0][::3] = 0

    def run(function, hidden, weight):
        leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        out = function(*leaves)
        out = out if entropy else (out,)
        return [*out, *gradients(out, leaves, [s.to(o.dtype) for o, s in zip(out, slopes)])]

    def dense(h, w):
        z = h @ w.t()
        z = cap * torch.tanh(z / cap) if cap else z
        logp = (z / temperature).log_softmax(-1)
        own = logp.gather(1, target[:, None])[:, 0]
        return (own, -(logp.exp() * logp).sum(1)) if entropy else own

    def kernels(h, w, start=0, combine=None):
        return logprob.linear_logprob(h, w, target, temperature, entropy, start, combine, cap)

    wanted = run(dense, hidden.double(), weight.double())
    ours = run(kernels, hidden, weight)
    assert all(o.dtype == torch.float32 for o in ours[:-2])
    errors = [relative_error(a, b) for a, b in zip(ours, wanted, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors

    shards, partials = (slice(0, split), slice(split, vocab)), []
    for shard in shards:  # what two ranks would send each other
        kernels(hidden, weight[shard], shard.start, lambda p: partials.append(p) or p)
    whole = logprob.merge_partials(torch.stack(partials))
    d_hidden, d_weight = 0, []
    for shard in shards:

        def on_one_rank(h, w, start=shard.start):
            return kernels(h, w, start, lambda p: whole)

        *out, d_h, d_w = run(on_one_rank, hidden, weight[shard])
        assert max(relative_error(a, b) for a, b in zip(out, wanted)) < TOLERANCE[dtype]
        d_hidden = d_hidden + d_h
        d_weight.append(d_w)
    assert relative_error(d_hidden, wanted[-2]) < TOLERANCE[dtype]
    assert relative_error(torch.cat(d_weight), wanted[-1]) < TOLERANCE[dtype]


# ---- norms, rotary embedding, SwiGLU -------------------------------------------------------------


def compare(ours, formula, inputs, dtype) -> None:
    """Assert that outputs and gradients of a kernel in `dtype` are its formula's in float64."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    a, b = ours(*leaves), formula(*exact)
    a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
    slopes = [torch.randn(x.shape).to(dtype) for x in a]
    results = [*a, *gradients(a, leaves, slopes)]
    wanted = [*b, *gradients(b, exact, [s.double() for s in slopes])]
    assert all(x.dtype == dtype for x in results)
    errors = [relative_error(x, y) for x, y in zip(results, wanted, strict=True)]
    assert max(errors) < TOLERANCE[dtype], errors


# The next two hold for the twins, whose backward is written out, and in the interpreter.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 96), (3, 5, 16), (1, 2500)])
def test_rms_norms(shape, dtype):
    """x / √(mean(x²) + eps) · weight, alone and of a sum, with gradients into both outputs."""
    torch.manual_seed(0)
    x, more, weight = torch.randn(shape), torch.randn(shape), 1 + 0.3 * torch.randn(shape[-1])

    def norm(x, w):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w

    def add_norm(x, more, w):
        return x + more, norm(x + more, w)

    compare(lambda x, w: rms_norm(x, w, 1e-5), norm, (x, weight), dtype)
    compare(lambda x, m, w: add_rms_norm(x, m, w, 1e-5), add_norm, (x, more, weight), dtype)
    # Gemma's weight is kept less 1, and 1 + w in fp32 whatever x is.
    less_one = weight - 1

    def norm_1p(x, w):
        return norm(x, w + 1)

    exact = torch.promote_types(dtype, torch.float32)
    compare(lambda x, w: rms_norm(x, w.to(exact) + 1, 1e-5), norm_1p, (x, less_one), dtype)


@law
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size", "rotated"), [(3, 32, 32), (40, 16, 16), (2, 40, 10)])
def test_rope_rotates_pairs(heads, size, rotated, dtype):
    """Pair (i, i + R/2) is rotated by its angle; the rest of a head (GPT-NeoX) stays."""
    torch.manual_seed(0)
    angle = torch.rand(29, rotated // 2) * 9
    cos, sin = angle.cos(), angle.sin()

    def rotate(x):
        z = torch.complex(x[..., : rotated // 2], x[..., rotated // 2 : rotated])
        z = z * torch.complex(cos.double(), sin.double())[:, None]
        return torch.cat((z.real, z.imag, x[..., rotated:]), -1)

    compare(lambda x: rope(x, cos, sin), rotate, (torch.randn(29, heads, size),), dtype)
    strided = torch.randn(29, heads + 1, size)[:, 1:]
    assert relative_error(rope(strided, cos, sin), rotate(strided.double())) < EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_swiglu(dtype):
    """silu(gate) · up, for one whole block and a part of one."""
    torch.manual_seed(0)
    inputs = [3 * torch.randn(7, 311), torch.randn(7, 311)]
    compare(swiglu, lambda gate, up: gate * torch.sigmoid(gate) * up, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_is_kept_for_backward(dtype):
    """Both keep their inputs, which the linears before them made, and a norm a number a row."""
    x, y = (torch.randn(6, 40, dtype=dtype, requires_grad=True) for _ in range(2))
    weight = torch.ones(40, dtype=dtype, requires_grad=True)
    inputs = {tensor.data_ptr() for tensor in (x, y, weight)}
    kept: dict[int, int] = {}  # address -> numbers, of what is no input

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in inputs:
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = [swiglu(x, y)]  # held, so that no address is given twice
        assert not kept
        results.append(rms_norm(x, weight, 1e-5))
    assert list(kept.values()) == [6]


# ---- whole models --------------------------------------------------------------------------------


def tiny_model(family: str):
    import model

    sizes = {"vocab": 150, "width": 48, "layers": 2, "heads": 4, "kv_heads": 2}
    sizes |= {"head_size": 16, "ffn": 80}
    if family == "llama":
        sizes |= {"windows": (0, 9)}
    elif family == "qwen3":
        sizes |= {"qk_norm": "head", "qkv_bias": True, "tied": True}
    elif family == "gemma3_text":
        sizes |= {"norm": "rms1p", "norms": "both", "mlp": "geglu", "qk_norm": "head"}
        sizes |= {"embedding_scale": 7.0, "attention_scale": 0.2, "windows": (9, 0)}
        sizes |= {"local_theta": 100.0, "tied": True}
    elif family == "gemma2":
        sizes |= {"norm": "rms1p", "norms": "both", "mlp": "geglu", "attention_scale": 0.2}
        sizes |= {"embedding_scale": 7.0, "windows": (9, 0), "tied": True}
        sizes |= {"score_cap": 2.0, "logit_cap": 3.0}
    else:
        sizes |= {"norm": "layer", "mlp": "gelu", "rope_size": 4}
        sizes |= {"parallel_residual": True, "kv_heads": 4}
    gpt = model.GPT(model.GPTConfig(family=family, **sizes))
    gpt.init_weights(0, std=0.2)
    return gpt


def tiny_batch(responses: int):
    from data.trees import make_batch

    rng = np.random.default_rng(0)
    sizes = [(11, [5, 9, 3, 1]), (1, [4, 2, 2, 6]), (30, [7, 1, 12, 3])]
    rows = [
        ([*rng.integers(0, 150, p)], [[*rng.integers(0, 150, n)] for n in ns[:responses]])
        for p, ns in sizes
    ]
    return make_batch(dataset_of(rows), [0, 1, 2])


def loss_of(gpt, batch) -> torch.Tensor:
    """Compute SFT's loss for one response a tree, DPO's for pairs, else weighted log-probs."""
    import losses

    sums = batch.sum_by_response(gpt.logps(gpt(batch), batch))
    per_tree = len(sums) // len(batch.spans)
    if per_tree == 1:
        return -sums.sum() / batch.lengths.sum()
    if per_tree == 2:
        chosen, rejected = sums.view(-1, 2).unbind(1)
        return losses.sigmoid(chosen - 0.3, rejected + 0.2, 0.1).mean()
    return (sums * torch.linspace(-1, 2, len(sums))).sum() / len(sums)


@law
@pytest.mark.parametrize(
    ("family", "responses"),
    [
        ("llama", 1),
        ("llama", 2),
        ("gpt_neox", 2),
        ("qwen3", 4),
        ("gemma2", 2),
        ("gemma3_text", 2),
        ("qwen2_moe", 2),
    ],
)
def test_a_model_computes_the_same_with_kernels(family: str, responses: int):
    """Loss and every gradient of a model are those of the plain twins in float64."""
    gpt, batch = tiny_model(family), tiny_batch(responses)
    loss = loss_of(gpt, batch)
    ours = [loss, *torch.autograd.grad(loss, list(gpt.parameters()))]
    gpt = gpt.double()  # float64 takes the twins
    loss = loss_of(gpt, batch)
    wanted = [loss, *torch.autograd.grad(loss, list(gpt.parameters()))]
    assert max(float(w.abs().max()) for w in wanted[1:]) > 0.01
    for a, b in zip(ours, wanted, strict=True):
        assert (a - b).abs().max() < 5e-6 * max(1, b.abs().max())


@law
def test_kernels_are_operators_that_torch_compile_takes():
    """Schemas, fake implementations and autograd formulas hold (opcheck), and a compiled block
    gives the same bits."""
    from torch.library import opcheck

    ops = torch.ops.plumb
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    layout = TreeLayout.from_spans([(9, [5, 3]), (0, [4])])
    q, k, v = (torch.randn(21, h, 32, requires_grad=True) for h in (2, 1, 1))
    x, w = torch.randn(6, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    angle = torch.rand(21, 16)
    z, target = torch.randn(6, 40), torch.randint(0, 40, (6,))
    for op, inputs in (
        (ops.tree_attention, (q, k, v, tiles.work_lists(layout, q, 1, 0), 0, 0.0)),
        (ops.tree_attention, (q, k, v, tiles.work_lists(layout, q, 1, 4, True), 4, 2.0)),
        (ops.add_rms_norm, (x, x.detach().clone().requires_grad_(), w, 1e-5)),
        (ops.add_rms_norm, (x, None, w, 1e-5)),
        (ops.swiglu, (x, x.detach().clone())),
        (ops.rope, (q, angle.cos(), angle.sin(), False)),
        (ops.fold_logits, (z, target, *torch.zeros(4, 6), 0, 1.0, 0.0)),
        (ops.logit_slopes, (z, target, *torch.zeros(4, 6), 0, 1.0, 2.0, torch.bfloat16)),
    ):
        opcheck(op, inputs, test_utils=checks)

    gpt, batch = tiny_model("llama"), tiny_batch(2)
    loss_of(gpt, batch).backward()
    eager = [p.grad.clone() for p in gpt.parameters()]
    gpt.zero_grad()
    for block in gpt.blocks.values():
        block.compile(dynamic=True, backend="aot_eager")
    loss_of(gpt, batch).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(eager, gpt.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_the_laws_hold_in_the_interpreter():
    """All laws of the kernels, in a process of their own."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PLUMB_KERNELS": "on"}
    here = Path(__file__).parent
    others = "attention_kernels", "kl_kernels", "quantized", "grouped_kernels"
    files = [__file__, *(here / f"test_{name}.py" for name in others)]
    command = [sys.executable, "-m", "pytest", *files, "-x", "--tb=short", "-p", "no:cacheprovider"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]
