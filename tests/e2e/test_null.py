"""The null test: with a constant reward and policy = reference, online learning learns nothing.

KL exactly 0, ratio exactly 1, gradient 0, and every weight the same to the bit after three steps.
"""

from pathlib import Path

import pytest
import torch
from launch import launch
from nulls import NOTHING, ZERO, null_flags, null_numbers, words_of

import hf
import train_ppo
import train_reinforce
from sampling import updates
from weights.folder import save_model

SEVERAL = {"rollout_epochs": 2, "minibatches": 2}


@pytest.fixture(scope="module")
def tiny(toy: Path, tmp_path_factory) -> Path:
    """Return a random model of one layer on the toy world's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tokenizer = str(toy / "world" / "tokenizer")
    flags = hf.New(width=32, layers=1, heads=2, kv_heads=2, std=0.3, tokenizer=tokenizer)
    save_model(hf.new_model(flags), folder, tokenizer)
    return folder


CASES = [
    ("bf16", {"advantage": "grpo"}),
    ("bf16", {"advantage": "reinforce++", "loss": "dapo"}),
    ("bf16", {"advantage": "rloo", "loss": "reinforce"}),
    ("bf16", {"advantage": "grpo", "kl_in": "reward"}),
    ("bf16", {"advantage": "dr_grpo", "loss": "gspo", **SEVERAL}),
    ("bf16", {"advantage": "reinforce++", "loss": "cispo", "kl_in": "reward", **SEVERAL}),
    ("fp32", {"advantage": "rloo"}),
    ("fp32", {"advantage": "reinforce++", "kl_in": "reward"}),
    ("fp32", {"advantage": "grpo", "loss": "gspo", "kl_estimator": "k2", **SEVERAL}),
    ("fp64", {"advantage": "rloo", "loss": "cispo", "kl_in": "loss", "kl_estimator": "abs"}),
    ("fp64", {"advantage": "grpo", "kl_in": "reward", "kl_estimator": "k2", "temperature": 0.7}),
]


@pytest.mark.parametrize(("dtype", "more"), CASES, ids=lambda value: str(value))
def test_reinforce_learns_nothing_from_nothing(
    dtype: str, more: dict, toy: Path, tiny: Path, tmp_path: Path, train
):
    """Every advantage and loss, one and several updates, KL in the reward and in the loss."""
    flags = null_flags(tiny, toy / "world" / "sft.jsonl", dtype=dtype, **more)
    train(train_reinforce, tmp_path / "out", **flags)
    assert null_numbers(tmp_path / "out", tiny) == NOTHING


@pytest.mark.parametrize("dtype", ["bf16", "fp32", "fp64"])
def test_ppo_learns_nothing_from_nothing(dtype: str, toy: Path, tiny: Path, tmp_path: Path, train):
    """Reward 0 and a new critic, whose values are 0; or any constant, with λ = 1 and no critic."""
    more = {"reward": ZERO} if dtype == "bf16" else {"lam": 1, "critic_lr": 0}
    flags = null_flags(tiny, toy / "world" / "sft.jsonl", dtype=dtype, ppo_epochs=2, **more)
    train(train_ppo, tmp_path / "out", minibatches=2, **flags)
    assert null_numbers(tmp_path / "out", tiny) == NOTHING


@pytest.mark.parametrize("layout", ["tp", "dp"])
def test_two_ranks_learn_nothing_from_nothing(layout: str, toy: Path, tiny: Path, tmp_path: Path):
    """Tensor and data parallel, in bf16, with several updates."""
    more = {"tp": 2} if layout == "tp" else {}
    flags = null_flags(tiny, toy / "world" / "sft.jsonl", dtype="bf16", advantage="grpo", **SEVERAL)
    launch(2, train_reinforce.main, words_of(tmp_path / "out", flags | more))
    assert null_numbers(tmp_path / "out", tiny) == NOTHING


def test_a_later_pass_keeps_its_micro_batches(toy: Path, tiny: Path, tmp_path: Path, train):
    """Another packing may round otherwise, which a KL in the loss would learn from.

    Eight prompts in two parts, each in several micro-batches, three passes: the flat rows are those
    over which old and reference log-probs were computed.
    """
    flags = null_flags(tiny, toy / "world" / "sft.jsonl", dtype="bf16", advantage="grpo")
    flags |= {"batch_size": 8, "rollout_epochs": 3, "minibatches": 2, "max_tokens": 60}
    plans, scorings = [], []
    plan_of, token_logps = updates.plan, updates.token_logps

    def spy(*args) -> list[updates.Update]:
        plans.append(plan_of(*args))
        return plans[-1]

    def spy_on_scoring(model, data, bins, config):
        scorings.append(bins)
        return token_logps(model, data, bins, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(updates, "plan", spy)
        patch.setattr(updates, "token_logps", spy_on_scoring)
        train(train_reinforce, tmp_path / "out", **flags)
    assert len(scorings) == 2 * len(plans)  # the policy and the reference of every step
    for i, plan in enumerate(plans):
        scored = updates.first_epoch(plan)
        assert scorings[2 * i : 2 * i + 2] == [scored] * 2
        assert len(plan) == 6 and len(scored) > 2
        assert all(items in scored for update in plan for items in update.bins)
    assert null_numbers(tmp_path / "out", tiny) == NOTHING


def test_a_real_reward_is_not_nothing(toy: Path, tiny: Path, tmp_path: Path, train):
    """The numbers of the null test can differ from 0."""
    flags = null_flags(tiny, toy / "world" / "sft.jsonl", dtype="bf16", reward="length:3")
    train(train_reinforce, tmp_path / "out", **flags)
    numbers = null_numbers(tmp_path / "out", tiny)
    assert numbers["kl"] > 0 and numbers["grad_norm"] > 0 and numbers["moved"] > 0
    assert torch.isfinite(torch.tensor(list(numbers.values()))).all()
