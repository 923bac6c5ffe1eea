"""Rejection sampling: what is kept is the best of what was drawn; files that SFT and DPO take; resumes."""

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import checkpoint
import train_dpo
import train_rejection
import train_sft
from data.dataset import Prompts
from sampling.rollout import Rollout, trees
from sampling.sampler import Sample

ROOT = Path(__file__).parents[2]


def flags_of(toy: Path, **more) -> dict:
    return {
        "model": toy / "model", "data": toy / "world" / "sft.jsonl", "batch_size": 8, "group_size": 6, "lr": 1e-2,
        "max_new_tokens": 60, "reward": "length:4", "template": "plain", "prompts": 20, **more,
    }  # fmt: skip


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def answers_end(monkeypatch):
    """A model of random weights does not end by itself."""
    own = train_rejection.Template

    def ends(*args):
        template = own(*args)
        template.stop_ids = template.stop_ids | set(range(4, 640, 9))
        return template

    monkeypatch.setattr(train_rejection, "Template", ends)


def found(texts: list[str], rewards: list[float], ended: list[bool], group: int) -> Rollout:
    n = len(texts) // group
    samples = [Sample([5], [0.0], [0.0], end) for end in ended]
    prompts = Prompts([{}] * n, [f"p{i}" for i in range(n)], [[4]] * n)
    return Rollout(
        prompts, samples, texts, np.array(rewards), np.array(ended), trees(prompts.ids, samples), {}
    )


def test_the_best_are_kept_and_pairs_are_best_and_worst():
    """By hand: ties keep the first drawn, texts count once, what did not end or says nothing does not count."""
    drawn = found(
        ["a", "b", "c", "b", "x", "y", "", "z", "k", "k", "k", "k"],
        [1.0, 3.0, 2.0, 3.0, 9.0, 5.0, 7.0, 5.0, 1.0, 1.0, 1.0, 1.0],
        [True, True, True, True, False, True, True, True, True, True, True, True], 4,
    )  # fmt: skip
    config = train_rejection.Config(group_size=4, top=2)
    kept, pairs = train_rejection.choose(drawn, config)
    assert [(row["prompt"], row["response"], row["reward"]) for row in kept] == [
        ("p0", "b", 3.0), ("p0", "c", 2.0), ("p1", "y", 5.0), ("p1", "z", 5.0), ("p2", "k", 1.0)
    ]  # fmt: skip
    assert pairs == [
        {
            "prompt": "p0",
            "chosen": "b",
            "rejected": "a",
            "chosen_reward": 3.0,
            "rejected_reward": 1.0,
        }
    ]
    config.top, config.min_reward = 1, 3.0
    assert [row["response"] for row in train_rejection.choose(drawn, config)[0]] == ["b", "y"]


def test_it_is_sft_on_what_it_kept(toy: Path, tmp_path: Path, train):
    """Its steps are those of train_sft.py on kept.jsonl, bit for bit; the kept answers earn more than the rest."""
    flags = flags_of(toy)
    rows = train(
        train_rejection, tmp_path / "out", **flags, eval_data=toy / "world" / "prompts_test.jsonl"
    )
    first, evaluated, *steps = rows
    kept = rows_of(tmp_path / "out" / "kept.jsonl")
    assert (
        first["kept/reward"] > first["reward"] + first["reward_std"] / 2
        and first["kept/rows"] == len(kept) > 10
    )
    logged = rows_of(
        tmp_path / "out" / "samples.jsonl"
    )  # of the first eight prompts, 6 samples of 4 of them
    best = max(row["reward"] for row in logged[:6] if row["ended"])
    assert (
        len(logged) == 24 and kept[0]["prompt"] == logged[0]["prompt"] and kept[0]["reward"] == best
    )
    assert (
        len({row["prompt"] for row in kept}) == len(kept)
        and "eval/reward" in evaluated
        and len(steps) > 2
    )
    same = train(
        train_sft, tmp_path / "sft", model=toy / "model", data=tmp_path / "out" / "kept.jsonl", batch_size=8, lr=1e-2,
        template="plain",
    )  # fmt: skip
    assert [row for row in steps if "loss" in row] == same
    a, b = (load_file(tmp_path / name / "final" / "model.safetensors") for name in ("out", "sft"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_its_pairs_are_what_dpo_takes(toy: Path, tmp_path: Path, train):
    """--no-train writes the files and stops; train_dpo.py runs on pairs.jsonl as it is, rewards and all."""
    train_rejection.main([w for k, v in flags_of(toy).items() for w in (f"--{k}", str(v))]
                         + ["--out", str(tmp_path / "out"), "--no-train"])  # fmt: skip
    assert not (tmp_path / "out" / "final").exists()
    pairs = rows_of(tmp_path / "out" / "pairs.jsonl")
    assert len(pairs) > 10 and all(row["chosen_reward"] > row["rejected_reward"] for row in pairs)
    flags = {
        "model": toy / "model",
        "data": tmp_path / "out" / "pairs.jsonl",
        "batch_size": 4,
        "max_steps": 3,
    }
    rows = train(train_dpo, tmp_path / "dpo", **flags, lr=1e-2, loss="rpo_sq", template="plain")
    assert len([row for row in rows if "loss" in row]) == 3


def test_resumed_is_never_stopped_bit_for_bit(toy: Path, tmp_path: Path, train):
    """The samples are not drawn again, by a policy that has changed since."""
    whole = train(train_rejection, tmp_path / "whole", **flags_of(toy))
    part = train(train_rejection, tmp_path / "part", **flags_of(toy), max_minutes=1e-6)
    assert len(part) == 2 and checkpoint.newest(tmp_path / "part").name == "step_1"
    drawn = (tmp_path / "part" / "kept.jsonl").stat().st_mtime_ns
    assert train(train_rejection, tmp_path / "part", **flags_of(toy), resume="auto") == whole
    assert (tmp_path / "part" / "kept.jsonl").stat().st_mtime_ns == drawn
    a, b = (
        load_file(tmp_path / name / "final" / "model.safetensors") for name in ("whole", "part")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_settings_that_cannot_be_are_refused(toy: Path, tmp_path: Path, train):
    """One line that names the flag."""
    for more, words in (
        ({"group_size": 1}, "--group-size 2 or more"),
        ({"top": 7}, "--top between 1 and --group-size"),
        ({"min_reward": 5}, "none of 120 samples is worth keeping .* lower --min-reward"),
    ):
        with pytest.raises(ValueError, match=words):
            train(train_rejection, tmp_path / words[:5], **flags_of(toy, **more))


def test_the_loop_of_the_readme_runs(toy: Path, tmp_path: Path, train):
    """Iterative DPO as README.md has it: the commands of two rounds, thirty prompts, a model of random weights."""
    text = (ROOT / "README.md").read_text()
    loop = next(
        block
        for block in re.findall(r"```sh\n(.*?)```", text, re.S)
        if "train_rejection.py" in block
    )
    model, *commands, goes_on = re.findall(r"^(?:model=|  python |  model=)(.*)$", loop, re.M)
    assert len(commands) == 2
    for i in ("1", "2"):
        for command in commands:
            for old, new in (
                ("$model", model), ("runs/sft/final", str(toy / "model")), ("$i", i), ("--prompts 512", "--prompts 30"),
                ("runs/toy/sft.jsonl", str(toy / "world/sft.jsonl")), ("runs/rm/final", "length:20"),
                ("runs/", f"{tmp_path}/"),
            ):  # fmt: skip
                command = command.replace(old, new)
            script, *words = shlex.split(command)
            {"train_rejection.py": train_rejection, "train_dpo.py": train_dpo}[script].main(words)
        model = goes_on.replace("$i", i)
    assert (
        rows_of(tmp_path / "pairs_1" / "pairs.jsonl")
        != rows_of(tmp_path / "pairs_2" / "pairs.jsonl")
        != []
    )
    assert (tmp_path / "iterated_2" / "final" / "model.safetensors").exists()
