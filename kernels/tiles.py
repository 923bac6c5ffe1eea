"""The tiles that the attention kernels compute: their sizes, and the work lists of one batch.

All of it is decided on the host from the spans, once a batch, and copied to the device at once.

Letters: T tokens, M queries and N keys of a tile, W work items, S slots.
"""

import numpy as np
import torch
from torch import Tensor

from kernels.device import architecture, is_amd, processors, untraced
from layout import Spans, TreeLayout, host_layout

SPLIT = 16  # a dK/dV list of fewer steps is never split: balance would gain less than merging costs

# (M, N, warps, stages) of forward, dQ and dK/dV by architecture and head size (rounded up to a
# power of two), for 2-byte types: the largest tiles that tests/unit/test_kernels_offline.py sees
# without spills in a loop.
TILES = {
    80: {
        32: ((128, 64, 4, 3), (128, 64, 4, 3), (64, 128, 8, 3)),
        64: ((128, 64, 8, 3), (64, 64, 4, 3), (32, 128, 8, 3)),
        128: ((128, 64, 8, 3), (64, 64, 4, 2), (64, 64, 8, 2)),
        256: ((128, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2)),
    },
    86: {  # and all others: 99 KB of shared memory
        32: ((128, 64, 4, 2), (64, 64, 4, 2), (64, 128, 8, 2)),
        64: ((128, 64, 8, 2), (64, 32, 4, 3), (32, 128, 8, 2)),
        128: ((128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
        256: ((64, 32, 4, 2), (32, 32, 4, 1), (32, 32, 4, 2)),
    },
    90: {
        32: ((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
        64: ((128, 128, 8, 2), (128, 64, 8, 3), (64, 128, 8, 2)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
        256: ((128, 64, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2)),
    },
    100: {
        32: ((128, 64, 8, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
        64: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2)),
        256: ((128, 32, 8, 2), (128, 32, 8, 2), (32, 64, 8, 2)),
    },
    942: {  # and all others of AMD's: 64 KB of shared memory; 4 warps have 512 registers a thread
        32: ((128, 64, 4, 2), (128, 64, 4, 2), (32, 128, 4, 1)),
        64: ((128, 64, 8, 2), (128, 64, 8, 2), (32, 128, 4, 1)),
        128: ((128, 64, 8, 2), (64, 64, 4, 1), (32, 128, 4, 1)),
        256: ((64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)),
    },
}
# dK/dV of capped scores, where the cap takes registers that the tiles above need.
CAPPED_TILES = {(90, 128): (32, 128, 8, 2), (86, 256): (32, 32, 8, 2)}
SAME_TILES = {87: 80, 103: 100}  # architectures that use another one's table


def tile_sizes(
    arch: int, head_size: int, dtype: torch.dtype, capped: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Return (M, N, warps, stages) of forward, dQ and dK/dV."""
    if dtype == torch.float32:  # twice the bytes, and exact products that no tensor core computes
        return ((32, 32, 8, 1),) * 3
    known, padded = SAME_TILES.get(arch, arch), max(32, 1 << (head_size - 1).bit_length())
    if known not in TILES:
        known = 942 if is_amd(arch) else 86
    forward, d_q, d_kv = TILES[known][padded]
    return forward, d_q, CAPPED_TILES.get((known, padded), d_kv) if capped else d_kv


@untraced
def work_lists(
    layout: TreeLayout, q: Tensor, kv_heads: int, window: int, capped: bool = False
) -> list[Tensor]:
    """Return what the kernels read: kv_end, positions, and the arrays of `plan`, on q's device.

    Built once for each shape of q and cached on the layout. Nothing here waits for the device.
    """
    heads, device = q.shape[1], q.device
    sizes = tile_sizes(architecture(device), q.shape[2], q.dtype, capped)
    key = ("work_lists", sizes, heads, kv_heads, window, SPLIT)
    if key not in layout.cache:
        arrays = plan(layout.spans, sizes, heads, kv_heads, window, processors(device), layout.rows)
        padded = [np.pad(x.ravel(), (0, -x.size % 4)) for x in arrays]  # 16 bytes, for fast loads
        flat = torch.from_numpy(np.concatenate(padded).astype(np.int32))
        if device.type == "cuda":
            flat = flat.pin_memory().to(device, non_blocking=True)
        parts = flat.split([x.size for x in padded])
        lists = [part[: x.size].view(x.shape) for part, x in zip(parts, arrays)]
        layout.cache[key] = [layout.kv_end, layout.positions, *lists]
    return layout.cache[key]


def plan(
    spans: Spans,
    sizes: tuple,
    heads: int,
    kv_heads: int,
    window: int,
    processors: int,
    rows: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Plan all three kernels: items and lists of forward, of dQ, of dK/dV, then the latter's slots.

    sizes: as `tile_sizes` returns them. processors: over how many the work is balanced.
    rows: the queries to compute (default: all); tiles without any of them are left out.
    """
    kv_end, positions = host_layout(spans)
    computed = np.ones(len(kv_end), bool)
    if rows is not None:
        computed[:] = False
        computed[rows] = True
    tiles = []
    # dK/dV reads what dQ and forward wrote for every row of a tile, dQ what forward wrote. So each
    # kernel computes all rows that a later one touches, even where tiles differ in size: memory
    # that nobody wrote may hold NaN, and 0 · NaN is not 0.
    for m, n, _, _ in reversed(sizes):
        mine = np.logical_or.reduceat(computed, np.arange(0, len(computed), m))  # (T/M,)
        computed = np.repeat(mine, m)[: len(computed)]
        seen, full = visible_tiles(kv_end, positions, m, n, window)
        tiles.append((seen & mine[:, None], full & mine[:, None]))
    (seen, full), dq, forward = tiles

    query_arrays = []
    for items, lists, _ in (work_items(*forward), work_items(*dq)):
        query_arrays += [items[items[:, 3] > 0], lists]
    steps_each = int(seen.sum()) * heads / processors  # of the dK/dV loops
    limit = max(SPLIT, int(steps_each) // 4)
    return [*query_arrays, *work_items(seen.T, full.T, heads // kv_heads, limit)]


def visible_tiles(
    kv_end: np.ndarray, positions: np.ndarray, m: int, n: int, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Find the tiles of m queries and n keys with any, and with only, visible pairs.

    Returns two bool (T/M, T/N). With a window the first may include tiles without a visible pair.
    """
    total = len(kv_end)
    rows, cols = np.arange(0, total, m), np.arange(0, total, n)
    end_max, end_min = np.maximum.reduceat(kv_end, cols), np.minimum.reduceat(kv_end, cols)
    seen = (end_max > rows[:, None]) & (cols < rows[:, None] + m)
    # A tile that reaches past T is never full, as kv_end <= T: rows past the end would count in
    # dK and dV.
    full = (end_min >= rows[:, None] + m) & (cols + n - 1 <= rows[:, None])
    if window:
        query_min, query_max = (f.reduceat(positions, rows) for f in (np.minimum, np.maximum))
        key_min, key_max = (f.reduceat(positions, cols) for f in (np.minimum, np.maximum))
        seen &= query_min[:, None] - key_max < window
        full &= query_max[:, None] - key_min < window
    return seen, seen & full


def work_items(
    seen: np.ndarray, full: np.ndarray, group: int = 1, limit: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """List the work of one kernel: items (W, 8), lists, slots (S, 2).

    seen, full: for each tile (row) the tiles that its program walks (columns).
    Items are sorted heaviest first, so that no long one starts last. An item is
        (tile, first entry in lists, full tiles, all tiles, first step, end step, slot or -1, 0)
    and its list holds the full tiles first. A list is walked for `group` heads. One that takes more
    than `limit` steps is cut into several items, each summing into a slot of its own. A slot is
    (tile, number of the tile's slots if this is the first of them, else 0).
    """
    row, _, lists = np.nonzero(np.stack((full, seen & ~full), 1))  # by row, full tiles first
    total = np.bincount(row, minlength=len(seen))
    full_count = full.sum(1)
    first = np.cumsum(total) - total
    items, slots = [], []
    for tile in range(len(seen)):
        steps = int(total[tile]) * group
        # At least one item even without steps: keys that no query here sees still get their zeros.
        pieces = max(1, -(-steps // limit)) if limit else 1
        size = -(-steps // pieces)
        for piece in range(pieces):
            slot = -1
            if pieces > 1:
                slot = len(slots)
                slots.append((tile, 0 if piece else pieces))
            low, high = piece * size, min(steps, (piece + 1) * size)
            items.append((tile, first[tile], full_count[tile], total[tile], low, high, slot, 0))
    items = np.array(items)
    heaviest_first = np.argsort(items[:, 4] - items[:, 5], kind="stable")
    return items[heaviest_first], lists, np.array(slots).reshape(-1, 2)
