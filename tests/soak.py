"""Soak test: a long DPO run that is killed every few hundred steps must equal one that is not.

    python tests/soak.py                      2,000 steps twice, a kill about every 250 steps
    python tests/soak.py --steps 300 --every 50

SIGTERM and SIGKILL take turns. pytest does not collect this file, because it takes minutes. Exit
status 0 means that final weights, metrics and token counts are equal bit for bit.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import checkpoint  # noqa: E402
import hf  # noqa: E402
from data import toyworld  # noqa: E402
from weights.folder import save_model  # noqa: E402


def command(home: Path, out: Path, steps: int, save_every: int) -> list[str]:
    """Return the training command.

    bco_pair carries a running mean from step to step, so more than weights has to survive.
    """
    flags = {
        "model": home / "model",
        "data": home / "world" / "preferences.jsonl",
        "out": out,
        "loss": "bco_pair",
        "lr": 1e-3,
        "batch-size": 4,
        "max-tokens": 256,
        "epochs": steps,
        "max-steps": steps,
        "save-every": save_every,
        "resume": "auto",
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "train_dpo.py"), *words]


def read_rows(out: Path) -> list[dict]:
    """Return the rows of metrics.jsonl without times and memory.

    A row that is still being written is left out.
    """
    path = out / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        names = [name for name in row if "second" not in name and "memory" not in name]
        rows.append({name: row[name] for name in names})
    return rows


def run(
    words: list[str], log: Path, kill_at: int = 0, number: int = 0, out: Path | None = None
) -> int:
    """Run a command to its end and return its exit status.

    With `kill_at`, send it signal `number` once it has logged that step to OUT.
    """
    with open(log, "ab") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        while kill_at and process.poll() is None:
            rows = read_rows(out)
            if rows and rows[-1]["step"] >= kill_at:
                process.send_signal(number)
                break
            time.sleep(0.02)
        return process.wait()


def last_lines(log: Path) -> str:
    """Return the end of a log."""
    return log.read_text()[-3000:]


def make_inputs(home: Path) -> None:
    """Write a toy world of 64 pairs and a random model of one layer under `home`."""
    toyworld.main(["make", "--out", str(home / "world"), "--preferences", "64"])
    tokenizer = str(home / "world" / "tokenizer")
    flags = hf.New(width=16, layers=1, heads=2, ffn=32, std=0.2, tokenizer=tokenizer)
    save_model(hf.new_model(flags), home / "model", tokenizer)


def run_with_kills(words: list[str], out: Path, log: Path, flags: argparse.Namespace) -> int:
    """Run a command, kill it about every `flags.every` steps, and return the number of kills."""
    generator = random.Random(flags.seed)
    at = 0
    kills = 0
    while (at := at + round(flags.every * generator.uniform(0.9, 1.1))) < flags.steps:
        number = (signal.SIGTERM, signal.SIGKILL)[kills % 2]
        status = run(words, log, at, number, out)
        expected = 0 if number == signal.SIGTERM else -signal.SIGKILL
        if status != expected or (out / "final").exists():
            sys.exit(f"the kill at step {at} ended with status {status}:\n{last_lines(log)}")
        kills += 1
        reached = read_rows(out)[-1]["step"]
        kept = checkpoint.newest(out)
        origin = kept.name if kept else "the start"
        print(f"{number.name} after step {reached}; resumes from {origin}", flush=True)
    if run(words, log):
        sys.exit(f"the last part failed:\n{last_lines(log)}")
    return kills


def compare(whole: Path, killed: Path, start: Path, steps: int) -> str:
    """Return a line that describes two equal runs. Exits where weights or metrics differ."""
    one = load_file(whole / "final" / "model.safetensors")
    other = load_file(killed / "final" / "model.safetensors")
    if one.keys() != other.keys():
        sys.exit("FAILED: the two models have different weights")
    wrong = [name for name in one if not torch.equal(one[name], other[name])]
    if wrong:
        sys.exit(f"FAILED: {len(wrong)} of {len(one)} weights differ, first {wrong[0]}")
    rows = read_rows(whole)
    if rows != read_rows(killed) or sum("loss" in row for row in rows) != steps:
        sys.exit("FAILED: the weights are equal, the metrics are not")
    before = load_file(start / "model.safetensors")
    moved = max((one[name] - before[name]).abs().max().item() for name in one)
    return (
        f"equal bit for bit: {len(one)} weights (moved by up to {moved:.3f}) "
        f"and {len(rows)} rows of metrics"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of each run")
    parser.add_argument("--every", type=int, default=250, help="steps between kills, within 10 %%")
    parser.add_argument("--seed", type=int, default=0, help="seed of the steps that it kills at")
    parser.add_argument("--save-every", type=int, default=40, help="steps between checkpoints")
    flags = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        whole, killed, log = home / "whole", home / "killed", home / "log.txt"
        make_inputs(home)

        began = time.monotonic()
        if run(command(home, whole, flags.steps, flags.save_every), log):
            sys.exit(f"the unbroken run failed:\n{last_lines(log)}")
        print(f"{flags.steps} steps unbroken in {time.monotonic() - began:.0f} s", flush=True)

        began = time.monotonic()
        words = command(home, killed, flags.steps, flags.save_every)
        kills = run_with_kills(words, killed, log, flags)
        seconds = time.monotonic() - began
        print(f"{flags.steps} steps with {kills} kills in {seconds:.0f} s", flush=True)

        print(compare(whole, killed, home / "model", flags.steps))


if __name__ == "__main__":
    main()
