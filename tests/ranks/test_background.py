"""--async-save: the bytes of a checkpoint that is written at once, and its safety.

Faults that these tests are for: no copy of the state; a copy that is written before it has arrived
from the device; a counter taken when the file is written; a folder renamed before all ranks have
written; an error that nobody hears of; a reference removed that a checkpoint on its way needs.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pretend
import pytest
import test_faults
import torch
from forked import kill_all
from launch import launch
from test_faults import before_step, full_disk, losses, start, weights

import checkpoint
import reference
import train_sft
from background import Writer
from checkpoint import State, Written
from model import GPT, GPTConfig
from optimizer import AdamW
from parallel import init_mesh

SMALL = GPTConfig(
    family="llama", vocab=53, width=16, layers=2, heads=2, kv_heads=1, head_size=8, ffn=37
)
ASYNC = "--async-save"


class Stop:
    """A run's stop request."""

    reason = ""


def make_optimizer(zero: int, dtype: torch.dtype, device: str = "cpu") -> AdamW:
    """Return the optimizer of a random model."""
    model = GPT(SMALL, init_mesh())
    model.init_weights(0)
    model = model.to(dtype)
    if device == "cuda":  # as a script's: parameters that are made on the device
        for module in model.modules():
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(p.detach().to(device)))
    return AdamW(model, (0.9, 0.95), 1e-8, 0.1, zero)


def take_step(optimizer: AdamW) -> None:
    """Update from gradients that are the weights."""
    for b in optimizer.buckets:
        b.shard.copy_(b.piece)
    optimizer.collected = True
    optimizer.step(1e-1, 1.0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(autouse=True)
def nobody_stays():
    """Kill ranks that a failed test has left behind."""
    yield
    kill_all()


# ---- the same bytes ------------------------------------------------------------------------------


def save_both_ways(out: Path, zero: int, dtype: torch.dtype, device: str = "cpu") -> None:
    """Save step 2 at once; again in a thread that writes when step 3 is done."""
    if device == "cuda":
        pretend.install()
    optimizer, state = make_optimizer(zero, dtype, device), State(step=2, extra={"sum": 0.5})
    mesh, moved_on = optimizer.model.mesh, threading.Event()
    take_step(optimizer)
    take_step(optimizer)
    checkpoint.save(out / "now", state, optimizer, 2, {"run": {}})
    write_rank = checkpoint.write_rank

    def late(*values) -> Written:
        assert moved_on.wait(20)
        return write_rank(*values)

    checkpoint.write_rank = late
    writer = Writer(Stop())
    pretend.WAITS.clear()
    writer.save(out / "later", state, optimizer, 2, {"run": {}})
    # The host waits for the counters of AdamW alone, and in the thread for the copies.
    assert {place for _, place, _ in pretend.WAITS} <= {"master.py:state", "background.py:work"}
    take_step(optimizer)
    state.extra["sum"], state.tokens = 0.0, 7
    torch.manual_seed(mesh.rank + 5)
    assert [path.name for path in (out / "later").iterdir()] == [".step_2.partial"]
    moved_on.set()
    writer.wait()
    writer.wait()  # nothing is left to wait for


@pytest.mark.parametrize(
    ("world", "zero", "dtype", "device"),
    [
        (1, 1, torch.float32, "cpu"),
        (2, 2, torch.bfloat16, "cpu"),
        (2, 3, torch.float64, "cpu"),
        (1, 1, torch.bfloat16, "cuda"),
    ],
)
def test_a_checkpoint_written_later_has_the_same_bytes(
    world: int, zero: int, dtype: torch.dtype, device: str, tmp_path: Path
):
    """Every file is that of the step at which it was due, though weights and counters moved on."""
    launch(world, save_both_ways, tmp_path, zero, dtype, device)
    now, later = files(tmp_path / "now" / "step_2"), files(tmp_path / "later" / "step_2")
    assert now == later and len(now) == world + 2


# ---- scripts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(toy: Path, tmp_path_factory) -> Path:
    """Return the folder of a run of two ranks that writes its checkpoints at once."""
    out = tmp_path_factory.mktemp("unbroken") / "out"
    test_faults.finish(2, toy, out)
    return out


def while_writing(save: int, do: Callable[[Path], None], on: int) -> Callable[[int], None]:
    """Return a fault: rank `on` calls do(file) in its thread, in the n-th checkpoint."""

    def fault(rank: int) -> None:
        write, calls = checkpoint.save_file, iter(range(1, 99))

        def patched(tensors, path, metadata) -> None:
            if next(calls) == save:
                do(path)
            write(tensors, path, metadata)

        if rank == on:
            checkpoint.save_file = patched

    return fault


def tear(path: Path) -> None:
    """Leave half a file, and die."""
    path.write_bytes(b"\0" * 1000)
    time.sleep(0.3)  # the other rank writes its file
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_run_killed_while_writing_goes_on_from_the_checkpoint_before(
    toy: Path, unbroken: Path, tmp_path: Path
):
    """The torn folder is hidden; metrics and weights after a restart are those of one run."""
    out = tmp_path / "out"
    ranks = start(2, toy, out, ASYNC, fault=while_writing(2, tear, on=1))
    assert ranks.wait() == [1, -signal.SIGKILL]
    assert (out / ".step_4.partial").is_dir() and checkpoint.newest(out).name == "step_2"
    said = test_faults.finish(2, toy, out, ASYNC, "--resume", "auto")
    assert "step_2 after step 2" in said
    test_faults.same(out, unbroken)
    assert [path.name for path in checkpoint.all_steps(out)] == ["step_6", "step_4", "step_2"]
    for step in (2, 4, 6):
        a, b = (weights(run / f"step_{step}") for run in (out, unbroken))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_full_disk_is_heard_of(toy: Path, tmp_path: Path):
    """All ranks end within two steps with the error of the rank whose disk is full."""
    out = tmp_path / "out"
    ranks = start(2, toy, out, ASYNC, "--keep", "1", fault=full_disk(1, 4))
    assert ranks.wait() == [1, 1]
    line = ranks.text(0).partition("error on every rank: ")[2]
    assert f"could not write {out / 'step_4'} (rank 1: " in line
    assert "free space on the disk, then --resume auto goes on from step_2" in line
    assert len(losses(out)) <= 6 and not (out / "final").exists()
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"cache", "step_2"}


def test_a_failed_write_asks_the_run_to_stop(tmp_path: Path, monkeypatch):
    """At once, not at the next checkpoint, which may be hours away and finds the same error."""

    def full(*_) -> Written:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_rank", full)
    writer = Writer(Stop())
    writer.save(tmp_path, State(step=2), make_optimizer(1, torch.float32), 2, {"run": {}})
    writer.job.thread.join()
    assert writer.stop.reason == "a checkpoint that could not be written"
    with pytest.raises(OSError, match="could not write"):
        writer.wait()


def test_a_signal_waits_for_the_checkpoint_on_its_way(toy: Path, tmp_path: Path):
    """SIGTERM while step 2 is written slowly: that of step 3 follows, and both are whole."""
    out = tmp_path / "out"

    def fault(rank: int) -> None:
        while_writing(1, lambda _: time.sleep(0.5), on=rank)(rank)
        before_step(3, lambda _: os.kill(os.getpid(), signal.SIGTERM))

    ranks = start(1, toy, out, ASYNC, fault=fault)
    assert ranks.wait() == [0], ranks.text(0)
    assert "stopped by SIGTERM after step 3" in ranks.text(0)
    assert [path.name for path in checkpoint.all_steps(out)] == ["step_3", "step_2"]
    assert not any(checkpoint.damage(folder) for folder in checkpoint.all_steps(out))


def test_a_run_that_fails_leaves_the_checkpoint_on_its_way(toy: Path, tmp_path: Path):
    """Every rank's thread ends before the process does."""
    out = tmp_path / "out"

    def fail(_: AdamW) -> None:
        raise ValueError("bad luck")

    def fault(rank: int) -> None:
        while_writing(1, lambda _: time.sleep(0.5), on=rank)(rank)
        before_step(3, fail)

    ranks = start(2, toy, out, ASYNC, fault=fault)
    assert ranks.wait() == [1, 1] and "bad luck" in ranks.text(0)
    assert checkpoint.newest(out).name == "step_2"


def test_a_checkpoint_on_its_way_keeps_its_reference(tmp_path: Path):
    """TR-DPO's reference of step 4 stays while step_4 is written, and goes with it."""
    config = train_sft.Config(out=str(tmp_path))
    for name in ("reference_4", "reference_8", ".step_5.partial", "step_6"):
        (tmp_path / name).mkdir()
    assert sorted(checkpoint.steps_begun(tmp_path)) == [5, 6]
    reference._drop_references(config, 4, 8)
    assert (tmp_path / "reference_4").exists()
    (tmp_path / ".step_5.partial").rmdir()
    (tmp_path / "step_6").rename(tmp_path / "step_9")
    reference._drop_references(config, 4, 8)
    assert not (tmp_path / "reference_4").exists() and (tmp_path / "reference_8").exists()
