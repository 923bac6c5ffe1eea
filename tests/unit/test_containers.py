"""The same rows from every container; other files get the right diagnosis."""

import csv
import gzip
import json
from pathlib import Path

import pytest

from data.rows import existing_files, read_lines, read_rows

ROWS = [
    {"prompt": 'Who, "she"?', "response": "Ada\nLovelace", "helpfulness": 4},
    {"prompt": "naïve 🙂 \u2028", "response": "12", "label": True},
    {"prompt": [{"role": "user", "content": "Q"}], "response": " a  b "},
]
KEYS = ["prompt", "response", "helpfulness", "label"]


def as_cell(value: object) -> object:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, bool)) else value


def write(path: Path) -> Path:
    """Write ROWS as the name of the file says."""
    name = path.name.removesuffix(".gz")
    if name.endswith((".csv", ".tsv")):
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, KEYS, delimiter="\t" if name.endswith(".tsv") else ",")
            table.writeheader()
            table.writerows({k: as_cell(v) for k, v in row.items()} for row in ROWS)
    elif name.endswith((".parquet", ".arrow")):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        # A column has one type: the conversation goes as JSON would not, so it is left out.
        table = pyarrow.Table.from_pylist([{k: r.get(k) for k in KEYS} for r in ROWS[:2]])
        if name.endswith(".parquet"):
            parquet.write_table(table, path)
        else:
            with pyarrow.ipc.new_stream(str(path), table.schema) as stream:
                stream.write_table(table)
    else:
        texts = [json.dumps(row, ensure_ascii=False) for row in ROWS]
        text = "\n".join(texts) if "lines" in name else "[\n " + ",\n ".join(texts) + "]\n"
        path.write_text(text, encoding="utf-8")
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


NAMES = [
    "array.json",
    "array.jsonl",
    "array.json.gz",
    "lines.jsonl",
    "lines.json",
    "lines.jsonl.gz",
]
NAMES += ["table.csv", "table.tsv", "table.csv.gz", "rows.parquet", "rows.arrow"]


@pytest.mark.parametrize("name", NAMES)
def test_a_container_changes_no_row(name: str, tmp_path: Path):
    """Text keeps every character, numbers and switches are none, empty cells are absent keys."""
    rows = list(read_rows(write(tmp_path / name)))
    wanted = ROWS[:2] if name.startswith("rows") else ROWS
    assert [{k: v for k, v in row.items() if v is not None} for row in rows] == wanted


@pytest.mark.parametrize("name", ["array.json", "table.csv", "rows.parquet"])
def test_rows_are_numbered(name: str, tmp_path: Path):
    numbers = [number for _, number, _ in read_lines([write(tmp_path / name)])]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b"PK\x03\x04xxxx", "a zip archive: unpack it"),
        ("a.jsonl", b"\x28\xb5\x2f\xfdxxxx", "compressed with zstd"),
        ("a.jsonl", b"BZh9xxxx", "compressed with bzip2"),
        ("a.jsonl", b"\xfd7zXZ\x00", "compressed with xz"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        ("a.jsonl", b"<!DOCTYPE html><html>", "a web page"),
        ("a.jsonl", b"SQLite format 3\x00", "an SQLite database"),
        ("a.json", b'[{"prompt": 1}, ', "begins like a JSON array, but is none"),
        ("a.json", b"[]", r"a\.json:1: not a JSON object"),
        ("a.json", b'[{"a":' * 100_000, "begins like a JSON array, but is none"),
        ("a.csv", b"prompt,prompt\na,b\n", r"a\.csv:1: the names of the columns"),
        ("a.csv", b"prompt,response\na,b,c\n", r"a\.csv:2: a row of another length"),
        ("a.csv", b"prompt,response\na\n", r"a\.csv:2: a row of another length"),
        ("a.csv", b"prompt,response\n\xff,b\n", r"a\.csv: not UTF-8 at byte"),
        ("a.csv", b'prompt,response\n"a,b\n', r"a\.csv: not a table"),
        ("a.parquet", b"PAR1xxxxxxxx", "not a whole Parquet file"),
        ("a.arrow", b"ARROW1xxxxxx", "not a whole Arrow file"),
        ("a.jsonl.gz", b"\x1f\x8bxxxx", "not a whole gzip file"),
    ],
)
def test_another_file_gets_the_right_diagnosis(
    name: str, content: bytes, said: str, tmp_path: Path
):
    if name.endswith((".parquet", ".arrow")):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        list(read_rows(tmp_path / name))


def test_a_folder_names_its_files(tmp_path: Path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set/data-00000-of-00001.arrow").write_bytes(b"")
    (tmp_path / "set/dataset_info.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"set is a folder: .*/data-00000-of-00001\.arrow"):
        existing_files([tmp_path / "set"])


def test_patterns_and_saved_data_sets(tmp_path: Path):
    """Shards by a pattern, in the order of their names; a folder of datasets' save_to_disk."""
    for k in (10, 2, 1):
        (tmp_path / f"shard-{k:03d}.jsonl").write_text(f'{{"k": {k}}}\n')
    files = existing_files([f"{tmp_path}/shard-*.jsonl", tmp_path / "shard-001.jsonl"])
    assert [row["k"] for file in files for row in read_rows(file)] == [1, 2, 10, 1]
    with pytest.raises(FileNotFoundError, match="no file matches"):
        existing_files([f"{tmp_path}/other-*.jsonl"])
    pyarrow = pytest.importorskip("pyarrow")
    saved = tmp_path / "saved"
    (saved / "train").mkdir(parents=True)
    names = [f"data-0000{k}-of-00002.arrow" for k in (0, 1)]
    for k, name in enumerate(names):
        table = pyarrow.table({"prompt": [f"q{k}"], "response": ["a"]})
        path = str(saved / "train" / name)
        with pyarrow.OSFile(path, "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as out:
            out.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names]}
    (saved / "train" / "state.json").write_text(json.dumps(state))
    (saved / "train" / "dataset_info.json").write_text("{}")
    files = existing_files([saved / "train"])
    assert [row["prompt"] for file in files for row in read_rows(file)] == ["q0", "q1"]
    (saved / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(FileNotFoundError, match="holds the splits train: choose one, as in"):
        existing_files([saved])
    (saved / "train" / names[1]).unlink()
    with pytest.raises(FileNotFoundError, match="a file that state.json names is missing"):
        existing_files([saved / "train"])
