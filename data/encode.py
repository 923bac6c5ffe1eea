import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.formats import Row, attribute_row, label_row, preference_row, sft_row, weight_row
from data.rows import _lines, _parse

CHUNK_ROWS = 256  # rows a worker is handed at a time; a file of one chunk needs no workers
CHUNK_BYTES = 1 << 19  # and bytes


ROWS: dict[str, Callable[[dict, bool], Row]] = {
    "sft": lambda row, plain: sft_row(row), "preference": preference_row, "label": label_row,
    "attributes": lambda row, plain: attribute_row(row), "weights": lambda row, plain: weight_row(row),
}  # fmt: skip


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
