"""score.py --standardize: mean and deviation in a reward folder, and every score after it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import score
import train_rm
from data.dataset import from_trees
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling.rewards import load_reward
from weights.folder import load_model, save_model


@pytest.fixture
def rm(toy: Path, tmp_path: Path) -> Path:
    """Return a reward model with random scores."""
    model = load_model(toy / "model", torch.float64, scores=("reward",))
    torch.nn.init.normal_(model.score_head.weight, std=0.5)
    save_model(model, tmp_path / "rm", toy / "model")
    return tmp_path / "rm"


def scored(rm: Path, data: Path, out: Path, *flags: str) -> list[dict]:
    words = f"--model {rm} --data {data} --out {out} --dtype fp64".split()
    score.main([*words, *flags])
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_scores_are_standardised_from_then_on(rm: Path, toy: Path, tmp_path: Path, capsys):
    """In the same call, in later ones on other rows, and as --reward; weights keep their bits."""
    data, other = (toy / "world" / name for name in ("sft.jsonl", "preferences_test.jsonl"))
    weights = (rm / "model.safetensors").read_bytes()
    raw = np.array([row["score"] for row in scored(rm, data, tmp_path / "raw.jsonl")])
    pairs = scored(rm, other, tmp_path / "pairs.jsonl")
    rows = scored(rm, data, tmp_path / "new.jsonl", "--standardize")
    mean, std = raw.mean(), raw.std()
    assert abs(mean) > 0.01 and abs(std - 1) > 0.01
    now = np.array([row["score"] for row in rows])
    assert now == pytest.approx((raw - mean) / std, abs=1e-12)
    assert "config.json" in capsys.readouterr().out
    for before, after in zip(pairs, scored(rm, other, tmp_path / "pairs2.jsonl")):
        for key in ("chosen_reward", "rejected_reward"):
            assert after[key] == pytest.approx((before[key] - mean) / std, abs=1e-12)
    template = Template("auto", load_tokenizer(rm))
    reward = load_reward(str(rm), template, dtype=torch.float64)
    prompt, answers = template.pair(rows[0]["prompt"], [rows[0]["response"]])[:2]
    trees = from_trees([(prompt, answers)])
    (value,) = reward([rows[0]["prompt"]], [rows[0]["response"]], [{}], trees)
    assert value == pytest.approx(now[0], abs=1e-12)
    assert (rm / "model.safetensors").read_bytes() == weights
    again = scored(rm, data, tmp_path / "again.jsonl", "--standardize")  # of the model's own scores
    assert [row["score"] for row in again] == pytest.approx(now.tolist(), abs=1e-12)


def test_a_model_that_is_trained_on_drops_them(rm: Path, toy: Path, tmp_path: Path):
    """Its scores are others."""
    scored(rm, toy / "world" / "sft.jsonl", tmp_path / "x.jsonl", "--standardize")
    words = f"--model {rm} --data {toy}/world/preferences.jsonl --max-steps 1 --device cpu"
    train_rm.main([*words.split(), "--out", str(tmp_path / "out")])
    config = json.loads((tmp_path / "out" / "final" / "config.json").read_text())
    assert "reward_standard" not in config


def test_what_has_no_deviation_or_no_scores_is_refused(rm: Path, toy: Path, tmp_path: Path):
    """One answer, a language model, other flags, a name of the hub, and numbers that do not fit."""
    one = tmp_path / "one.jsonl"
    one.write_text((toy / "world" / "sft.jsonl").read_text().splitlines(True)[0])
    for model, data, flags, message in (
        (rm, one, (), "deviation is 0"),
        (toy / "model", one, (), "is a language model"),
        (rm, one, ("--attributes",), "drop the other flags"),
        ("org/name", one, (), "is no folder here"),
    ):
        with pytest.raises(ValueError, match=message):
            scored(model, data, tmp_path / "x.jsonl", "--standardize", *flags)
    with pytest.raises(ValueError, match="gives attributes"):
        score.standardize(np.array([[1.0], [2.0]]), ("helpfulness",), str(rm))
    raw = json.loads((rm / "config.json").read_text())
    for bad in ({"mean": [0.0], "std": [0.0]}, {"mean": [0.0, 1.0], "std": [1.0, 1.0]}, [1], {}):
        text = json.dumps({**raw, "reward_standard": bad or {"mean": ["a"], "std": [1]}})
        (rm / "config.json").write_text(text)
        with pytest.raises(ValueError, match="reward_standard must have"):
            scored(rm, one, tmp_path / "x.jsonl")
