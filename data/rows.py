"""Files of rows in and out: numbered JSON objects, one a line or otherwise; bad rows reported.

JSONL, also as .gz, is read here line by line; arrays, tables and Parquet by data/containers.py.

Every line carries its file and number, so that every error can name file:line.
"""

import functools
import glob
import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from data.containers import kind_of, rows_of

Line = tuple[int, int, bytes]  # index of the file, line number from 1, content

BadRow = tuple[int, int, str]  # index of the file, line number, reason
SHOWN = 10  # bad rows printed, and kept in the cache
LONGEST_LINE = 64 << 20  # bytes; longer ones are no rows but another kind of file
# A .gz file that grows beyond both of these was made to fill the memory or the time.
BOMB_BYTES, BOMB_RATIO = 1 << 30, 300
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors write one in front of a UTF-8 text


def existing_files(files: Iterable[str | Path]) -> list[Path]:
    """Return the files that some paths name, in order; shards of a pattern by their names.

    A path may be a file, a pattern such as "shards/*.jsonl", or a folder that datasets'
    save_to_disk has written. FileNotFoundError names the first one that is none of these.
    """
    paths: list[Path] = []
    for file in files:
        path = Path(file)
        if path.is_file():
            paths.append(path)
        elif path.is_dir():
            paths += _saved_files(path)
        elif matches := sorted(match for match in glob.glob(str(file)) if Path(match).is_file()):
            paths += map(Path, matches)
        else:
            kind = "no file matches" if glob.has_magic(str(file)) else "no such file"
            raise FileNotFoundError(
                f"{path}: {kind}: give JSONL files, one JSON object a line, or a data set of the "
                "hub, org/name or org/name:split"
            )
    return paths


def _saved_files(folder: Path) -> list[Path]:
    """Return the Arrow files of a folder of datasets' save_to_disk, in their order.

    FileNotFoundError: it is another folder, or one of several splits.
    """
    inside = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if (folder / "dataset_dict.json").is_file():
        splits = [name for name in inside if (folder / name / "state.json").is_file()]
        raise FileNotFoundError(
            f"{folder} holds the splits {', '.join(splits)}: choose one, as in {folder}/{splits[0]}"
            if splits
            else f"{folder} holds no split: save it again"
        )
    if (folder / "state.json").is_file():
        try:
            state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            names = [entry["filename"] for entry in state["_data_files"]]
        except (ValueError, KeyError, TypeError):
            names = []
        paths = [folder / Path(name).name for name in names]
        if not paths or not all(path.is_file() for path in paths):
            raise FileNotFoundError(f"{folder}: a file that state.json names is missing")
        return paths
    names = [name for name in inside if not name.endswith("_info.json")]
    raise FileNotFoundError(
        f"{folder} is a folder: give the files in it, such as {folder}/{(names or ['*'])[0]}"
    )


def read_lines(files: list[Path]) -> Iterator[Line]:
    """Yield the lines of some files in order, blank ones left out.

    ValueError: a bad .gz file; file:line of a line that is too long, or where a .gz file has grown
    beyond reason.
    """
    for index, file in enumerate(files):
        kind = kind_of(file)
        if kind != "lines":
            for number, row in rows_of(file, kind):
                yield index, number, row
            continue
        opener = gzip.open if file.suffix == ".gz" else open
        try:
            with opener(file, "rb") as stream:
                size = file.stat().st_size
                lines = iter(functools.partial(stream.readline, LONGEST_LINE + 1), b"")
                total = 0
                for number, line in enumerate(lines, 1):
                    total += len(line)
                    if len(line) > LONGEST_LINE:
                        raise ValueError(
                            f"{file}:{number}: a line of more than {LONGEST_LINE >> 20} MB: JSONL "
                            "holds one row a line"
                        )
                    if total > max(BOMB_BYTES, BOMB_RATIO * size):
                        raise ValueError(
                            f"{file}:{number}: {size:,} bytes have grown to {total:,}: not data"
                        )
                    if number == 1:
                        line = line.removeprefix(BYTE_ORDER_MARK)
                    if line.strip():
                        yield index, number, line
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{file}: not a whole gzip file ({error}): download or compress it again"
            ) from None


def parse_row(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line. ValueError says why there is none."""
    try:
        row = json.loads(line.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start}: save the file as UTF-8") from None
    except RecursionError:
        raise ValueError("nested too deeply for JSON data") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos + 1}") from None
    except _TwiceError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"not JSON that Python can read: {error}") from None
    if not isinstance(row, dict):
        raise ValueError("not a JSON object {...}: JSONL holds one object a line")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. ValueError: a key stands in it twice, and which counts is not said."""
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"the key {ascii(twice)[:60]} stands twice in an object: keep one")
    return result


class _TwiceError(ValueError):
    """A key stands twice in a JSON object."""


def read_rows(file: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of one JSONL file unchanged. ValueError names file:line of a bad row."""
    for _, number, line in read_lines(existing_files([file])):
        try:
            yield parse_row(line)
        except ValueError as error:
            raise ValueError(f"{file}:{number}: {error}") from None


def write_rows(path: str | Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write a JSONL file, all of it or nothing; return its name."""
    partial = Path(f"{path}.partial")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    # UTF-8 cannot hold half of a surrogate pair, but a JSON escape can; Python spells it the same.
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")
    partial.replace(path)
    return str(path)


def check_bad_rows(
    bad: list[BadRow],
    total: int,
    files: list[Path],
    max_bad_rows: int,
    log: Callable[[str], Any],
) -> None:
    """Log the first bad rows as file:line: reason. ValueError: `total` is over the limit."""
    reports = [f"{files[file]}:{line}: {reason}" for file, line, reason in bad]
    for report in reports:
        log(f"bad row {report}")
    if total > len(reports):
        log(f"... and {total - len(reports)} more bad rows")
    if total > max_bad_rows:
        fix = f"fix the data or raise --max-bad-rows {max_bad_rows}"
        raise ValueError(f"{reports[0]} ({total} bad so far: {fix})")
