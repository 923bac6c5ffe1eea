"""A weighted blend of training files: which row of which file each example of an epoch is.

    blend = make_blend(["a.jsonl:0.7", "b.jsonl:0.3"], file_start)
    blend.epoch(0, seed=7, shuffle=True)    # (n,) examples, n as many as there are rows

An epoch has as many examples as the files have rows. Every file gives its share of them, spread
evenly: any stretch of an epoch holds a file's share of it to within one example for each file. A
file is read in passes, each a new order of its rows, and the next epoch goes on where the last one
ended; so no row is read a second time before all rows of its file were read once. All is a function
of the seed and the epoch, and a resumed run needs nothing else.

Letters: n examples of an epoch, F files.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

import sources
from data.rows import existing_files


@dataclass(frozen=True)
class Blend:
    """Files in one data set, and how many examples of an epoch each gives."""

    names: tuple[str, ...]  # of the files or patterns, (F,)
    start: tuple[int, ...]  # number of the first example of each, and the end, (F + 1,)
    quota: tuple[int, ...]  # examples an epoch, (F,); their sum is start[-1]

    def epoch(self, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
        """Return the examples of an epoch in order, (n,) int64, not to be written to."""
        return _epoch(self, epoch, seed, shuffle)

    def describe(self) -> str:
        """Return a line: the share of every file, and how often an epoch reads its rows."""
        total = self.start[-1]
        parts = []
        for name, first, end, quota in zip(self.names, self.start, self.start[1:], self.quota):
            size = end - first
            parts.append(
                f"{name} {quota:,} ({quota / total:.1%}) of {size:,} rows, each "
                f"{quota / size:.2f} times"
            )
        return f"blend, examples an epoch: {'; '.join(parts)}"


def make_blend(words: list[str], file_start: np.ndarray) -> Blend | None:
    """Return the blend that the words of --data ask for; None where they have no weights.

    file_start: number of the first example of every file that the words name, and the end.
    ValueError: weights that cannot be, a file without rows, or one that an epoch would not read.
    """
    shares = sources.shares(words)
    if not shares:
        return None
    names = sources.paths(words, "data")
    files = np.cumsum([0, *(len(existing_files([name])) for name in names)])
    start = np.asarray(file_start)[files]
    total = int(start[-1])
    # Largest remainders: whole numbers whose sum is the total.
    exact = np.array(shares) * total
    quota = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: total - quota.sum()]] += 1
    for name, size, count in zip(names, np.diff(start), quota):
        if not size:
            raise ValueError(f"--data {name} has a weight, and no row of it is left: drop it")
        if not count:
            raise ValueError(
                f"--data {name}: its share of {total:,} examples is less than one: raise its weight"
            )
    return Blend(tuple(names), tuple(start.tolist()), tuple(quota.tolist()))


@lru_cache(maxsize=2)
def _epoch(blend: Blend, epoch: int, seed: int, shuffle: bool) -> np.ndarray:
    """Return the examples of an epoch in order, (n,); kept, since every step asks for some."""
    picks, times = [], []
    for file, (first, end, quota) in enumerate(zip(blend.start, blend.start[1:], blend.quota)):
        size = end - first
        passes, place = np.divmod(epoch * quota + np.arange(quota), size)
        if shuffle:
            for number in np.unique(passes):
                inside = passes == number
                order = np.random.default_rng([seed, int(number), file]).permutation(size)
                place[inside] = order[place[inside]]
        picks.append(first + place)
        times.append((np.arange(quota) + 0.5) / quota)
    order = np.argsort(np.concatenate(times), kind="stable")
    examples = np.concatenate(picks)[order]
    examples.setflags(write=False)
    return examples
