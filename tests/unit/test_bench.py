"""bench/gpu.py runs on a CPU at tiny sizes, in Triton's interpreter."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_gpu_bench(folder: Path, out: Path, *flags: str) -> tuple[subprocess.CompletedProcess, list]:
    """Run the gpu.py of a folder on the CPU; return the process and its result rows."""
    pytest.importorskip("triton")
    rows = out / "rows.json"
    command = [sys.executable, folder / "gpu.py", "--device", "cpu", "--tiny", "--json", rows]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([*command, *flags], env=environment, capture_output=True, text=True)
    return run, json.loads(rows.read_text())["rows"]


@pytest.mark.slow
def test_the_gpu_bench_finds_every_kernel_right(tmp_path: Path):
    """Every part runs, every kernel agrees with its twin; TRL is compared with where it is."""
    run, rows = run_gpu_bench(ROOT / "bench", tmp_path)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert sum(row.get("ok", False) for row in rows) == 10
    parts = ["check", "ceilings", "attention", "logprob", "small", "steps", "trl"]
    assert {row["part"] for row in rows} == set(parts)
    assert any("tflops" in row for row in rows if row["part"] == "steps")
    theirs = [row for row in rows if row["part"] == "trl"]
    if importlib.util.find_spec("trl"):
        assert ["seconds" in row for row in theirs] == [True, True], theirs
        assert theirs[0]["plumb_faster"] > 0
    else:
        assert "not importable: trl" in theirs[0]["skipped"]


@pytest.mark.slow
def test_the_gpu_bench_survives_a_part_that_dies(tmp_path: Path):
    """A part whose process is killed is reported; the parts after it still run."""
    shutil.copytree(ROOT / "bench", tmp_path / "bench")
    kernels = tmp_path / "bench" / "gpu_kernels.py"
    doc = '    """Time RMSNorm, rotary embedding and SwiGLU'
    source = kernels.read_text()
    assert doc in source
    kernels.write_text(source.replace(doc, f"    import os; os.abort()\n{doc}"))
    run, rows = run_gpu_bench(tmp_path / "bench", tmp_path, "--parts", "small", "ceilings")
    assert run.returncode == 1 and "failed: small, the whole part" in run.stdout
    assert [row["part"] for row in rows] == ["small", "ceilings", "ceilings"]
