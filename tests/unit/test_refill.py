"""Refill: groups without spread are replaced, in bounded rounds, the same every time; masks."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import losses
import train_reinforce
from data.dataset import load_prompts
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling import refill, rollout
from weights.folder import load_model

FIRST = [5, 2, 9, 0]  # the step's prompts


@pytest.fixture(scope="module")
def ready(toy: Path) -> dict:
    """Return the arguments of a draw of four prompts of twelve, three samples each."""
    config = rollout.RolloutConfig(model=str(toy / "model"), max_new_tokens=5, group_size=3)
    template = Template("auto", load_tokenizer(toy / "model"))
    template.stop_ids = template.stop_ids | set(range(4, 640, 9))  # so that some samples end
    files = [toy / "world" / "sft.jsonl"]
    prompts = load_prompts(files, template, 100, log=lambda line: None).take(range(12))
    for i, row in enumerate(prompts.rows):
        row["number"] = i
    model = load_model(toy / "model", torch.float64)
    return {"train": prompts, "examples": np.array(FIRST), "model": model} | {
        "template": template,
        "config": config,
        "server": None,
    }


def spread_for(useful: set[int], seen: list | None = None):
    """Return a reward with spread within the groups of some prompts, and 1 for all others."""

    def reward(prompts, responses, rows, trees):
        numbers = [row["number"] for row in rows]
        if seen is not None:
            seen.append(numbers[::3])
        return np.array([float(i % 3 if n in useful else 1) for i, n in enumerate(numbers)])

    return reward


def numbers(samples: rollout.Rollout) -> list[int]:
    return [row["number"] for row in samples.prompts.rows]


def test_without_rounds_it_is_the_plain_rollout(ready: dict):
    """Also with rounds, if every group has spread: not a token changes."""
    config, everything = ready["config"], spread_for(set(range(12)))
    wanted = rollout.draw(
        ready["train"].take(FIRST), 7, ready["model"], everything, ready["template"], config, None
    )
    for rounds, reward in ((0, spread_for(set())), (0, everything), (3, everything)):
        got, row = refill.draw(**ready, rounds=rounds, step=7, reward=reward)
        assert [s.tokens for s in got.samples] == [s.tokens for s in wanted.samples]
        assert got.texts == wanted.texts and numbers(got) == FIRST
        assert row == {"refill/groups": 4.0, "refill/spread": float(reward is everything)}


@pytest.mark.parametrize("useful", [{2, 1, 3, 4, 6, 8}, {0, 7, 11}, {7}, set()])
@pytest.mark.parametrize("rounds", [1, 2, 20])
def test_groups_without_spread_are_replaced(ready: dict, useful: set, rounds: int):
    """As many as have spread are kept, whole and in the order of drawing; no prompt comes twice."""
    seen: list = []
    got, row = refill.draw(**ready, rounds=rounds, step=3, reward=spread_for(useful, seen))
    drawn = [number for part in seen for number in part]
    assert drawn[:4] == FIRST and len(set(drawn)) == len(drawn) == row["refill/groups"]
    assert len(seen) <= rounds + 1
    spread = [number for number in drawn if number in useful]
    assert row["refill/spread"] == pytest.approx(len(spread) / len(drawn))
    if len(spread) < 4:  # it went on as long as it may
        assert len(seen) == rounds + 1 or len(drawn) == 12
    wanted = set((spread + [number for number in drawn if number not in useful])[:4])
    assert numbers(got) == [number for number in drawn if number in wanted]
    # Every part belongs together.
    assert len(got.samples) == len(got.texts) == len(got.rewards) == len(got.ended) == 12
    groups = got.rewards.reshape(4, 3)
    for i, number in enumerate(numbers(got)):
        assert groups[i].tolist() == ([0.0, 1.0, 2.0] if number in useful else [1.0] * 3)
        start = got.data.tree_start[i]
        ids = got.data.tokens[start : start + got.data.prompt_len[i]].tolist()
        assert ids == got.prompts.ids[i] == ready["train"].ids[number]
    texts = [ready["template"].tokenizer.decode(sample.tokens) for sample in got.samples]
    assert texts == got.texts
    assert got.ended.tolist() == [sample.ended for sample in got.samples]
    places = got.data.token_columns["token_index"][got.data.scored == 1]
    assert places.tolist() == list(range(int(got.data.scored_len.sum())))


def test_draws_are_a_function_of_seed_and_step(ready: dict):
    reward = spread_for({1, 3})
    one, two, other = (
        refill.draw(**ready, rounds=2, step=step, reward=reward)[0] for step in (3, 3, 4)
    )
    assert [s.tokens for s in one.samples] == [s.tokens for s in two.samples]
    assert [s.tokens for s in one.samples] != [s.tokens for s in other.samples]


def flags_of(toy: Path, tmp_path: Path) -> dict:
    """Return the flags of a run whose rewards often are equal."""
    (tmp_path / "mine.py").write_text("def r(p, text, row):\n    return float(len(text) > 14)\n")
    flags = {"model": toy / "model", "data": toy / "world" / "sft.jsonl", "batch_size": 4}
    flags |= {"group_size": 3, "max_new_tokens": 8, "lr": 1e-2, "refill": 2, "max_steps": 4}
    return flags | {"reward": f"{tmp_path}/mine.py:r"}


def test_a_resumed_run_refills_alike(toy: Path, tmp_path: Path, train):
    """Bit for bit, with groups counted in every step."""
    flags = flags_of(toy, tmp_path)
    whole = train(train_reinforce, tmp_path / "whole", **flags)
    assert any(row["refill/groups"] > 4 for row in whole)
    part = tmp_path / "part"
    assert train(train_reinforce, part, **flags, save_every=1, keep=9) == whole
    for step in (4, 3):
        checkpoint.all_steps(part)[0].rename(tmp_path / f"gone{step}")
    (part / "finished.json").unlink()
    assert train(train_reinforce, part, **flags, resume="auto") == whole


def test_cut_samples_carry_no_loss():
    """Their tokens have no term; the weights of others do not count them."""
    config = train_reinforce.Config(mask_cut=True, kl=0.0, loss="reinforce")
    columns = {
        "old_logps": torch.zeros(5, dtype=torch.float64),
        "advantage": torch.tensor([2.0, 2.0, -1.0, -1.0, -1.0], dtype=torch.float64),
        "kept": torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64),
    }
    batch = SimpleNamespace(
        token_columns=columns,
        response=torch.tensor([0, 0, 1, 1, 1]),
        lengths=torch.tensor([2, 3]),
    )
    logps = torch.tensor([-0.1, -0.2, -3.0, -4.0, -5.0], dtype=torch.float64)
    lengths = torch.tensor([2.0, 0.0], dtype=torch.float64)
    loss, _ = train_reinforce.policy_loss(logps, batch, lengths, config)
    assert loss.item() == pytest.approx(-2.0 * (-0.1 - 0.2) / 2, abs=1e-12)


def test_a_run_counts_only_samples_that_ended(toy: Path, tmp_path: Path, train, monkeypatch):
    """The counts of an update have a 0 for each cut sample; with none left, no gradient."""
    counted = []
    weights = losses.token_weights

    def spy(lengths, step_lengths, *args):
        counted.append(step_lengths.tolist())
        return weights(lengths, step_lengths, *args)

    monkeypatch.setattr(losses, "token_weights", spy)
    flags = flags_of(toy, tmp_path) | {"mask_cut": True, "max_steps": 1, "log_samples": 1}
    rows = train(train_reinforce, tmp_path / "out", **flags, kl=0.0)
    lines = (tmp_path / "out" / "samples.jsonl").read_text().splitlines()
    ended = [json.loads(line)["ended"] for line in lines]
    assert [length > 0 for length in counted[0]] == ended
    assert (rows[0]["grad_norm"] > 0) == any(ended)
