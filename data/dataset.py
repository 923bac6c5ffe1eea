"""JSONL files -> a data set of token trees, tokenised once and cached; or prompts to sample from.

    dataset = load_dataset(["prefs.jsonl"], "preference", template, cache="OUT/cache")
    start, end = dataset.tree_start[i : i + 2]
    dataset.tokens[start:end]      # tree i: its prompt, then its responses

Worker processes tokenise the rows (data/encode.py). The arrays are kept in CACHE/<key>/ and
memory-mapped (data/cache.py); the key is the hash of everything that decides them, so a cached data
set is never out of date.

Letters: N tokens, n trees, R responses, M scored tokens.
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

from data.cache import DTYPES, read_meta, write_cache
from data.encode import ROWS, Job, cut_prompt
from data.keys import prompt_in, without
from data.rows import SHOWN, check_bad_rows, existing_files, parse_row, read_lines
from disk import file_sha256

AT_ONCE = 1 << 16  # responses whose tokens are counted at once
FORMAT = 7  # raise it when the same rows would give other arrays, here or in data/formats.py


@dataclass
class Dataset:
    """Token trees in flat arrays. Tree i lies in `tokens` as prompt, response 0, response 1, ...

    Two trees, [1 2 | 3 | 4 5] and [6 | 7]:
        tokens 1 2 3 4 5 6 7    tree_start 0 5 7       prompt_len 2 1
        scored 0 0 1 1 1 0 1    response_start 0 2 3   response_len 1 2 1
    """

    tokens: np.ndarray  # (N,) int32
    scored: np.ndarray  # (N,) uint8: 1 on response tokens that the loss counts, 0 on prompts
    tree_start: np.ndarray  # (n + 1,) int64: index of a tree's first token
    prompt_len: np.ndarray  # (n,) int32
    response_start: np.ndarray  # (n + 1,) int64: index of a tree's first response
    response_len: np.ndarray  # (R,) int32
    # name -> (R,) float32, NaN where a row has no value
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    # rows + split = trees + too_long + bad; all other counts are of the trees kept
    counts: dict[str, int] = field(default_factory=dict)
    key: str = ""  # hash of everything that decides the arrays
    # name -> (N,), meaningful where `scored` is 1
    token_columns: dict[str, np.ndarray] = field(default_factory=dict)
    experts: np.ndarray | None = None  # (N, L, K) int16: of samples, see sampling/chosen.py
    # (files + 1,): number of the first tree of every file; (1,) if the trees are of no file
    file_start: np.ndarray = field(default_factory=lambda: np.zeros(1, np.int64))

    def __len__(self) -> int:
        return len(self.prompt_len)

    def tree_lengths(self, shared: bool = True) -> np.ndarray:
        """Return the tokens of each tree, (n,) int64; not `shared`: a prompt a response."""
        lengths = np.diff(self.tree_start)
        return lengths if shared else lengths + self.prompt_len * (np.diff(self.response_start) - 1)

    def add_tokens(self, name: str, values: np.ndarray) -> None:
        """Add a token column from one value a scored token, (M,) in the order of the data set."""
        column = np.zeros(len(self.tokens), values.dtype)
        column[self.scored == 1] = values
        self.token_columns[name] = column

    @cached_property
    def scored_len(self) -> np.ndarray:
        """Scored tokens of each response, (R,) int64."""
        prompt_tokens = np.cumsum(self.prompt_len)  # up to and including each tree's prompt
        starts = np.repeat(prompt_tokens, np.diff(self.response_start))
        starts = starts + np.cumsum(self.response_len) - self.response_len
        counts = np.zeros(len(starts), np.int64)
        nonempty = np.flatnonzero(self.response_len)
        for low in range(0, len(nonempty), AT_ONCE):  # the sum widens what it reads to int64
            part = nonempty[low : low + AT_ONCE]
            first, last = starts[part[0]], starts[part[-1]] + self.response_len[part[-1]]
            # Between two responses lies a prompt at most, which is not scored.
            scored = self.scored[first:last]
            counts[part] = np.add.reduceat(scored, starts[part] - first, dtype=np.int64)
        return counts

    def responses_of(self, examples: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the numbers of all responses of some trees, in order, int64."""
        trees = np.asarray(examples, np.int64)
        first = self.response_start[trees]
        count = self.response_start[trees + 1] - first
        before = np.cumsum(count) - count  # responses of the trees before each
        return np.repeat(first - before, count) + np.arange(count.sum())


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
    ignore: Iterable[str] = (),
) -> Dataset:
    """Return the rows of JSONL files (.gz too) as token trees, in order; cached between runs.

    kind: "sft", "preference", "label", "attributes" or "weights": the rows of data/formats.py.
    max_length: tokens of a prompt with one response. For a longer one, overlong "drop" removes the
    tree; "truncate" cuts the prompt from the left (bos stays) or, if none would be left, removes
    the tree.
    ignore: keys to leave out of rows and messages.
    workers: processes (None: one a core, at most 32); the arrays do not depend on it.
    FileNotFoundError: a file is missing. ValueError: more bad rows than `max_bad_rows` (the message
    has file:line and reason), or no row is left.
    """
    paths = existing_files([files] if isinstance(files, (str, Path)) else files)
    _check_choice("kind", kind, tuple(ROWS))
    _check_choice("overlong", overlong, ("drop", "truncate"))
    job = Job(paths, kind, template, max_length, overlong, tuple(ignore))
    key = _key(job)
    folder = Path(cache) / key[:32]
    began = time.perf_counter()
    meta = read_meta(folder, key)
    if meta is not None:
        source = f"from cache {folder}"
        check_bad_rows(meta["bad"], meta["counts"]["bad"], paths, max_bad_rows, log)
    else:
        if folder.exists():
            log(
                f"warning: {folder} is damaged (a file is missing or has changed): tokenising again"
            )
        meta = write_cache(folder, key, job, max_bad_rows, workers, log)
        source = f"tokenised in {time.perf_counter() - began:.1f} s"
    dataset = _open(folder, meta)
    log(_summary(dataset, job, source))
    return dataset


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} {value!r} is unknown: use {' or '.join(choices)}")


def _key(job: Job) -> str:
    """Return the hash of everything that decides the arrays, as hex digits."""
    decides = [
        FORMAT,
        job.kind,
        [file_sha256(file) for file in job.files],
        job.template.hash,
        job.template.tokenizer.hash,
        job.max_length,
        job.overlong,
        sorted(job.ignore),
    ]
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _open(folder: Path, meta: dict[str, Any]) -> Dataset:
    """Return the data set of a cache folder, its arrays memory-mapped."""

    def array(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", mmap_mode="r")

    arrays: dict[str, Any] = {name: array(name) for name in DTYPES}
    columns = {name.removeprefix("column_"): array(name) for name in meta["columns"]}
    file_start = np.cumsum([0, *meta["file_trees"]])
    return Dataset(
        **arrays, columns=columns, counts=meta["counts"], key=meta["key"], file_start=file_start
    )


def _summary(dataset: Dataset, job: Job, source: str) -> str:
    """Return lines for the log: rows kept, what was dropped or changed, how long the rest is."""
    names = ", ".join(file.name for file in job.files)
    counts = dataset.counts
    lines = [
        f"{names}: {counts['rows']:,} rows, {len(dataset):,} kept, {counts['tokens']:,} tokens; "
        f"{source}{_ignored(counts)}"
    ]
    notes = [f"{counts[name]:,} {words}" for name, words in NOTES.items() if counts[name]]
    if counts["too_long"]:
        notes.insert(0, f"{counts['too_long']:,} dropped as longer than {job.max_length} tokens")
    if notes:
        lines.append("  " + "; ".join(notes))
    shares = ", ".join(f"{share} %" for share in SHARES)
    prompts = _percentiles(dataset.prompt_len)
    responses = _percentiles(dataset.response_len)
    lines.append(f"  tokens at {shares}: prompt {prompts}; response {responses}")
    return "\n".join(lines)


SHARES = (50, 90, 99, 100)  # percentiles of the lengths


def _percentiles(lengths: np.ndarray) -> str:
    """Return some percentiles of lengths, each that of an item of the data."""
    values = np.percentile(np.asarray(lengths), SHARES, method="inverted_cdf")
    return ", ".join(f"{value:,}" for value in values)


NOTES = {  # count -> what it says; left out where there is none
    "truncated": "truncated: their prompts were cut from the left",
    "identical": "pairs with identical responses",
    "bad": "unreadable, left out",
    "moved": "rows whose border between prompt and response a token would have crossed",
    "split": "trees more, because the template writes earlier turns in another way: one a turn",
    "own_ends": "rows with a bos or an end of turn of their own, not doubled",
    "control": "rows with control tokens in their texts",
}


def _ignored(counts: dict[str, int]) -> str:
    """Return which keys of the rows were ignored, and in how many."""
    prefix = "ignored "
    keys = [
        f"{name.removeprefix(prefix)} ({n})"
        for name, n in counts.items()
        if name.startswith(prefix)
    ]
    return f"; keys ignored: {', '.join(sorted(keys))}" if keys else ""


def from_trees(
    trees: Iterable[tuple[Any, list[tuple[Any, Any]]]],
    columns: dict[str, np.ndarray] | None = None,
    key: str = "",
) -> Dataset:
    """Return a data set in memory from one (prompt ids, [(response ids, scored), ...]) a tree."""
    tokens = []
    scored = []
    prompt_len = []
    response_len = []
    tree_len = []
    responses = []
    for prompt, answers in trees:
        tokens.append(prompt)
        scored.append(np.zeros(len(prompt), np.uint8))
        for ids, flags in answers:
            tokens.append(ids)
            scored.append(flags)
        lengths = [len(ids) for ids, _ in answers]
        prompt_len.append(len(prompt))
        response_len += lengths
        tree_len.append(len(prompt) + sum(lengths))
        responses.append(len(answers))
    return Dataset(
        tokens=np.concatenate(tokens).astype(np.int32),
        scored=np.concatenate(scored).astype(np.uint8),
        tree_start=np.cumsum([0, *tree_len]),
        prompt_len=np.array(prompt_len, np.int32),
        response_start=np.cumsum([0, *responses]),
        response_len=np.array(response_len, np.int32),
        columns=columns or {},
        key=key,
    )


class Prompts(NamedTuple):
    """Prompts to sample responses to, in lists of the same length."""

    rows: list[dict[str, Any]]  # as in the files, for the reward function
    prompts: list[Any]  # text or messages
    ids: list[list[int]]
    files: tuple[int, ...] = ()  # number of each prompt's file; () if they are of none
    n_files: int = 0

    @property
    def file_start(self) -> np.ndarray:
        """Number of the first prompt of every file, in order, and the end: (files + 1,)."""
        return np.searchsorted(self.files, np.arange(self.n_files + 1))

    def take(self, items: Sequence[int] | np.ndarray) -> "Prompts":
        """Return some of them, in the order given."""
        return Prompts(
            [self.rows[i] for i in items],
            [self.prompts[i] for i in items],
            [self.ids[i] for i in items],
            tuple(self.files[i] for i in items) if self.files else (),
            self.n_files,
        )


def load_prompts(
    files: Iterable[str | Path],
    template: Any,
    max_length: int,
    overlong: str = "drop",
    max_bad_rows: int = 0,
    log: Callable[[str], Any] = print,
    ignore: Iterable[str] = (),
) -> Prompts:
    """Return the prompts of JSONL files with rows of any kind; responses stay in `rows`, unused.

    max_length: tokens of a prompt. A longer one is removed (overlong "drop") or cut from the left,
    bos kept (overlong "truncate"). ignore: keys to leave out of rows and messages; the reward still
    sees them.
    FileNotFoundError: a file is missing. ValueError: more bad rows than `max_bad_rows`, or no
    prompt is left.
    """
    paths = existing_files(files)
    skipped = set(ignore)
    kept = Prompts([], [], [])
    numbers = []  # of the files
    counts: Counter = Counter()
    bad = []
    for file, number, line in read_lines(paths):
        counts["rows"] += 1
        try:
            row = parse_row(line)
            prompt = prompt_in(without(row, skipped), template.plain)
            ids = template.prompt(prompt)
        except ValueError as error:
            bad.append((file, number, str(error)))
            continue
        if len(ids) > max_length:
            counts["too_long"] += 1
            ids = cut_prompt(ids, max_length, template.tokenizer.bos, overlong)
        if ids is not None:
            kept.rows.append(row)
            kept.prompts.append(prompt)
            kept.ids.append(ids)
            numbers.append(file)
    check_bad_rows(bad[:SHOWN], len(bad), paths, max_bad_rows, log)
    names = ", ".join(file.name for file in paths)
    too_long = f"{counts['too_long']} longer than {max_length} tokens ({overlong})"
    if not kept.ids:
        raise ValueError(
            f"{names}: no prompt is left of {counts['rows']} rows, {too_long}: raise --max-length"
        )
    log(f"{names}: {counts['rows']} rows, {len(kept.ids)} prompts kept, {too_long}, {len(bad)} bad")
    return kept._replace(files=tuple(numbers), n_files=len(paths))
