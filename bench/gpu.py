"""Check and time plumb on this machine's GPU, in stages that stand alone, most valuable first.

    python bench/gpu.py                                        all stages, into bench/results/
    python bench/gpu.py --stages 1 2 --out bench/results/      some of them
    python bench/gpu.py --device cpu --tiny                    test of this command

    1  every kernel against its plain twin in float64                      gpu_check.py
    2  attention and log-prob against torch's best, memory-bound kernels   gpu_kernels.py
    3  DPO steps of a 1B and a 7B, whole and LoRA: MFU, memory, waits      gpu_steps.py
    4  the same steps by TRL, where it is installed                        gpu_trl.py
    5  tokens a second of the sampler, eager and as CUDA graphs            gpu_sampling.py
    6  a trace of one DPO step                                             gpu_steps.py

A stage takes at most four minutes. Each result is written at once, one JSON object a line, to a
file of the stage's own; trace.json and trace.txt lie beside. A stage runs in a process of its own:
one that crashes or hangs costs the part that it was at, and whatever was written stays.

Needs torch (2.11 or 2.13), its Triton, numpy and requirements.txt; no network, no model, no data.
Times are medians of CUDA events around single calls with a cold L2 cache; the sampler's and TRL's
are read from the clock after synchronising.
"""

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from harness import Bench, describe, read_rows, write_row

ROOT = Path(__file__).resolve().parents[1]


class Stage(NamedTuple):
    """A stage: its name, and the parts that it runs."""

    name: str
    parts: dict[str, tuple[str, int]]  # part -> module with a function of its name, seconds at most


STAGES = {
    1: Stage("kernels", {"check": ("gpu_check", 200)}),
    2: Stage(
        "speed",
        {
            "ceilings": ("gpu_kernels", 20),
            "attention": ("gpu_kernels", 100),
            "logprob": ("gpu_kernels", 60),
            "small": ("gpu_kernels", 30),
            "experts": ("gpu_kernels", 20),
        },
    ),
    3: Stage("steps", {"steps": ("gpu_steps", 200)}),
    4: Stage("trl", {"trl": ("gpu_trl", 200)}),
    5: Stage("sampling", {"sampling": ("gpu_sampling", 90), "graphs": ("gpu_sampling", 110)}),
    6: Stage("trace", {"trace": ("gpu_steps", 150)}),
}
LIMIT = 230  # seconds of a stage; then its process is ended
DONE = "the whole part"


def run_parts(args: argparse.Namespace) -> None:
    """Run some parts of one stage in this process."""
    if args.device == "pretend":
        import pretend

        pretend.install()
    if not Path(args.rows).exists():
        write_row(Path(args.rows), "machine", args.device, **machine())
    for part in args.parts:
        name, seconds = STAGES[args.stages[0]].parts[part]
        start = time.monotonic()
        module = importlib.import_module(name)
        left = args.seconds if args.tiny else min(seconds, args.seconds)
        bench = Bench(part, args.rows, args.device, args.tiny, left)
        getattr(module, part)(bench)
        args.seconds -= time.monotonic() - start
        write_row(bench.rows, part, DONE, seconds=time.monotonic() - start)


def start_parts(
    number: int, parts: list[str], rows: Path, args: argparse.Namespace, left: float
) -> str:
    """Run parts of a stage in a process of their own; return what went wrong, if anything did."""
    folders = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {
        "CUDA_VISIBLE_DEVICES": "0",  # TRL accepts one visible GPU only
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONUNBUFFERED": "1",
    }
    if args.device != "cuda":
        kernels = {"TRITON_INTERPRET": "1", "PLUMB_KERNELS": "on"}
        environment |= kernels if number <= 2 else {"PLUMB_KERNELS": "off"}
    words = [sys.executable, __file__, "--parts", *parts, "--stages", number, "--rows", rows]
    words += ["--device", args.device, "--seconds", f"{0.9 * left:.0f}"] + ["--tiny"] * args.tiny
    try:
        run = subprocess.run([str(word) for word in words], env=environment, timeout=left)
    except subprocess.TimeoutExpired:
        return f"ended after {left:.0f} s"
    return f"ended with status {run.returncode}" if run.returncode else ""


def run_stage(number: int, folder: Path, args: argparse.Namespace) -> list[dict]:
    """Run one stage; return its rows. After a part that ends its process the others still run."""
    stage = STAGES[number]
    rows = folder / f"{number}_{stage.name}.jsonl"
    rows.unlink(missing_ok=True)
    end = time.monotonic() + LIMIT * (5 if args.tiny else 1)  # a test's machine may be busy
    parts = list(stage.parts)
    while parts:
        left = end - time.monotonic()
        error = start_parts(number, parts, rows, args, left) if left > 5 else "no time left"
        finished = {row["part"] for row in read_rows(rows) if row["name"] == DONE}
        parts = [part for part in parts if part not in finished]
        if parts:
            write_row(rows, parts.pop(0), DONE, error=error or "did not finish")
    return read_rows(rows)


def machine() -> dict:
    """Return GPU, versions and time, of which all numbers are."""
    import torch
    import triton

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"gpu": gpu, **versions, "cuda": torch.version.cuda or torch.version.hip, "utc": when}


def report(rows: list[dict], strict: bool) -> int:
    """Print all rows and what failed; return the exit status. strict: a failure is an error."""
    print()
    for row in rows:
        print(describe({key: value for key, value in row.items() if key != "errors"}))
    wrong = [row["name"] for row in rows if row.get("ok") is False]
    broken, peers = [], []
    for row in rows:
        if "error" in row:
            by_peer = row["part"] == "trl" or "Liger" in row["name"]  # not this project's failure
            (peers if by_peer else broken).append(f"{row['part']}, {row['name']}")
    print(f"WRONG: {'; '.join(wrong)}" if wrong else "every checked kernel is right")
    print(f"failed: {'; '.join(broken)}" if broken else "every part ran")
    if peers:
        print(f"not compared with: {'; '.join(peers)}")
    return int(bool(wrong or (broken and strict)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", type=int, choices=STAGES, default=list(STAGES))
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder")
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu", "pretend"),
        default="cuda",
        help="pretend: tests/pretend.py, with --tiny",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="smallest sizes: only test that it runs"
    )
    parser.add_argument("--parts", nargs="+", help=argparse.SUPPRESS)  # these three: run them here
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.parts:
        run_parts(args)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [row for number in args.stages for row in run_stage(number, args.out, args)]
    return report(rows, args.tiny)


if __name__ == "__main__":
    sys.exit(main())
