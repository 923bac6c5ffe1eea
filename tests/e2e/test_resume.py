"""Law 4: killed and resumed = never killed, bit for bit; nothing that was saved is lost."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import read_metrics
from safetensors.torch import load_file

import checkpoint
import hf
import train_dpo
import train_sft
from optimizer import AdamW
from weights.folder import load_model, save_model

ROOT = Path(__file__).parents[2]


def command(toy: Path, out: Path, *more: str) -> list[str]:
    """Return DPO on the toy world: 48 steps, 8 epochs, evaluations, a running mean, checkpoints."""
    return [
        sys.executable,
        str(ROOT / "train_dpo.py"),
        "--model",
        str(toy / "model"),
        "--out",
        str(out),
        "--data",
        str(toy / "world" / "preferences.jsonl"),
        "--eval-data",
        str(toy / "world" / "preferences_test.jsonl"),
        "--batch-size",
        "8",
        "--epochs",
        "8",
        "--lr",
        "1e-2",
        "--loss",
        "bco_pair",
        "--max-tokens",
        "256",
        "--eval-every",
        "10",
        "--save-every",
        "7",
        *more,
    ]


@pytest.fixture(scope="module")
def unbroken(toy: Path, tmp_path_factory) -> Path:
    """Return the output of the run that nobody stops."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    subprocess.run(command(toy, out), check=True, capture_output=True)
    return out


def same(one: Path, other: Path) -> None:
    """Assert that metrics, best and final weights of two runs have the same bits."""
    assert read_metrics(one) == read_metrics(other)
    for folder in ("final", "best"):
        a, b = (load_file(out / folder / "model.safetensors") for out in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_resumes_as_if_nothing_had_been(
    number: int, toy: Path, unbroken: Path, tmp_path: Path
):
    """SIGTERM saves and exits 0, SIGKILL saves nothing; --resume auto ends both as if unbroken."""
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(toy, out), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (out / "step_14").exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.002)
    process.send_signal(number)
    text, _ = process.communicate()
    assert not (out / "final").exists(), "it finished before it could be killed"
    references = {path: path.read_bytes() for path in (out / "cache").glob("reference-*")}
    assert len(references) == 2
    if number == signal.SIGTERM:
        assert process.returncode == 0 and "stopped by SIGTERM after step" in text
        assert (
            checkpoint.newest(out).name
            == f"step_{len([r for r in read_metrics(out) if 'loss' in r])}"
        )
    else:
        assert process.returncode == -signal.SIGKILL
        # A run killed while writing leaves half a row; it must not disturb the resumed one.
        with open(out / "metrics.jsonl", "a") as file:
            file.write('{"step": 15, "lo')
        # Without its cache the reference is scored again: the policy of step 0, not the saved one.
        shutil.rmtree(out / "cache")
    resumed = subprocess.run(
        command(toy, out, "--resume", "auto"), check=True, capture_output=True, text=True
    )
    assert "resumed from" in resumed.stdout
    assert {path: path.read_bytes() for path in (out / "cache").glob("reference-*")} == references
    same(out, unbroken)


def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    toy: Path, unbroken: Path, tmp_path: Path
):
    """A newest checkpoint with a flipped byte, or cut short, is named in a warning and skipped."""
    out = tmp_path / "out"
    stopped = subprocess.run(
        command(toy, out, "--max-steps", "15"), check=True, capture_output=True, text=True
    )
    assert {path.name for path in checkpoint.all_steps(out)} == {"step_14", "step_7"}, (
        stopped.stdout
    )
    file = out / "step_14" / "state-00001-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    warnings = []
    assert checkpoint.newest(out, warnings.append).name == "step_7"
    assert (
        "step_14 is damaged: state-00001-of-00001.safetensors does not match its SHA-256"
        in warnings[0]
    )
    file.write_bytes(content[:-3])
    assert checkpoint.newest(out, warnings.append).name == "step_7" and "bytes, not" in warnings[1]
    with pytest.raises(ValueError, match="is damaged"):
        checkpoint.load(out / "step_14", saved(toy, tmp_path / "other", 1))


def saved(toy: Path, out: Path, step: int) -> AdamW:
    optimizer = AdamW(load_model(toy / "model", torch.float32), (0.9, 0.95), 1e-8, 0.0)
    checkpoint.save(out, checkpoint.State(step=step), optimizer, keep=2)
    return optimizer


def test_a_full_disk_leaves_the_old_checkpoint(toy: Path, tmp_path: Path):
    """When writing fails, the error says what to do and only whole checkpoints stay."""
    optimizer = saved(toy, tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (50_000, hard)
    )  # as a full disk would stop it, in mid-file
    try:
        with pytest.raises(
            OSError, match="could not write .*step_2.*free space.*goes on from step_1"
        ):
            checkpoint.save(tmp_path, checkpoint.State(step=2), optimizer, keep=2)
        with pytest.raises(OSError, match="could not write .*final.*free space"):
            save_model(load_model(toy / "model", torch.float32), tmp_path / "final")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert os.listdir(tmp_path) == ["step_1"] and not checkpoint.damage(tmp_path / "step_1")


def test_only_the_newest_checkpoints_are_kept(toy: Path, tmp_path: Path):
    """keep=2 leaves two, by step and not by name."""
    for step in (8, 9, 10):
        saved(toy, tmp_path, step)
    assert [path.name for path in checkpoint.all_steps(tmp_path)] == ["step_10", "step_9"]


def test_a_checkpoint_of_another_model_is_refused(toy: Path, tmp_path: Path):
    """The message names a tensor that does not fit."""
    saved(toy, tmp_path, 1)
    other = hf.new_model(hf.New(vocab=40, width=16, heads=2, layers=1))
    optimizer = AdamW(other, (0.9, 0.95), 1e-8, 0.0)
    with pytest.raises(ValueError, match=r"has no master head.weight \(40, 16\)"):
        checkpoint.load(tmp_path / "step_1", optimizer)


def test_steps_that_are_not_finite_change_nothing_and_end_the_run(toy: Path, tmp_path: Path, train):
    """A NaN gradient changes neither weights nor AdamW; five in a row end the run."""
    model = load_model(toy / "model", torch.float32)
    with torch.no_grad():
        model.head.weight[:] = 1e38  # logits overflow
    save_model(model, tmp_path / "broken", toy / "model")
    with pytest.raises(ValueError, match="not finite in 5 steps in a row, up to step 5"):
        train(
            train_sft,
            tmp_path / "out",
            model=tmp_path / "broken",
            data=toy / "world" / "sft.jsonl",
            batch_size=4,
            save_every=2,
            keep=9,
        )
    rows = read_metrics(tmp_path / "out")
    assert len(rows) == 4 and all(row["grad_norm"] is None for row in rows)
    state = load_file(tmp_path / "out" / "step_4" / "state-00001-of-00001.safetensors")
    assert torch.equal(state["master/head.weight"], model.head.weight.flatten())
    assert not any(name.startswith("exp_avg") for name in state)
    assert json.loads((tmp_path / "out" / "step_4" / "state.json").read_text())["skipped"] == 4


def test_max_minutes_saves_and_leaves(toy: Path, tmp_path: Path, train):
    """The time limit ends a run after a step, with a checkpoint; --resume auto does the rest."""
    flags = {
        "model": toy / "model",
        "data": toy / "world" / "preferences.jsonl",
        "batch_size": 8,
        "lr": 1e-2,
    }
    whole = train(train_dpo, tmp_path / "whole", **flags)
    first = train(train_dpo, tmp_path / "out", **flags, max_minutes=1e-6)
    assert len(first) == 2 and checkpoint.newest(tmp_path / "out").name == "step_1"
    assert train(train_dpo, tmp_path / "out", **flags, resume="auto") == whole


def test_a_second_run_does_not_overwrite_the_first(toy: Path, tmp_path: Path, train):
    """An --out that holds a run is refused without --resume."""
    flags = {"model": toy / "model", "data": toy / "world" / "sft.jsonl", "max_steps": 1}
    train(train_sft, tmp_path / "out", **flags)
    with pytest.raises(ValueError, match="already holds a run: continue it with --resume auto"):
        train(train_sft, tmp_path / "out", **flags)
