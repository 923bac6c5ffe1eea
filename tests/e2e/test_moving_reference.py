"""TR-DPO, LD-DPO and mixtures of losses: steps equal a plain loop; a resumed run is unbroken."""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import read_metrics
from launch import weights_in
from plain import PlainModel, PlainTrainer, encode

import train_dpo
from weights.folder import load_model, save_model

STEPS, BATCH, BETA = 4, 3, 0.1


@pytest.fixture(scope="module")
def double(toy: Path, tmp_path_factory) -> Path:
    """Return the toy model in float64."""
    folder = tmp_path_factory.mktemp("double") / "model"
    save_model(load_model(toy / "model", torch.float64), folder, toy / "model")
    return folder


def flags_of(toy: Path, double: Path, **more) -> dict:
    return {
        "model": double,
        "data": toy / "world" / "preferences.jsonl",
        "template": "plain",
        "dtype": "fp64",
        "batch_size": BATCH,
        "lr": 1e-2,
        "max_steps": STEPS,
        "max_tokens": 200,
        "warmup": 0.25,
        "weight_decay": 0.1,
        "shuffle": False,
        **more,
    }


def sigmoid_loss(c: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return torch.log1p(torch.exp(-BETA * (c - r)))


def hinge_loss(c: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    return torch.clamp(1 - BETA * (c - r), min=0)


@pytest.mark.parametrize(
    "more",
    [
        {"ref_every": 1},
        {"ref_every": 2, "ref_mix": 0.6},
        {"ld_alpha": 0.3},
        {"ld_alpha": 0.0, "mix": "sigmoid:0.8 hinge:0.5", "sft_weight": 0.2, "ref_every": 3},
    ],
    ids=["hard", "soft", "ld", "all"],
)
def test_steps_equal_a_plain_loop_in_float64(
    more: dict, toy: Path, double: Path, tmp_path: Path, train
):
    """Loss, norm and weights within 1e-10: π_ref <- α π + (1 - α) π_ref every --ref-every steps.

    Tokens beyond the shorter answer's length count ld_alpha, for policy and reference, and whole in
    the NLL of --sft-weight.
    """
    words = {key: value.split() if key == "mix" else value for key, value in more.items()}
    flags = flags_of(toy, double, **words)
    got = [row for row in train(train_dpo, tmp_path / "out", **flags) if row["step"]]
    lines = flags["data"].read_text().splitlines()[: STEPS * BATCH]
    rows = [json.loads(line) for line in lines]
    tokenizer = toy / "world" / "tokenizer" / "tokenizer.model"
    trees = encode(tokenizer, rows, ["chosen", "rejected"])
    policy, ref = (PlainModel(double, torch.float64) for _ in range(2))
    trainer = PlainTrainer(policy, total=STEPS, lr=1e-2)
    alpha, mix = more.get("ld_alpha", 1.0), more.get("ref_mix", 1.0)
    longer = 0
    for step in range(STEPS):
        total = 0.0
        batch = trees[step * BATCH : (step + 1) * BATCH]
        chosen_tokens = sum(len(answers[0]) for _, answers in batch)
        for prompt, answers in batch:
            shorter = min(map(len, answers))
            longer += max(map(len, answers)) > shorter
            ratios = []
            for answer in answers:
                weights = torch.ones(len(answer), dtype=torch.float64)
                weights[shorter:] = alpha
                with torch.no_grad():
                    fixed = (weights * ref.logps(prompt, answer)).sum()
                ratios.append((weights * policy.logps(prompt, answer)).sum() - fixed)
            if "mix" in more:
                loss = 0.8 * sigmoid_loss(*ratios) + 0.5 * hinge_loss(*ratios)
            else:
                loss = sigmoid_loss(*ratios)
            nll = -policy.logps(prompt, answers[0]).sum() / chosen_tokens
            total = total + loss / BATCH + more.get("sft_weight", 0.0) * nll
        loss, norm = trainer.step(total)
        assert got[step]["loss"] == pytest.approx(loss, abs=1e-10)
        assert got[step]["grad_norm"] == pytest.approx(norm, rel=1e-9)
        if more.get("ref_every") and (step + 1) % more["ref_every"] == 0:
            with torch.no_grad():
                for name, weight in ref.weights.items():
                    weight.copy_(mix * policy.weights[name] + (1 - mix) * weight)
    assert longer > BATCH  # or the weights of --ld-alpha would not be seen
    after = weights_in(tmp_path / "out" / "final")
    assert max((after[n] - policy.weights[n]).abs().max().item() for n in after) < 1e-10


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_resumed_run_has_the_moved_reference(
    stop: int, toy: Path, double: Path, tmp_path: Path, train
):
    """Resumed before, at and after a soft update, bit for bit, evaluations included."""
    flags = flags_of(toy, double, ref_every=2, ref_mix=0.6, save_every=1, keep=0, eval_every=1)
    flags["eval_data"] = toy / "world" / "preferences_test.jsonl"
    whole = train(train_dpo, tmp_path / "whole", **flags)
    losses = [row["eval/loss"] for row in whole if "eval/loss" in row]
    assert len(losses) == STEPS and losses[1] != pytest.approx(math.log(2), abs=1e-3)
    resume = tmp_path / "whole" / f"step_{stop}"
    train(train_dpo, tmp_path / "part", **{**flags, "resume": resume})
    assert read_metrics(tmp_path / "part") == [row for row in whole if row["step"] > stop]
    part, weights = (weights_in(tmp_path / run / "final") for run in ("part", "whole"))
    assert all(torch.equal(part[name], weights[name]) for name in weights)


def test_a_hard_update_starts_again_at_ln_2(toy: Path, double: Path, tmp_path: Path, train):
    """The step after an update has margins of 0, and an evaluation there is ln 2 as well."""
    flags = flags_of(toy, double, ref_every=2, eval_every=2)
    flags["eval_data"] = toy / "world" / "preferences_test.jsonl"
    rows = train(train_dpo, tmp_path / "out", **flags)
    steps = {row["step"]: row for row in rows if "loss" in row}
    assert [steps[i]["rewards/margins"] == 0 for i in (1, 2, 3, 4)] == [True, False, True, False]
    (first, _) = [row["eval/loss"] for row in rows if "eval/loss" in row]
    assert first == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"ref_every": 2, "loss": "simpo"}, "there is none"),
        ({"ref_every": 2, "reference_free": True}, "there is none"),
        ({"ref_every": 2, "ref": "none"}, "there is none"),
        ({"ref_mix": 0.5}, "set that as well"),
        ({"wpo": True, "ld_alpha": 0.5}, "without --ld-alpha"),
        ({"loss": "simpo", "average_logps": True}, "divides by the lengths itself"),
        ({"loss": "sigmoid_norm", "average_logps": True}, "divides by the lengths itself"),
        ({"loss": "sigmoid_norm", "average_logps": True, "mix": ["ipo:1"]}, None),
        ({"mix": ["rpo_sq:1"]}, None),
        ({"mix": ["aot:0.5", "sft:0.1"]}, "is --sft-weight"),
        ({"mix": ["ipo"]}, "is not NAME:WEIGHT"),
        ({"mix": ["ipo:-1"]}, "is not NAME:WEIGHT"),
        ({"mix": ["orpo:1"]}, "is no loss of pairs"),
        ({"mix": ["simpo:1"]}, "mix with no other"),
    ],
)
def test_what_has_no_meaning_is_refused(
    flags: dict, message: str | None, toy: Path, double: Path, tmp_path: Path, train
):
    words = flags_of(toy, double, max_steps=1, **flags)
    if message is None:  # the toy world's pairs have rewards
        assert train(train_dpo, tmp_path / "out", **words)
        return
    with pytest.raises(ValueError, match=message):
        train(train_dpo, tmp_path / "out", **words)
