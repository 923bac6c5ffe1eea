"""The geometry of prompt trees in a flat row: who sees whom, at which position, on which rank.

    tree = a prompt, then its responses side by side:   [ p p p p | a a a | b b b b b ]
    row  = trees one after another, without padding

A response sees its prompt and itself, never a sibling: key j is visible to query i iff
j <= i < kv_end[j].

Letters: T tokens of the flat row, n rows that one rank holds.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.device import upload

Spans = list[tuple[int, list[int]]]  # one entry a tree: prompt length, response lengths

# Context parallelism deals blocks of this many consecutive rows to ranks. Every query tile of the
# attention kernels divides it, so that no two ranks compute rows of the same tile.
BLOCK = 128


class QueryRun(NamedTuple):
    """Consecutive queries of one branch (a prompt and one of its responses)."""

    queries: int  # number of queries
    keys: int  # number of keys of the branch that the last query sees
    parts: tuple[int, ...]  # prompt and response of the branch, counted over the row


class TreeLayout:
    """The trees of one flat row, and the part of its queries that this rank computes.

    spans: prompt length and response lengths of every tree, in the order of the row.
    kv_end, positions: (T,) tensors of the whole row, on the device; see `host_layout`.
    rows: under context parallelism, the ascending places of this rank's queries in the row, (n,)
        int64 on the host. None: all queries are here.
    index: `rows` as a tensor on the device, or None.
    sizes: length of every prompt and response, in the order of the row.
    runs: this rank's queries as runs within branches.
    cache: what the attention kernels derive from the layout once and use in every layer.
    """

    def __init__(
        self, spans: Spans, kv_end: Tensor, positions: Tensor, rows: np.ndarray | None = None
    ):
        self.spans = spans
        self.kv_end = kv_end
        self.positions = positions
        self.rows = rows
        self.index = None
        self.sizes = [n for prompt, responses in spans for n in (prompt, *responses)]
        self.runs = query_runs(spans, rows)
        self.cache: dict = {}
        if rows is not None:
            self.index = upload(rows, kv_end.device)

    @classmethod
    def from_spans(cls, spans: Spans, device: torch.device | str = "cpu") -> "TreeLayout":
        """Lay out a row from its spans alone, with all queries here."""
        kv_end, positions = (upload(x, device) for x in host_layout(spans))
        return cls(spans, kv_end.int(), positions)

    def shard(self, rows: np.ndarray) -> "TreeLayout":
        """Return the same trees with only the queries at `rows` here: one share of `share_rows`.

        ValueError: rows are not ascending places of the flat row.
        """
        rows = np.asarray(rows, np.int64)
        if (np.diff(rows, prepend=-1, append=len(self.kv_end)) <= 0).any():
            raise ValueError(
                f"rows must be ascending and distinct, from 0 to {len(self.kv_end) - 1}: sort them"
            )
        return TreeLayout(self.spans, self.kv_end, self.positions, rows)


def host_layout(spans: Spans) -> tuple[np.ndarray, np.ndarray]:
    """Compute kv_end and positions of every token on the host, (T,) int64 each.

    Positions count from the start of the prompt; every response continues from the prompt's end.

        [(2, [1, 2])]  ->  kv_end [5, 5, 3, 5, 5],  positions [0, 1, 2, 2, 3]
    """
    sizes, ends, origins = [], [], []  # of each prompt and response; origin: row of its position 0
    start = 0
    for prompt, responses in spans:
        bounds = start + prompt + np.cumsum([0, *responses])  # where responses begin and end
        sizes += [prompt, *responses]
        ends += [bounds[-1], *bounds[1:]]
        origins += [start, *(bounds[:-1] - prompt)]
        start = int(bounds[-1])
    counts = np.array(sizes, np.int64)
    kv_end = np.repeat(np.array(ends, np.int64), counts)
    return kv_end, np.arange(start) - np.repeat(np.array(origins, np.int64), counts)


def share_rows(spans: Spans, ranks: int, window: int = 0) -> list[np.ndarray]:
    """Deal the rows of the flat row to `ranks` for context parallelism: ascending places of each.

    Every row goes to exactly one rank. Ranks differ by at most one row, and see about equally many
    (query, key) pairs: blocks of consecutive rows are sorted by falling work and dealt in rounds,
    the heaviest block of a round to the rank with the least work so far. On one long sequence this
    is the zig-zag of Llama 3, arXiv 2407.21783 Sec. 3.3.2. The blocks that fill no whole round,
    and the short one at the end, are cut into equal pieces. With T < ranks some ranks get no row.
    """
    _, positions = host_layout(spans)
    rows = np.arange(len(positions))
    keys = np.minimum(positions + 1, window) if window else positions + 1  # seen by each query
    size = min(BLOCK, 1 << max(0, (len(rows) // (4 * ranks)).bit_length() - 1))  # 4 rounds or more
    blocks = rows[: len(rows) // size * size].reshape(-1, size)
    blocks = blocks[np.argsort(-keys[blocks].sum(1), kind="stable")]
    dealt = len(blocks) // ranks * ranks
    rest = np.setdiff1d(rows, blocks[:dealt])

    shares = [[] for _ in range(ranks)]
    work = np.zeros(ranks, np.int64)
    for pieces in (*blocks[:dealt].reshape(-1, ranks, size), np.array_split(rest, ranks)):
        pairs = np.array([keys[piece].sum() for piece in pieces])
        idlest_first = np.argsort(work, kind="stable")
        heaviest_first = np.argsort(-pairs, kind="stable")
        for rank, piece in zip(idlest_first, heaviest_first):
            shares[rank].append(pieces[piece])
            work[rank] += pairs[piece]
    return [np.sort(np.concatenate(share)) for share in shares]


def query_runs(spans: Spans, rows: np.ndarray | None = None) -> list[QueryRun]:
    """Cut the queries at `rows` (default: all) into runs of consecutive queries of one branch.

    A prompt's own queries belong to its first response's branch: the two are one causal sequence.

        [(2, [1, 2])]  ->  QueryRun(3, 3, (0, 1)), QueryRun(2, 4, (0, 2))
    """
    sizes = []  # rows of each branch; a prompt's go to its first response
    before = []  # keys of the branch that lie before those rows: the prompt, from response 2 on
    branches: list[tuple[int, ...]] = []  # its prompt and response, counted over the row
    part = 0
    for prompt, responses in spans:
        sizes += [prompt + sum(responses[:1]), *responses[1:]]
        before += [0, *[prompt] * len(responses[1:])]
        branches += [(part, part + 1 + i) for i in range(len(responses))] or [(part,)]
        part += 1 + len(responses)
    lengths, elsewhere = np.array(sizes, np.int64), np.array(before, np.int64)
    starts = np.cumsum(lengths) - lengths

    rows = np.arange(lengths.sum()) if rows is None else rows
    branch = np.repeat(np.arange(len(lengths)), lengths)[rows]  # of each row
    ends = np.flatnonzero((np.diff(rows, append=-1) != 1) | (np.diff(branch, append=-1) != 0))
    counts = np.diff(ends, prepend=-1)
    last = branch[ends]
    keys = rows[ends] + 1 - starts[last] + elsewhere[last]
    return [
        QueryRun(n, seen, branches[i]) for n, seen, i in zip(counts.tolist(), keys.tolist(), last)
    ]
