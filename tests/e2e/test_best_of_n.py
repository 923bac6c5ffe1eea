"""Best of n: it keeps the best of what it drew, for SFT and DPO; it does not draw twice."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from launch import launch

import best_of_n
import train_dpo
import train_sft
from data.dataset import Prompts
from data.templates import Template
from sampling.rollout import Rollout, trees
from sampling.sampler import Sample

ROOT = Path(__file__).parents[2]


def words_of(toy: Path, out: Path, **more) -> list[str]:
    """Return the command line of a short run, with other flags in place of some."""
    flags = {
        "model": toy / "model",
        "data": toy / "world" / "sft.jsonl",
        "out": out,
        "batch_size": 8,
        "group_size": 6,
        "max_new_tokens": 60,
        "reward": "length:4",
        "template": "plain",
        "prompts": 20,
        **more,
    }
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


def rows_of(path: Path) -> list[dict]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def responses_end(monkeypatch):
    """Make many token ids end a response: a model of random weights would hardly ever end one."""
    init = Template.__init__

    def init_with_ends(self, *args):
        init(self, *args)
        self.stop_ids = self.stop_ids | set(range(4, 640, 9))

    monkeypatch.setattr(Template, "__init__", init_with_ends)


def rollout_of(texts: list[str], rewards: list[float], ended: list[bool], group: int) -> Rollout:
    """Return a rollout of given texts and rewards, `group` per prompt."""
    n = len(texts) // group
    samples = [Sample([5], [0.0], [0.0], end) for end in ended]
    prompts = Prompts([{}] * n, [f"p{i}" for i in range(n)], [[4]] * n)
    data = trees(prompts.ids, samples)
    return Rollout(prompts, samples, texts, np.array(rewards), np.array(ended), data, {})


def test_the_best_are_kept_and_pairs_are_best_and_worst():
    """The first drawn of equals wins; a text counts once; unended or empty ones do not count."""
    samples = rollout_of(
        ["a", "b", "c", "b", "x", "y", "", "z", "k", "k", "k", "k"],
        [1.0, 3.0, 2.0, 3.0, 9.0, 5.0, 7.0, 5.0, 1.0, 1.0, 1.0, 1.0],
        [True] * 4 + [False] + [True] * 7,
        group=4,
    )
    config = best_of_n.Config(group_size=4, top=2)
    kept, pairs = best_of_n.select(samples, config)
    assert [(row["prompt"], row["response"], row["reward"]) for row in kept] == [
        ("p0", "b", 3.0),
        ("p0", "c", 2.0),
        ("p1", "y", 5.0),
        ("p1", "z", 5.0),
        ("p2", "k", 1.0),
    ]
    pair = {"prompt": "p0", "chosen": "b", "rejected": "a"}
    assert pairs == [{**pair, "chosen_reward": 3.0, "rejected_reward": 1.0}]
    config.top, config.min_reward = 1, 3.0
    assert [row["response"] for row in best_of_n.select(samples, config)[0]] == ["b", "y"]


def test_a_cut_response_may_be_the_rejected_one():
    """With --cut-rejected, and never the chosen one, whatever its reward is."""
    samples = rollout_of(
        ["a", "b", "cut", "c", "x", "y", "long", "z", "k", "l", "m", "n"],
        [1.0, 3.0, 0.0, 2.0, 2.0, 2.0, 9.0, 2.0, 1.0, 2.0, 3.0, 4.0],
        [True, True, False, True, True, True, False, True] + [False] * 4,
        group=4,
    )
    config = best_of_n.Config(group_size=4)
    (plain,) = best_of_n.select(samples, config)[1]
    assert (plain["chosen"], plain["rejected"]) == ("b", "a")
    config.pairs = 5
    several = best_of_n.select(samples, config)[1]
    assert [(p["chosen"], p["rejected"]) for p in several] == [("b", "a"), ("b", "c")]
    config.pairs, config.cut_rejected = 1, True
    kept, (pair,) = best_of_n.select(samples, config)
    assert (pair["chosen"], pair["rejected"], pair["rejected_reward"]) == ("b", "cut", 0.0)
    assert [row["response"] for row in kept] == ["b", "x"]


def test_it_keeps_the_best_of_what_it_drew(toy: Path, tmp_path: Path, capsys, train):
    """Kept responses earn more than the rest; train_sft.py and train_dpo.py take the files."""
    out = tmp_path / "out"
    best_of_n.main(words_of(toy, out))
    printed = capsys.readouterr().out
    numbers = dict(re.findall(r"([\w/]+) (-?[\d.]+)(?:,|\n)", printed.splitlines()[-2] + "\n"))
    kept, pairs = rows_of(out / "kept.jsonl"), rows_of(out / "pairs.jsonl")
    assert len(kept) == int(numbers["kept/rows"]) > 10
    assert len({row["prompt"] for row in kept}) == len(kept)
    assert float(numbers["kept/reward"]) == pytest.approx(
        np.mean([row["reward"] for row in kept]), rel=1e-3
    )
    spread = float(numbers["reward_std"])
    assert float(numbers["kept/reward"]) > float(numbers["reward"]) + spread / 2
    logged = rows_of(out / "samples.jsonl")  # of the first eight prompts, 6 samples to 4 of them
    assert len(logged) == 24
    assert kept[0]["prompt"] == logged[0]["prompt"]
    assert kept[0]["reward"] == max(row["reward"] for row in logged[:6] if row["ended"])
    assert len(pairs) == int(numbers["kept/pairs"]) > 10
    assert all(row["chosen_reward"] > row["rejected_reward"] for row in pairs)

    flags = {"model": toy / "model", "lr": 1e-2, "template": "plain", "max_steps": 2}
    data = out / "kept.jsonl"
    rows = train(train_sft, tmp_path / "sft", data=data, batch_size=8, **flags)
    assert len(rows) == 2
    data = out / "pairs.jsonl"
    rows = train(train_dpo, tmp_path / "dpo", data=data, batch_size=4, loss="rpo_sq", **flags)
    assert len([row for row in rows if "loss" in row]) == 2


def test_a_second_run_draws_the_same_or_nothing(toy: Path, tmp_path: Path, capsys):
    """The samples are those of (weights, flags, seed); a finished OUT is left as it is."""
    best_of_n.main(words_of(toy, tmp_path / "a"))
    best_of_n.main(words_of(toy, tmp_path / "b"))
    best_of_n.main(words_of(toy, tmp_path / "c", seed=1))
    for name in ("kept.jsonl", "pairs.jsonl", "samples.jsonl"):
        a, b, c = ((tmp_path / out / name).read_text() for out in "abc")
        assert a == b != c
    written = (tmp_path / "a" / "kept.jsonl").stat().st_mtime_ns
    capsys.readouterr()
    best_of_n.main(words_of(toy, tmp_path / "a"))
    assert "kept.jsonl is there already" in capsys.readouterr().out
    assert (tmp_path / "a" / "kept.jsonl").stat().st_mtime_ns == written


@pytest.mark.parametrize("layout", ["dp", "tp", "pp"])
def test_two_ranks_keep_what_one_keeps(layout: str, toy: Path, tmp_path: Path):
    """Whatever the layout, in float64, the files are the same."""
    flags = {"dtype": "fp64", "prompts": 9}
    layout_flags = {} if layout == "dp" else {layout: 2}
    launch(1, best_of_n.main, words_of(toy, tmp_path / "one", **flags))
    launch(2, best_of_n.main, words_of(toy, tmp_path / "two", **flags, **layout_flags))
    for name in ("kept.jsonl", "pairs.jsonl", "samples.jsonl"):
        assert (tmp_path / "one" / name).read_text() == (tmp_path / "two" / name).read_text()


def test_a_killed_run_starts_over(toy: Path, tmp_path: Path):
    """Without kept.jsonl in OUT everything is drawn again, and logged once."""
    best_of_n.main(words_of(toy, tmp_path / "out"))
    kept = (tmp_path / "out" / "kept.jsonl").read_text()
    logged = (tmp_path / "out" / "samples.jsonl").read_text()
    (tmp_path / "out" / "kept.jsonl").unlink()
    best_of_n.main(words_of(toy, tmp_path / "out"))
    assert (tmp_path / "out" / "kept.jsonl").read_text() == kept
    assert (tmp_path / "out" / "samples.jsonl").read_text() == logged


def test_impossible_settings_are_refused(toy: Path, tmp_path: Path):
    """One line that names the flag."""
    for more, words in (
        ({"top": 7}, "--top 7 of --group-size 6"),
        ({"lr": 1e-5}, "--lr has no effect here: pass it to train_sft.py"),
        ({"min_reward": 5}, "none of 120 samples can be kept .* lower --min-reward"),
    ):
        with pytest.raises(ValueError, match=words):
            best_of_n.main(words_of(toy, tmp_path / words[:5], **more))


def test_the_loop_of_the_demos_page_runs(toy: Path, tmp_path: Path, train):
    """Iterative DPO as in docs/demo.md: two rounds of its commands on thirty prompts."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "docs/demo.md").read_text(), re.S)
    (loop,) = [block for block in blocks if "best_of_n.py" in block]
    model, *commands, next_model = re.findall(r"^(?:model=|  python |  model=)(.*)$", loop, re.M)
    assert len(commands) == 2
    for i in ("1", "2"):
        for command in commands:
            for old, new in (
                ("$model", model),
                ("runs/sft/final", str(toy / "model")),
                ("$i", i),
                ("--prompts 512", "--prompts 30"),
                ("runs/toy/sft.jsonl", str(toy / "world/sft.jsonl")),
                ("runs/rm/final", "length:20"),
                ("runs/", f"{tmp_path}/"),
            ):
                command = command.replace(old, new)
            script, *words = shlex.split(command)
            {"best_of_n.py": best_of_n, "train_dpo.py": train_dpo}[script].main(words)
        model = next_model.replace("$i", i)
    one, two = (rows_of(tmp_path / f"pairs_{i}" / "pairs.jsonl") for i in "12")
    assert one != two != []
    assert (tmp_path / "iterated_2" / "final" / "model.safetensors").exists()
