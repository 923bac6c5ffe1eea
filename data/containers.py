"""Files that hold rows otherwise than one JSON object a line: arrays, tables, Parquet, Arrow.

    for number, line in rows_of("prefs.parquet"):     number from 1; a JSON object as bytes

What a file is shows in its first bytes, or for tables in its name (.csv, .tsv, also .gz). Parquet
and Arrow files, such as those of a folder of datasets.save_to_disk, are read by the optional
package pyarrow.
"""

import csv
import datetime
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

PARQUET, GZIP = b"PAR1", b"\x1f\x8b"
TABLES = {".csv": ",", ".tsv": "\t"}
# First bytes of files that are often given by mistake -> what they are and what to do.
OTHERS = {
    b"PK\x03\x04": "a zip archive: unpack it and give the files in it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it (zstd -d) or compress it with gzip",
    b"BZh": "compressed with bzip2: unpack it (bunzip2) or compress it with gzip",
    b"\xfd7zXZ": "compressed with xz: unpack it (unxz) or compress it with gzip",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the file itself (git lfs pull)",
    b"<!DOCTYPE": "a web page: fetch the file itself (on a hub, its raw or resolve address)",
    b"<html": "a web page: fetch the file itself (on a hub, its raw or resolve address)",
    b"SQLite format 3": "an SQLite database: export the table as JSONL or CSV",
}


def kind_of(file: Path) -> str:
    """Return "lines", "array", "table", "parquet" or "arrow". ValueError: another kind of file."""
    with open(file, "rb") as stream:
        head = stream.read(64)
    compressed = head.startswith(GZIP)
    if compressed:
        try:
            with gzip.open(file, "rb") as stream:
                head = stream.read(64)
        except (OSError, EOFError, zlib.error):
            return "lines"  # whose reader says what is wrong
    for magic, advice in OTHERS.items():
        if head.startswith(magic):
            raise ValueError(f"{file} is {advice}")
    if head.startswith(PARQUET):
        return "parquet"
    suffix = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    if suffix == ".arrow":
        return "arrow"
    if suffix in TABLES:
        return "table"
    array = re.match(rb"(\xef\xbb\xbf)?\s*\[\s*\{", head)
    return "array" if array else "lines"


def rows_of(file: Path, kind: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number, JSON object) of the rows of a file that is not "lines".

    ValueError names the file and what is wrong with it; ImportError the missing package.
    """
    readers = {"array": _array, "table": _table, "parquet": _parquet, "arrow": _arrow}
    for number, row in enumerate(readers[kind](file), 1):
        yield (
            number,
            json.dumps(row, default=_plain, ensure_ascii=False).encode("utf-8", "surrogatepass"),
        )


def _plain(value: Any) -> str | list:
    """Return what JSON can hold of a value of a table: dates and bytes as text."""
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta)):
        return str(value)
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return list(value) if isinstance(value, (set, tuple)) else str(value)


def _open_text(file: Path) -> io.TextIOBase:
    with open(file, "rb") as stream:
        compressed = stream.read(2) == GZIP
    opener = gzip.open if compressed else open
    return opener(file, "rt", encoding="utf-8-sig", newline="")  # type: ignore[return-value]


def _array(file: Path) -> list[Any]:
    """Return the rows of a JSON array."""
    try:
        with _open_text(file) as stream:
            rows = json.load(stream)
    except (ValueError, RecursionError, OSError, EOFError, zlib.error) as error:
        reason = str(error) or type(error).__name__
        raise ValueError(f"{file} begins like a JSON array, but is none: {reason}") from None
    return rows


def _table(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table with a line of names; empty cells are absent keys.

    A cell that holds a JSON list or object, a number, true or false is read as such, where the
    name is not that of a text.
    """
    csv.field_size_limit(min(sys.maxsize, 1 << 30))
    suffix = Path(file.stem).suffix if file.suffix == ".gz" else file.suffix
    try:
        with _open_text(file) as stream:
            reader = csv.DictReader(stream, delimiter=TABLES[suffix], strict=True)
            names = reader.fieldnames or []
            if len(set(names)) < len(names) or not all(names):
                raise ValueError(f"{file}:1: the names of the columns are missing or repeated")
            for row in reader:
                if None in row or None in row.values():
                    raise ValueError(
                        f"{file}:{reader.line_num}: a row of another length than the first: quote "
                        "cells that hold separators or line breaks"
                    )
                yield {name: _cell(name, text) for name, text in row.items() if text != ""}
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 at byte {error.start}: save it as UTF-8") from None
    except (csv.Error, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{file}: not a table with separators ({error})") from None


TEXTS = set("prompt response completion input output instruction system system_prompt".split())


def _cell(name: str, text: str) -> Any:
    """Return a cell's value: "4" under `helpfulness` -> 4; "4" under `prompt` -> "4"."""
    structured = text.lstrip()[:1] in ("[", "{")
    if name in TEXTS and not structured:
        return text
    try:
        value = json.loads(text.lower() if text in ("True", "False") else text)
    except (ValueError, RecursionError):
        return text
    if name in TEXTS | {"chosen", "rejected"} and not isinstance(value, list):
        return text
    return value


def _pyarrow(file: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ImportError(f"{file} is read by the package pyarrow: pip install pyarrow") from None
    return pyarrow


def _damaged(file: Path, kind: str, error: Exception) -> ValueError:
    return ValueError(
        f"{file}: not a whole {kind} file ({' '.join(str(error).split())}): fetch it again"
    )


def _records(file: Path, batches: Iterable) -> Iterator[dict[str, Any]]:
    """Yield the rows of batches. Where one object has a key, a column gives it to all, as null.

    Those nulls go: a template would write them into the arguments of a call.
    """
    for batch in batches:
        batch.validate(full=True)  # a damaged offset would end the process
        names = batch.schema.names
        if len(set(names)) < len(names):
            raise ValueError(f"{file}: the names of the columns are repeated")
        for row in batch.to_pylist():
            yield _without_nulls(row)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    return value


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file."""
    arrow = _pyarrow(file)
    import pyarrow.parquet

    try:
        yield from _records(file, pyarrow.parquet.ParquetFile(file).iter_batches(1024))
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(file, "Parquet", error) from None


def _arrow(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of an Arrow file or stream."""
    arrow = _pyarrow(file)
    try:
        with arrow.memory_map(str(file)) as source:
            try:
                batches = iter(arrow.ipc.open_stream(source))
            except arrow.ArrowInvalid:
                opened = arrow.ipc.open_file(source)
                batches = (opened.get_batch(i) for i in range(opened.num_record_batches))
            yield from _records(file, batches)
    except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _damaged(file, "Arrow", error) from None
