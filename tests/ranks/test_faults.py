"""Law 4 on several ranks: when one of them fails, all end together, say why, and lose nothing.

Real processes and real signals. A fault is patched into one rank after the fork, at a given step,
so that it always strikes at the same place; everything else is what a user would run.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import read_metrics
from forked import Ranks, kill_all
from safetensors import safe_open
from safetensors.torch import load_file

import checkpoint
import parallel
import runtime
import train_dpo
from model import GPT
from optimizer import AdamW
from weights.folder import load_model

ROOT = Path(__file__).parents[2]
STEPS = 6  # of the toy world's 48 pairs


def flags(toy: Path, out: Path, *more: str) -> list[str]:
    """Return flags of DPO in float64: six steps, a checkpoint every other one."""
    files = ["--model", toy / "model", "--data", toy / "world" / "preferences.jsonl", "--out", out]
    settings = "--dtype fp64 --device cpu --batch-size 8 --lr 1e-2 --max-tokens 256"
    saving = "--save-every 2 --keep 9"
    return [*map(str, files), *settings.split(), *saving.split(), *more]


def start(
    world: int,
    toy: Path,
    out: Path,
    *more: str,
    fault: Callable[[int], None] | None = None,
    timeout: float = 2.0,
) -> Ranks:
    """Start DPO on `world` ranks, each after fault(rank). timeout: --timeout-minutes."""

    def body(rank: int) -> None:
        runtime.PATIENCE = 3.0
        if fault:
            fault(rank)
        argv = flags(toy, out, "--timeout-minutes", str(timeout), *more)
        runtime.run(lambda: train_dpo.main(argv))

    return Ranks(world, body, out.with_name(f"{out.name}-said"))


def finish(world: int, toy: Path, out: Path, *more: str) -> str:
    """Run to the end without errors; return what rank 0 printed."""
    ranks = start(world, toy, out, *more)
    assert ranks.wait() == [0] * world, "\n".join(ranks.text(r) for r in range(world))
    return ranks.text(0)


def before_step(n: int, do: Callable[[AdamW], None]) -> None:
    """In this process, call do(optimizer) right before the n-th optimizer step from now."""
    step, calls = AdamW.step, iter(range(1, 99))

    def patched(self: AdamW, *values):
        if next(calls) == n:
            do(self)
        return step(self, *values)

    AdamW.step = patched


def signals(number: int, on: int, step: int) -> Callable[[int], None]:
    """Return a fault: rank `on` gets a signal in step `step`."""
    return lambda rank: (
        before_step(step, lambda _: os.kill(os.getpid(), number)) if rank == on else None
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: w
        for file in sorted(folder.glob("*.safetensors"))
        for name, w in load_file(file).items()
    }


def losses(out: Path) -> list[dict]:
    """Return the metrics of the steps, without rows about the reference."""
    return [row for row in read_metrics(out) if "loss" in row]


def same(one: Path, other: Path) -> None:
    """Assert that metrics and final weights of two runs are equal bit for bit."""
    assert losses(one) == losses(other) and len(losses(one)) == STEPS
    a, b = weights(one / "final"), weights(other / "final")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(autouse=True)
def nobody_stays():
    """Kill ranks that a failed test has left behind."""
    yield
    kill_all()


LAYOUTS = {"dp2": [], "zero2": ["--zero", "2"], "tp2": ["--tp", "2"], "pp2": ["--pp", "2"]}


@pytest.fixture(scope="module")
def unbroken(toy: Path, tmp_path_factory) -> Callable[[str], Path]:
    """Return a function: layout -> folder of an undisturbed run of two ranks."""
    outs: dict[str, Path] = {}

    def run(layout: str) -> Path:
        if layout not in outs:
            out = tmp_path_factory.mktemp(layout) / "out"
            finish(2, toy, out, *LAYOUTS[layout])
            outs[layout] = out
        return outs[layout]

    return run


# ---- signals and deaths --------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "rank"), [("dp2", 1), ("tp2", 0)])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    layout: str, rank: int, toy, unbroken, tmp_path: Path
):
    """After SIGTERM every rank saves and exits with 0, and resumed = never stopped."""
    out, more = tmp_path / "out", LAYOUTS[layout]
    ranks = start(2, toy, out, *more, fault=signals(signal.SIGTERM, rank, step=3))
    assert ranks.wait() == [0, 0], ranks.text(0) + ranks.text(1)
    who = "SIGTERM" if rank == 0 else "another rank"
    assert f"stopped by {who} after step 3 of {STEPS}; continue with --resume auto" in ranks.text(0)
    assert (
        checkpoint.newest(out).name == "step_3"
        and len(losses(out)) == 3
        and not (out / "final").exists()
    )
    assert "after step 3" in finish(2, toy, out, *more, "--resume", "auto")
    same(out, unbroken(layout))


@pytest.mark.parametrize(("layout", "rank"), [("zero2", 1), ("pp2", 0)])
def test_a_dead_rank_is_named_within_seconds(layout: str, rank: int, toy, unbroken, tmp_path: Path):
    """After SIGKILL the other rank does not wait for a timeout, and a restart loses nothing."""
    out, more = tmp_path / "out", LAYOUTS[layout]
    began = time.monotonic()
    fault = signals(signal.SIGKILL, rank, step=4)
    ranks = start(2, toy, out, *more, fault=fault, timeout=20.0)
    codes = ranks.wait()
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1
    assert time.monotonic() - began < 200, "--timeout-minutes 20 ended it"
    assert f"rank {rank} does not answer: dead, or hung" in ranks.text(1 - rank)
    assert "step_2" in finish(2, toy, out, *more, "--resume", "auto")
    same(out, unbroken(layout))


def stops_in_forward(rank: int) -> Callable[[int], None]:
    """Return a fault: SIGSTOP in a forward, where the other rank waits in the tensor group."""

    def fault(here: int) -> None:
        forward = GPT.run

        def patched(*values):
            os.kill(os.getpid(), signal.SIGSTOP)
            return forward(*values)

        if here == rank:
            before_step(1, lambda _: setattr(GPT, "run", patched))

    return fault


def test_a_hung_rank_is_named(toy: Path, tmp_path: Path):
    """After SIGSTOP the other rank waits for --timeout-minutes, not c10d's 30, and names it."""
    runs = [
        start(2, toy, tmp_path / f"{rank}", "--tp", "2", fault=stops_in_forward(rank), timeout=0.05)
        for rank in (0, 1)
    ]
    for rank, ranks in enumerate(runs):
        assert ranks.wait(ranks=[1 - rank]) == [1], ranks.text(1 - rank)
        assert f"rank {rank} does not answer: dead, or hung" in ranks.text(1 - rank)


def fails(rank: int, step: int, error: Exception) -> Callable[[int], None]:
    def fault(here: int) -> None:
        def fail(optimizer: AdamW) -> None:
            raise error

        if here == rank:
            before_step(step, fail)

    return fault


@pytest.mark.parametrize(
    ("rank", "error"), [(1, ValueError("bad luck")), (0, RuntimeError("bad luck\nin two lines"))]
)
def test_the_others_say_which_rank_failed_first(
    rank: int, error: Exception, toy: Path, tmp_path: Path
):
    """Both ranks give the reason; the one that failed does not blame the other."""
    ranks = start(2, toy, tmp_path / "out", fault=fails(rank, 2, error))
    assert ranks.wait() == [1, 1]
    why = "bad luck" if isinstance(error, ValueError) else "RuntimeError: bad luck"
    assert f"rank {rank} failed first: {why}\n" in ranks.text(1 - rank)
    assert f"error on rank {rank}: {why}\n" in ranks.text(
        rank
    ) and "does not answer" not in ranks.text(rank)


def test_without_torchrun_the_store_may_go_first(toy: Path, tmp_path: Path):
    """Without torchrun rank 0 holds the store; if it dies or hangs, the others still report it."""
    for number in (signal.SIGKILL, signal.SIGSTOP):
        out = tmp_path / signal.Signals(number).name
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]

        def fault(rank: int, number=number, port=port) -> None:
            os.environ.pop("TORCHELASTIC_USE_AGENT_STORE")
            os.environ["MASTER_PORT"] = str(port)
            signals(number, 0, step=2)(rank)

        ranks = start(2, toy, out, fault=fault, timeout=0.1)
        assert ranks.wait(ranks=[1]) == [1], ranks.text(1)
        assert "rank 0 does not answer: it is dead or hung" in ranks.text(1)


def test_max_minutes_stops_every_rank(toy: Path, tmp_path: Path):
    """The time limit of one rank stops all of them after the same step, with a checkpoint."""
    ranks = start(2, toy, tmp_path / "out", "--max-minutes", "1e-6")
    assert ranks.wait() == [0, 0]
    assert f"stopped by --max-minutes after step 1 of {STEPS}" in ranks.text(0)
    assert [path.name for path in checkpoint.all_steps(tmp_path / "out")] == ["step_1"]


def test_a_nan_on_one_rank_skips_the_step_on_all(toy: Path, tmp_path: Path):
    """Weights and moments stay the same bits on every rank; the step is counted as skipped."""

    def poison(optimizer: AdamW) -> None:
        optimizer.buckets[0].shard[0] = float("nan")

    out = tmp_path / "out"
    ranks = start(
        2, toy, out, "--save-every", "1", fault=lambda rank: rank == 1 and before_step(3, poison)
    )
    assert ranks.wait() == [0, 0], ranks.text(0) + ranks.text(1)
    assert "step 3: the gradient is not finite, no update (1 so far)" in ranks.text(0)
    assert [row["grad_norm"] is None for row in losses(out)] == [
        step == 3 for step in range(1, STEPS + 1)
    ]
    for name in ("state-00001-of-00002.safetensors", "state-00002-of-00002.safetensors"):
        two, three, four = (load_file(out / f"step_{step}" / name) for step in (2, 3, 4))
        assert two.keys() == three.keys() and all(torch.equal(two[key], three[key]) for key in two)
        assert not any(
            torch.equal(three[key], four[key]) for key in three if key.startswith("master")
        )
    state = json.loads((out / "step_3" / "state.json").read_text())
    assert state["skipped"] == 1 and state["updates"] == [2]


# ---- the disk ------------------------------------------------------------------------------------


def full_disk(rank: int, step: int) -> Callable[[int], None]:
    """Return a fault: from a step on, no file can grow beyond 20 kB, as on a full disk."""

    def fill(_: AdamW) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        )

    return lambda here: before_step(step, fill) if here == rank else None


def test_a_full_disk_of_one_rank_stops_all_and_loses_nothing(toy: Path, unbroken, tmp_path: Path):
    """The old checkpoint stays, no partial one is left, and every rank names the same rank."""
    runs = [
        start(2, toy, tmp_path / what, "--pp", "2", *more, fault=full_disk(1, step))
        for what, step, more in (("step_4", 4, []), ("final", STEPS, ["--save-every", "5"]))
    ]
    for ranks, what, kept in zip(runs, ("step_4", "final"), ("step_2", "step_5")):
        assert ranks.wait() == [1, 1]
        line = ranks.text(0).partition("error on every rank: ")[2]
        assert f"could not write {tmp_path / what / what} (rank 1: " in line
        assert "free space on the disk" in line
        assert "error" not in ranks.text(1)
        out = tmp_path / what
        assert {path.name for path in out.iterdir() if path.is_dir()} == {"cache", kept}
        assert not checkpoint.damage(out / kept)
    assert "goes on from step_2" in runs[0].text(0)
    finish(2, toy, tmp_path / "step_4", "--pp", "2", "--resume", "auto")
    same(tmp_path / "step_4", unbroken("pp2"))


def test_a_crash_between_write_and_rename_costs_one_checkpoint(toy: Path, unbroken, tmp_path: Path):
    """A restart takes the checkpoint before it and removes the partial one."""

    def fault(rank: int) -> None:
        if rank == 0:
            before_step(4, lambda _: setattr(Path, "rename", lambda self, target: os._exit(9)))

    out = tmp_path / "out"
    ranks = start(2, toy, out, fault=fault)
    assert ranks.wait() == [9, 1] and "rank 0 does not answer" in ranks.text(1)
    assert (out / ".step_4.partial" / "manifest.json").exists() and checkpoint.newest(
        out
    ).name == "step_2"
    assert "step_2" in finish(
        2, toy, out, "--resume", "auto", "--save-every", "3"
    )  # never step 4 again
    same(out, unbroken("dp2"))
    assert not list(out.glob(".*"))


def test_a_damaged_checkpoint_is_passed_over_by_all_ranks(toy: Path, unbroken, tmp_path: Path):
    """One flipped bit in the file of one rank: all ranks take the checkpoint before."""
    out = tmp_path / "out"
    assert start(2, toy, out, fault=signals(signal.SIGTERM, 1, step=4)).wait() == [0, 0]
    file = out / "step_4" / "state-00002-of-00002.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    said = finish(2, toy, out, "--resume", "auto")
    assert f"warning: {out}/step_4 is damaged: {file.name} does not match its SHA-256" in said
    assert f"resumed from {out}/step_2" in said
    same(out, unbroken("dp2"))


def test_an_out_that_is_not_shared_is_refused(toy: Path, tmp_path: Path):
    """Two nodes have a local --out each, one with files of another run: both refuse it."""

    def body(rank: int) -> None:
        disk = tmp_path / f"disk_{rank}"
        (disk / "out").mkdir(parents=True)
        (disk / "out" / "config.json").write_text("{}")
        os.chdir(disk)
        runtime.run(lambda: train_dpo.main(flags(toy, Path("out"))))

    ranks = Ranks(2, body, tmp_path / "said")
    assert ranks.wait() == [1, 1]
    why = "is not the same folder on every node: use one on a shared file system"
    assert why in ranks.text(0) + ranks.text(1)


# ---- another layout ------------------------------------------------------------------------------


def test_a_run_goes_on_under_one_layout_after_another(toy: Path, tmp_path: Path):
    """tp2 dp2 -> dp4 -> pp2 -> cp2 -> one process, a step each: as one process within 1e-12."""
    out, alone = tmp_path / "out", tmp_path / "alone"
    one = Ranks(
        1, lambda rank: runtime.run(lambda: train_dpo.main(flags(toy, alone))), tmp_path / "one"
    )
    for world, more in ((4, ["--tp", "2"]), (4, []), (2, ["--pp", "2"]), (2, ["--cp", "2"])):
        ranks = start(
            world,
            toy,
            out,
            *more,
            "--resume",
            "auto",
            fault=signals(signal.SIGTERM, world - 1, step=1),
        )
        assert ranks.wait() == [0] * world, ranks.text(0)
    finish(1, toy, out, "--resume", "auto")
    assert one.wait() == [0]
    for row, wanted in zip(losses(out), losses(alone), strict=True):
        off = {key: abs(row[key] - wanted[key]) / max(1, abs(wanted[key])) for key in wanted}
        if row["step"] == 1:  # every reward is 0 but for rounding
            off.pop("rewards/accuracies")
        assert max(off.values()) < 1e-12, off
    got, wanted = weights(out / "final"), weights(alone / "final")
    assert got.keys() == wanted.keys()
    assert max((got[name] - wanted[name]).abs().max().item() for name in wanted) < 1e-12


def whole_state(folder: Path) -> dict[str, torch.Tensor]:
    """Return weights and moments from all files of a checkpoint; NaN where a piece is missing."""
    state: dict[str, torch.Tensor] = {}
    slices: dict[tuple, torch.Tensor] = {}
    for path in folder.glob("state-*"):
        file = safe_open(path, framework="pt")
        for key, (first, shape, cut) in json.loads(file.metadata()["places"]).items():
            whole = state.setdefault(key, torch.full(shape, torch.nan, dtype=torch.float64))
            view = whole.narrow(cut[0], cut[1], cut[2] - cut[1]) if cut else whole
            held = slices.setdefault((key, str(cut)), torch.full_like(view, torch.nan).flatten())
            piece = file.get_tensor(key)
            held[first : first + len(piece)] = piece
            view.copy_(held.view(view.shape))
    return state


def test_a_checkpoint_loaded_elsewhere_and_saved_again_is_the_same(
    toy: Path, unbroken, tmp_path: Path
):
    """Weights and both moments survive three other layouts bit for bit."""
    folder = unbroken("tp2") / "step_6"
    wanted = whole_state(folder)
    assert {key.partition("/")[0] for key in wanted} == {"master", "exp_avg", "exp_avg_sq"}
    assert not any(value.isnan().any() for value in wanted.values())
    for i, (world, sizes, zero) in enumerate(
        [(2, {"pp": 2}, 1), (4, {"cp": 2}, 2), (4, {"tp": 2, "pp": 2}, 1)]
    ):
        out = tmp_path / str(i)

        def body(rank: int, folder=folder, out=out, sizes=sizes, zero=zero) -> None:
            mesh = parallel.init_mesh(**sizes, device="cpu")
            model = load_model(toy / "model", torch.float64, "cpu", mesh=mesh)
            optimizer = AdamW(model, (0.9, 0.95), 1e-8, 0.0, zero)
            checkpoint.save(out, checkpoint.load(folder, optimizer), optimizer, keep=1)
            parallel.close()

        ranks = Ranks(world, body, tmp_path / f"{i}-said")
        assert ranks.wait() == [0] * world, ranks.text(0)
        assert json.loads((out / "step_6" / "state.json").read_text())["updates"] == [6]
        folder = out / "step_6"
        got = whole_state(folder)
        assert got.keys() == wanted.keys() and all(
            torch.equal(got[key], wanted[key]) for key in wanted
        )


# ---- torchrun itself -----------------------------------------------------------------------------


def test_torchrun_passes_a_signal_on_and_the_run_resumes(toy: Path, unbroken, tmp_path: Path):
    """On SIGTERM to torchrun, as schedulers send it, ranks save and exit before it kills them."""
    out, said = tmp_path / "out", tmp_path / "said"
    torchrun = [*"-m torch.distributed.run --standalone --nproc_per_node 2".split()]
    words = flags(toy, out, *LAYOUTS["tp2"], "--save-every", "1")
    command = [sys.executable, *torchrun, str(ROOT / "train_dpo.py"), *words]
    with open(said, "w") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        try:
            while not (out / "step_1").exists():
                assert process.poll() is None, said.read_text()
                time.sleep(0.001)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()
    last = len(losses(out))
    assert f"stopped by SIGTERM after step {last} of {STEPS}" in said.read_text(), said.read_text()
    assert checkpoint.newest(out).name == f"step_{last}" and last < STEPS
    finish(2, toy, out, *LAYOUTS["tp2"], "--resume", "auto")
    same(out, unbroken("tp2"))
