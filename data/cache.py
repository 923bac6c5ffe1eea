import contextlib
import hashlib
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

from data.encode import _encode, _Job


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


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


SHOWN = 10  # bad rows printed, and kept in the cache


DTYPES: dict[str, type[np.generic]] = {
    "tokens": np.int32, "scored": np.uint8, "tree_start": np.int64, "prompt_len": np.int32,
    "response_start": np.int64, "response_len": np.int32,
}  # fmt: skip


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
