"""Context parallelism: shares of the queries add up to the whole, and are fair."""

import numpy as np
import pytest
import torch
from conftest import dataset_of

from data.trees import make_batch
from kernels import attention, tiles
from kernels.attention import tree_attention
from layout import BLOCK, QueryRun, TreeLayout, host_layout, query_runs, share_rows

TREES = {
    "one long row": [(0, [300])],
    "odd": [(37, [20, 31]), (1, [1, 1, 9]), (0, [23, 5]), (5, []), (70, [3, 1])] + [(1, [])] * 5,
    "many responses": [(40, [11, 9, 13, 7, 10, 12, 8, 6, 1, 5, 14, 3, 9, 2, 6, 7]), (9, [4])],
}


def dense(q, k, v, layout, window: int, slope) -> list[torch.Tensor]:
    """Compute result and gradients by the definition of the mask, over all (T, T) pairs."""
    q, k, v = leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    i = torch.arange(len(q))
    seen = (i <= i[:, None]) & (i[:, None] < layout.kv_end)
    if window:
        seen &= layout.positions[:, None] - layout.positions < window
    scores = torch.einsum("ihe,jhe->hij", q, k) / q.shape[2] ** 0.5
    out = torch.einsum("hij,jhe->ihe", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


def run(q, k, v, layout, window, slope) -> list[torch.Tensor]:
    """Compute result and gradients of tree_attention, of fresh leaves."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    out = tree_attention(*leaves, layout, window)
    return [out.detach(), *torch.autograd.grad(out, leaves, slope)]


@pytest.mark.parametrize("window", [0, 1, 13])
@pytest.mark.parametrize("name", TREES)
def test_shares_add_up_to_the_whole(name: str, window: int):
    """Out and dQ of the shares, put together, and dK and dV, added up, are those of dense attention
    and of all rows at once: float64, 1e-12. For shares of share_rows, and for any partition: single
    rows, one rank with nothing."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    layout = TreeLayout.from_spans(TREES[name])
    total = len(layout.kv_end)
    q, k, v = (torch.randn(total, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    slope = torch.randn_like(q)
    whole = dense(q, k, v, layout, window, slope)
    for ours, wanted in zip(run(q, k, v, layout, window, slope), whole, strict=True):
        assert (ours - wanted).abs().max() < 1e-12
    owner = rng.integers(0, 3, total)
    for shares in (
        share_rows(TREES[name], 2, window),
        share_rows(TREES[name], 5, window),
        [np.flatnonzero(owner == rank) for rank in range(4)],
        [np.array([total - 1]), np.arange(total - 1)],
    ):
        parts = [run(q[rows], k, v, layout.shard(rows), window, slope[rows]) for rows in shares]
        order = np.argsort(np.concatenate(shares))
        out, d_q = (torch.cat([part[i] for part in parts])[order] for i in (0, 1))
        d_k, d_v = (sum(part[i] for part in parts) for i in (2, 3))
        for ours, wanted in zip((out, d_q, d_k, d_v), whole, strict=True):
            assert (ours - wanted).abs().max() < 1e-12


def test_shares_do_no_work_for_others(monkeypatch):
    """Two halves of a long row compute about as many pairs each, together little more than the
    whole triangle."""
    pairs, attend_run = [], attention.attend_run

    def counted(q, k, *rest):
        pairs.append(q.shape[1] * k.shape[1])
        return attend_run(q, k, *rest)

    monkeypatch.setattr(attention, "attend_run", counted)
    spans = [(0, [2048])]
    layout, q = TreeLayout.from_spans(spans), torch.randn(2048, 1, 8)
    counts = []
    for rows in share_rows(spans, 2):
        pairs.clear()
        tree_attention(q[rows], q, q, layout.shard(rows))
        counts.append(sum(pairs))
    assert counts[0] == pytest.approx(counts[1], rel=0.05)
    assert sum(counts) < 1.15 * 2048**2 / 2


@pytest.mark.parametrize("spans", [[], [(3, [2, 4])]])
def test_nothing_to_compute_still_has_gradients(spans):
    """An empty batch, or a rank without rows: out is (0, H, E), and zeros flow to queries, keys and
    values (other ranks wait for them)."""
    layout = TreeLayout.from_spans(spans)
    total = len(layout.kv_end)
    for here in [layout.shard(np.arange(0))] + [layout] * (not spans):
        q, k, v = (
            torch.randn(n, h, 8, requires_grad=True) for n, h in ((0, 4), (total, 2), (total, 2))
        )
        out = tree_attention(q, k, v, here)
        assert out.shape == (0, 4, 8)
        for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
            assert grad.shape == x.shape and not grad.any()


def test_a_batch_on_another_device_keeps_its_share():
    """TreeBatch.to takes the rows along; rows that are no places of the flat row raise an error."""
    batch = make_batch(dataset_of([([1, 2, 3], [[4, 5], [6]])]), [0])
    batch.layout = batch.layout.shard([1, 4])
    assert batch.to(torch.device("cpu")).layout.rows.tolist() == [1, 4]
    for rows in ([2, 1], [1, 1], [-1, 2], [6]):
        with pytest.raises(ValueError, match="from 0 to 5"):
            batch.layout.shard(rows)


def test_layouts_of_a_small_tree():
    """The worked examples in the docstrings of host_layout and query_runs, and the runs of a part
    of the rows."""
    spans = [(2, [1, 2])]
    kv_end, positions = host_layout(spans)
    assert kv_end.tolist() == [5, 5, 3, 5, 5] and positions.tolist() == [0, 1, 2, 2, 3]
    assert query_runs(spans) == [QueryRun(3, 3, (0, 1)), QueryRun(2, 4, (0, 2))]
    rows = np.array([1, 2, 4])  # end of the prompt and its first response; end of the second
    assert query_runs(spans, rows) == [QueryRun(2, 3, (0, 1)), QueryRun(1, 4, (0, 2))]


def keys_seen(spans, window: int) -> np.ndarray:
    """Count the keys that each query of the flat row sees, (T,), branch by branch."""
    counts = []
    for prompt, responses in spans:
        counts += range(1, prompt + 1)
        for size in responses:
            counts += range(prompt + 1, prompt + size + 1)
    return np.array([min(n, window) if window else n for n in counts])


FAIR = {
    "long causal row": [(0, [16384])],
    "long row, odd length": [(1, [9999])],
    "many small trees": [(20, [11, 17])] * 160,
    "small trees of all sizes": [
        (5 + 7 * i % 90, [3 + 5 * i % 40, 1 + 11 * i % 60]) for i in range(100)
    ],
    "one tree, many responses": [(900, [300] * 30)],
    "short row": [(40, [150, 160])],
}


@pytest.mark.parametrize("window", [0, 256])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize("name", FAIR)
def test_shares_are_fair(name: str, ranks: int, window: int):
    """Every row once; numbers of rows differ by one at most; the heaviest rank sees at most 10 %
    more pairs than the mean; long rows have blocks as long as any query tile; repeats are equal."""
    spans = FAIR[name]
    shares, seen = share_rows(spans, ranks, window), keys_seen(spans, window)
    assert np.array_equal(np.sort(np.concatenate(shares)), np.arange(len(seen)))
    assert all(rows.dtype == np.int64 and (np.diff(rows) > 0).all() for rows in shares)
    sizes = [len(rows) for rows in shares]
    assert max(sizes) - min(sizes) <= 1
    work = [seen[rows].sum() for rows in shares]
    assert max(work) <= 1.1 * np.mean(work), (np.array(work) / np.mean(work)).round(3)
    if len(seen) >= 4 * ranks * 128:
        for rows in shares:  # all but the last piece of a rank are whole tiles of 128
            _, per_tile = np.unique(rows // 128, return_counts=True)
            assert (per_tile == 128).sum() >= len(seen) // 128 // ranks
    again = share_rows(list(spans), ranks, window)
    assert all(np.array_equal(a, b) for a, b in zip(shares, again, strict=True))


def blocks_of(rows: np.ndarray) -> list[int]:
    """Return which blocks of 128 rows a share is made of."""
    return (rows[::128] // 128).tolist()


def test_zig_zag_and_rows_that_are_few():
    """A long sequence in four rounds goes there and back twice; with a window of 1 all blocks weigh
    the same and are dealt in order; with more ranks than rows some get none."""
    first, second = share_rows([(0, [1024])], 2)
    assert blocks_of(first) == [0, 3, 4, 7] and blocks_of(second) == [1, 2, 5, 6]
    first, second = share_rows([(0, [1024])], 2, window=1)
    assert blocks_of(first) == [0, 2, 4, 6] and blocks_of(second) == [1, 3, 5, 7]
    assert sorted(len(rows) for rows in share_rows([(1, [1, 1])], 5)) == [0, 0, 1, 1, 1]
    assert [rows.shape for rows in share_rows([], 3)] == [(0,)] * 3


def test_query_tiles_divide_the_block():
    """A block that share_rows deals is made of whole query tiles."""
    for table in tiles.TILES.values():
        for sizes in table.values():
            assert all(BLOCK % m == 0 for m, *_ in sizes)
