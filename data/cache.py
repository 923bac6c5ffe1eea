"""Token trees as arrays on disk: a folder of .npy files and meta.json, complete or absent.

    CACHE/<key>/tokens.npy, ..., meta.json   key: the hash of everything that decides the arrays
    CACHE/.partial-<random>/                 while it is written; renamed at the end

A killed process leaves at most a .partial folder. meta.json has the hash of every array: a damaged
folder, down to a flipped bit, is recognised and replaced.
"""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
from numpy.typing import DTypeLike
from tqdm import tqdm

from data.encode import Job, encode_files
from data.rows import SHOWN, check_bad_rows
from disk import file_sha256

DTYPES: dict[str, type[np.generic]] = {
    "tokens": np.int32,
    "scored": np.uint8,
    "tree_start": np.int64,
    "prompt_len": np.int32,
    "response_start": np.int64,
    "response_len": np.int32,
}  # of the arrays that every data set has; columns are float32
STARTS = {"tree_start": "tree_len", "response_start": "responses"}  # start -> length in a Chunk


def write_cache(
    folder: Path,
    key: str,
    job: Job,
    max_bad_rows: int,
    workers: int | None,
    log: Callable[[str], Any],
) -> dict[str, Any]:
    """Tokenise into a temporary folder and rename it to `folder`; return the content of meta.json.

    ValueError: more than `max_bad_rows` bad rows, or no tree left.
    """
    temporary = _temporary_name(folder)
    temporary.mkdir(parents=True)
    arrays = _ArrayFiles(temporary)
    counts: dict[str, int] = {}
    file_trees = [0] * len(job.files)
    bad = []
    ends = dict.fromkeys(STARTS, 0)  # where the next tree starts: its token, its first response
    try:
        for name in STARTS:
            arrays.append(name, np.zeros(1, np.int64))
        with (
            contextlib.closing(encode_files(job, workers)) as chunks,
            tqdm(unit=" rows", disable=None, delay=2) as bar,
        ):
            for chunk in chunks:
                counts |= {name: counts.get(name, 0) + n for name, n in chunk.counts.items()}
                for number, n in chunk.file_trees.items():
                    file_trees[number] += n
                bad = (bad + chunk.bad)[:SHOWN]
                if counts["bad"] > max_bad_rows:
                    break
                for name, lengths in STARTS.items():
                    starts = ends[name] + np.cumsum(chunk.arrays[lengths])
                    arrays.append(name, starts)
                    ends[name] += int(chunk.arrays[lengths].sum())
                for name, values in chunk.arrays.items():
                    if name not in STARTS.values():
                        arrays.append(name, values)
                bar.update(chunk.counts["rows"])
        check_bad_rows(bad, counts.get("bad", 0), job.files, max_bad_rows, log)
        if not counts.get("trees"):
            raise ValueError(_why_empty(counts, job))
        sizes = arrays.finish()
        columns = [name for name in sizes if name not in DTYPES]
        meta: dict[str, Any] = {
            "key": key,
            "counts": counts,
            "bad": bad,
            "columns": columns,
            "bytes": sizes,
        }
        meta["file_trees"] = file_trees
        meta["sha256"] = {name: file_sha256(temporary / f"{name}.npy") for name in sizes}
        with open(temporary / "meta.json", "w") as file:
            json.dump(meta, file, indent=1)
            _sync(file)
        _publish(temporary, folder, key)
        return meta
    finally:
        arrays.close()
        shutil.rmtree(temporary, ignore_errors=True)


class _ArrayFiles:
    """Flat .npy files that grow; their headers get the final lengths in the end."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.streams: dict[str, BinaryIO] = {}
        self.lengths: dict[str, int] = {}

    def append(self, name: str, values: np.ndarray) -> None:
        """Write values at the end of an array, which begins with its first values."""
        if name not in self.streams:
            self.streams[name] = open(self.folder / f"{name}.npy", "wb")  # noqa: SIM115 (close)
            self.lengths[name] = 0
            _write_header(self.streams[name], values.dtype, 0)
        self.streams[name].write(values.tobytes())
        self.lengths[name] += len(values)

    def finish(self) -> dict[str, int]:
        """Write the headers again and sync to disk; return the size of each file in bytes."""
        for name, stream in self.streams.items():
            stream.seek(0)
            _write_header(stream, DTYPES.get(name, np.float32), self.lengths[name])
            _sync(stream)
        return {name: os.stat(self.folder / f"{name}.npy").st_size for name in self.streams}

    def close(self) -> None:
        """Close the files."""
        for stream in self.streams.values():
            stream.close()


def _write_header(stream: BinaryIO, dtype: DTypeLike, length: int) -> None:
    """Write the .npy header of a flat array. NumPy pads it, so a longer length fits later."""
    head = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (length,)}
    np.lib.format.write_array_header_1_0(stream, head)


def _temporary_name(folder: Path) -> Path:
    return folder.parent / f".partial-{uuid.uuid4().hex}"


def _sync(stream: IO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync a folder
        descriptor = os.open(folder, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def _publish(temporary: Path, folder: Path, key: str) -> None:
    """Rename `temporary` to `folder`.

    A process that was faster with the same key wrote the same arrays: its folder stays. A damaged
    folder is removed. OSError: it cannot be.
    """
    _sync_folder(temporary)
    for _ in range(100):
        try:
            temporary.rename(folder)
            _sync_folder(folder.parent)
            return
        except OSError:
            if not folder.exists():
                raise
        if read_meta(folder, key):
            return
        with contextlib.suppress(FileNotFoundError):  # another process may have moved it first
            shutil.rmtree(folder.rename(_temporary_name(folder)))
    raise OSError(f"{folder}: cannot be replaced: remove it by hand")


def read_meta(folder: Path, key: str) -> dict[str, Any] | None:
    """Return meta.json of a cached data set, or None when a file is missing or has changed."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta["key"] != key:
            return None
        for name, size in meta["bytes"].items():
            path = folder / f"{name}.npy"
            if path.stat().st_size != size or file_sha256(path) != meta["sha256"][name]:
                return None
        return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _why_empty(counts: dict[str, int], job: Job) -> str:
    names = ", ".join(map(str, job.files)) or "no files"
    rows = counts.get("rows", 0)
    if not rows:
        return f"{names}: no rows: give JSONL files, one JSON object a line"
    if counts["too_long"]:
        return (
            f"{names}: no row is left, {counts['too_long']} of {rows} are longer than "
            f"{job.max_length} tokens: raise --max-length or use --overlong truncate"
        )
    return f"{names}: no row is left, all {rows} rows are bad: fix the data"
