"""JSONL files -> token trees on disk: read, tokenised once in parallel, cached, memory-mapped.

    dataset = load_dataset(["prefs.jsonl"], "preference", template, max_length=1024, cache="OUT/cache")
    a, b = dataset.tree_start[i : i + 2]     # tree i, its prompt and then its responses: dataset.tokens[a:b]

Letters: N tokens, n trees, R responses. The folder CACHE/<key>/ holds one .npy a field and meta.json; the key is the
hash of everything that decides the arrays, so a cached data set can be used or thrown away but never be out of date.
"""

import contextlib
import gzip
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import uuid
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike
from tqdm import tqdm

from data.formats import (
    Row,
    attribute_row,
    label_row,
    preference_row,
    prompt_of,
    sft_row,
    weight_row,
)

FORMAT = 2  # raise it whenever the same rows would give other arrays, here or in data/formats.py
SHOWN = 10  # bad rows printed, and kept in the cache
CHUNK_ROWS, CHUNK_BYTES = (
    256,
    1 << 19,
)  # what a worker is handed at a time; a file of one chunk needs no workers

ROWS: dict[str, Callable[[dict, bool], Row]] = {
    "sft": lambda row, plain: sft_row(row), "preference": preference_row, "label": label_row,
    "attributes": lambda row, plain: attribute_row(row), "weights": lambda row, plain: weight_row(row),
}  # fmt: skip
DTYPES: dict[str, type[np.generic]] = {
    "tokens": np.int32, "scored": np.uint8, "tree_start": np.int64, "prompt_len": np.int32,
    "response_start": np.int64, "response_len": np.int32,
}  # fmt: skip


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


class _Job(NamedTuple):
    files: list[Path]
    kind: str
    template: Any
    max_length: int
    overlong: str


class _Chunk(NamedTuple):
    """Trees of some consecutive lines, as arrays: little to send between processes, little to hold."""

    arrays: dict[
        str, np.ndarray
    ]  # those of Dataset, lengths for starts: tree_len (tokens), responses (of a tree)
    counts: dict[str, int]
    bad: list[tuple[int, int, str]]  # file, line, reason


def _encode_lines(job: _Job, lines: list[tuple[int, int, bytes]]) -> _Chunk:
    """Lines (file, line number, bytes) -> trees. Pure: the same lines give the same trees in any process."""
    # array.array, not lists of int: a chunk of tokens must not cost eight times its size
    counts = dict.fromkeys(("too_long", "truncated", "moved", "identical"), 0)
    bad, columns = [], {}
    tokens, scored, tree_len = array("i"), array("B"), []
    prompt_len, response_len, responses = [], [], []
    for file, number, line in lines:
        try:
            row = ROWS[job.kind](_parse(line), job.template.plain)
            prompt, answers, moved = _tokenise(row, job.template)
        except ValueError as error:
            bad.append((file, number, str(error)))
            continue
        longest = max(len(ids) for ids, _ in answers)
        cut = len(prompt) + longest > job.max_length
        if cut:
            prompt = _cut(
                prompt, job.max_length - longest, job.template.tokenizer.bos, job.overlong
            )
        if prompt is None:
            counts["too_long"] += 1
            continue
        counts["truncated"] += cut
        counts["moved"] += moved
        counts["identical"] += len(row.responses) > 1 and all(
            r == row.responses[0] for r in row.responses
        )
        before = len(tokens)
        tokens.extend(prompt)
        scored.extend([0] * len(prompt))
        for ids, flags in answers:
            tokens.extend(ids)
            scored.extend(flags)
        tree_len.append(len(tokens) - before)
        prompt_len.append(len(prompt))
        response_len += [len(ids) for ids, _ in answers]
        responses.append(len(answers))
        for name, values in row.columns.items():
            columns.setdefault(f"column_{name}", []).extend(values)
    arrays: dict[str, np.ndarray] = {
        "tokens": np.array(tokens, np.int32),
        "scored": np.array(scored, np.uint8),
        "prompt_len": np.array(prompt_len, np.int32),
        "response_len": np.array(response_len, np.int32),
        "tree_len": np.array(tree_len, np.int64),
        "responses": np.array(responses, np.int64),
    } | {name: np.array(values, np.float32) for name, values in columns.items()}
    counts |= {
        "rows": len(lines),
        "bad": len(bad),
        "trees": len(prompt_len),
        "responses": len(response_len),
    }
    counts |= {"tokens": len(tokens), "scored": sum(scored)}
    return _Chunk(arrays, counts, bad)


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}: save the file as UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply for JSON data") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"not JSON that can be read: {error}") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object {...}: JSONL holds one object a line")
    return row


def _tokenise(row: Row, template: Any) -> tuple[list[int], list[tuple[list[int], list[int]]], bool]:
    """(prompt ids, a (ids, scored) for each response, whether the border between them moved)."""
    if row.prompt is None:
        prompt, answer = template.conversation(row.responses[0])
        answers, moved = [answer], False
    else:
        prompt, answers, moved = template.pair(row.prompt, row.responses)
    if not prompt:
        raise ValueError(
            "the prompt has no tokens, so nothing predicts the first of the response: write a prompt"
        )
    if not all(any(scored) for _, scored in answers):
        raise ValueError("a response has no token to learn from: write one")
    return prompt, answers, moved


def _cut(prompt: list[int], room: int, bos: int | None, overlong: str) -> list[int] | None:
    """The prompt's last tokens in `room`, behind its bos; None when the tree has to go."""
    head = prompt[:1] if prompt[0] == bos and len(prompt) > 1 else []
    if overlong == "drop" or room <= len(head):  # at least one token of the prompt itself stays
        return None
    return head + prompt[len(prompt) - (room - len(head)) :]


def read_rows(file: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file (.gz too) as they are. ValueError names file:line of one that cannot be read."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist")
    for _, number, line in _lines([Path(file)]):
        try:
            yield _parse(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from None


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> str:
    """Writes a JSONL file, whole or not at all; returns its name."""
    partial = Path(f"{path}.partial")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # Half of a surrogate pair is no UTF-8, but JSON has an escape for it, and this is how Python spells it too.
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)
    return str(path)


# Lines to chunks, chunks to files: what the parent does.


def _lines(files: list[Path]) -> Iterator[tuple[int, int, bytes]]:
    for index, file in enumerate(files):
        try:
            with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as stream:
                for number, line in enumerate(stream, 1):
                    if number == 1:
                        line = line.removeprefix(
                            b"\xef\xbb\xbf"
                        )  # a byte order mark, as some editors write
                    if line.strip():
                        yield index, number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{file}: not a whole gzip file ({error}): fetch or compress it again"
            ) from None


def _chunks(files: list[Path]) -> Iterator[list[tuple[int, int, bytes]]]:
    chunk, size = [], 0
    for line in _lines(files):
        chunk.append(line)
        size += len(line[2])
        if len(chunk) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _encode(job: _Job, workers: int | None) -> Generator[_Chunk, None, None]:
    """Every chunk encoded, in file order; by forked workers when there is more than one chunk."""
    chunks = _chunks(job.files)
    head = list(islice(chunks, 2))
    if workers is None:
        workers = min(
            32,
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
        )
    if workers <= 1 or len(head) < 2 or "fork" not in multiprocessing.get_all_start_methods():
        yield from (_encode_lines(job, chunk) for chunk in chain(head, chunks))
        return
    # Not multiprocessing.Pool, which waits for ever for a worker that was killed. Forked workers inherit the template.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (job,))
    waiting = deque()
    try:
        for chunk in chain(head, chunks):
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if (
                len(waiting) > 3 * workers
            ):  # enough to keep them busy; what is read but not written stays small
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a tokenising worker was killed (out of memory?): free memory, or use workers=1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_job: _Job  # a worker's own, set once it is forked


def _start_worker(job: _Job) -> None:
    global _job
    _job = job
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the parent, which ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = (
        multiprocessing.parent_process()
    )  # a parent killed with -9 must not leave its workers waiting for ever

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _encode_in_worker(chunk: list[tuple[int, int, bytes]]) -> _Chunk:
    return _encode_lines(_job, chunk)


def _build(
    folder: Path,
    key: str,
    job: _Job,
    max_bad_rows: int,
    workers: int | None,
    log: Callable[[str], Any],
) -> dict[str, Any]:
    """Tokenise into a temporary folder, then rename it to `folder`: readers see all of it or nothing. Returns meta."""
    temporary = folder.parent / f".partial-{uuid.uuid4().hex}"
    temporary.mkdir(parents=True)
    counts, bad, streams, lengths = {}, [], {}, {}

    def append(name: str, values: np.ndarray) -> None:
        if name not in streams:
            streams[name] = open(temporary / f"{name}.npy", "wb")  # noqa: SIM115 (closed below, with the others)
            _write_header(streams[name], values.dtype, 0)
            lengths[name] = 0
        streams[name].write(values.tobytes())
        lengths[name] += len(values)

    try:
        ends = {"tree_start": np.int64(0), "response_start": np.int64(0)}
        for name, end in ends.items():
            append(name, np.array([end]))
        with (
            contextlib.closing(_encode(job, workers)) as chunks,
            tqdm(unit=" rows", disable=None, delay=2) as bar,
        ):
            for arrays, chunk_counts, chunk_bad in chunks:
                counts = {name: counts.get(name, 0) + n for name, n in chunk_counts.items()}
                bad = (bad + chunk_bad)[:SHOWN]
                if counts["bad"] > max_bad_rows:
                    break
                for name, lens in (
                    ("tree_start", arrays.pop("tree_len")),
                    ("response_start", arrays.pop("responses")),
                ):
                    starts = ends[name] + np.cumsum(lens)
                    append(name, starts)
                    ends[name] = starts[-1] if len(starts) else ends[name]
                for name, values in arrays.items():
                    append(name, values)
                bar.update(chunk_counts["rows"])
        _check_bad(bad, counts.get("bad", 0), job.files, max_bad_rows, log)
        if not lengths.get("prompt_len"):
            raise ValueError(_why_empty(counts, job))
        for name, stream in streams.items():
            stream.seek(0)
            _write_header(stream, DTYPES.get(name, np.float32), lengths[name])
            _sync(stream)
        sizes = {name: (temporary / f"{name}.npy").stat().st_size for name in streams}
        columns = [name for name in streams if name not in DTYPES]
        meta = {"key": key, "counts": counts, "bad": bad, "columns": columns, "bytes": sizes}
        with open(temporary / "meta.json", "w") as file:
            json.dump(meta, file, indent=1)
            _sync(file)
        _publish(temporary, folder, key)
        return meta
    finally:
        for stream in streams.values():
            stream.close()
        shutil.rmtree(temporary, ignore_errors=True)


def _write_header(stream: BinaryIO, dtype: DTypeLike, length: int) -> None:
    """The .npy header of a flat array. NumPy leaves room in it for the length to grow, so it can be written again."""
    head = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stream, head)


def _sync(stream: IO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _publish(temporary: Path, folder: Path, key: str) -> None:
    """Rename to `folder`. Whoever was faster with the same key wrote the same arrays; a damaged folder makes way."""
    _sync_folder(temporary)
    for _ in range(100):
        try:
            temporary.rename(folder)
            _sync_folder(folder.parent)
            return
        except OSError:
            if not folder.exists():
                raise
        if _intact(folder, key):
            return
        with contextlib.suppress(FileNotFoundError):  # another process may have moved it away first
            shutil.rmtree(folder.rename(folder.parent / f".partial-{uuid.uuid4().hex}"))
    raise OSError(f"{folder}: cannot be replaced: remove it by hand")


def _intact(folder: Path, key: str) -> dict[str, Any] | None:
    """meta.json of a cached data set whose files are all there in the right size, else None."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        whole = all(
            (folder / f"{name}.npy").stat().st_size == size for name, size in meta["bytes"].items()
        )
        return meta if whole and meta["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _check_bad(
    bad: list, total: int, files: list[Path], max_bad_rows: int, log: Callable[[str], Any]
) -> None:
    """Print the first bad rows; ValueError when there are more than allowed."""
    reports = [f"{files[file]}:{line}: {reason}" for file, line, reason in bad]
    for report in reports:
        log(f"bad row {report}")
    if total > len(reports):
        log(f"... and {total - len(reports)} more bad rows")
    if total > max_bad_rows:
        raise ValueError(
            f"{reports[0]} ({total} bad so far: repair the data or raise --max-bad-rows {max_bad_rows})"
        )


def _why_empty(counts: dict[str, int], job: _Job) -> str:
    names = ", ".join(map(str, job.files)) or "no files"
    if not counts.get("rows"):
        return f"{names}: no rows: give JSONL files, one JSON object a line"
    if counts["too_long"]:
        what = (
            f"{counts['too_long']} of {counts['rows']} rows are longer than {job.max_length} tokens"
        )
        return f"{names}: nothing is left, {what}: raise --max-length or use --overlong truncate"
    return f"{names}: nothing is left, all {counts['rows']} rows are bad: repair the data"


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
