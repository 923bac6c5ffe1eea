"""Processes of bench/cpu_vs_trl.py: one thread each, their CPU time, wall time and peak memory."""

import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CLOCKS = {"cpu": "cpu_seconds", "wall": "seconds"}  # name here, name in metrics.jsonl
# glibc returns every large tensor's memory to the kernel and takes it again, page by page. In a
# virtual machine that was more than half of TRL's CPU time, so both sides keep what they free,
# unless --malloc default.
KEEP_FREED_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**28),
}


def start(command: list, log: Path, malloc: str = "default") -> dict:
    """Run a command on one thread to its end; return its peak memory and CPU time.

    Its output goes to `log`. The calling process must stay small: the kernel counts a parent's
    pages at fork in the child's peak.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(log.parent / "hf"),
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if malloc == "keep":
        environment |= KEEP_FREED_MEMORY
    words = [str(word) for word in command]
    with open(log, "w") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        tail = log.read_text(errors="replace")[-3000:]
        raise ValueError(f"{' '.join(words)} ended with {process.returncode}; its output:\n{tail}")
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "peak_gb": usage.ru_maxrss / 2**20,
        "process_cpu": cpu,
        "kernel_share": usage.ru_stime / cpu,
    }


def call(function: Callable[[dict], dict], spec: dict, log: Path) -> tuple[dict, dict]:
    """Call a function of a bench file in a process of its own; return its result and usage."""
    asked, answer = log.with_suffix(".in.json"), log.with_suffix(".out.json")
    asked.write_text(json.dumps(spec))
    words = [sys.executable, __file__, function.__module__, function.__name__, asked, answer]
    usage = start(words, log, spec["malloc"])
    return json.loads(answer.read_text()), usage


def timed(function: Callable, times: list[dict]) -> Callable:
    """Wrap a function so that CPU and wall seconds of each call are appended to `times`."""

    def wrapper(*args, **kwargs):
        cpu, wall = time.process_time(), time.perf_counter()
        result = function(*args, **kwargs)
        times.append({"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall})
        return result

    return wrapper


def medians(results: dict[str, list[dict]], keys: Iterable[str]) -> dict[str, dict[str, float]]:
    """Return the median over the repeats of each run, by run and key."""
    return {
        run: {key: statistics.median(repeat[key] for repeat in repeats) for key in keys}
        for run, repeats in results.items()
    }


if __name__ == "__main__":
    module, name, asked, answer = sys.argv[1:]
    function = getattr(importlib.import_module(module), name)
    Path(answer).write_text(json.dumps(function(json.loads(Path(asked).read_text()))))
