"""Lines of JSONL files -> token trees, chunk by chunk, in forked worker processes.

The trees depend on the lines alone: any number of workers gives the same chunks in the same order.
"""

import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.chat import SPOKEN, Messages
from data.formats import (
    Row,
    attribute_row,
    label_row,
    preference_row,
    sft_row,
    weight_row,
    with_options,
)
from data.keys import canonical, check_used, without
from data.rows import BadRow, Line, parse_row, read_lines

CHUNK_ROWS = 256  # rows of one task of a worker; a file of one chunk needs no workers
CHUNK_BYTES = 1 << 19  # the same limit in bytes, for long rows
MAX_WORKERS = 32

# kind -> function of (JSON object, keep HH transcripts as text) -> Row
ROWS: dict[str, Callable[[dict, bool], Row]] = {
    "sft": sft_row,
    "preference": preference_row,
    "label": label_row,
    "attributes": lambda row, plain: attribute_row(row),
    "weights": lambda row, plain: weight_row(row),
}

Answer = tuple[list[int], list[int]]  # ids of a response, and 1 for each that is scored, else 0


class Job(NamedTuple):
    """Everything that decides the trees."""

    files: list[Path]
    kind: str  # a key of ROWS
    template: Any
    max_length: int  # tokens of a prompt with one response
    overlong: str  # "drop" or "truncate"
    ignore: tuple[str, ...] = ()  # keys to leave out of rows and messages


class Chunk(NamedTuple):
    """Trees of consecutive lines, as arrays: compact to send between processes and to hold."""

    # Those of Dataset, with lengths in place of starts: tree_len (tokens), responses (of a tree).
    arrays: dict[str, np.ndarray]
    counts: dict[str, int]
    bad: list[BadRow]
    file_trees: dict[int, int]  # number of a file -> its trees here


@dataclass
class _Trees:
    """Trees added one by one, in compact arrays: a list of int takes eight times the memory."""

    tokens: array = field(default_factory=lambda: array("i"))
    scored: array = field(default_factory=lambda: array("B"))
    tree_len: list[int] = field(default_factory=list)
    prompt_len: list[int] = field(default_factory=list)
    response_len: list[int] = field(default_factory=list)
    responses: list[int] = field(default_factory=list)
    columns: dict[str, list[float]] = field(default_factory=dict)

    def add(
        self, prompt: list[int], answers: list[Answer], columns: dict[str, list[float]]
    ) -> None:
        """Append a tree and its columns."""
        start = len(self.tokens)
        self.tokens.extend(prompt)
        self.scored.extend([0] * len(prompt))
        for ids, scored in answers:
            self.tokens.extend(ids)
            self.scored.extend(scored)
            self.response_len.append(len(ids))
        self.tree_len.append(len(self.tokens) - start)
        self.prompt_len.append(len(prompt))
        self.responses.append(len(answers))
        for name, values in columns.items():
            self.columns.setdefault(name, []).extend(values)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays of a Chunk."""
        arrays: dict[str, np.ndarray] = {
            "tokens": np.array(self.tokens, np.int32),
            "scored": np.array(self.scored, np.uint8),
            "prompt_len": np.array(self.prompt_len, np.int32),
            "response_len": np.array(self.response_len, np.int32),
            "tree_len": np.array(self.tree_len, np.int64),
            "responses": np.array(self.responses, np.int64),
        }
        for name, values in self.columns.items():
            arrays[f"column_{name}"] = np.array(values, np.float32)
        return arrays


def encode_lines(job: Job, lines: list[Line]) -> Chunk:
    """Turn lines into trees. Pure: the same lines give the same trees in any process."""
    trees = _Trees()
    bad = []
    file_trees: dict[int, int] = {}
    names = ("too_long", "truncated", "moved", "identical", "split", "own_ends", "control")
    counts = dict.fromkeys(names, 0)
    for file, number, line in lines:
        try:
            content, ignored, options = canonical(without(parse_row(line), job.ignore), job.kind)
            row = ROWS[job.kind](content, job.template.plain)
            check_used(content, row, job.kind)
            row = with_options(row, options)
            ids = sampled_ids(content)
            encoded = _tokenise(row, job.template, ids)
        except ValueError as error:
            bad.append((file, number, str(error)))
            continue
        counts["split"] += len(encoded) - 1
        for mark in job.template.marks(_texts(row)):
            counts[mark] += 1
        for key in ignored:
            counts[f"ignored {key}"] = counts.get(f"ignored {key}", 0) + 1
        for prompt, answers, moved in encoded:
            room = job.max_length - max(len(ids) for ids, _ in answers)  # for the prompt
            truncated = len(prompt) > room
            if truncated:
                prompt = cut_prompt(prompt, room, job.template.tokenizer.bos, job.overlong)
            if prompt is None:
                counts["too_long"] += 1
                continue
            first, *others = row.responses
            counts["truncated"] += truncated
            counts["moved"] += moved
            counts["identical"] += bool(others) and all(other == first for other in others)
            trees.add(prompt, answers, row.columns)
            file_trees[file] = file_trees.get(file, 0) + 1
    counts |= {
        "rows": len(lines),
        "bad": len(bad),
        "trees": len(trees.prompt_len),
        "responses": len(trees.response_len),
        "tokens": len(trees.tokens),
        "scored": sum(trees.scored),
    }
    return Chunk(trees.arrays(), counts, bad, file_trees)


class SampledIds(NamedTuple):
    """The ids of a row's responses as they were sampled."""

    tokenizer: str  # fingerprint of the template that they belong to
    responses: list[list[int]]


def sampled_ids(row: dict[str, Any]) -> SampledIds | None:
    """Return the sampled ids of a row, None if it has none.

    ValueError: a value that is no list of token ids.
    """
    keys: tuple[str, ...] = ("response_ids",)
    if row.get("chosen") is not None or row.get("chosen_response") is not None:
        keys = ("chosen_ids", "rejected_ids")
    tokenizer = row.get("tokenizer")
    if not isinstance(tokenizer, str) or any(row.get(key) is None for key in keys):
        return None
    for key in keys:
        ids = row[key]
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise ValueError(
                f"`{key}` must be a list of token ids and not empty, got {ascii(ids)[:60]}"
            )
    return SampledIds(tokenizer, [row[key] for key in keys])


def encode_pair(
    template: Any, prompt: str | Messages, responses: list, ids: SampledIds | None
) -> tuple[list[int], list[Answer], bool]:
    """Encode a prompt and its responses as Template.pair does, or take the ids that were sampled.

    A text has several tokenisations, and the tokenizer's own is seldom the sampled one: learned in
    its place it would be other data. Ids of another template are ignored, and so are ids that do
    not spell the responses, because somebody edited the texts.
    """
    if ids is not None and ids.tokenizer == template.fingerprint:
        texts = [template.tokenizer.decode(own) for own in ids.responses]
        if texts == [_single_text(response) for response in responses]:
            answers = [(own, [1] * len(own)) for own in ids.responses]
            return template.prompt(prompt), answers, False
    return template.pair(prompt, responses)


def _single_text(response: str | Messages) -> str | None:
    """Return the text of a response of one message, None if there is more to it."""
    if isinstance(response, str):
        return response
    is_text = len(response) == 1 and not response[0].keys() & set(SPOKEN)
    return response[0]["content"] if is_text else None


def _texts(row: Row) -> list[tuple[str, str]]:
    """Return the texts of a row with their roles, in order."""
    said: list[tuple[str, str]] = []
    parts = [("assistant", response) for response in row.responses]
    if row.prompt is not None:
        parts.insert(0, ("user", row.prompt))
    for role, part in parts:
        if isinstance(part, str):
            said.append((role, part))
        else:
            said += [(message["role"], message["content"]) for message in part]
    return said


def _tokenise(
    row: Row, template: Any, ids: SampledIds | None = None
) -> list[tuple[list[int], list[Answer], bool]]:
    """Return (prompt ids, an answer for each response, whether their border moved) of each tree.

    ids: of the responses as they were sampled, if the row has them.
    """
    if row.prompt is None:
        talk = template.conversation(row.responses[0])
        trees = [(prompt, [answer], False) for prompt, answer in talk]
    else:
        trees = [encode_pair(template, row.prompt, row.responses, ids)]
    for prompt, answers, _ in trees:
        if not prompt:
            raise ValueError(
                "the prompt has no tokens, so nothing predicts the first of the response: add a "
                "prompt"
            )
        if not all(any(scored) for _, scored in answers):
            raise ValueError("a response has no token to train on: write one")
    return trees


def cut_prompt(prompt: list[int], room: int, bos: int | None, overlong: str) -> list[int] | None:
    """Return the last tokens of a prompt that is too long, bos kept in front; None: drop the tree.

    [bos 5 6 7] with room for 3 -> [bos 6 7]. At least one token besides bos must be left.
    """
    head = prompt[:1] if prompt[0] == bos and len(prompt) > 1 else []
    if overlong == "drop" or room <= len(head):
        return None
    return head + prompt[len(prompt) - (room - len(head)) :]


def encode_files(job: Job, workers: int | None) -> Generator[Chunk, None, None]:
    """Yield every chunk of the files, encoded, in order; forked workers encode from two chunks on.

    workers: None is one a core, at most MAX_WORKERS. RuntimeError: a worker was killed.
    """
    chunks = _chunks(job.files)
    head = list(islice(chunks, 2))
    if workers is None:
        workers = min(MAX_WORKERS, _cores())
    if workers <= 1 or len(head) < 2 or "fork" not in multiprocessing.get_all_start_methods():
        for chunk in chain(head, chunks):
            yield encode_lines(job, chunk)
        return
    # Not multiprocessing.Pool, which hangs when a worker is killed. Fork: workers inherit the job.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("fork"), _start_worker, (job,))
    pending = deque()
    try:
        for chunk in chain(head, chunks):
            pending.append(pool.submit(_encode_in_worker, chunk))
            if len(pending) > 3 * workers:  # enough to keep the workers busy, little to hold
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError(
            "a tokenising worker was killed (out of memory?): free memory, or use workers=1"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _chunks(files: list[Path]) -> Iterator[list[Line]]:
    chunk: list[Line] = []
    size = 0
    for line in read_lines(files):
        chunk.append(line)
        size += len(line[2])
        if len(chunk) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk = []
            size = 0
    if chunk:
        yield chunk


def _cores() -> int:
    """Return the cores that this process may use, where the system says so."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


_job: Job  # of this worker process, set after the fork


def _start_worker(job: Job) -> None:
    """Set up a worker: only the parent handles Ctrl-C; the worker exits when the parent dies."""
    global _job
    _job = job
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()

    def follow_parent() -> None:
        parent.join()
        os._exit(1)

    # A parent killed with -9 cannot stop its workers: they would wait forever.
    threading.Thread(target=follow_parent, daemon=True).start()


def _encode_in_worker(chunk: list[Line]) -> Chunk:
    return encode_lines(_job, chunk)
