"""Any data file: rows are used as they say, or rejected with file, line and reason. Never a crash.

Hypothesis makes the inputs; the expected result is computed again here in plain Python.
"""

import gzip
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import json_values, lines, quick, rows, texts

from data import formats
from data.dataset import load_dataset
from data.encode import ROWS
from data.rows import read_rows, write_rows


def parse_line(line: bytes) -> dict | None:
    """Return the JSON object of a line as Python's parser reads it, or None if it holds none."""
    try:
        value = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


@quick
@given(st.lists(lines, max_size=5), st.booleans())
@example([b'\xef\xbb\xbf{"prompt": "a"}', b"{}"], False)
def test_a_file_is_read_up_to_its_first_bad_line(tmp_path: Path, lines: list[bytes], packed: bool):
    """read_rows yields the rows before the first bad line; the error then names its file:line."""
    path = tmp_path / ("rows.jsonl" + ".gz" * packed)
    content = b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if packed else content)
    expected, bad = [], None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = parse_line(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
        if row is None:
            bad = number
            break
        expected.append(row)
    got = []
    if bad is None:
        got += read_rows(path)
    else:
        with pytest.raises(ValueError) as error:
            got.extend(read_rows(path))
        assert str(error.value).startswith(f"{path}:{bad}: ")
    assert json.dumps(got) == json.dumps(expected)


@quick
@given(st.binary(max_size=60), st.integers(0, 60), st.binary(max_size=3))
def test_damaged_gzip_files_are_named(tmp_path: Path, noise: bytes, at: int, patch: bytes):
    """Noise, or a gzip file cut or patched: an error with its name, or rows if it does no harm."""
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b'{"prompt": "a"}\n' * 3)
    patched = whole[:at] + patch + whole[at + len(patch) :]
    for content in (noise, whole[:at], patched, whole + noise):
        path.write_bytes(content)
        try:
            assert all(isinstance(row, dict) for row in read_rows(path))
        except ValueError as error:
            assert str(path) in str(error)


@quick
@given(st.lists(st.dictionaries(texts, json_values, max_size=3), max_size=3))
def test_rows_that_are_written_are_read_back(tmp_path: Path, rows: list[dict]):
    """write_rows and read_rows undo each other for any JSON, unpaired surrogates included."""
    path = write_rows(tmp_path / "rows.jsonl", rows)
    assert json.dumps(list(read_rows(path))) == json.dumps(rows)


def is_messages(value) -> bool:
    """Return True for a list of messages with a known role, text, and no other key."""
    return bool(value) and all(
        message.keys() == {"role", "content"}
        and message["role"] in ("system", "user", "assistant")
        and isinstance(message["content"].encode(), bytes)
        for message in value
    )


@settings(quick, max_examples=400)
@given(rows(), st.sampled_from([*ROWS, "answers"]), st.booleans())
@example({"prompt": "a", "response": "b", "weights": []}, "weights", False)
@example({"prompt": "a", "responses": 5, "weights": [1.0]}, "weights", False)
@example({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e39}, "preference", False)
def test_any_row_is_used_or_rejected(row: dict, kind: str, plain: bool):
    """A row gives text or messages, and one number per response in every column; or a ValueError.

    A null counts as an absent key.
    """

    def outcome(row: dict):
        try:
            return formats.answers_of(row, plain) if kind == "answers" else ROWS[kind](row, plain)
        except ValueError as error:
            assert str(error)
            return None

    result = outcome(row)
    without_nulls = {key: value for key, value in row.items() if value is not None}
    assert repr(result) == repr(outcome(without_nulls))  # by repr: NaN does not equal itself
    if result is None:
        return
    prompt, responses, columns = (*result, {}) if kind == "answers" else result
    assert responses and all(isinstance(r, str) or is_messages(r) for r in responses)
    if prompt is None:
        assert len(responses) == 1 and responses[0][-1]["role"] == "assistant"
    else:
        assert isinstance(prompt, str) or is_messages(prompt) and prompt[-1]["role"] != "assistant"
    for values in columns.values():
        assert len(values) == len(responses)
        assert all(isinstance(value, float) and not abs(value) > 3.5e38 for value in values)


class Bytes:
    """A plain template over bytes, with the methods of Template that load_dataset calls."""

    plain, hash = True, "bytes"
    tokenizer = SimpleNamespace(bos=None, hash="bytes")

    def pair(self, prompt, responses):
        """Return (prompt ids, [(response ids, all scored), ...], no border moved)."""
        bodies = [
            x if isinstance(x, str) else "".join(message["content"] for message in x)
            for x in (prompt, *responses)
        ]
        head, *answers = ([byte for byte in text.encode()] for text in bodies)
        return head, [(ids, [1] * len(ids)) for ids in answers], False

    def conversation(self, messages):
        """Return (ids before the last message, (its ids, all scored))."""
        head, [answer], _ = self.pair(messages[:-1], [messages[-1:]])
        return head, answer


def is_usable(row: dict, kind: str) -> bool:
    """Return True if a row of this kind has a prompt and responses that are not empty."""
    try:
        prompt, responses, _ = ROWS[kind](row, True)
        if prompt is None:
            head, answer = Bytes().conversation(responses[0])
            answers = [answer]
        else:
            head, answers, _ = Bytes().pair(prompt, responses)
    except ValueError:
        return False
    return bool(head) and all(ids for ids, _ in answers)


@settings(quick, max_examples=60)
@given(st.lists(lines, max_size=6), st.sampled_from(list(ROWS)), st.integers(0, 6))
def test_bad_rows_are_counted_up_to_the_limit(
    tmp_path: Path, lines: list[bytes], kind: str, limit: int
):
    """load_dataset keeps good rows and counts bad ones; past --max-bad-rows it names the first."""
    good = {"prompt": "a", "response": "b", "chosen": "b", "rejected": "c", "label": True}
    good |= {"helpfulness": 3, "responses": ["b"], "weights": [1.0]}
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join([json.dumps(good).encode(), *lines]))
    numbered = [(number, line) for number, line in enumerate(lines, 2) if line.strip()]
    bad = [number for number, line in numbered if not is_usable(parse_line(line) or {}, kind)]
    kept = 1 + len(numbered) - len(bad)

    def load():
        cache = tmp_path / "cache"
        return load_dataset(path, kind, Bytes(), 10**6, "drop", limit, cache, 1, lambda text: None)

    if len(bad) <= limit:
        data = load()
        assert len(data) == kept
        assert data.counts["bad"] == len(bad) and data.counts["rows"] == kept + len(bad)
    else:
        with pytest.raises(ValueError) as error:
            load()
        assert str(error.value).startswith(f"{path}:{bad[0]}: ")
        assert "--max-bad-rows" in str(error.value)
