"""A teacher's top K of every scored token, computed once before the first step and kept on disk.

    CACHE/teacher-<key>/ids.npy     (N, K) uint16, int32 for over 65,536 tokens; likeliest first
    CACHE/teacher-<key>/logps.npy   (N, K + 1) fp16, fp64 in runs of fp64; last: all other tokens
    CACHE/teacher-<key>/meta.json   hashes of both

A script holds no teacher beside its student: it reads the rows of a micro-batch from the memory
map. The key hashes weights, tokens, dtype, K, temperature and examples, so a resumed run reads what
was scored at first. Where K is the vocabulary, the last column is left out.

Letters: N scored tokens of a data set, M of a micro-batch.
"""

import hashlib
import json
import shutil
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.dataset import Dataset
from data.trees import TreeBatch
from disk import file_sha256, replace_folder, write_text
from kernels.device import upload
from model import GPT
from parallel import Mesh
from passes import Batching, forward
from reporting import in_bytes
from weights.files import fingerprint

FORMAT = 1  # raise it when the same inputs would give other files
BLOCK = 1 << 24  # log-probs that are held until they are written
LEAST = -1e4  # a log-prob; fp16 has no more than 65,504, and 0 times infinity is no number


@dataclass(frozen=True)
class TopK:
    """The K likeliest tokens of a teacher at every scored token of a data set, with log-probs."""

    ids: np.ndarray  # (N, K), memory-mapped
    logps: np.ndarray  # (N, K + 1), memory-mapped
    data: Dataset
    first: np.ndarray  # (R,): row of each response's first scored token; of those scored

    def of(self, batch: TreeBatch) -> tuple[Tensor, Tensor]:
        """Return ids (M, K) and log-probs (M, K + 1) of a micro-batch, on its device.

        The log-probs are fp32 at least and those of a distribution, to which they are normalised
        after their rounding on disk.
        """
        rows = _rows(self.data, self.first, batch)
        device = batch.tokens.device
        ids = upload(self.ids[rows].astype(np.int32), device).long()
        logps = upload(self.logps[rows], device)
        logps = logps.to(torch.promote_types(logps.dtype, torch.float32))
        return ids, logps.clamp(min=LEAST).log_softmax(1)


def top_k_path(
    cache: Path,
    folder: str,
    student: GPT,
    data: Dataset,
    examples: np.ndarray,
    k: int,
    temperature: float,
) -> Path:
    """Return where a teacher's top K of some examples is kept in a cache folder.

    folder: of the teacher. student: its dtype and vocabulary are the teacher's too. Collective.
    """
    weights = student.mesh.ask(lambda: fingerprint(folder))
    inputs = [FORMAT, weights, data.key, str(student.dtype), student.c.vocab, k, temperature]
    digest = hashlib.sha256(json.dumps(inputs).encode()).digest()
    ordered = np.sort(examples).astype(np.int64)
    return cache / f"teacher-{hashlib.sha256(digest + ordered.tobytes()).hexdigest()[:24]}"


def read_top_k(path: Path, data: Dataset, examples: np.ndarray, mesh: Mesh) -> TopK | None:
    """Return a teacher's cached top K, None if there is none or it is damaged. Collective."""
    if not mesh.ask(lambda: _is_intact(path)) or not all(mesh.everyone(path.exists())):
        return None
    top = _open(path, data, examples)
    print(f"teacher: top {top.ids.shape[1]} of {len(top.ids):,} tokens from {path}")
    return top


@torch.no_grad()
def score_top_k(
    path: Path,
    teacher: GPT,
    data: Dataset,
    examples: np.ndarray,
    k: int,
    temperature: float,
    config: Batching,
) -> TopK:
    """Let a teacher score some examples; write its top K to `path` and return it. Collective.

    ValueError: K is more than the vocabulary, or the ranks do not share the folder.
    """
    mesh, vocab, began = teacher.mesh, teacher.c.vocab, time.perf_counter()
    if k > vocab:
        raise ValueError(
            f"--teacher-top-k {k} is more than the vocabulary: use at most {vocab}, or 0 for all"
        )
    examples = np.sort(examples)
    total = int(data.scored_len[data.responses_of(examples)].sum())
    exact = teacher.dtype == torch.float64
    columns = k if k == vocab else k + 1
    partial = path.with_name(f".partial-{uuid.uuid4().hex}")
    files: list[np.memmap] = []
    if mesh.main:
        partial.mkdir(parents=True)
        id_type = np.uint16 if vocab <= 1 << 16 else np.int32
        shapes = {"ids": (id_type, k), "logps": (np.float64 if exact else np.float16, columns)}
        for name, (dtype, width) in shapes.items():
            array = partial / f"{name}.npy"
            files.append(np.lib.format.open_memmap(array, "w+", dtype, (total, width)))
    done = 0
    blocks = _blocks(data, examples, BLOCK // columns)
    try:
        for block in tqdm(blocks, "teacher", disable=None if mesh.main else True):
            ids, logps = _score_block(teacher, data, block, k, temperature, config)
            for file, values in zip(files, (ids, logps[:, :columns])):
                with np.errstate(over="ignore"):  # a log-prob below fp16's is no mass at all
                    file[done : done + len(values)] = values
            done += len(ids)
        mesh.ask(lambda: _publish(partial, path, files))
    finally:
        if mesh.main:
            shutil.rmtree(partial, ignore_errors=True)
    if not all(mesh.everyone(path.exists())):
        raise ValueError(
            f"{path.parent} is not the same folder on every node, and --teacher-top-k reads it on "
            "all of them: choose a --cache on a shared file system"
        )
    top = _open(path, data, examples)
    size = top.ids[:1].nbytes + top.logps[:1].nbytes
    print(
        f"teacher: top {k} of {total:,} tokens scored in {time.perf_counter() - began:.1f} s, "
        f"{size} bytes a token, {in_bytes(size * total)} in {path}"
    )
    return top


def _score_block(
    teacher: GPT, data: Dataset, block: np.ndarray, k: int, temperature: float, config: Batching
) -> tuple[np.ndarray, np.ndarray]:
    """Return ids (n, K) and log-probs (n, K + 1) of the n scored tokens of some examples, in order.

    Every rank scores its share and gets all of it.
    """
    first = _first_rows(data, block)
    total = int(data.scored_len[data.responses_of(block)].sum())
    exact = torch.promote_types(teacher.dtype, torch.float32)
    all_ids = torch.zeros(total, k, dtype=torch.int32)
    all_logps = torch.zeros(total, k + 1, dtype=exact)
    for batch, hidden in forward(teacher, data, block, config):
        ids, logps = teacher.top_k(hidden, batch, k, temperature)
        rows = torch.from_numpy(_rows(data, first, batch))
        all_ids[rows] = ids.int().cpu()
        all_logps[rows] = logps.cpu()
    return teacher.mesh.sum(all_ids).numpy(), teacher.mesh.sum(all_logps).numpy()


def _blocks(data: Dataset, examples: np.ndarray, tokens: int) -> list[np.ndarray]:
    """Cut examples into runs of about so many scored tokens each, at least one example."""
    scored = np.concatenate([[0], np.cumsum(data.scored_len)])
    start, end = data.response_start[examples], data.response_start[examples + 1]
    ends = np.cumsum(scored[end] - scored[start])
    return np.split(examples, np.flatnonzero(np.diff(ends // max(1, tokens))) + 1)


def _first_rows(data: Dataset, examples: np.ndarray) -> np.ndarray:
    """Return the row of each response's first scored token, (R,), if `examples` are kept."""
    responses = data.responses_of(examples)
    count = data.scored_len[responses]
    first = np.full(len(data.response_len), -1, np.int64)
    first[responses] = np.cumsum(count) - count
    return first


def _rows(data: Dataset, first: np.ndarray, batch: TreeBatch) -> np.ndarray:
    """Return the row of each scored token of a micro-batch, (M,)."""
    responses = data.responses_of(batch.examples)
    count = data.scored_len[responses]
    before = np.cumsum(count) - count
    return np.repeat(first[responses] - before, count) + np.arange(count.sum())


def _open(path: Path, data: Dataset, examples: np.ndarray) -> TopK:
    ids, logps = (np.load(path / f"{name}.npy", mmap_mode="r") for name in ("ids", "logps"))
    return TopK(ids, logps, data, _first_rows(data, np.sort(examples)))


def _publish(partial: Path, path: Path, files: list[np.memmap]) -> None:
    """Flush the arrays, write their hashes, and rename the folder: it is whole or not there."""
    for file in files:
        file.flush()
    hashes = {name: file_sha256(partial / name) for name in ("ids.npy", "logps.npy")}
    write_text(partial / "meta.json", json.dumps(hashes, indent=1) + "\n")
    replace_folder(partial, path)


def _is_intact(path: Path) -> bool:
    """Return whether a cache is there with the content that was written."""
    if not path.exists():
        return False
    try:
        hashes = json.loads((path / "meta.json").read_text())
        intact = all(file_sha256(path / name) == digest for name, digest in hashes.items())
    except (OSError, ValueError, AttributeError):
        intact = False
    if not intact:
        print(f"warning: {path} is damaged, the teacher scores again")
    return intact
