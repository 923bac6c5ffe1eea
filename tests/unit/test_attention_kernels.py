"""Law 8, first half, attention: the kernels against dense float64, in Triton's interpreter.

TRITON_INTERPRET=1 PLUMB_KERNELS=on python -m pytest tests/unit/test_attention_kernels.py
"""

import numpy as np
import pytest
import torch
from interpreter import EXACT, TOLERANCE, gradients, law, relative_error

from kernels import attention, tiles
from layout import TreeLayout, host_layout, share_rows

# Prompts of 37 tokens, of one and of none; one-token responses; no response at all; five lone
# tokens at the end.
ODD = [(37, [20, 31]), (1, [1, 1, 9]), (0, [23]), (5, []), (70, [3, 1])] + [(1, [])] * 5
WIDE = [(40, [11, 9, 13, 7, 10, 12, 8, 6, 1, 5, 14, 3, 9, 2, 6, 7]), (9, [4])]
LONG = [(150, [70, 20]), (0, [33]), (40, [1])]


def brute_force_mask(spans, window: int) -> torch.Tensor:
    """Return who sees whom, (T, T) bool, written out branch by branch without kv_end."""
    total = sum(p + sum(rs) for p, rs in spans)
    seen, start = torch.zeros(total, total, dtype=torch.bool), 0
    for prompt, responses in spans:
        branches, at = [], start + prompt
        for size in responses or [0]:
            branches.append([*range(start, start + prompt), *range(at, at + size)])
            at += size
        for branch in branches:  # a plain causal sequence
            for i, query in enumerate(branch):
                first = max(0, i + 1 - window) if window else 0
                seen[query, branch[first : i + 1]] = True
        start = at
    return seen


@law
@pytest.mark.parametrize("window", [0, 1, 13, 32])
@pytest.mark.parametrize("spans", [ODD, WIDE, LONG])
def test_the_mask_and_the_tile_lists(spans, window: int, monkeypatch):
    """j <= i < kv_end[j] is the brute-force mask; lists hold every visible pair, and full tiles
    hold no hidden one."""
    seen = brute_force_mask(spans, window)
    kv_end, positions = (torch.from_numpy(x) for x in host_layout(spans))
    i, j = torch.arange(len(seen))[:, None], torch.arange(len(seen))
    mask = (j <= i) & (i < kv_end)
    if window:
        mask &= positions[:, None] - positions < window
    assert torch.equal(mask, seen)
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


def attention_errors(
    spans, heads, kv_heads, size, dtype, window=0, shares=None, cap=0.0
) -> list[float]:
    """Return the errors of out, dq, dk and dv against dense float64 attention.

    With `shares` each share of the rows is computed on its own.
    """
    torch.manual_seed(0)
    layout = TreeLayout.from_spans(spans)
    total = len(layout.kv_end)
    q, k, v = (
        torch.randn(total, h, size).to(dtype).requires_grad_() for h in (heads, kv_heads, kv_heads)
    )
    slope = torch.randn(total, heads, size).to(dtype)
    if shares is None:
        out = attention.tree_attention(q, k, v, layout, window, cap)
    else:
        parts = [
            attention.tree_attention(q[rows], k, v, layout.shard(rows), window, cap)
            for rows in shares
        ]
        out = torch.cat(parts)[np.argsort(np.concatenate(shares))]
    ours = [out, *gradients(out, (q, k, v), slope)]

    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    q, k, v = exact[0], *(x.repeat_interleave(heads // kv_heads, 1) for x in exact[1:])
    scores = torch.einsum("ihe,jhe->hij", q, k) / size**0.5
    scores = cap * torch.tanh(scores / cap) if cap else scores
    chances = scores.masked_fill(~brute_force_mask(spans, window), float("-inf")).softmax(-1)
    out = torch.einsum("hij,jhe->ihe", chances, v)
    wanted = [out, *gradients(out, exact, slope.double())]
    return [relative_error(a, b) for a, b in zip(ours, wanted, strict=True)]


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
        # a multiple of every tile, and a window as long as a tile
        ([(0, [64]), (64, [])], 1, 1, 32, torch.float32, 32),
        (LONG, 2, 1, 64, torch.bfloat16, 0),
        (ODD, 2, 2, 64, torch.float16, 13),
        (LONG, 4, 2, 128, torch.bfloat16, 0),
        (WIDE, 2, 1, 80, torch.bfloat16, 20),
        (ODD, 1, 1, 256, torch.bfloat16, 0),
    ],
)
def test_attention_equals_dense_attention(spans, heads, kv_heads, size, dtype, window):
    """Out, dQ, dK and dV equal dense float64 attention over the brute-force mask."""
    assert max(attention_errors(spans, heads, kv_heads, size, dtype, window)) < TOLERANCE[dtype]


@law
@pytest.mark.parametrize("cap", [0.5, 2.0, 50.0])
@pytest.mark.parametrize(
    ("spans", "size", "dtype", "window", "shared"),
    [
        (ODD, 32, torch.float32, 0, False),
        (WIDE, 40, torch.float32, 13, False),
        (LONG, 32, torch.float32, 13, True),
        (LONG, 64, torch.bfloat16, 0, True),
        (ODD, 256, torch.bfloat16, 13, False),
    ],
)
def test_capped_scores_equal_dense_attention(spans, size, dtype, window, shared, cap):
    """The same with scores that a cap bends much, some and hardly."""
    shares = random_blocks(spans, 16) if shared else None
    errors = attention_errors(spans, 4, 2, size, dtype, window, shares, cap)
    assert max(errors) < (2 if shared else 1) * TOLERANCE[dtype], errors


@law
def test_split_tiles_add_up(monkeypatch):
    """dK and dV of the prompt of 16 responses, cut into many parts and merged, are still exact, and
    repeat bit for bit."""
    monkeypatch.setattr(tiles, "SPLIT", 2)
    layout = TreeLayout.from_spans(WIDE)
    q, k = torch.randn(len(layout.kv_end), 4, 32), torch.randn(len(layout.kv_end), 2, 32)
    slots = tiles.work_lists(layout, q, 2, 0)[-1]
    assert len(slots) > 8
    assert max(attention_errors(WIDE, 4, 2, 32, torch.float32)) < EXACT
    slope = torch.randn_like(q)
    runs = []
    for _ in range(2):
        q2, k2 = q.clone().requires_grad_(), k.clone().requires_grad_()
        runs.append(gradients(attention.tree_attention(q2, k2, k2, layout), (q2, k2), slope))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def random_blocks(spans, size: int, ranks: int = 2) -> list[np.ndarray]:
    """Deal blocks of `size` rows to the ranks at random."""
    total = sum(p + sum(rs) for p, rs in spans)
    order = np.random.default_rng(size).permutation(-(-total // size))
    owner = order[np.arange(total) // size] % ranks
    return [np.flatnonzero(owner == rank) for rank in range(ranks)]


@pytest.fixture
def fresh_memory_is_nan():
    """Fill what torch.empty returns with NaN, so that reading memory nobody wrote shows."""
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
    """Out and dQ of the shares, put together, and dK and dV, added up, are those of dense float64
    attention: for random blocks that are no whole tiles, and (block 0) as share_rows deals them."""
    shares = random_blocks(spans, block) if block else share_rows(spans, 3)
    assert min(map(len, shares))
    limit = 2 * TOLERANCE[dtype]  # parts are rounded before they are added up
    assert max(attention_errors(spans, heads, kv_heads, size, dtype, window, shares)) < limit


@law
def test_a_lone_query_reads_only_written_memory(fresh_memory_is_nan, monkeypatch):
    """For any tiles of the three kernels: where a later kernel has larger tiles, the earlier ones
    compute more rows."""
    rest = (torch.float32, 0, [np.array([100]), np.delete(np.arange(130), 100)])
    for m in ((16, 32, 64), (64, 32, 16), (32, 16, 64)):
        sizes = tuple((x, 16, 4, 1) for x in m)
        monkeypatch.setattr(tiles, "tile_sizes", lambda *_, sizes=sizes: sizes)
        assert max(attention_errors([(70, [40, 20])], 1, 1, 32, *rest)) < EXACT


@law
def test_a_share_computes_only_its_own_tiles():
    """Forward and dQ run on the tiles with rows of the share, dK and dV read no others; every key
    gets a sum."""
    layout = TreeLayout.from_spans([(0, [512])])
    rows = np.r_[64:128, 300:310]
    q = torch.empty(512, 1, 32)
    lists = tiles.work_lists(layout.shard(rows), q, 1, 0)
    _, _, items, _, dq_items, _, key_items, key_lists, _ = (x.numpy() for x in lists)
    assert {*items[:, 0]} == {*dq_items[:, 0]} == {*key_lists} == {2, 3, 9}  # of 32 rows
    assert {*key_items[:, 0]} == set(range(16))
    assert int(items[:, 3].sum()) == 3 + 4 + 10 == len(key_lists)


@law
def test_strided_inputs_give_the_same_bits():
    """q, k and v may be views into one projection; the result is that of copies."""
    layout = TreeLayout.from_spans(LONG)
    views = torch.randn(len(layout.kv_end), 4, 32).split((2, 1, 1), 1)
    copies = [x.contiguous() for x in views]
    out = attention.tree_attention(*views, layout)
    assert torch.equal(out, attention.tree_attention(*copies, layout))
