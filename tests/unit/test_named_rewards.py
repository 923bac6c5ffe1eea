"""Named rewards and functions that see a group; their weights; penalties for length."""

import dataclasses
import math
import statistics
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import losses
import train_reinforce
from config import RolloutConfig
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling import rewards, rollout
from sampling.named import read_weights, total
from sampling.sampler import Sample
from weights.folder import load_model, save_model

FUNCTIONS = """
def alone(prompt, response, row):
    return {"long": float(len(response)), "right": float(response == row["answer"])}

def together(prompts, responses, rows):
    assert len(prompts) == len(responses) == len(rows) == 3 and len(set(prompts)) == 1
    rows[0].clear()
    return [sum(other == one for other in responses) for one in responses]

def both(prompts, responses, rows):
    return {"rank": [sorted(responses).index(r) for r in responses], "one": (1, 1, 1)}

def short(prompts, responses, rows):
    return [0.0]

def scalar(prompts, responses, rows):
    return 0.5

def uneven(prompt, response, row):
    return {response: 1.0}

def mixed(prompt, response, row):
    return 1.0 if response == "a" else {"x": 1.0}

def empty(prompt, response, row):
    return {}

def endless(prompts, responses, rows):
    return {"x": [0.0, float("nan"), 0.0]}
"""


@pytest.fixture()
def named(toy: Path, tmp_path: Path):
    """Return a call of one of FUNCTIONS on two prompts with three responses each."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    template = Template("auto", load_tokenizer(toy / "model"))
    data = rollout.trees([[5], [6]], [Sample([7], [], [], True)] * 6)

    def call(name: str) -> np.ndarray:
        reward = rewards.load_reward(f"{tmp_path}/mine.py:{name}", template)
        prompts = ["p"] * 3 + ["q"] * 3
        return reward(prompts, ["a", "b", "a", "b", "bb", "c"], [{"answer": "b"}] * 6, data)

    return call


def test_a_function_returns_named_rewards(named):
    got = named("alone")
    assert got["long"].tolist() == [1, 1, 1, 1, 2, 1]
    assert got["right"].tolist() == [0, 1, 0, 1, 0, 0]


def test_a_function_sees_the_responses_to_a_prompt_at_once(named):
    """Group by group; it may change its copies of the rows."""
    assert named("together").tolist() == [2, 1, 2, 1, 1, 1]
    got = named("both")
    assert got["rank"].tolist() == [0, 2, 0, 0, 1, 2] and got["one"].tolist() == [1] * 6


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short", "for a group of 3 responses: it must return a list of 3 numbers"),
        ("scalar", "for a group of 3 responses"),
        ("uneven", "return the same names every time"),
        ("mixed", "return the same names every time"),
        ("empty", "return the same names every time"),
        ("endless", "must be finite"),
    ],
)
def test_what_is_no_reward_is_refused(named, name: str, message: str):
    with pytest.raises(ValueError, match=message):
        named(name)


def test_weights_make_one_number():
    """All count 1; with weights, those that are left out are only logged."""
    columns = {"a": np.array([1.0, 2.0]), "b": np.array([10.0, -1.0]), "c:d": np.array([0.5, 0.5])}
    assert total(columns, {}).tolist() == [11.5, 1.5]
    weights = read_weights(["b:-0.5", "c:d:2"])
    assert weights == {"b": -0.5, "c:d": 2.0}
    assert total(columns, weights).tolist() == [-4.0, 1.5]
    with pytest.raises(ValueError, match="names x, but the reward has a, b, c:d"):
        total(columns, {"x": 1.0})
    with pytest.raises(ValueError, match="names x, but the reward is one number"):
        total({}, {"x": 1.0})
    for word in ("a", ":1", "a:", "a:b", "a:nan", "a:inf"):
        with pytest.raises(ValueError, match="write NAME:WEIGHT"):
            read_weights([word])


def test_rewards_of_ranks_become_totals_and_metrics():
    scores = [{"x": 1.0, "y": 2.0}, {"x": 3.0, "y": 0.0}]
    got, columns = rollout.totals(scores, RolloutConfig(reward_weights=["x:2"]))
    assert got.tolist() == [2.0, 6.0] and columns["y"].tolist() == [2.0, 0.0]
    assert rollout.totals([1.0, 2.0], RolloutConfig())[0].tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="other names"):
        rollout.totals([{"x": 1.0}, {"y": 1.0}], RolloutConfig())


def test_a_reward_model_of_several_outputs_is_named(toy: Path, tmp_path: Path):
    """Each output is a column, as scored alone; their weighted sum is the reward."""
    model = load_model(toy / "model", torch.float64, scores=("correctness", "verbosity"))
    with torch.no_grad():
        model.score_head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "rm", toy / "model")
    template = Template("auto", load_tokenizer(toy / "model"))
    reward = rewards.load_reward(str(tmp_path / "rm"), template, dtype=torch.float64)
    data = rollout.trees([[5, 6]], [Sample([7, 8], [], [], True), Sample([9], [], [], True)])
    got = reward(["p"] * 2, ["a", "b"], [{}] * 2, data)
    assert got.dtype.names == ("correctness", "verbosity")
    for name, head in zip(got.dtype.names, model.score_head.weight):
        one = load_model(toy / "model", torch.float64, scores=("reward",))
        with torch.no_grad():
            one.score_head.weight.copy_(head[None])
        save_model(one, tmp_path / name, toy / "model")
        alone = rewards.load_reward(str(tmp_path / name), template, dtype=torch.float64)
        wanted = alone(["p"] * 2, ["a", "b"], [{}] * 2, data)
        assert got[name].tolist() == pytest.approx(wanted.tolist(), abs=1e-12)


@pytest.mark.parametrize("buffer", [0, 1, 4, 10])
def test_the_penalty_for_length_is_dapos(buffer: int):
    """arXiv 2503.14476: 0 to L - b tokens free, then (L - b - n) / b, -1 at L; times the weight."""
    config = RolloutConfig(
        max_new_tokens=10, overlong_buffer=buffer, overlong_penalty=0.7, no_eos_penalty=0.2
    )
    lengths = np.arange(1, 11)
    got = rollout.length_penalty(lengths, lengths < 10, config)
    for n, value in zip(range(1, 11), got):
        wanted = 0.2 if n == 10 else 0.0
        if buffer and n > 10 - buffer:
            wanted += 0.7 * (n - (10 - buffer)) / buffer
        assert value == pytest.approx(wanted, abs=1e-12)


def test_a_buffer_longer_than_the_response_is_refused():
    with pytest.raises(ValueError, match="--overlong-buffer 20 is more than --max-new-tokens 10"):
        rollout.validate(RolloutConfig(max_new_tokens=10, overlong_buffer=20))


def test_named_rewards_are_logged(toy: Path, tmp_path: Path, train):
    """As a user runs it: the weighted sum is the reward, each name has its curve."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    flags = {"model": toy / "model", "data": toy / "world" / "sft.jsonl", "max_steps": 2}
    flags |= {"batch_size": 2, "group_size": 3, "max_new_tokens": 6, "lr": 1e-3, "kl": 0}
    flags |= {"reward": f"{tmp_path}/mine.py:both", "reward_weights": "rank:0.5"}
    for row in train(train_reinforce, tmp_path / "out", **flags):
        assert row["reward"] == pytest.approx(0.5 * row["reward/rank"], abs=1e-9)
        assert row["reward/one"] == 1.0


def test_gdpo_normalises_each_reward_in_plain_numbers():
    """arXiv 2601.05242: (r - mean) / deviation in each group, weighted sum, whitened over all."""
    columns = [[1.0, 0.0, 0.0, 1.0, 1.0, 1.0], [100.0, 250.0, 90.0, 70.0, -30.0, 10.0]]
    weights = [2.0, 0.5]
    combined = [0.0] * 6
    for column, weight in zip(columns, weights):
        for start in (0, 3):
            part = column[start : start + 3]
            for i, value in enumerate(part):
                deviation = statistics.stdev(part) + 1e-4
                combined[start + i] += weight * (value - statistics.fmean(part)) / deviation
    deviation = math.sqrt(statistics.variance(combined) + 1e-8)
    wanted = [(value - statistics.fmean(combined)) / deviation for value in combined]
    rewards = torch.tensor(columns, dtype=torch.float64).T
    got = losses.gdpo(rewards, torch.tensor(weights, dtype=torch.float64), 3)
    assert got.tolist() == pytest.approx(wanted, abs=1e-12)
    scaled = losses.gdpo(rewards * torch.tensor([1.0, 1e6]), torch.tensor(weights).double(), 3)
    assert scaled.tolist() == pytest.approx(wanted, abs=1e-3)


def test_a_run_with_gdpo(toy: Path, tmp_path: Path, train):
    """Advantages come from the named rewards; one number, or another baseline, is refused."""
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    flags = {"model": toy / "model", "data": toy / "world" / "sft.jsonl", "max_steps": 1}
    flags |= {"batch_size": 2, "group_size": 3, "max_new_tokens": 6, "kl": 0, "gdpo": True}
    flags |= {"advantage": "dr_grpo", "reward": f"{tmp_path}/mine.py:both"}
    (row,) = train(train_reinforce, tmp_path / "out", **flags)
    assert row["grad_norm"] > 0
    config = train_reinforce.Config(gdpo=True, group_size=3)
    for changed, message in (
        ({}, "use --advantage dr_grpo"),
        ({"advantage": "dr_grpo", "no_eos_penalty": 1.0}, "leave them at 0"),
    ):
        with pytest.raises(ValueError, match=message):
            train_reinforce.validate(dataclasses.replace(config, **changed))
    with pytest.raises(ValueError, match="this reward is one number"):
        train_reinforce.normalised_rewards(SimpleNamespace(named={}), config)
