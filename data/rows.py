import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


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
