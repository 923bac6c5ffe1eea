"""Odd rows in every container, and what they have shown to go wrong."""

import json
from pathlib import Path

import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("pyarrow")

import chat_templates
import fuzz_rows

from data import jinja
from data.encode import Job, encode_lines
from data.rows import parse_row, read_lines, read_rows
from data.templates import Template
from data.tokenizer import load_tokenizer

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
PAIR = {"prompt": "Q", "response": "A"}


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Template:
    """Return Qwen2.5's template, which takes tools."""
    folder = tmp_path_factory.mktemp("fuzz") / "qwen"
    return Template(
        "auto", load_tokenizer(chat_templates.save(folder, *chat_templates.MODELS["qwen2.5"]))
    )


def encoded(template: Template, row: dict, kind: str = "sft"):
    line = (0, 1, json.dumps(row).encode())
    return encode_lines(Job([], kind, template, 1000, "drop"), [line])


def test_odd_rows_are_learned_whole_or_refused(tmp_path: Path):
    """A short part of tests/fuzz_rows.py: no traceback, no loss, no change, the books."""
    counts = fuzz_rows.run(tmp_path, 800, 7)
    assert counts["learned"] > 200 and counts["bad"] > 100 and counts["refused files"] > 1


SCORED = [{"response": "B", "overall_score": 4}, {"response": "C", "overall_score": 2}]
TWICE = [  # kind, row with two prompts or answers, the key named
    ("sft", PAIR | {"completion": "B"}, "completion"),
    ("sft", PAIR | {"messages": [USER, {"role": "assistant", "content": "B"}]}, "messages"),
    ("sft", PAIR | {"messages": [{"role": "system", "content": "S"}, USER, ANSWER]}, "messages"),
    ("sft", {"messages": [USER, ANSWER], "prompt": "another"}, "prompt"),
    ("sft", {"instruction": "Q", "output": "A", "response": "B"}, "output"),
    ("sft", {"messages": [USER, ANSWER], "text": "a text"}, "text"),
    ("sft", PAIR | {"completions": SCORED}, "response"),
    ("label", PAIR | {"label": True, "chosen": "A", "rejected": "B"}, "rejected"),
    (
        "preference",
        {"prompt": "Q", "chosen": "A", "rejected": "B", "chosen_response": "C"},
        "chosen",
    ),
    (
        "preference",
        {"prompt": "P", "chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "B"}]},
        "prompt",
    ),
    ("weights", {"prompt": "Q", "responses": ["A"], "weights": [1], "response": "B"}, "response"),
    ("label", PAIR | {"label": True, "kto_tag": False}, "kto_tag"),
    ("sft", {"conversations": [USER, ANSWER], "conversation": [USER]}, "conversation"),
]


@pytest.mark.parametrize("kind, row, key", TWICE)
def test_two_that_differ_are_refused(kind: str, row: dict, key: str, template: Template):
    """Before, one of them was learned and the other vanished."""
    ((_, _, reason),) = encoded(template, row, kind).bad
    assert f"`{key}" in reason


SAME = [
    ("sft", PAIR | {"messages": [USER, ANSWER]}),
    ("sft", {"messages": [USER, ANSWER, USER], "prompt": "Q"}),
    ("sft", PAIR | {"completion": "A"}),
    ("preference", {"prompt": "Q", "chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}),
    ("label", PAIR | {"label": True, "kto_tag": True}),
]


@pytest.mark.parametrize("kind, row", SAME)
def test_what_stands_twice_may_stand_twice(kind: str, row: dict, template: Template):
    assert not encoded(template, row, kind).bad


def test_rated_completions_serve_every_kind(template: Template):
    """UltraFeedback's rows: one answer, or the best against the worst; no key it does not have."""
    row = {"instruction": "Q", "completions": SCORED}
    for kind, n in (("sft", 1), ("preference", 2), ("label", 2), ("attributes", 1)):
        chunk = encoded(template, row, kind)
        assert not chunk.bad and chunk.counts["responses"] == n
        assert not [name for name in chunk.counts if name.startswith("ignored")], kind
    for odd in (float("nan"), float("inf"), 10**400, True, "4", None):
        completions = [*SCORED, {"response": "D", "overall_score": odd}]
        chunk = encoded(template, row | {"completions": completions}, "preference")
        assert chunk.arrays["column_reward"].tolist() == [4.0, 2.0], odd


def test_history_is_read_like_messages(template: Template):
    """Its calls are completed and its odd keys named, as those of `messages` are."""
    call = {"name": "f", "arguments": '{"x": "here"}'}
    history = [USER, {"role": "assistant", "content": None, "tool_calls": [call], "id": 4}]
    history.append({"role": "tool", "content": [{"type": "text", "text": "forty"}]})
    chunk = encoded(template, {"history": history, **PAIR})
    text = template.tokenizer.decode(chunk.arrays["tokens"].tolist(), False)
    assert '{"name": "f", "arguments": {"x": "here"}}' in text and "forty" in text
    assert chunk.counts["ignored history[].id"] == 1


def test_null_keys_are_absent(template: Template):
    row = {"messages": [USER | {"id": None}, ANSWER], "source": None}
    assert not [n for n in encoded(template, row).counts if n.startswith("ignored")]


@pytest.mark.parametrize("key", ["system", "system_prompt", "instruction", "history", "tools"])
@pytest.mark.parametrize("value", [True, 1, 0, 2.5, {"a": 1}])
def test_a_switch_is_no_text(key: str, value: object, template: Template):
    ((_, _, reason),) = encoded(template, {"messages": [USER, ANSWER], key: value}).bad
    assert f"`{key}` must be" in reason


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(ValueError, match="'prompt' stands twice"):
        parse_row(b'{"prompt": "a", "response": "c", "prompt": "b"}')
    with pytest.raises(ValueError, match="'content' stands twice"):
        parse_row(b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}')


def test_columns_add_no_nulls(tmp_path: Path):
    """Parquet and Arrow give every object the keys of all others, as null."""
    rows = [
        {"messages": [USER | {"tool_calls": [{"name": "f", "arguments": {"x": 1}}]}]},
        {"messages": [USER | {"tool_calls": [{"name": "g", "arguments": {"y": "z"}}]}]},
    ]
    for name in ("rows.parquet", "rows.arrow"):
        fuzz_rows.write_columns(tmp_path / name, rows)
        assert list(read_rows(tmp_path / name)) == rows


def test_columns_of_one_name_are_refused(tmp_path: Path):
    import pyarrow
    from pyarrow import ipc

    table = pyarrow.table([["a"], ["b"]], names=["prompt", "prompt"])
    with ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(ValueError, match="a.arrow: the names of the columns are repeated"):
        list(read_lines([tmp_path / "a.arrow"]))


UNPARSED = {
    "loops": "".join(f"{{% for a{i} in [1] %}}" for i in range(25)) + "{% endfor %}" * 25,
    "ifs": "{% if true %}" * 150 + "{% endif %}" * 150,
    "parentheses": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "break": "{% break %}",
    "arguments": "{{ f(a=1, a=2) }}",
    "digits": "{{ " + "1" * 5000 + " }}",
}


@pytest.mark.parametrize("name", UNPARSED)
def test_a_template_that_python_refuses_is_named(name: str):
    """Jinja writes Python, which has limits of its own: these were tracebacks."""
    with pytest.raises(ValueError, match="chat template cannot be parsed"):
        jinja.compile_template(UNPARSED[name])


HUGE = [
    "{{ 'a' * 10000000000 }}",
    "{{ 10000000000 * 'a' }}",
    "{{ [1] * 10000000000 }}",
    "{{ 9 ** (9 ** 9) }}",
    "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "{{ 'a' | center(10000000000) }}",
    "{{ 'a'.ljust(10000000000) }}",
    "{% for i in range(70) %}{{ 'a' * 1000000 }}{% endfor %}",
]


@pytest.mark.parametrize("source", HUGE)
def test_a_template_that_fills_the_memory_is_stopped(source: str):
    """No signal interrupts one step of Python, so each is bounded."""
    with pytest.raises(ValueError, match="it (makes something too large|writes .* characters)"):
        jinja.render(source, {"messages": []})
    assert jinja.render("{{ 3 * 4 }}{{ 2 ** 10 }}{{ '-' * 3 }}{{ 'a' | center(3) }}", {}) == (
        "121024--- a "
    )
