"""Files that a run rewrites: whole before and whole after, whenever it is killed.

Logs are JSON objects, one a line, and a line ends at "\\n" only: texts may hold U+2028 and other
characters that str.splitlines takes for line ends.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of linux/fcntl.h and linux/fs.h


def write_text(path: str | Path, text: str) -> None:
    """Write a file under another name, flush it to the disk and rename it to `path`."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Give a folder to fill under another name, and rename it to `folder` if all goes well.

    ValueError: there is one already.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another --out")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`, in the place of what is there: in one step where Linux can.

    Elsewhere there is a moment at which a kill leaves the old folder under `.NAME.old` only.
    """
    if not folder.exists():
        new.rename(folder)
        return
    if _exchange(new, folder):
        shutil.rmtree(new, ignore_errors=True)
        return
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, by renameat2(2); return False where that does not exist."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 of a file's content, as hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: str | Path) -> str:
    """Return `sha256_of` a file, read once a process as long as size and time stay the same."""
    stat = os.stat(path)
    return _remembered(str(path), stat.st_ino, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _remembered(path: str, *stat: int) -> str:
    return sha256_of(path)


def lines_of(text: str) -> list[str]:
    """Return the lines of a text without their ends, split at "\\n" only.

    "a\\u2028b\\nc\\n" -> ["a\\u2028b", "c"]
    """
    lines = text.split("\n")
    return lines if lines[-1] else lines[:-1]


def drop_rows_after(path: str | Path, step: int, log: Callable[[str], Any] = print) -> None:
    """Drop the rows of a log whose "step" is later, which a resumed run repeats.

    A last row without a line end is what a kill leaves: it is dropped without a word. Any other row
    that cannot be read is dropped with a warning, and the file as it was is kept beside the log.
    """
    path = Path(path)
    if not path.exists():
        return
    try:
        content = path.read_bytes()
    except OSError as error:
        log(f"warning: {path} cannot be read ({error.strerror}): it may hold steps twice")
        return
    lines = content.split(b"\n")[:-1]  # whole ones
    steps = [_step_of(line) for line in lines]
    kept = [line for line, at in zip(lines, steps) if at is not None and at <= step]
    unreadable = [number for number, at in enumerate(steps, 1) if at is None]
    if unreadable:
        copy = path.with_name(f"{path.name}.damaged")
        shutil.copyfile(path, copy)
        log(
            f"warning: {path} has {len(unreadable)} unreadable row(s), the first at line "
            f"{unreadable[0]}: dropped, the whole file is in {copy.name}"
        )
    write_text(path, b"".join(line + b"\n" for line in kept).decode())


def _step_of(line: bytes) -> float | None:
    """Return the step of a row, 0 if it has none; None if the line is no JSON object."""
    try:
        return float(json.loads(line.decode()).get("step", 0))
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
