"""Weights & Biases and TensorBoard get every row and, at the end, the samples."""

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from config import RolloutConfig
from parallel import Mesh
from reporting import Log


class FakeRun:
    """Stands in for the run that wandb.init returns."""

    def __init__(self):
        self.logged, self.finished = [], False

    def log(self, row, step=None):
        self.logged.append((step, row))

    def finish(self):
        self.finished = True


def write_samples(out: Path) -> None:
    rows = [
        {
            "step": step,
            "prompt": [{"role": "user", "content": "Hi?"}],
            "response": "Yes.",
            "reward": 1.5,
        }
        for step in (1, 10)
    ]
    out.mkdir()
    (out / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def run_log(out: Path, **flags) -> None:
    log = Log(RolloutConfig(out=str(out), **flags), 0, 2, Mesh())
    log.row({"step": 1, "loss": 0.5, "reward": float("nan")})
    log.row({"step": 2, "loss": 0.25})
    log.close()


def test_wandb_gets_rows_and_a_table_of_samples(tmp_path, monkeypatch):
    """The run has the name of the folder; a number that is not finite is None."""
    started, run = {}, FakeRun()
    wandb = ModuleType("wandb")
    wandb.init = lambda **settings: started.update(settings) or run
    wandb.Table = lambda columns, data: (columns, data)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_NAME", raising=False)
    write_samples(tmp_path / "out")
    run_log(tmp_path / "out", wandb="mine")
    assert started["project"] == "mine" and started["name"] == "out"
    assert started["config"]["max_new_tokens"] == 256
    assert run.logged[:2] == [(1, {"loss": 0.5, "reward": None}), (2, {"loss": 0.25})]
    (step, row) = run.logged[2]
    columns, data = row["samples"]
    assert columns == ["step", "prompt", "response", "reward"] and len(data) == 2
    assert data[1][0] == "10" and "Hi?" in data[1][1] and data[1][2:] == ["Yes.", "1.5"]
    assert run.finished and len(run.logged) == 3


def test_tensorboard_gets_scalars_and_texts(tmp_path):
    """Rows are scalars at their step, samples are texts."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_samples(tmp_path / "out")
    run_log(tmp_path / "out", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert "reward" not in events.Tags()["scalars"]
    texts = events.Tensors("samples/text_summary")
    assert [e.step for e in texts] == [1, 10]
    assert b"Yes." in texts[1].tensor_proto.string_val[0]


def test_a_run_without_samples_is_closed_alike(tmp_path, monkeypatch):
    """No table, no error."""
    run = FakeRun()
    wandb = ModuleType("wandb")
    wandb.init = lambda **settings: run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "out").mkdir()
    run_log(tmp_path / "out", wandb="mine")
    assert run.finished and len(run.logged) == 2
