"""A checkpoint knows its run: its script, its code, and what the files of its flags held.

Seen to fail: without check_resumed in runtime.py; with a manifest that nobody reads; without the
mark of a finished run.
"""

import json
import shutil
from pathlib import Path

import pytest

import checkpoint
import identity
import train_dpo
import train_sft
from weights.files import fingerprint


@pytest.fixture
def stopped(toy: Path, tmp_path: Path, train) -> dict:
    """Return the flags of an SFT run that stopped after its first step, to resume it."""
    shutil.copytree(toy / "model", tmp_path / "model")
    shutil.copyfile(toy / "world" / "sft.jsonl", tmp_path / "rows.jsonl")
    flags = {"model": tmp_path / "model", "data": tmp_path / "rows.jsonl", "batch_size": 20}
    train(train_sft, tmp_path / "out", **flags, max_minutes=1e-6)
    return {**flags, "resume": "auto"}


def flip(path: Path) -> None:
    """Flip a bit at the end of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_another_script_is_refused(stopped: dict, toy: Path, tmp_path: Path, train):
    """Both are named; nothing in OUT changes."""
    before = (tmp_path / "out" / "config.json").read_text()
    flags = {**stopped, "data": toy / "world" / "preferences.jsonl"}
    with pytest.raises(ValueError, match="step_1 was written by train_sft.py, not by train_dpo.py"):
        train(train_dpo, tmp_path / "out", **flags)
    assert (tmp_path / "out" / "config.json").read_text() == before


def test_other_data_under_the_same_path_is_refused_unless_asked_for(
    stopped: dict, tmp_path: Path, train, capsys
):
    """The flag is named; --resume-changed goes on, with a warning after all other lines."""
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"prompt": "one", "response": "more"}\n')
    with pytest.raises(ValueError, match="files of --data are not those .* --resume-changed"):
        train(train_sft, tmp_path / "out", **stopped)
    capsys.readouterr()
    train(train_sft, tmp_path / "out", **stopped, resume_changed=True)
    said = capsys.readouterr().out
    assert said.index("resuming with other files of --data") > said.index("resumed from")


def test_another_model_under_the_same_path_is_refused(stopped: dict, tmp_path: Path, train):
    """One bit of the weights, or a tokenizer's file, makes another model."""
    for name in ("model.safetensors", "tokenizer.json"):
        path = tmp_path / "model" / name
        if not path.exists():
            path = next((tmp_path / "model").glob("tokenizer*"))
        before = path.read_bytes()
        path.write_bytes(before + b" ") if name != "model.safetensors" else flip(path)
        with pytest.raises(ValueError, match="files of --model are not those"):
            train(train_sft, tmp_path / "out", **stopped)
        path.write_bytes(before)
    train(train_sft, tmp_path / "out", **stopped)


def test_the_same_files_elsewhere_are_the_same_run(stopped: dict, tmp_path: Path, train, capsys):
    """A moved model is a changed flag: a warning, after the line on the checkpoint."""
    (tmp_path / "model").rename(tmp_path / "moved")
    train(train_sft, tmp_path / "out", **{**stopped, "model": tmp_path / "moved"})
    said = capsys.readouterr().out
    warning = said.index("warning: resuming with another --model")
    assert warning > said.index("resumed from") and warning > said.index("parameters")


def test_changed_code_is_a_warning(stopped: dict, tmp_path: Path, train, capsys, monkeypatch):
    """Numbers may differ, and the version that wrote the checkpoint is named."""
    monkeypatch.setattr(identity, "code_hash", lambda: "another")
    train(train_sft, tmp_path / "out", **stopped)
    said = capsys.readouterr().out
    assert (
        f"the code has changed since step_1 was written (by version {identity.version()})" in said
    )


def test_a_finished_run_is_refused_and_more_steps_go_on(stopped: dict, tmp_path: Path, train):
    """--resume auto after the last step is an error that says so; --epochs 2 continues."""
    out = tmp_path / "out"
    rows = train(train_sft, out, **stopped, save_every=2)
    with pytest.raises(
        ValueError, match=r"already finished: .*final is there after 3 steps: --max"
    ):
        train(train_sft, out, **stopped)
    with pytest.raises(ValueError, match="already finished"):
        train(train_sft, out, **stopped, max_steps=2)
    more = train(train_sft, out, **stopped, epochs=2)
    assert len(more) > len(rows) and more[-1]["step"] == 6
    shutil.rmtree(out / "step_2")
    with pytest.raises(ValueError, match="already finished"):
        train(train_sft, out, **stopped, epochs=2)


def test_a_finished_run_without_a_checkpoint_does_not_start_again(toy: Path, tmp_path: Path, train):
    """More steps cannot go on from nothing: final/ is not replaced by a run from the start."""
    flags = {"model": toy / "model", "data": toy / "world" / "sft.jsonl", "max_steps": 1}
    train(train_sft, tmp_path / "out", **flags)
    before = fingerprint(tmp_path / "out" / "final")
    with pytest.raises(ValueError, match="already finished.* no checkpoint is left to go on from"):
        train(train_sft, tmp_path / "out", **{**flags, "max_steps": 2}, resume="auto")
    assert fingerprint(tmp_path / "out" / "final") == before


def test_a_checkpoint_past_the_last_step_is_refused(stopped: dict, tmp_path: Path, train):
    """Fewer steps than the checkpoint has: no model of more steps under the name of fewer."""
    train(train_sft, tmp_path / "out", **stopped, epochs=2, save_every=4)
    (tmp_path / "out" / "finished.json").unlink()
    with pytest.raises(ValueError, match="step_4 is past the 2 steps asked for"):
        train(train_sft, tmp_path / "out", **stopped, max_steps=2)


def reseal(folder: Path, **values) -> None:
    """Change state.json and its seal."""
    path, manifest = folder / "state.json", folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    files = json.loads(manifest.read_text())
    files["state.json"] = {"bytes": path.stat().st_size, "sha256": checkpoint.sha256_of(path)}
    manifest.write_text(json.dumps(files))


def test_another_versions_checkpoint_is_refused_by_that_name(stopped: dict, tmp_path: Path, train):
    """The version and both formats are named, not a missing tensor."""
    folder = tmp_path / "out" / "step_1"
    run = json.loads((folder / "state.json").read_text())["run"]
    run["run"]["version"] = "7.7"
    reseal(folder, format=99, run=run)
    with pytest.raises(
        ValueError, match=r"was written by 7.7 of plumb \(format 99, this one reads"
    ):
        train(train_sft, tmp_path / "out", **stopped)


def test_only_listed_files_are_read(stopped: dict, tmp_path: Path, train):
    """A stray state file, as a copy by hand leaves it, changes nothing."""
    folder = tmp_path / "out" / "step_1"
    shutil.copyfile(
        folder / "state-00001-of-00001.safetensors", folder / "state-00002-of-00002.safetensors"
    )
    (folder / "state-junk.safetensors").write_bytes(b"junk")
    train(train_sft, tmp_path / "out", **stopped)


def test_an_unreadable_config_is_a_warning(stopped: dict, tmp_path: Path, train, capsys):
    """config.json of the stopped run cannot be read: the run goes on and says so."""
    (tmp_path / "out" / "config.json").write_text("{")
    train(train_sft, tmp_path / "out", **stopped)
    assert "config.json is unreadable: flags may have changed" in capsys.readouterr().out
