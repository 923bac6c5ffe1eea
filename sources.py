"""Words of --data and --eval-data: a file, its weight, the name of the set that it belongs to.

    --data a.jsonl b.jsonl                 all rows, each once an epoch
    --data a.jsonl:0.7 b.jsonl:0.3         a blend: 70 % of the examples come from a.jsonl
    --eval-data chat=a.jsonl math=b.jsonl  two sets, evaluated apart: eval/chat/..., eval/math/...

A path that is there as written comes first, whatever signs are in it.
"""

import glob
import math
import re
from pathlib import Path
from typing import NamedTuple

NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)")
WEIGHTED = re.compile(r"(.+):([-+]?(?:[\d.]+(?:[eE][-+]?\d+)?|nan|inf))")


class Source(NamedTuple):
    """A word of a data flag, taken apart; `str` puts it together again."""

    path: str
    name: str = ""  # of an evaluation set; "" where the word has none
    weight: str = ""  # as it was written; "" where the word has none

    def __str__(self) -> str:
        name = f"{self.name}=" if self.name else ""
        weight = f":{self.weight}" if self.weight else ""
        return f"{name}{self.path}{weight}"


def is_there(path: str) -> bool:
    """Return whether a path, or a pattern of paths, names something on this disk."""
    return Path(path).exists() or bool(glob.glob(path))


def read(word: str, flag: str) -> Source:
    """Take a word apart. flag: "data", whose words may have weights; "eval_data", names."""
    if is_there(word):
        return Source(word)
    if flag == "data" and (match := WEIGHTED.fullmatch(word)):
        return Source(match[1], weight=match[2])
    if flag == "eval_data" and (match := NAMED.fullmatch(word)):
        return Source(match[2], name=match[1])
    return Source(word)


def paths(words: list[str], flag: str) -> list[str]:
    """Return the paths of some words, without weights and names."""
    return [read(word, flag).path for word in words]


def shares(words: list[str]) -> list[float]:
    """Return the share of each word of --data in a blend, in all 1; none where none has a weight.

    ValueError: a weight that is not above 0, or words with and without one.
    """
    sources = [read(word, "data") for word in words]
    if not any(source.weight for source in sources):
        return []
    weights = []
    for source in sources:
        if not source.weight:
            raise ValueError(
                f"--data {source.path} has no weight and others have one: give every file one, as "
                f"in {source.path}:0.5, or none"
            )
        try:
            weight = float(source.weight)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise ValueError(f"--data {source}: the weight after the colon must be above 0")
        weights.append(weight)
    return [weight / sum(weights) for weight in weights]


def refuse_shares(words: list[str], why: str) -> None:
    """Raise ValueError where the words of --data have weights and they would have no effect."""
    if shares(words):
        raise ValueError(f"--data with weights, FILE:WEIGHT, is not supported {why}: drop them")


def named_sets(words: list[str], best_by: str = "") -> dict[str, list[str]]:
    """Return name -> files of the sets of --eval-data, first the one that decides what is best.

    Files without a name are one set, "". best_by: the name of the first one; default: as written.
    ValueError: there is no such set.
    """
    sets: dict[str, list[str]] = {}
    for source in (read(word, "eval_data") for word in words):
        sets.setdefault(source.name, []).append(source.path)
    if best_by and best_by not in sets:
        known = ", ".join(name for name in sets if name) or "none"
        raise ValueError(
            f"--best-by {best_by} is not the name of a set of --eval-data ({known}): name one as "
            f"in --eval-data {best_by}=FILE"
        )
    return dict(sorted(sets.items(), key=lambda item: bool(best_by) and item[0] != best_by))
