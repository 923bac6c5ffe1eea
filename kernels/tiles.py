"""Which tiles the attention kernels compute, in what order and size: all decided on the host, once a batch.

Letters: T tokens, M queries and N keys of a tile, W work items, S slots.
"""

import numpy as np
import torch

from layout import Spans, host_layout

SPLIT = (
    16  # steps of a dK/dV program below which splitting its list costs more than the balance gains
)

# (M, N, warps, stages) of forward, dQ and dK/dV by architecture and head size (rounded up to a power of two), for
# 2-byte types: the largest tiles that tests/test_kernels_offline.py sees without spills in a loop.
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
}


def tile_sizes(
    arch: int, head_size: int, dtype: torch.dtype
) -> tuple[tuple[int, int, int, int], ...]:
    """(M, N, warps, stages) of forward, dQ and dK/dV."""
    size = max(32, 1 << (head_size - 1).bit_length())
    if dtype == torch.float32:  # twice the bytes, and exact products that no tensor core makes
        return ((32, 32, 8, 1),) * 3
    table = TILES[
        100 if arch in (100, 103) else 90 if arch == 90 else 80 if arch in (80, 87) else 86
    ]
    return table[size]


def plan(
    spans: Spans,
    sizes: tuple,
    heads: int,
    kv_heads: int,
    window: int,
    processors: int,
    rows: np.ndarray | None = None,
) -> list[np.ndarray]:
    """Items and lists of the forward, of dQ and of dK/dV with the slots of its split tiles.

    rows: the queries to compute, all by default; tiles without any of them are left out.
    """
    kv_end, positions = host_layout(spans)
    wanted = np.ones(len(kv_end), bool)
    if rows is not None:
        wanted[:] = False
        wanted[rows] = True
    tiles = []
    for m, n, _, _ in reversed(sizes):
        mine = np.logical_or.reduceat(wanted, np.arange(0, len(wanted), m))
        # dK and dV read what dQ and the forward left for every row of a tile, dQ what the forward did: so each computes
        # all rows that a later one touches. What nobody wrote may be NaN, and 0 · NaN is no 0.
        wanted = np.repeat(mine, m)[: len(wanted)]
        tiles.append(
            [which & mine[:, None] for which in visible_tiles(kv_end, positions, m, n, window)]
        )
    dkdv, dq, forward = tiles
    share = int(dkdv[0].sum()) * heads / processors  # steps of the dK/dV loops on each processor
    keys = work_items(dkdv[0].T, dkdv[1].T, heads // kv_heads, max(SPLIT, int(share) // 4))
    queries = []
    for items, lists, _ in (work_items(*forward), work_items(*dq)):
        queries += [items[items[:, 3] > 0], lists]
    return [*queries, *keys]


def visible_tiles(
    kv_end: np.ndarray, positions: np.ndarray, m: int, n: int, window: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which tiles of m queries and n keys hold a visible pair, and which hold nothing else: two bool (T/m, T/n)."""
    total = len(kv_end)
    rows, cols = np.arange(0, total, m), np.arange(0, total, n)
    end_max, end_min = np.maximum.reduceat(kv_end, cols), np.minimum.reduceat(kv_end, cols)
    seen = (end_max > rows[:, None]) & (cols < rows[:, None] + m)
    # A tile that reaches past T is never full, since kv_end <= T: what lies there would get into dK and dV.
    full = (end_min >= rows[:, None] + m) & (cols + n - 1 <= rows[:, None])
    if window:
        seen &= (
            np.minimum.reduceat(positions, rows)[:, None] - np.maximum.reduceat(positions, cols)
            < window
        )
        full &= (
            np.maximum.reduceat(positions, rows)[:, None] - np.minimum.reduceat(positions, cols)
            < window
        )
    return seen, seen & full


def work_items(
    seen: np.ndarray, full: np.ndarray, group: int = 1, limit: int | None = None
) -> tuple[np.ndarray, ...]:
    """Work items (W, 8), heaviest first so that no long one starts last; the lists they walk; slots (S, 2).

    An item is (tile, first entry of its list, full tiles, all tiles, first step, last step + 1, slot or -1, nothing).
    A list walked for `group` heads that takes more than `limit` steps is cut into items that leave their sums in slots
    of their own: (tile, slots of the tile if this is its first, else 0) a slot.
    """
    row, _, tiles = np.nonzero(np.stack((full, seen & ~full), 1))  # by row, full tiles first
    total = np.bincount(row, minlength=len(seen))
    n_full, first = full.sum(1), np.cumsum(total) - total
    items, slots = [], []
    for tile in range(len(seen)):
        steps = int(total[tile]) * group
        pieces = (
            max(1, -(-steps // limit)) if limit else 1
        )  # keys that no query here sees still get their zeros
        size = -(-steps // pieces)
        for piece in range(pieces):
            slot = len(slots) if pieces > 1 else -1
            if pieces > 1:
                slots.append((tile, 0 if piece else pieces))
            low = piece * size
            items.append(
                (tile, first[tile], n_full[tile], total[tile], low, min(steps, low + size), slot, 0)
            )
    items = np.array(items)
    order = np.argsort(items[:, 4] - items[:, 5], kind="stable")
    return items[order], tiles, np.array(slots).reshape(-1, 2)
