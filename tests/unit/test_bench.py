"""bench/gpu.py runs at tiny sizes without a GPU: its kernels in Triton's interpreter."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = ["1_kernels", "2_speed", "3_steps", "4_trl", "5_sampling", "6_trace"]


def run_gpu_bench(
    folder: Path, out: Path, *flags: str
) -> tuple[subprocess.CompletedProcess, dict[str, list[dict]]]:
    """Run the gpu.py of a folder; return the process and the rows of every stage's file."""
    pytest.importorskip("triton")
    command = [sys.executable, folder / "gpu.py", "--tiny", "--out", out, *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "tests")))}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    files = sorted(out.glob("*.jsonl"))
    rows = {file.stem: [json.loads(line) for line in file.open()] for file in files}
    return run, rows


@pytest.mark.slow
def test_every_stage_of_the_gpu_bench_runs_on_the_pretend_gpu(tmp_path: Path):
    """Every kernel agrees with its twin; steps, samples and a trace are there, and host waits."""
    run, rows = run_gpu_bench(ROOT / "bench", tmp_path, "--device", "pretend")
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert sorted(rows) == STAGES
    assert all(rows[stage][0]["gpu"] == "pretend H100" for stage in STAGES)
    assert sum(row.get("ok", False) for row in rows["1_kernels"]) == 18
    assert {row["part"] for row in rows["2_speed"][1:]} == {
        "ceilings",
        "attention",
        "logprob",
        "small",
        "experts",
    }
    steps = {row["name"]: row for row in rows["3_steps"] if "tflops" in row}
    assert list(steps) == ["tiny DPO, prompts shared", "tiny LoRA DPO, prompts shared"]
    for row in steps.values():
        assert row["host_waits"] == 1  # the gradient's norm
        assert row["mfu"] == pytest.approx(row["tflops"] / 989)  # an H100's data sheet
    assert steps["tiny LoRA DPO, prompts shared"]["tokens"] > 0
    why = "only plumb runs" if importlib.util.find_spec("trl") else "not importable: trl"
    assert why in rows["4_trl"][1]["skipped"]
    sampled = [row for row in rows["5_sampling"] if "tokens_per_s" in row]
    assert [row["host_waits_per_token"] for row in sampled] == [1, 1]
    assert (
        "longest" in rows["6_trace"][1] and "traceEvents" in (tmp_path / "trace.json").read_text()
    )
    assert "Self CPU" in (tmp_path / "trace.txt").read_text()


@pytest.mark.slow
def test_the_gpu_bench_compares_with_trl(tmp_path: Path):
    """On a CPU, where TRL is installed."""
    pytest.importorskip("trl")
    _, rows = run_gpu_bench(ROOT / "bench", tmp_path, "--device", "cpu", "--stages", "3", "4")
    theirs = [row for row in rows["4_trl"] if "DPO" in row["name"] or "SFT" in row["name"]]
    assert ["seconds" in row for row in theirs] == [True, True], theirs
    assert theirs[0]["plumb_faster"] > 0


@pytest.mark.slow
def test_the_gpu_bench_survives_a_part_that_dies(tmp_path: Path):
    """A part whose process is killed is reported; the parts after it and other stages still run."""
    shutil.copytree(ROOT / "bench", tmp_path / "bench")
    sampling = tmp_path / "bench" / "gpu_sampling.py"
    doc = '    """Time the sampler as it runs by default'
    source = sampling.read_text()
    assert doc in source
    sampling.write_text(source.replace(doc, f"    import os; os.abort()\n{doc}"))
    run, rows = run_gpu_bench(tmp_path / "bench", tmp_path, "--device", "cpu", "--stages", "5", "4")
    assert run.returncode == 1 and "failed: sampling, the whole part" in run.stdout
    assert [row["part"] for row in rows["5_sampling"]] == [
        "machine",
        "sampling",
        *["graphs"] * 3,
    ]
    assert "status" in rows["5_sampling"][1]["error"] and "4_trl" in rows
