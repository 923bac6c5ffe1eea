"""Soak: a long DPO run that is killed every few hundred steps ends with the weights of the run that nobody stopped.

    python tests/soak.py                      2,000 steps twice, a kill about every 250, SIGTERM and SIGKILL in turn
    python tests/soak.py --steps 300 --every 50

Not collected by pytest: it takes minutes. Exit status 0 when final weights, metrics and tokens are equal bit for bit.
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

from weights.folder import save_model

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import checkpoint  # noqa: E402
import hf  # noqa: E402
from data import toyworld  # noqa: E402


def command(home: Path, out: Path, steps: int, save_every: int) -> list[str]:
    """bco_pair carries a running mean from step to step, so that more than weights has to survive."""
    return [
        sys.executable, str(ROOT / "train_dpo.py"), "--model", str(home / "model"), "--out", str(out),
        "--data", str(home / "world" / "preferences.jsonl"), "--loss", "bco_pair", "--lr", "1e-3",
        "--batch-size", "4", "--max-tokens", "256", "--epochs", str(steps), "--max-steps", str(steps),
        "--save-every", str(save_every), "--resume", "auto",
    ]  # fmt: skip


def logged(out: Path) -> list[dict]:
    """metrics.jsonl without times and memory; a row that is still being written is left out."""
    rows = []
    for line in (
        (out / "metrics.jsonl").read_text().splitlines() if (out / "metrics.jsonl").exists() else []
    ):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.append(
            {name: v for name, v in row.items() if "second" not in name and "memory" not in name}
        )
    return rows


def run(
    words: list[str], log: Path, kill_at: int = 0, number: int = 0, out: Path | None = None
) -> int:
    """Runs a command to its end, or sends it a signal once it has logged step `kill_at`. Returns its exit status."""
    with open(log, "ab") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
        while kill_at and process.poll() is None:
            rows = logged(out)
            if rows and rows[-1]["step"] >= kill_at:
                process.send_signal(number)
                break
            time.sleep(0.02)
        return process.wait()


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--steps", type=int, default=2000, help="optimizer steps of each run")
    flags.add_argument(
        "--every", type=int, default=250, help="steps between kills, give or take a tenth"
    )
    flags.add_argument("--seed", type=int, default=0, help="of the steps at which it is killed")
    flags.add_argument("--save-every", type=int, default=40, help="steps between checkpoints")
    asked = flags.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        toyworld.main(["make", "--out", str(home / "world"), "--preferences", "64"])
        made = hf.New(
            width=16,
            layers=1,
            heads=2,
            ffn=32,
            std=0.2,
            tokenizer=str(home / "world" / "tokenizer"),
        )
        save_model(hf.new_model(made), home / "model", made.tokenizer)

        began = time.monotonic()
        whole, killed, log = home / "whole", home / "killed", home / "log.txt"
        if run(command(home, whole, asked.steps, asked.save_every), log):
            sys.exit(f"the unbroken run failed:\n{log.read_text()[-3000:]}")
        print(f"{asked.steps} steps unbroken in {time.monotonic() - began:.0f} s", flush=True)

        began = time.monotonic()
        words = command(home, killed, asked.steps, asked.save_every)
        dice, at, kills = random.Random(asked.seed), 0, []
        while (at := at + round(asked.every * dice.uniform(0.9, 1.1))) < asked.steps:
            number = (signal.SIGTERM, signal.SIGKILL)[len(kills) % 2]
            status = run(words, log, at, number, killed)
            if (
                status != (0 if number == signal.SIGTERM else -signal.SIGKILL)
                or (killed / "final").exists()
            ):
                sys.exit(
                    f"the kill at step {at} ended with status {status}:\n{log.read_text()[-3000:]}"
                )
            reached, kept = logged(killed)[-1]["step"], checkpoint.newest(killed)
            kills.append(number.name)
            print(
                f"{number.name} after step {reached}; goes on from {kept.name if kept else 'the start'}",
                flush=True,
            )
        if run(words, log):
            sys.exit(f"the last part failed:\n{log.read_text()[-3000:]}")
        print(
            f"{asked.steps} steps with {len(kills)} kills in {time.monotonic() - began:.0f} s",
            flush=True,
        )

        one, other = (load_file(out / "final" / "model.safetensors") for out in (whole, killed))
        wrong = [name for name in one if not torch.equal(one[name], other[name])]
        before, start = logged(whole), load_file(home / "model" / "model.safetensors")
        if wrong or one.keys() != other.keys():
            sys.exit(f"FAILED: {len(wrong)} of {len(one)} weights differ, first {wrong[:1]}")
        if before != logged(killed) or sum("loss" in row for row in before) != asked.steps:
            sys.exit("FAILED: the weights are equal, the metrics are not")
        moved = max((one[name] - start[name]).abs().max().item() for name in one)
        print(
            f"equal bit for bit: {len(one)} weights (moved by up to {moved:.3f}) and {len(before)} rows of metrics"
        )


if __name__ == "__main__":
    main()
