"""The whole pipeline in minutes on a laptop, through the very commands a user types; then a table of the truth.

    python demo.py                     three seeds, under 5 minutes on 2 cores      (make demo)
    python demo.py --quick             one seed, a fraction of the data             (make demo DEMO=quick)

For every seed: a toy world with its tokenizer, a base model from random weights on clean answers, SFT on the answers of
careless writers, DPO on pairs; then answers to held-out prompts at temperature 0.7, scored against the truth.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent
STAGES = ["sft", "dpo"]  # rows of the table, in the order of training
COLUMNS = ["good", "gold", "correct", "complete", "coherent", "polite", "rude", "words"]
SCRATCH = "--lr 2e-3 --batch-size 8 --warmup 0.05 --weight-decay 0.05"
QUICK = "--base 8000 --sft 3000 --preferences 1500"


def commands(home: Path, seed: int, quick: bool) -> list[tuple[str, str]]:
    """(stage, command line) of one seed, in order; everything lands under `home`."""
    world = f"{home}/world"
    size = "--width 96 --layers 2 --heads 4 --kv-heads 2 --ffn 256 --std 0.1"
    lines = [
        ("world", f"-m data.toyworld make --out {world} --seed {seed} {QUICK if quick else ''}"),
        ("new", f"hf.py new --out {home}/new --family llama {size} --tokenizer {world}/tokenizer --seed {seed}"),
        ("base", f"train_sft.py --model {home}/new --data {world}/base.jsonl --template plain {SCRATCH}"),
        ("sft", f"train_sft.py --model {home}/base/final --data {world}/sft.jsonl {SCRATCH}"),
        ("dpo", f"train_dpo.py --model {home}/sft/final --data {world}/preferences.jsonl --eval-data "
                f"{world}/preferences_test.jsonl --eval-every 50 --lr 3e-4 --batch-size 16 --beta 0.1 --sft-weight 0.3 "
                "--warmup 0.05"),
    ]  # fmt: skip
    lines = [(name, f"{line} --out {home}/{name} --seed {seed}" if "train_" in line else line) for name, line in lines]
    for name in STAGES:
        lines.append((
            f"answers of {name}",
            f"generate.py --model {home}/{name}/final --data {world}/prompts_test.jsonl --out {home}/{name}.jsonl "
            f"--temperature 0.7 --max-new-tokens 64 --seed {seed}",
        ))  # fmt: skip
    return lines


def run_seed(home: Path, seed: int, quick: bool, show: bool, stopped: threading.Event) -> dict[str, dict]:
    """Runs all commands of one seed, output to home/log.txt. Returns {stage: scores} with the seconds it took."""
    home.mkdir(parents=True)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}  # one core a seed: seeds run side by side
    seconds = {}
    with open(home / "log.txt", "w") as log:
        for name, line in commands(home, seed, quick):
            if show:
                print(f"$ python {line}", flush=True)
            start = time.monotonic()
            done = subprocess.run([sys.executable, *line.split()], cwd=ROOT, env=env, stdout=log, stderr=log)
            seconds[name] = time.monotonic() - start
            if done.returncode or stopped.is_set():
                stopped.set()
                tail = "\n".join((home / "log.txt").read_text().splitlines()[-15:])
                raise SystemExit(f"seed {seed}: '{name}' failed; the end of {home}/log.txt:\n{tail}")
    files = [str(home / f"{name}.jsonl") for name in STAGES]
    table = subprocess.run(
        [sys.executable, "-m", "data.toyworld", "score", "--json", *files],
        cwd=ROOT, env=env, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return {name: {**row, "seconds": seconds[name]} for name, row in zip(STAGES, json.loads(table.stdout))}


def report(results: list[dict[str, dict]], seeds: list[int]) -> str:
    """The table: mean over seeds, and of `good` every seed's value and its gain over SFT."""
    lines = [f"{'':<6}" + "".join(f"{c:>10}" for c in COLUMNS) + f"{'seconds':>10}    good by seed"]
    for name in STAGES:
        rows = [result[name] for result in results]
        means = [statistics.mean(row[c] for row in rows) for c in COLUMNS]
        cells = "".join(f"{mean:>10.1f}" if c == "words" else f"{mean:>10.3f}" for c, mean in zip(COLUMNS, means))
        by_seed = "  ".join(f"{row['good']:.3f}" for row in rows)
        lines.append(f"{name:<6}{cells}{statistics.mean(row['seconds'] for row in rows):>10.0f}    {by_seed}")
    for name in STAGES[1:]:
        gains = [result[name]["good"] - result["sft"]["good"] for result in results]
        each = ", ".join(f"{gain:+.3f} (seed {seed})" for gain, seed in zip(gains, seeds))
        lines.append(f"{name} over sft, share of good answers: {statistics.mean(gains):+.3f} on average; {each}")
    return "\n".join(lines)


def side_by_side(home: Path, n: int) -> str:
    """The answers of every stage to the first n held-out prompts."""
    answers = {name: [json.loads(line) for line in open(home / f"{name}.jsonl")][:n] for name in STAGES}  # noqa: SIM115
    lines = []
    for i in range(n):
        lines.append(f"\n{answers[STAGES[0]][i]['prompt']}")
        lines += [f"  {name}: {answers[name][i]['response']}" for name in STAGES]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, less data")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2, or 0 with --quick")
    parser.add_argument("--out", default="runs/demo", help="folder for everything; must not exist yet or hold a demo")
    flags = parser.parse_args()
    seeds = flags.seeds or ([0] if flags.quick else [0, 1, 2])
    # A demo that ran before stays beside the new one.
    out = Path(flags.out)
    while out.exists():
        stem, _, number = out.name.rpartition("-")
        out = out.with_name(f"{stem}-{int(number) + 1}" if stem and number.isdigit() else f"{out.name}-2")
    print(f"everything goes to {out}/; seed {seeds[0]} runs these commands, the other seeds the same:", flush=True)
    start, stopped = time.monotonic(), threading.Event()
    with ThreadPoolExecutor(max(1, min(len(seeds), os.cpu_count() or 1))) as pool:
        jobs = [pool.submit(run_seed, out / f"seed_{s}", s, flags.quick, s == seeds[0], stopped) for s in seeds]
        results = [job.result() for job in jobs]
    print(f"\nheld-out prompts, temperature 0.7, {len(seeds)} seed(s), {time.monotonic() - start:.0f} s in all")
    print(report(results, seeds))
    print(side_by_side(out / f"seed_{seeds[0]}", 4))
    runs = [str(out / f"seed_{seed}" / "dpo") for seed in seeds]
    plotted = subprocess.run(
        [sys.executable, "plot.py", *runs, "--out", str(out / "dpo.png")], cwd=ROOT, capture_output=True, text=True
    )
    print(f"\ncurves: {out}/dpo.png" if not plotted.returncode else f"\nno picture: {plotted.stderr.strip()}")
    (out / "scores.json").write_text(json.dumps(dict(zip(map(str, seeds), results)), indent=1))


if __name__ == "__main__":
    main()
