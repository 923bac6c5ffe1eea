"""Verifiable instructions: checks by hand, rows by seed, what training never sees."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from data import verifiable
from data.verifiable import check, make_rows, reward, score_rows

ROOT = Path(__file__).parents[2]
CHECKS = [  # kind, value, texts that hold it, texts that do not
    ("max", 4, ["one two three", "It's one-two three"], ["a b c d e", "it's a b c d"]),
    ("without", "the", ["Their other theme", "a b c"], ["Is THE one", "see the, here"]),
    ("use", "small", ["A Small bird", "is it small?"], ["smaller birds here", "a b c"]),
    ("no_commas", None, ["a b c"], ["a, b c"]),
    ("one_sentence", None, ["It is 3.5 m.", "Is it so?", " A b c! "], ["A b c", "A b. C d.", "A."]),
    ("question", None, ["Is it so? ", "A b. C d?"], ["Is it? Yes.", "a b c"]),
    ("begin", "Well", ["Well, a b", " Well a b"], ["well a b", "Wellness is good", "A Well b"]),
    ("lower", None, ["a b c.", "übel 3 b c"], ["A b c", "a b É c"]),
    (
        "bullets",
        2,
        ["- a b\n- c", "* a\n\n* b c"],
        ["- a b c", "x\n- a b\n- c", "-a\n-b c"],
    ),
    (
        "json",
        ["topic", "fact"],
        ['{"fact": "a", "topic": 1, "topic": "b"}', ' {"topic": "a", "fact": "b"}\n'],
        ['{"topic": "a b c"}', '[["topic", "fact", "a"]]', "topic fact a", "[" * 100000],
    ),
    ("finish", "That is all.", ["A. That is all. "], ["That is all", "that is all.", "a b c"]),
    ("letter", "k", ["Kites fly. A b ok."], ["Kites fly. A b c."]),
]


@pytest.mark.parametrize(("kind", "value", "good", "bad"), CHECKS, ids=[c[0] for c in CHECKS])
def test_a_check_says_what_its_instruction_asks(kind: str, value, good: list, bad: list):
    """Case, white space, punctuation and words inside words are read as people read them."""
    assert all(check(text, {kind: value})[kind] for text in good)
    assert not any(check(text, {kind: value})[kind] for text in bad)


def test_every_kind_has_a_check_here():
    assert [kind for kind, *_ in CHECKS] == list(verifiable.KINDS)


@pytest.mark.parametrize("text", ["", " ", "\n", "?", "- \n- ", "{}", "Well", "é", "a b"])
def test_an_answer_without_content_holds_nothing(text: str):
    """An empty answer would otherwise hold "do not use commas"; no check may fail on it."""
    for kind, spec in verifiable.KINDS.items():
        assert all(check(text, {kind: value}) == {kind: False} for value in spec.values)


def test_the_reward_is_the_share_of_constraints_held():
    row = {"constraints": {"max": 4, "no_commas": None, "question": None}}
    assert reward("", "Is it so, then?", row) == 2 / 3
    assert reward("", "Is it so?", row) == 1.0
    with pytest.raises(ValueError, match="unknown constraint rhyme: have max"):
        reward("", "a b c", {"constraints": {"rhyme": None}})


def test_rows_are_a_function_of_the_seed():
    assert make_rows(50, "train", 0) == make_rows(60, "train", 0)[:50]
    assert make_rows(50, "train", 0) != make_rows(50, "train", 1)


@pytest.mark.parametrize("kinds", [verifiable.EASY, tuple(verifiable.KINDS)])
def test_the_test_asks_what_training_never_asked(kinds: tuple):
    """Other topics; combinations of kinds that training leaves out; no contradiction in either."""
    train, test = (make_rows(3000, split, 3, kinds) for split in ("train", "test"))
    pairs = [pair for pair in verifiable.HELD_OUT if pair <= set(kinds)]
    for rows, wanted in ((train, False), (test, True)):
        sets = [set(row["constraints"]) for row in rows]
        assert all(1 <= len(one) <= 3 for one in sets)
        assert not any(pair <= one for one in sets for pair in verifiable.CONFLICTS)
        assert all(any(pair <= one for one in sets) == wanted for pair in pairs)
        assert set.union(*sets) == set(kinds)
    topics = verifiable.TOPICS["test"]
    assert not any(topic in row["prompt"][0]["content"] for row in train for topic in topics)


def test_an_instruction_names_its_value():
    for row in make_rows(300, "train", 5, tuple(verifiable.KINDS)):
        text = row["prompt"][0]["content"]
        for value in row["constraints"].values():
            parts = value if isinstance(value, list) else [value]
            assert all(str(part) in text for part in parts if part is not None)
        assert "{" not in text and "None" not in text


def test_scores_are_means_over_responses():
    rows = [
        {"constraints": {"max": 3}, "response": "a b c"},
        {"constraints": {"max": 3, "question": None}, "responses": ["a b c", "a b c d?"]},
    ]
    scores = score_rows(rows)
    assert scores == {
        "all": 1 / 3,
        "held": 3 / 5,
        "words": 10 / 3,
        "rows": 3,
        "max": 2 / 3,
        "question": 1 / 2,
    }


def test_the_command_makes_rows_and_scores_answers(tmp_path):
    """As a user types it; the same files twice."""

    def run(*words: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "data.verifiable", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    for name in "ab":
        made = run("make", "--out", f"{tmp_path}/{name}", "--train", "30", "--test", "10")
        assert made.returncode == 0, made.stderr
    for split, n in (("train", 30), ("test", 10)):
        texts = [(tmp_path / name / f"{split}.jsonl").read_text() for name in "ab"]
        assert texts[0] == texts[1] and len(texts[0].splitlines()) == n
    rows = [json.loads(line) for line in texts[0].splitlines()]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({**row, "response": "a b c"}) + "\n" for row in rows))
    scored = run("score", str(answers))
    assert json.loads(scored.stdout)["rows"] == 10
    failed = run("score", str(tmp_path / "a" / "test.jsonl"))
    assert failed.returncode == 1 and "response" in failed.stderr
