"""--lora in every script: only adapters and score heads train; the outputs load; runs resume."""

import json
from pathlib import Path

import pytest
import torch
from conftest import read_metrics
from launch import launch, weights_in

import hf
import train_dpo
import train_kto
import train_ppo
import train_reinforce
import train_rm
import train_sft
from weights.folder import load_model

SHORT = "--batch-size 8 --max-steps 3 --lr 1e-2 --max-tokens 600 --dtype fp64 --lora 4".split()
REWARD = ["--reward", "length:3", "--max-new-tokens", "8"]
SCRIPTS = {
    "sft": (train_sft, "sft.jsonl", []),
    "dpo": (train_dpo, "preferences.jsonl", []),
    "kto": (train_kto, "labels.jsonl", []),
    "rm": (train_rm, "preferences.jsonl", []),
    "ppo": (train_ppo, "sft.jsonl", [*REWARD, "--ppo-epochs", "1"]),
    "reinforce": (train_reinforce, "sft.jsonl", REWARD),
}


def train(name: str, toy: Path, out: Path, *flags: str) -> Path:
    script, data, own = SCRIPTS[name]
    files = ["--model", str(toy / "model"), "--data", str(toy / "world" / data), "--out", str(out)]
    script.main([*files, *SHORT, *own, *flags])
    return out


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_adapters_alone(name: str, toy: Path, tmp_path: Path):
    """Norms and the embedding keep their bits, every linear moves; the adapter says its base."""
    out = train(name, toy, tmp_path / "out")
    start, final = weights_in(toy / "model"), weights_in(out / "final")
    moved = {n for n in start if n in final and not torch.equal(start[n].double(), final[n])}
    assert moved == {n for n in start if "_proj." in n}
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(toy / "model")
    assert config["r"] == 4 and config["lora_alpha"] == 8.0
    rows = read_metrics(out)
    assert all(row["grad_norm"] > 0 for row in rows if "grad_norm" in row)
    if name in ("ppo", "reinforce"):  # the reference is the base, not the policy of the moment
        assert rows[0]["kl"] == 0 and rows[-1]["kl"] > 0
    if name == "dpo":
        first = next(row for row in rows if "loss" in row)
        assert first["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)


def test_a_run_resumes_and_moves_to_another_layout(toy: Path, tmp_path: Path):
    """Stopped after step 2 and resumed with two tensor ranks: the numbers of the unbroken run."""
    whole = train("dpo", toy, tmp_path / "whole")
    train("dpo", toy, tmp_path / "cut", "--save-every", "2")
    # Go on from step 2 with the other layout.
    launch(
        2,
        train,
        "dpo",
        toy,
        tmp_path / "cut",
        "--resume",
        str(tmp_path / "cut/step_2"),
        "--tp",
        "2",
    )
    one, other = weights_in(whole / "final"), weights_in(tmp_path / "cut/final")
    assert max((one[n] - other[n]).abs().max().item() for n in one) < 1e-12


def test_merging_by_hand_gives_the_merged_model(toy: Path, tmp_path: Path):
    out = train("sft", toy, tmp_path / "out", "--dtype", "fp32")
    hf.main(["merge", str(toy / "model"), str(out / "adapter"), "--out", str(tmp_path / "merged")])
    merged, final = weights_in(tmp_path / "merged"), weights_in(out / "final")
    assert all((merged[n] - final[n]).abs().max() < 1e-6 for n in final)


def test_an_adapter_goes_on_and_is_the_reference(toy: Path, tmp_path: Path, capsys):
    """--adapter starts from SFT's adapter: DPO's first loss is ln 2. --no-merge: no final/."""
    out = train("sft", toy, tmp_path / "sft")
    flags = [f for f in SHORT if f not in ("--lora", "4")]
    train_dpo.main(
        ["--model", str(toy / "model"), "--adapter", str(out / "adapter"), "--no-merge"]
        + ["--data", str(toy / "world/preferences.jsonl"), "--out", str(tmp_path / "dpo"), *flags]
    )
    rows = [row for row in read_metrics(tmp_path / "dpo") if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    assert (tmp_path / "dpo/adapter").is_dir() and not (tmp_path / "dpo/final").exists()
    assert "frozen" in capsys.readouterr().out


def test_a_folder_with_only_an_adapter_says_what_to_do(toy: Path, tmp_path: Path):
    out = train("sft", toy, tmp_path / "out", "--no-merge")
    with pytest.raises(FileNotFoundError, match="--adapter, or merge the two: hf.py merge"):
        load_model(out / "adapter", torch.float32)


@pytest.mark.parametrize(("base_dtype", "bound"), [("int8", 0.002), ("nf4", 0.005)])
def test_a_quantised_base_learns_as_the_whole_one(
    base_dtype: str, bound: float, toy: Path, tmp_path: Path
):
    """DPO's loss follows that of the whole base: step by step no further away than `bound` nats,
    a share of what eight steps learn. The folder that comes out is merged from whole weights."""
    flags = "--batch-size 48 --epochs 8 --max-steps 8 --lr 5e-3 --warmup 0".split()
    whole = read_metrics(train("dpo", toy, tmp_path / "whole", *flags))
    out = train("dpo", toy, tmp_path / "fewer", *flags, "--base-dtype", base_dtype)
    losses = [[row["loss"] for row in rows if "loss" in row] for rows in (whole, read_metrics(out))]
    assert losses[0] != losses[1]
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < bound
    assert losses[0][0] - losses[0][-1] > 5 * bound
    hf.main(["merge", str(toy / "model"), str(out / "adapter"), "--out", str(tmp_path / "merged")])
    merged, final = weights_in(tmp_path / "merged"), weights_in(out / "final")
    assert all((merged[n].double() - final[n]).abs().max() < 1e-6 for n in final)


def test_fewer_bits_want_a_frozen_base(toy: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="--base-dtype nf4 is for weights that stay frozen"):
        train("sft", toy, tmp_path / "out", "--lora", "0", "--base-dtype", "nf4")
