import numpy as np

Spans = list[tuple[int, list[int]]]  # of every tree: prompt length, response lengths


BLOCK = 128  # consecutive rows that go to one rank: every query tile below divides it, so that no two ranks share one


def host_layout(spans: Spans) -> tuple[np.ndarray, np.ndarray]:
    """kv_end and positions of the flat row, (T,) each, from the spans alone."""
    sizes, ends, first, start = [], [], [], 0
    for prompt, responses in spans:
        sizes += [prompt, *responses]
        own = start + prompt + np.cumsum([0, *responses])
        ends += [own[-1], *own[1:]]
        first += [start] + [int(at) - prompt for at in own[:-1]]
        start = int(own[-1])
    ends, first, sizes = (np.array(x, np.int64) for x in (ends, first, sizes))
    return np.repeat(ends, sizes), np.arange(start) - np.repeat(first, sizes)


def share_rows(spans: Spans, ranks: int, window: int = 0) -> list[np.ndarray]:
    """Which rows of the flat row each of `ranks` computes the queries of (context parallelism), ascending, (n,) int64.

    Together every row once; no rank has more than one row more than another (some have none where T < ranks); and about
    as many visible (query, key) pairs everywhere: blocks of consecutive rows go round by falling work, in each round
    the heaviest to the rank with the least so far. On one long sequence that is the zig-zag of Llama 3 (section 3.3.2).
    What is left after the last whole round, the lightest blocks and the short one at the end, is cut in equal pieces.
    """
    _, positions = host_layout(spans)
    rows = np.arange(len(positions))
    pairs = (
        np.minimum(positions + 1, window) if window else positions + 1
    )  # keys that each query sees
    size = min(
        BLOCK, 1 << max(0, (len(rows) // (4 * ranks)).bit_length() - 1)
    )  # four rounds at least
    blocks = rows[: len(rows) // size * size].reshape(-1, size)
    blocks = blocks[np.argsort(-pairs[blocks].sum(1), kind="stable")]
    dealt = len(blocks) // ranks * ranks
    rest = np.setdiff1d(rows, blocks[:dealt])
    shares, work = [[] for _ in range(ranks)], np.zeros(ranks, np.int64)
    for pieces in (*blocks[:dealt].reshape(-1, ranks, size), np.array_split(rest, ranks)):
        own = np.array([pairs[piece].sum() for piece in pieces])
        for rank, piece in zip(np.argsort(work, kind="stable"), np.argsort(-own, kind="stable")):
            shares[rank].append(pieces[piece])
            work[rank] += own[piece]
    return [np.sort(np.concatenate(share)) for share in shares]


def query_runs(
    spans: Spans, rows: np.ndarray | None = None
) -> list[tuple[int, int, tuple[int, ...]]]:
    """Cuts rows (all by default) into runs of consecutive queries of one branch, in order: (how many they are, how many
    keys of the branch their last one sees, which parts of the flat row make up the branch).

    A part is a prompt or a response. The prompt's own queries go with the first response: the two are one causal row.
    """
    lengths, before, branches, part = [], [], [], 0
    for prompt, responses in spans:
        lengths += [prompt + sum(responses[:1]), *responses[1:]]
        before += [0, *[prompt] * len(responses[1:])]  # keys of the branch that lie elsewhere
        branches += [(part, part + 1 + i) for i in range(len(responses))] or [(part,)]
        part += 1 + len(responses)
    lengths, before = np.array(lengths, np.int64), np.array(before, np.int64)
    rows = np.arange(lengths.sum()) if rows is None else rows
    branch = np.repeat(np.arange(len(lengths)), lengths)[rows]
    ends = np.flatnonzero((np.diff(rows, append=-1) != 1) | (np.diff(branch, append=-1) != 0))
    counts, last = np.diff(ends, prepend=-1), branch[ends]
    seen = rows[ends] + 1 - (np.cumsum(lengths) - lengths)[last] + before[last]
    return [(n, keys, branches[i]) for n, keys, i in zip(counts.tolist(), seen.tolist(), last)]
