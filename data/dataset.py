"""JSONL files -> token trees on disk: read, tokenised once in parallel, cached, memory-mapped.

    dataset = load_dataset(["prefs.jsonl"], "preference", template, max_length=1024, cache="OUT/cache")
    a, b = dataset.tree_start[i : i + 2]     # tree i, its prompt and then its responses: dataset.tokens[a:b]

Letters: N tokens, n trees, R responses. The folder CACHE/<key>/ holds one .npy a field and meta.json; the key is the
hash of everything that decides the arrays, so a cached data set can be used or thrown away but never be out of date.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.cache import DTYPES, SHOWN, _build, _check_bad, _intact, _sha256
from data.encode import ROWS, _cut, _Job
from data.formats import (
    prompt_of,
)
from data.rows import _lines, _parse

FORMAT = 2  # raise it whenever the same rows would give other arrays, here or in data/formats.py


@dataclass
class Dataset:
    """Token trees in flat arrays. Tree i lies in `tokens` as prompt, response 0, response 1, ..."""

    tokens: np.ndarray  # (N,) int32
    scored: np.ndarray  # (N,) uint8, 1 where a response token is learned from
    tree_start: np.ndarray  # (n + 1,) int64, index of a tree's first token
    prompt_len: np.ndarray  # (n,) int32
    response_start: np.ndarray  # (n + 1,) int64, index of a tree's first response
    response_len: np.ndarray  # (R,) int32
    columns: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # name -> (R,) float32, NaN where a row gave none
    counts: dict[str, int] = field(
        default_factory=dict
    )  # rows = trees + too_long + bad; the rest is of trees kept
    key: str = ""  # hash of everything that decided the arrays
    token_columns: dict[str, np.ndarray] = field(
        default_factory=dict
    )  # name -> (N,), of meaning where `scored` is 1

    def __len__(self) -> int:
        return len(self.prompt_len)

    def tree_lengths(self, shared: bool = True) -> np.ndarray:
        """Tokens of each tree, (n,) int64; `shared` False counts the prompt once for every response."""
        lengths = np.diff(self.tree_start)
        return lengths if shared else lengths + self.prompt_len * (np.diff(self.response_start) - 1)

    def add_tokens(self, name: str, values: np.ndarray) -> None:
        """Keeps a value of every scored token, (M,) in the order of the data set, as a token column."""
        column = np.zeros(len(self.tokens), values.dtype)
        column[self.scored == 1] = values
        self.token_columns[name] = column

    @cached_property
    def scored_len(self) -> np.ndarray:
        """Scored tokens of each response, (R,) int64."""
        prompts = np.repeat(
            np.cumsum(self.prompt_len), np.diff(self.response_start)
        )  # tokens of all up to its own
        starts = prompts + np.cumsum(self.response_len) - self.response_len
        counts, full = np.zeros(len(starts), np.int64), np.asarray(self.response_len) > 0
        if full.any():  # what lies between two responses is a prompt, which is not scored
            counts[full] = np.add.reduceat(self.scored, starts[full], dtype=np.int64)
        return counts

    def responses_of(self, examples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Numbers of all responses of some trees, in order."""
        starts, ends = self.response_start[:-1], self.response_start[1:]
        return np.concatenate(
            [np.arange(starts[i], ends[i]) for i in examples] or [np.empty(0, np.int64)]
        )


def load_dataset(
    files: str | Path | Iterable[str | Path],
    kind: str,
    template: Any,
    max_length: int = 1024,
    overlong: str = "drop",
    max_bad_rows: int = 0,
    cache: str | Path = "cache",
    workers: int | None = None,
    log: Callable[[str], Any] = print,
) -> Dataset:
    """Rows of the JSONL files (.gz too), in order, as token trees; read from `cache` when they were tokenised before.

    kind: "sft", "preference", "label", "attributes" or "weights": the rows are in data/formats.py. A response with its
    prompt longer than `max_length` tokens: "drop" removes the whole tree, "truncate" cuts the prompt from the left (bos
    stays) and removes the tree only when no prompt would be left.
    The arrays do not depend on `workers` (None: one a core, at most 32).
    Raises FileNotFoundError for a missing file, ValueError for more bad rows than `max_bad_rows` (the message has
    file:line and reason) and when no row is left.
    """
    paths = [Path(f) for f in ([files] if isinstance(files, (str, Path)) else files)]
    for name, value, known in (
        ("kind", kind, tuple(ROWS)),
        ("overlong", overlong, ("drop", "truncate")),
    ):
        if value not in known:
            raise ValueError(f"{name} {value!r} is not known: use {' or '.join(known)}")
    for file in paths:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file: give JSONL files, one JSON object a line"
            )
    decides = [
        FORMAT,
        kind,
        [_sha256(f) for f in paths],
        template.hash,
        template.tokenizer.hash,
        max_length,
        overlong,
    ]
    key = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
    folder = Path(cache) / key[:32]
    began = time.perf_counter()
    meta, source = None, f"from cache {folder}"
    if folder.exists():
        meta = _intact(folder, key)
        if meta is None:
            log(
                f"warning: {folder} is damaged (a file is missing or has the wrong size): tokenising again"
            )
    if meta is None:
        meta = _build(
            folder,
            key,
            _Job(paths, kind, template, max_length, overlong),
            max_bad_rows,
            workers,
            log,
        )
        source = f"tokenised in {time.perf_counter() - began:.1f} s"
    else:
        _check_bad(meta["bad"], meta["counts"]["bad"], paths, max_bad_rows, log)
    arrays = {
        name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in (*DTYPES, *meta["columns"])
    }
    columns = {name.removeprefix("column_"): arrays.pop(name) for name in meta["columns"]}
    dataset = Dataset(**arrays, columns=columns, counts=meta["counts"], key=key)
    log(_summary(dataset, paths, max_length, source))
    return dataset


def from_trees(
    trees: Iterable[tuple[Any, list[tuple[Any, Any]]]],
    columns: dict[str, np.ndarray] | None = None,
    key: str = "",
) -> Dataset:
    """A data set in memory from (prompt ids, [(response ids, scored), ...]) a tree, as template.pair gives them."""
    parts, flags, prompt_len, response_len, responses = [], [], [], [], []
    for prompt, answers in trees:
        parts += [prompt, *(ids for ids, _ in answers)]
        flags += [np.zeros(len(prompt)), *(scored for _, scored in answers)]
        prompt_len.append(len(prompt))
        response_len += [len(ids) for ids, _ in answers]
        responses.append(len(answers))
    response_start = np.cumsum([0, *responses])
    ends = np.cumsum([0, *response_len])[response_start]
    return Dataset(
        tokens=np.concatenate(parts).astype(np.int32),
        scored=np.concatenate(flags).astype(np.uint8),
        tree_start=np.cumsum([0, *prompt_len]) + ends,
        prompt_len=np.array(prompt_len, np.int32),
        response_start=response_start,
        response_len=np.array(response_len, np.int32),
        columns=columns or {},
        key=key,
    )


class Prompts(NamedTuple):
    """Prompts that wait for an answer, n of each."""

    rows: list[dict[str, Any]]  # as in the files, for a reward to look at
    prompts: list[Any]  # text or messages
    ids: list[list[int]]

    def take(self, items: Iterable[int]) -> "Prompts":
        """Some of them, in the order given."""
        return Prompts(
            [self.rows[i] for i in items],
            [self.prompts[i] for i in items],
            [self.ids[i] for i in items],
        )


def load_prompts(
    files: Iterable[str | Path],
    template: Any,
    max_length: int,
    overlong: str = "drop",
    max_bad_rows: int = 0,
    log: Callable[[str], Any] = print,
) -> Prompts:
    """The prompts of JSONL files, rows of any kind; answers that a row has stay in the row.

    max_length: tokens of a prompt; a longer one goes, or with overlong "truncate" loses its beginning (bos stays).
    Raises FileNotFoundError for a missing file, ValueError for more bad rows than `max_bad_rows` and when none is left.
    """
    paths = [Path(f) for f in files]
    for file in paths:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file}: no such file: give JSONL files, one JSON object a line"
            )
    kept, counts, bad = Prompts([], [], []), Counter(), []
    for place, number, line in _lines(paths):
        counts["rows"] += 1
        try:
            row = _parse(line)
            prompt = prompt_of(row, template.plain)
            ids = template.prompt(prompt)
        except ValueError as error:
            bad.append((place, number, str(error)))
            continue
        if len(ids) > max_length:
            counts["too_long"] += 1
            ids = _cut(ids, max_length, template.tokenizer.bos, overlong)
        if ids is not None:
            kept.rows.append(row)
            kept.prompts.append(prompt)
            kept.ids.append(ids)
    _check_bad(bad[:SHOWN], len(bad), paths, max_bad_rows, log)
    names = ", ".join(f.name for f in paths)
    what = f"{counts['too_long']} longer than {max_length} tokens ({overlong})"
    if not kept.ids:
        raise ValueError(
            f"{names}: no prompt is left of {counts['rows']} rows, {what}: raise --max-length"
        )
    log(f"{names}: {counts['rows']} rows, {len(kept.ids)} prompts kept, {what}, {len(bad)} bad")
    return kept


def _summary(dataset: Dataset, files: list[Path], max_length: int, source: str) -> str:
    c, trees, responses = dataset.counts, len(dataset), len(dataset.response_len)
    prompt, response = dataset.prompt_len.sum() / trees, dataset.response_len.sum() / responses
    pairs = f", {c['identical']} with identical responses" if responses > trees else ""
    return (
        f"{', '.join(f.name for f in files)}: {c['rows']} rows, {trees} kept ({c['truncated']} truncated, "
        f"{c['moved']} borders moved{pairs}), {c['too_long']} dropped as longer than {max_length}, {c['bad']} bad; "
        f"{c['tokens']:,} tokens, mean prompt {prompt:.1f}, mean response {response:.1f}; {source}"
    )


# Rows to trees: what a worker does.


# Lines to chunks, chunks to files: what the parent does.
