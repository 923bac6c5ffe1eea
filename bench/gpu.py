"""Check and time the kernels on this machine's GPU: first correct, then fast, then whole steps.

    python bench/gpu.py                           all parts, 8 minutes; bench/results/GPU.json
    python bench/gpu.py --parts check attention   some parts
    python bench/gpu.py --device cpu --tiny       test of this command, in Triton's interpreter

    ceilings   rates of a plain matmul and a plain copy, of which all shares are   gpu_kernels.py
    check      every kernel against its plain twin in float64                      gpu_check.py
    attention, logprob, small   kernels against alternatives                       gpu_kernels.py
    steps, trl   whole training steps of plumb and of TRL, real tokens only        gpu_steps.py

Needs torch and triton. Liger and TRL are compared with where they are installed. Every part runs in
a process of its own, so that a crash or a hang costs that part alone; results are written as they
come. Times are medians of CUDA events around single calls with a cold L2 cache (TRL's steps: a
clock read after synchronising).
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import UNITS, Bench, ceiling_variable, describe, read_rows, write_row

ROOT = Path(__file__).resolve().parents[1]
PARTS = {  # module with a function of the part's name, seconds at most
    "ceilings": ("gpu_kernels", 40),
    "check": ("gpu_check", 100),
    "attention": ("gpu_kernels", 120),
    "logprob": ("gpu_kernels", 70),
    "small": ("gpu_kernels", 50),
    "steps": ("gpu_steps", 150),
    "trl": ("gpu_steps", 150),
}


def run_part(args: argparse.Namespace) -> None:
    """Run one part in this process."""
    module, _ = PARTS[args.part]
    bench = Bench(args.part, args.rows, args.device, args.tiny, args.seconds)
    getattr(importlib.import_module(module), args.part)(bench)


def start_part(
    part: str, rows: Path, args: argparse.Namespace, environment: dict, left: float
) -> str:
    """Run one part in a process of its own; return what went wrong, else an empty string."""
    if left < 5:
        return "no time left"
    words = [sys.executable, __file__, "--part", part, "--rows", rows, "--device", args.device]
    words += ["--seconds", f"{0.8 * left:.0f}"] + ["--tiny"] * args.tiny
    try:
        run = subprocess.run([str(word) for word in words], env=environment, timeout=left)
    except subprocess.TimeoutExpired:
        return f"ended after {left:.0f} s"
    return f"ended with status {run.returncode}" if run.returncode else ""


def run_parts(args: argparse.Namespace) -> list[dict]:
    """Run the parts one after the other; return all rows."""
    environment = {
        "CUDA_VISIBLE_DEVICES": "0",  # TRL accepts one visible GPU only
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "PYTHONUNBUFFERED": "1",
    }
    if args.device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "PLUMB_KERNELS": "on"}
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.jsonl")
        for part in args.parts:
            _, limit = PARTS[part]
            error = start_part(part, rows, args, environment, min(limit, end - time.monotonic()))
            if error:
                write_row(rows, part, "the whole part", error=error)
            for row in read_rows(rows):
                if row["part"] == "ceilings":
                    for unit in set(UNITS) & set(row):
                        environment[ceiling_variable(unit)] = str(row[unit])
        return read_rows(rows)


def report(rows: list[dict], args: argparse.Namespace) -> int:
    """Print all rows and what failed, write them to a file; return the exit status."""
    import torch
    import triton

    gpu = "cpu"
    if args.device == "cuda" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    versions = {"device": gpu, "torch": torch.__version__, "triton": triton.__version__}
    path = args.json
    if path is None and not args.tiny:
        path = ROOT / "bench" / "results" / f"{gpu.replace(' ', '_')}.json"
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps({**versions, "rows": rows}, indent=1) + "\n")

    print(f"\n{gpu}, torch {torch.__version__}, triton {triton.__version__}")
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
    return int(bool(wrong or (broken and args.tiny)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="smallest sizes: only test that it runs"
    )
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="for all parts; then they are ended"
    )
    parser.add_argument("--json", help="results; default bench/results/GPU.json, none with --tiny")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # these three: run one part here
    parser.add_argument("--rows", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        run_part(args)
        return 0
    return report(run_parts(args), args)


if __name__ == "__main__":
    sys.exit(main())
