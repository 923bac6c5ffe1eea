"""Law 8, first half: every kernel, forward and backward, against dense float64, in Triton's interpreter on the CPU.

The interpreter has to be chosen before a kernel's module is imported, and the other tests want the plain twins: so this
file runs itself in a process of its own, where the laws below are collected.

    TRITON_INTERPRET=1 PLUMB_KERNELS=on python -m pytest tests/test_kernels.py     the laws one by one
"""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import dataset_of

from kernels import attention, logprob, tiles
from kernels.rmsnorm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu
from layout import host_layout, share_rows

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
law = pytest.mark.skipif(not INTERPRETED, reason="runs in the process that the last test starts")
EXACT, HALF = 1e-6, 1e-2  # of the largest value: float32, and the 2-byte types
TOLERANCE = {torch.float32: EXACT, torch.bfloat16: HALF, torch.float16: HALF}


def mend_interpreter() -> None:
    """What Triton's interpreter does to bfloat16 and a GPU does not: dots multiply its raw bits, casts to it truncate;
    and in Triton 3.6 numpy 2.4 refuses to take an array of one element for a loop bound."""
    import triton.language as tl
    import triton.runtime.interpreter as I

    builder, patch = I.InterpreterBuilder, I._patch_lang_tensor
    dot, cast = builder.create_dot, builder.cast_impl

    def widened(x):
        bits = x.dtype.scalar == tl.bfloat16
        return (
            I.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            if bits
            else x
        )

    def create_dot(self, a, b, d, *how):
        assert min(*a.data.shape, *b.data.shape) >= 16, "a GPU refuses dots below 16"
        return dot(self, widened(a), widened(b), d, *how)

    def cast_impl(self, source, to):
        if to.scalar == tl.bfloat16 and source.dtype.scalar == tl.float32:
            bits = source.data.view(np.uint32).astype(np.uint64)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            return I.TensorHandle(rounded.astype(np.uint16), tl.bfloat16)
        return cast(self, source, to)

    def patch_tensor(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(
            tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])
        )

    builder.create_dot, builder.cast_impl, I._patch_lang_tensor = (
        create_dot,
        cast_impl,
        patch_tensor,
    )


if INTERPRETED:
    mend_interpreter()


def far(ours: torch.Tensor, wanted: torch.Tensor) -> float:
    """Largest difference, relative to the largest value (to 1 where that is less: some gradients are exactly 0)."""
    assert ours.shape == wanted.shape and torch.isfinite(ours).all()
    return ((ours.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1)).item()


def gradients(out, inputs, slopes) -> list[torch.Tensor]:
    return list(torch.autograd.grad(out, inputs, slopes))


# ---- attention -------------------------------------------------------------------------------------------------------

# Prompts of 37 tokens, of one and of none; one-token responses; no response at all; five lone tokens at the end.
ODD = [(37, [20, 31]), (1, [1, 1, 9]), (0, [23]), (5, []), (70, [3, 1])] + [(1, [])] * 5
WIDE = [(40, [11, 9, 13, 7, 10, 12, 8, 6, 1, 5, 14, 3, 9, 2, 6, 7]), (9, [4])]
LONG = [(150, [70, 20]), (0, [33]), (40, [1])]


def brute_mask(spans, window: int) -> torch.Tensor:
    """Who sees whom, (T, T): told segment by segment, without kv_end."""
    total = sum(p + sum(rs) for p, rs in spans)
    seen, start = torch.zeros(total, total, dtype=torch.bool), 0
    for prompt, responses in spans:
        branches, at = [], start + prompt
        for size in responses or [0]:
            branches.append([*range(start, start + prompt), *range(at, at + size)])
            at += size
        for branch in branches:  # a plain causal sequence
            for i, query in enumerate(branch):
                seen[query, branch[max(0, i + 1 - window) if window else 0 : i + 1]] = True
        start = at
    return seen


def layout_of(spans) -> attention.TreeLayout:
    kv_end, positions = host_layout(spans)
    return attention.TreeLayout(spans, torch.from_numpy(kv_end).int(), torch.from_numpy(positions))


@law
@pytest.mark.parametrize("window", [0, 1, 13, 32])
@pytest.mark.parametrize("spans", [ODD, WIDE, LONG])
def test_the_mask_and_the_tile_lists(spans, window: int, monkeypatch):
    """j <= i < kv_end[j] is what is told branch by branch; lists hold all visible pairs, full tiles no others."""
    seen = brute_mask(spans, window)
    kv_end, positions = (torch.from_numpy(x) for x in host_layout(spans))
    i, j = torch.arange(len(seen))[:, None], torch.arange(len(seen))
    told = (j <= i) & (i < kv_end) & ((positions[:, None] - positions < window) if window else True)
    assert torch.equal(told, seen)
    m, n = 32, 16
    visible, full = tiles.visible_tiles(kv_end.numpy(), positions.numpy(), m, n, window)
    for a in range(visible.shape[0]):
        for b in range(visible.shape[1]):
            tile = seen[a * m : (a + 1) * m, b * n : (b + 1) * n]
            assert visible[a, b] or not tile.any()
            assert not full[a, b] or (tile.all() and tile.shape == (m, n))
            assert window or visible[a, b] == tile.any()
    monkeypatch.setattr(tiles, "SPLIT", 3)
    items, lists, slots = tiles.work_items(visible.T, full.T, 2, 3)
    assert (items[:-1, 5] - items[:-1, 4] >= items[1:, 5] - items[1:, 4]).all()  # heaviest first
    for tile in range(visible.shape[1]):
        own = items[items[:, 0] == tile]
        steps = sorted(step for item in own for step in range(item[4], item[5]))
        assert steps == list(range(2 * int(visible[:, tile].sum())))
        assert set(lists[own[0, 1] :][: own[0, 3]]) == set(np.flatnonzero(visible[:, tile]))
        assert len(own) == 1 or sorted(own[:, 6]) == list(np.flatnonzero(slots[:, 0] == tile))


def attention_errors(spans, heads, kv_heads, size, dtype, window=0, shares=None) -> list[float]:
    """How far out, dq, dk and dv are from the dense float64 reference; computed share by share of the rows if given."""
    torch.manual_seed(0)
    layout = layout_of(spans)
    total = len(layout.kv_end)
    q, k, v = (
        torch.randn(total, h, size).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)
    )
    slope = torch.randn(total, heads, size).to(dtype)
    if shares is None:
        out = attention.tree_attention(q, k, v, layout, window)
    else:
        parts = [
            attention.tree_attention(q[rows], k, v, layout.shard(rows), window) for rows in shares
        ]
        out = torch.cat(parts)[np.argsort(np.concatenate(shares))]
    ours = [out, *gradients(out, (q, k, v), slope)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wide = [exact[0], *(x.repeat_interleave(heads // kv_heads, 1) for x in exact[1:])]
    scores = torch.einsum("ihe,jhe->hij", wide[0], wide[1]) / size**0.5
    chance = scores.masked_fill(~brute_mask(spans, window), float("-inf")).softmax(-1)
    wanted = torch.einsum("hij,jhe->ihe", chance, wide[2])
    return [far(a, b) for a, b in zip(ours, [wanted, *gradients(wanted, exact, slope.double())])]


@law
@pytest.mark.parametrize(
    ("spans", "heads", "kv_heads", "size", "dtype", "window"),
    [
        (ODD, 4, 2, 32, torch.float32, 0),
        (ODD, 2, 2, 40, torch.float32, 0),  # a head size between powers of two
        (ODD, 2, 1, 32, torch.float32, 2),
        (ODD, 2, 1, 32, torch.float32, 13),
        (LONG, 2, 1, 64, torch.float32, 33),
        (WIDE, 4, 1, 32, torch.float32, 0),
        ([(1, [])], 1, 1, 32, torch.float32, 0),
        (
            [(0, [64]), (64, [])],
            1,
            1,
            32,
            torch.float32,
            32,
        ),  # a multiple of every tile; window = a tile
        (LONG, 2, 1, 64, torch.bfloat16, 0),
        (ODD, 2, 2, 64, torch.float16, 13),
        (LONG, 4, 2, 128, torch.bfloat16, 0),
        (WIDE, 2, 1, 80, torch.bfloat16, 20),
        (ODD, 1, 1, 256, torch.bfloat16, 0),
    ],
)
def test_attention_is_the_dense_one(spans, heads, kv_heads, size, dtype, window):
    """Out, dQ, dK and dV of the kernels equal dense float64 attention over the brute-force mask."""
    assert max(attention_errors(spans, heads, kv_heads, size, dtype, window)) < TOLERANCE[dtype]


@law
def test_split_tiles_add_up(monkeypatch):
    """The prompt's dK and dV of a tree of 16, cut into many pieces and merged, are still exact, and repeat bit for
    bit."""
    monkeypatch.setattr(tiles, "SPLIT", 2)
    layout = layout_of(WIDE)
    q, k = torch.randn(len(layout.kv_end), 4, 32), torch.randn(len(layout.kv_end), 2, 32)
    assert len(layout.plan(q, 2, 0)[-1]) > 8
    assert max(attention_errors(WIDE, 4, 2, 32, torch.float32)) < EXACT
    slope = torch.randn_like(q)
    runs = []
    for _ in range(2):
        q2, k2 = q.clone().requires_grad_(), k.clone().requires_grad_()
        runs.append(gradients(attention.tree_attention(q2, k2, k2, layout), (q2, k2), slope))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def dealt(spans, size: int, ranks: int = 2) -> list[np.ndarray]:
    """Blocks of `size` rows go to the ranks by chance."""
    total = sum(p + sum(rs) for p, rs in spans)
    owner = (
        np.random.default_rng(size).permutation(-(-total // size))[np.arange(total) // size] % ranks
    )
    return [np.flatnonzero(owner == rank) for rank in range(ranks)]


@pytest.fixture
def fresh_memory_is_nan():
    """torch.empty gives NaN: what a kernel reads and nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@law
@pytest.mark.parametrize(
    ("spans", "heads", "kv_heads", "size", "dtype", "window", "block"),
    [
        (ODD, 4, 2, 32, torch.float32, 0, 32),  # as long as a tile
        (ODD, 2, 1, 32, torch.float32, 13, 64),
        (LONG, 2, 2, 40, torch.float32, 0, 7),  # blocks and tiles cut each other
        (WIDE, 4, 1, 32, torch.float32, 20, 1),
        (LONG, 4, 2, 64, torch.bfloat16, 0, 128),  # tiles of 128, 128 and 64 queries
        (LONG, 4, 2, 64, torch.bfloat16, 33, 16),
        ([(0, [300])], 1, 1, 32, torch.float32, 0, 0),
        (WIDE, 2, 1, 32, torch.float32, 0, 0),
    ],
)
def test_shares_of_the_queries_add_up(
    spans, heads, kv_heads, size, dtype, window, block, fresh_memory_is_nan
):
    """Out and dQ of the shares, put together, and dK and dV, added up, are those of dense float64 attention. Blocks of
    a length that tiles do not know, or (0) as share_rows deals them."""
    shares = dealt(spans, block) if block else share_rows(spans, 3)
    assert min(map(len, shares))
    limit = 2 * TOLERANCE[dtype]  # parts are rounded before they are added up
    assert max(attention_errors(spans, heads, kv_heads, size, dtype, window, shares)) < limit


@law
def test_a_lone_query_reads_nothing_that_nobody_wrote(fresh_memory_is_nan, monkeypatch):
    """Whatever tiles the three kernels have: where a later one has larger tiles, those before it compute more rows."""
    rest = (torch.float32, 0, [np.array([100]), np.delete(np.arange(130), 100)])
    for m in ((16, 32, 64), (64, 32, 16), (32, 16, 64)):
        sizes = tuple((x, 16, 4, 1) for x in m)
        monkeypatch.setattr(tiles, "tile_sizes", lambda *_, sizes=sizes: sizes)
        assert max(attention_errors([(70, [40, 20])], 1, 1, 32, *rest)) < EXACT


@law
def test_a_share_walks_its_own_tiles_only():
    """Programs of forward and dQ are those of tiles with own rows, dK and dV read no other; all keys get a sum."""
    layout = layout_of([(0, [512])])
    rows = np.r_[64:128, 300:310]
    q = torch.empty(512, 1, 32)
    _, _, items, _, dq_items, _, key_items, key_lists, _ = (
        x.numpy() for x in layout.shard(rows).plan(q, 1, 0)
    )
    assert {*items[:, 0]} == {*dq_items[:, 0]} == {*key_lists} == {2, 3, 9}  # of 32 rows
    assert {*key_items[:, 0]} == set(range(16))
    assert int(items[:, 3].sum()) == 3 + 4 + 10 == len(key_lists)


@law
def test_strided_inputs_are_read_where_they_lie():
    """q, k and v may be views into one projection; the result is that of copies."""
    layout = layout_of(LONG)
    whole = torch.randn(len(layout.kv_end), 4, 32)
    q, k, v = whole.split((2, 1, 1), 1)
    out = attention.tree_attention(q, k, v, layout)
    assert torch.equal(
        out, attention.tree_attention(q.contiguous(), k.contiguous(), v.contiguous(), layout)
    )


# ---- linear + log-prob -----------------------------------------------------------------------------------------------


@law
@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(("temperature", "entropy"), [(1.0, False), (0.7, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_are_those_of_the_softmax(dtype, temperature, entropy, kept, monkeypatch):
    """Log-probs, entropies and both gradients equal log_softmax in float64; chunks of odd width, slopes of both signs;
    two shards of the vocabulary, merged, give the same."""
    monkeypatch.setattr(logprob, "GPU_CHUNK", 192)
    monkeypatch.setattr(logprob, "BLOCK", 128)
    monkeypatch.setattr(logprob, "GPU_KEEP_BYTES", 1 << 30 if kept else 0)
    torch.manual_seed(0)
    rows, width, vocab, split = 33, 48, 517, 259
    hidden, weight = torch.randn(rows, width).to(dtype), (torch.randn(vocab, width) / 8).to(dtype)
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
        logp = (h @ w.t() / temperature).log_softmax(-1)
        own = logp.gather(1, target[:, None])[:, 0]
        return (own, -(logp.exp() * logp).sum(1)) if entropy else own

    wanted = run(dense, hidden.double(), weight.double())
    ours = run(
        lambda h, w: logprob.linear_logprob(h, w, target, temperature, entropy), hidden, weight
    )
    assert all(o.dtype == torch.float32 for o in ours[: len(ours) - 2])
    errors = [far(a, b) for a, b in zip(ours, wanted)]
    assert max(errors) < TOLERANCE[dtype], errors

    cut, partials = (slice(0, split), slice(split, vocab)), []
    for own in cut:  # what two ranks would send each other
        logprob.linear_logprob(
            hidden,
            weight[own],
            target,
            temperature,
            entropy,
            own.start,
            lambda p: partials.append(p) or p,
        )
    whole = logprob.merge_partials(torch.stack(partials))
    d_hidden, d_weight = 0, []
    for own in cut:
        sharded = run(
            lambda h, w, own=own: logprob.linear_logprob(
                h, w, target, temperature, entropy, own.start, lambda p: whole
            ),
            hidden, weight[own],
        )  # fmt: skip
        assert max(far(a, b) for a, b in zip(sharded[:-2], wanted)) < TOLERANCE[dtype]
        d_hidden = d_hidden + sharded[-2]
        d_weight.append(sharded[-1])
    assert (
        far(d_hidden, wanted[-2]) < TOLERANCE[dtype]
        and far(torch.cat(d_weight), wanted[-1]) < TOLERANCE[dtype]
    )


# ---- the small ones --------------------------------------------------------------------------------------------------


def compare(ours, twin, inputs, dtype) -> None:
    """Outputs and gradients of a kernel in `dtype` against its formula in float64."""
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    a, b = ours(*leaves), twin(*exact)
    a, b = (x if isinstance(x, tuple) else (x,) for x in (a, b))
    slopes = [torch.randn(x.shape).to(dtype) for x in a]
    results = [*a, *gradients(a, leaves, slopes)]
    wanted = [*b, *gradients(b, exact, [s.double() for s in slopes])]
    assert all(x.dtype == dtype for x in results)
    assert max(far(x, y) for x, y in zip(results, wanted)) < TOLERANCE[dtype]


@law
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(37, 96), (3, 5, 16), (1, 2500)])
def test_rms_norms(shape, dtype):
    """x / √(mean(x²) + eps) · weight, alone and of a sum, with gradients arriving at both outputs."""
    torch.manual_seed(0)
    x, more, weight = torch.randn(shape), torch.randn(shape), 1 + 0.3 * torch.randn(shape[-1])

    def norm(x, w):
        return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * w

    compare(lambda x, w: rms_norm(x, w, 1e-5), norm, (x, weight), dtype)
    both = lambda x, m, w: (x + m, norm(x + m, w))  # noqa: E731
    compare(lambda x, m, w: add_rms_norm(x, m, w, 1e-5), both, (x, more, weight), dtype)


@law
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size", "turned"), [(3, 32, 32), (40, 16, 16), (2, 40, 10)])
def test_rope_turns_pairs(heads, size, turned, dtype):
    """Pair (i, i + R/2) is turned by its angle; the rest of a head (GPT-NeoX) stays."""
    torch.manual_seed(0)
    angle = torch.rand(29, turned // 2) * 9
    cos, sin = angle.cos(), angle.sin()

    def turn(x):
        z = torch.complex(x[..., : turned // 2], x[..., turned // 2 : turned])
        z = z * torch.complex(cos.double(), sin.double())[:, None]
        return torch.cat((z.real, z.imag, x[..., turned:]), -1)

    compare(lambda x: rope(x, cos, sin), turn, (torch.randn(29, heads, size),), dtype)
    strided = torch.randn(29, heads + 1, size)[:, 1:]
    assert far(rope(strided, cos, sin), turn(strided.double())) < EXACT


@law
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu(dtype):
    """silu(gate) · up; one block and a bit."""
    torch.manual_seed(0)
    inputs = [3 * torch.randn(7, 311), torch.randn(7, 311)]
    compare(swiglu, lambda gate, up: gate * torch.sigmoid(gate) * up, inputs, dtype)


# ---- together --------------------------------------------------------------------------------------------------------


def tiny_model(family: str):
    import model

    sizes = {
        "vocab": 150,
        "width": 48,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_size": 16,
        "ffn": 80,
    }
    more = {
        "llama": {"windows": (0, 9)},
        "qwen3": {"qk_norm": True, "qkv_bias": True, "tied": True},
        "gpt_neox": {
            "norm": "layer",
            "mlp": "gelu",
            "rope_size": 4,
            "parallel_residual": True,
            "kv_heads": 4,
        },
    }[family]
    gpt = model.GPT(model.GPTConfig(family=family, **{**sizes, **more}))
    gpt.init_weights(0, std=0.2)
    return gpt


def trees_of_a_batch(responses: int):
    from data.trees import make_batch

    rng = np.random.default_rng(0)
    sizes = [(11, [5, 9, 3, 1]), (1, [4, 2, 2, 6]), (30, [7, 1, 12, 3])]
    rows = [
        ([*rng.integers(0, 150, p)], [[*rng.integers(0, 150, n)] for n in ns[:responses]])
        for p, ns in sizes
    ]
    return make_batch(dataset_of(rows), [0, 1, 2])


def loss_of(gpt, batch) -> torch.Tensor:
    """SFT where every tree has one response, DPO on pairs, a weighted sum of log-probs for wider trees."""
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
    ("family", "responses"), [("llama", 1), ("llama", 2), ("gpt_neox", 2), ("qwen3", 4)]
)
def test_a_model_computes_the_same_with_kernels(family: str, responses: int, monkeypatch):
    """Loss and every gradient of a model are those of the plain twins in float64."""
    gpt, batch = tiny_model(family), trees_of_a_batch(responses)
    loss = loss_of(gpt, batch)
    ours = [loss, *torch.autograd.grad(loss, list(gpt.parameters()))]
    gpt = gpt.double()  # float64 is the twins'
    loss = loss_of(gpt, batch)
    wanted = [loss, *torch.autograd.grad(loss, list(gpt.parameters()))]
    assert max(float(w.abs().max()) for w in wanted[1:]) > 0.01
    for a, b in zip(ours, wanted):
        assert (a - b).abs().max() < 5e-6 * max(1, b.abs().max())


@law
def test_kernels_are_operators_that_torch_compile_takes():
    """Schemas, fake implementations and autograd formulas hold (opcheck), and a compiled block gives the same bits."""
    from torch.library import opcheck

    ops = torch.ops.plumb
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    layout = layout_of([(9, [5, 3]), (0, [4])])
    q, k, v = (torch.randn(21, h, 32, requires_grad=True) for h in (2, 1, 1))
    x, w = torch.randn(6, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    angle = torch.rand(21, 16)
    z, target = torch.randn(6, 40), torch.randint(0, 40, (6,))
    for op, inputs in (
        (ops.tree_attention, (q, k, v, layout.plan(q, 1, 0), 0)),
        (ops.add_rms_norm, (x, x.detach().clone().requires_grad_(), w, 1e-5)),
        (ops.add_rms_norm, (x, None, w, 1e-5)),
        (ops.swiglu, (x, x.detach().clone())),
        (ops.rope, (q, angle.cos(), angle.sin(), False)),
        (ops.fold_logits, (z, target, *torch.zeros(4, 6), 0, 1.0)),
        (ops.logit_slopes, (z, target, *torch.zeros(4, 6), 0, 1.0, torch.bfloat16)),
    ):
        opcheck(op, inputs, test_utils=checks)

    gpt, batch = tiny_model("llama"), trees_of_a_batch(2)
    loss_of(gpt, batch).backward()
    eager = [p.grad.clone() for p in gpt.parameters()]
    gpt.zero_grad()
    for block in gpt.blocks.values():
        block.compile(dynamic=True, backend="aot_eager")
    loss_of(gpt, batch).backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(eager, gpt.parameters()))


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_the_laws_hold_in_the_interpreter():
    """All of the above, in a process of its own."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PLUMB_KERNELS": "on"}
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-x", "--tb=short", "-p", "no:cacheprovider"],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="starts processes of its own")
def test_the_gpu_bench_runs_and_survives_a_part_that_dies(tmp_path):
    """bench/gpu.py finds every kernel right at tiny sizes; a part that is killed is reported, the others still run."""
    import importlib.util
    import json
    from pathlib import Path

    pytest.importorskip("triton")
    script = Path(__file__).parents[2] / "bench" / "gpu.py"
    flags = ["--device", "cpu", "--tiny", "--json", tmp_path / "rows.json"]
    run = subprocess.run([sys.executable, script, *flags], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert sum(row.get("ok", False) for row in rows) == 10
    assert {row["part"] for row in rows} == {
        "check",
        "ceilings",
        "attention",
        "logprob",
        "small",
        "steps",
        "trl",
    }
    theirs = [row for row in rows if row["part"] == "trl"]
    if importlib.util.find_spec("trl"):
        assert ["seconds" in row for row in theirs] == [True, True] and theirs[0][
            "plumb_faster"
        ] > 0, theirs
    else:
        assert "not importable: trl" in theirs[0]["skipped"]

    source = script.read_text().replace(
        '"""Memory-bound ones,', 'os.abort()\n    """Memory-bound ones,'
    )
    source = source.replace(
        "Path(__file__).resolve().parents[1]", repr(script.parents[1]).replace("PosixPath", "Path")
    )
    (tmp_path / "broken.py").write_text(source)
    flags += ["--parts", "small", "ceilings"]
    run = subprocess.run(
        [sys.executable, tmp_path / "broken.py", *flags], capture_output=True, text=True
    )
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert run.returncode == 1 and "failed: small, the whole part" in run.stdout
    assert [row["part"] for row in rows] == ["small", "ceilings", "ceilings"]
