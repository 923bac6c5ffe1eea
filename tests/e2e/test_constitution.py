"""Constitutional AI: the same rows whatever kills it, both orders asked, bad principle files."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from plain import PlainModel

import constitution
import train_dpo
import train_sft
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling.constitution import Speaker, fill, read_constitution
from sampling.traces import label, pair_rows
from weights.folder import load_model, save_model

RULES = """# a comment
[principles]
The answer is polite.
The answer is not rude.

[critique]
{prompt} {response} {principle}
\\# why?
[revise]
{prompt} {response} {critique} {principle} {"kept": 1}
[compare]
{prompt} A {first} B {second} {principle}
[choices]
yes
no
"""


@pytest.fixture(autouse=True)
def texts_end(monkeypatch):
    """Make many token ids end a text: a model of random weights would hardly ever end one."""
    init = Template.__init__

    def init_with_ends(self, *args):
        init(self, *args)
        self.stop_ids = self.stop_ids | set(range(4, 640, 9))

    monkeypatch.setattr(Template, "__init__", init_with_ends)


@pytest.fixture(scope="module")
def model(toy: Path, tmp_path_factory) -> Path:
    """Return the toy model in float64."""
    folder = tmp_path_factory.mktemp("constitution") / "model"
    save_model(load_model(toy / "model", torch.float64), folder, toy / "model")
    return folder


@pytest.fixture
def words(toy: Path, model: Path, tmp_path: Path):
    """Return a function of OUT and flags that returns the command line of a short run."""
    rules = tmp_path / "rules.txt"
    rules.write_text(RULES)

    def make(out: str, **more) -> list[str]:
        flags = {
            "model": model,
            "data": toy / "world" / "sft.jsonl",
            "out": tmp_path / out,
            "principles": rules,
            "max_new_tokens": 14,
            "temperature": 1,
            "batch_size": 4,
            "limit": 10,
            "dtype": "fp64",
            **more,
        }
        return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]

    return make


def rows_of(path: Path) -> list[dict]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


FILES = ("sft.jsonl", "pairs.jsonl", "trace.jsonl")


def test_a_killed_run_ends_with_the_same_bytes(words, tmp_path: Path, monkeypatch):
    """Stopped in the second batch, and with its last line cut: the same command, the same files."""
    constitution.main(words("whole", rounds=2, pairs=2))
    choose = Speaker.choose
    calls = []

    def stop_at_the_second(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return choose(self, *args)

    monkeypatch.setattr(Speaker, "choose", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        constitution.main(words("killed", rounds=2, pairs=2))
    trace = tmp_path / "killed" / "trace.jsonl"
    assert len(rows_of(trace)) == 5  # the key and one batch
    constitution.main(words("killed", rounds=2, pairs=2))
    assert len(calls) == 2 + 2  # the first batch was not computed again
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    content = trace.read_bytes()
    trace.write_bytes(content[: content.rindex(b'"pairs"')])  # the last line: 9 of 10 prompts
    (tmp_path / "killed" / "sft.jsonl").unlink()
    constitution.main(words("killed", rounds=2, pairs=2))
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(ValueError, match="another model, other data, principles or flags"):
        constitution.main(words("killed", rounds=1, pairs=2))


def test_texts_are_a_function_of_seed_and_prompt(words, tmp_path: Path):
    """Another batch size gives the same texts, another seed gives others; all goes into rows."""
    for name, flags in {"a": {}, "b": {"batch_size": 7}, "c": {"seed": 1}}.items():
        constitution.main(words(name, **flags))
    a, b, c = (rows_of(tmp_path / name / "trace.jsonl")[1:] for name in "abc")
    for one, other in zip(a, b):
        pairs = zip(one.pop("pairs"), other.pop("pairs"))
        assert one == other
        for left, right in pairs:
            assert np.allclose(left.pop("logps"), right.pop("logps"), atol=1e-10)
            assert left == right
    assert [one["draft"] for one in a] != [one["draft"] for one in c]
    pairs = rows_of(tmp_path / "a" / "pairs.jsonl")
    assert {pair["principle"] for pair in pairs} == {
        "The answer is polite.",
        "The answer is not rude.",
    }
    # No text is a copy of another for want of a seed of its own.
    assert all(one["draft"] != one["rounds"][0]["revision"] for one in a)
    rows = rows_of(tmp_path / "a" / "sft.jsonl")
    assert 0 < len(rows) < 10  # a random model is cut now and then
    for row in rows:
        trace = a[row["row"] - 1]
        assert row["response"] == trace["rounds"][-1]["revision"] and trace["ended"]
        assert row["draft"] == trace["draft"]


def test_both_orders_are_asked_and_swapped(words, model: Path, tmp_path: Path):
    """logps against each answer's own question, word by word, in both orders, within 1e-10."""
    constitution.main(words("out", limit=5))
    tokenizer = load_tokenizer(model)
    plain = PlainModel(model, torch.float64)
    template = Template("auto", tokenizer)
    rules = read_constitution(tmp_path / "rules.txt")

    def logps(prompt: str, first: str, second: str, principle: str) -> list[float]:
        ids = template.prompt(f"{prompt} A {first} B {second} {principle}")
        with torch.no_grad():
            return [plain.logps(ids, list(tokenizer.encode(x))).sum().item() for x in ("yes", "no")]

    rows = rows_of(tmp_path / "out" / "pairs.jsonl")
    assert rows and {row["consistent"] for row in rows} <= {True, False}
    for row in rows:
        texts = row["prompt"], row["chosen"], row["rejected"]
        front = logps(*texts, row["principle"])
        behind = logps(texts[0], texts[2], texts[1], row["principle"])
        assert row["logps"]["chosen_first"] == pytest.approx(front, abs=1e-10)
        assert row["logps"]["chosen_second"] == pytest.approx(behind, abs=1e-10)
        p = 1 / (1 + math.exp(front[1] - front[0])), 1 / (1 + math.exp(behind[0] - behind[1]))
        assert row["probability"] == pytest.approx(sum(p) / 2, abs=1e-10)
        assert row["probability"] > 0.5
        assert row["consistent"] == (min(p) > 0.5)
    assert rules.critique == "{prompt} {response} {principle}\n# why?"


def test_a_label_is_the_mean_of_both_orders():
    """A judge of the place alone gives 0.5 and no pair; swapped answers swap the label."""
    by_place = [[math.log(0.6), math.log(0.2)], [math.log(0.3), math.log(0.1)]]
    assert label(by_place) == (pytest.approx(0.5, abs=1e-15), False, pytest.approx(0.4))
    front, behind = [math.log(0.5), math.log(0.1)], [math.log(0.2), math.log(0.6)]
    value, agree, _ = label([front, behind])
    assert (value, agree) == (pytest.approx((5 / 6 + 3 / 4) / 2), True)
    assert label([behind, front])[0] == pytest.approx(1 - value)

    def rows(least: float = 0.5, consistent: bool = False, **more) -> list[dict]:
        pair = {"answers": ["x", "y"], "ended": [True, True], "principle": "p"}
        pair |= {"logps": [behind, front], **more}
        trace = {"prompt": {"prompt": "q"}, "row": 1, "pairs": [pair]}
        return pair_rows(trace, least, consistent, Counter())

    (row,) = rows()
    assert (row["chosen"], row["rejected"]) == ("y", "x")
    assert row["logps"] == {"chosen_first": front, "chosen_second": behind}
    assert not rows(least=0.8) and rows(least=0.79)
    torn = [[math.log(0.9), math.log(0.1)], [math.log(0.6), math.log(0.4)]]
    assert rows(logps=torn) and not rows(logps=torn, consistent=True)
    assert not rows(answers=["x", "x"]) and not rows(answers=["x", ""])
    assert not rows(ended=[True, False])


def test_the_rows_train(words, model: Path, tmp_path: Path, train):
    """sft.jsonl and pairs.jsonl are rows of train_sft.py and train_dpo.py as they are."""
    constitution.main(words("out"))
    for script, name in ((train_sft, "sft"), (train_dpo, "pairs")):
        data = tmp_path / "out" / f"{name}.jsonl"
        rows = train(script, tmp_path / name, model=model, data=data, batch_size=2, max_steps=1)
        assert math.isfinite(rows[-1]["loss"])


def test_a_server_says_the_same(words, toy: Path, tmp_path: Path, engine):
    """Log-probs from --rollout-url equal those of the model here for the server's own answers."""
    more = {"model": toy / "model", "limit": 4, "rollout_url": engine("vllm").url}
    constitution.main(words("served", **more))
    model = load_model(toy / "model", torch.float32)
    template = Template("auto", load_tokenizer(toy / "model"))
    config = constitution.rollout_config(constitution.Flags())
    speaker = constitution.local_speaker(model, template, config, 8192)
    rules = read_constitution(tmp_path / "rules.txt")
    for trace in rows_of(tmp_path / "served" / "trace.jsonl")[1:]:
        (pair,) = trace["pairs"]
        one, two = pair["answers"]
        asked = [
            fill(rules.compare, **trace["prompt"], first=x, second=y, principle=pair["principle"])
            for x, y in ((one, two), (two, one))
        ]
        assert np.allclose(speaker.choose(asked, rules.choices), pair["logps"], atol=1e-4)


def test_every_text_has_a_seed_of_its_own():
    """No two of draft, critique, revision, answers and draws share one, nor do two --seed."""
    seeds = [
        constitution.seed_of(constitution.Flags(seed=seed), row, use, number)
        for seed in (0, 1)
        for row in range(5)
        for use in range(6)
        for number in range(4)
    ]
    assert len(set(seeds)) == len(seeds) == 2 * 5 * 6 * 4


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("# a comment", "a comment", "before the first section"),
        ("[choices]", "[choice]", r"no section \[choice\]"),
        ("The answer is polite.\nThe answer is not rude.\n", "", r"no \[principles\]"),
        ("The answer is polite.", "The answer is not rude.", "stands there twice"),
        ("yes\nno", "yes", "two different replies"),
        ("yes\nno", "yes\nyes", "two different replies"),
        ("[choices]", "[compare]", "stands there twice"),
        ("{critique}", "", r"\[revise\] shows no \{critique\}"),
        ("B {second}", "B {secnd} {second}", r"nothing fills in \{secnd\}"),
        ("yes\nno", "the\nthe mill", "begins the other"),
    ],
)
def test_a_bad_file_of_principles_is_refused(words, tmp_path: Path, old, new, complaint):
    """Each complaint says what is wrong; nothing is written."""
    text = RULES.replace(old, new)
    assert text != RULES
    (tmp_path / "rules.txt").write_text(text)
    with pytest.raises(ValueError, match=complaint):
        constitution.main(words("out"))
    assert not (tmp_path / "out").exists()


def test_the_default_file_is_read_and_braces_stay(words):
    """data/constitution.txt is good; texts with braces are filled in once."""
    rules = read_constitution(constitution.Flags().principles)
    assert len(rules.principles) >= 4 and rules.choices == ["A", "B"]
    assert fill("{prompt} {x} {response}", prompt="{response}", response="r") == "{response} {x} r"
    for flags in ({"rounds": 0, "pairs": 0}, {"temperature": 0}):
        with pytest.raises(ValueError, match="raise"):
            constitution.main(words("out", **flags))
