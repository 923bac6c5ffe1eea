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
import torch.nn.functional as F
from conftest import dataset_of

from kernels import attention, tiles

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
        return I.TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32) if bits else x

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
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))

    builder.create_dot, builder.cast_impl, I._patch_lang_tensor = create_dot, cast_impl, patch_tensor


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
    kv_end, positions = tiles.host_layout(spans)
    return attention.TreeLayout(spans, torch.from_numpy(kv_end).int(), torch.from_numpy(positions))


@law
@pytest.mark.parametrize("window", [0, 1, 13, 32])
@pytest.mark.parametrize("spans", [ODD, WIDE, LONG])
def test_the_mask_and_the_tile_lists(spans, window: int, monkeypatch):
    """j <= i < kv_end[j] is the definition told branch by branch; lists hold all visible pairs; full tiles no others."""
    seen = brute_mask(spans, window)
    kv_end, positions = (torch.from_numpy(x) for x in tiles.host_layout(spans))
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


def attention_errors(spans, heads, kv_heads, size, dtype, window=0) -> list[float]:
    """How far out, dq, dk and dv are from the dense float64 reference."""
    torch.manual_seed(0)
    layout = layout_of(spans)
    total = len(layout.kv_end)
    q, k, v = (torch.randn(total, h, size).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads))
    slope = torch.randn(total, heads, size).to(dtype)
    out = attention.tree_attention(q, k, v, layout, window)
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
        ([(0, [64]), (64, [])], 1, 1, 32, torch.float32, 32),  # a multiple of every tile; window = a tile
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


@law
def test_strided_inputs_are_read_where_they_lie():
    """q, k and v may be views into one projection; the result is that of copies."""
    layout = layout_of(LONG)
    whole = torch.randn(len(layout.kv_end), 4, 32)
    q, k, v = whole.split((2, 1, 1), 1)
    out = attention.tree_attention(q, k, v, layout)
    assert torch.equal(out, attention.tree_attention(q.contiguous(), k.contiguous(), v.contiguous(), layout))
