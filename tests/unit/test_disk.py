"""Files that a run rewrites: whole or as before, split at line feeds only, damage named.

Seen to fail: a log split by str.splitlines; a partial file written in place.
"""

import json
import os
from pathlib import Path

import pytest

import disk
import plot
from disk import drop_rows_after, lines_of, write_text

LINE_ENDS = "\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e\r"  # of str.splitlines, but not of JSONL


def log_of(path: Path, steps: range, text: str = LINE_ENDS) -> list[str]:
    """Write a row a step, with every character that looks like a line end; return the lines."""
    lines = [json.dumps({"step": n, "loss": 1.0, "x": text}, ensure_ascii=False) for n in steps]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8", newline="")
    return lines


def read(path: Path) -> str:
    return path.read_bytes().decode()


def test_lines_end_at_line_feeds_only():
    """As Python's open(newline="\\n") splits a file; a last line need not end."""
    assert lines_of(f"a{LINE_ENDS}b\nc\n") == [f"a{LINE_ENDS}b", "c"]
    assert lines_of("a\n\nb") == ["a", "", "b"] and lines_of("") == []


def test_rows_after_a_step_are_dropped_whatever_they_hold(tmp_path: Path, capsys):
    """Texts with U+2028 and its kind survive; what a kill left half written goes silently."""
    path = tmp_path / "samples.jsonl"
    lines = log_of(path, range(6))
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 6, "lo')
    drop_rows_after(path, 3)
    assert read(path) == "".join(line + "\n" for line in lines[:4])
    assert capsys.readouterr().out == "" and os.listdir(tmp_path) == [path.name]
    drop_rows_after(tmp_path / "absent.jsonl", 3)


@pytest.mark.parametrize(
    "bad", [b"{", b"\xff\xfe", b"[1]", b"7", b'{"step": "x"}', b'{"step": null}', b"[" * 9999]
)
def test_an_unreadable_row_is_named_and_kept_beside_the_log(bad: bytes, tmp_path: Path, capsys):
    """A warning with file and line; the other rows stay, and nothing is lost."""
    path = tmp_path / "metrics.jsonl"
    lines = log_of(path, range(3))
    before = path.read_bytes() + bad + b"\n"
    path.write_bytes(before)
    drop_rows_after(path, 5)
    assert read(path) == "".join(line + "\n" for line in lines)
    said = capsys.readouterr().out
    assert f"warning: {path} has 1 unreadable row(s), the first at line 4" in said
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == before


def test_a_log_that_cannot_be_opened_is_a_warning(tmp_path: Path, capsys):
    """A folder in the place of a log: a warning that names it."""
    (tmp_path / "metrics.jsonl").mkdir()
    drop_rows_after(tmp_path / "metrics.jsonl", 1)
    assert f"warning: {tmp_path / 'metrics.jsonl'} cannot be read" in capsys.readouterr().out


def test_a_curve_is_drawn_from_rows_with_any_text(tmp_path: Path):
    """plot.py splits a log where the run does."""
    log_of(tmp_path / "metrics.jsonl", range(4))
    assert plot.read_run(tmp_path)["loss"] == [(n, 1.0) for n in range(4)]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch):
    """When the flush fails, as on a full disk, the old file stays and no partial one is left."""
    path = tmp_path / "config.json"
    write_text(path, "old")

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_folder_is_replaced_and_nothing_is_left(exchanges: bool, tmp_path: Path, monkeypatch):
    """With and without the exchange of names: the new content, no other folder."""
    if not exchanges:
        monkeypatch.setattr(disk, "_exchange", lambda one, other: False)
    for content in ("old", "new"):
        (tmp_path / ".partial").mkdir()
        (tmp_path / ".partial" / content).touch()
        disk.replace_folder(tmp_path / ".partial", tmp_path / "final")
    assert os.listdir(tmp_path) == ["final"] and os.listdir(tmp_path / "final") == ["new"]


def test_names_are_exchanged_in_one_step(tmp_path: Path):
    """On Linux's own file systems there is no moment without the folder."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not disk._exchange(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot exchange names")
    assert os.listdir(tmp_path / "one") == ["other"]
