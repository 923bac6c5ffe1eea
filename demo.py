"""The whole pipeline in minutes on a laptop, through the very commands a user types; then a table of the truth.

    python demo.py                     three seeds, under 10 minutes on 2 cores      (make demo)
    python demo.py --quick             one seed, a fraction of the data             (make demo DEMO=quick)

For every seed: a toy world with its tokenizer, a base model from random weights on right answers, SFT on the answers of
careless writers; from there DPO on pairs, KTO on marked answers, a reward model on the pairs, PPO and REINFORCE for
what that model likes, and for the truth; and SteerLM from the base model on answers with attributes. Then answers to
held-out prompts at temperature 0.7, scored against the truth; `kl` is by how many nats an answer is likelier to the
model than it was to SFT.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).parent
COLUMNS = ["good", "gold", "correct", "complete", "coherent", "polite", "rude", "words", "kl"]
# Rows of the table; each has an answers file.
TABLE = [
    "sft", "dpo", "kto", "ppo", "ppo truth", "reinforce", "reinforce truth", "steerlm best", "steerlm worst"
]  # fmt: skip
AFTER = {  # stage: needs
    "base": "world", "sft": "base", "rm": "sft", "dpo": "sft", "kto": "sft", "steerlm": "base", "ppo": "rm",
    "reinforce": "rm",
}  # fmt: skip
SCRATCH = "--lr 2e-3 --batch-size 8 --warmup 0.05 --weight-decay 0.05"
QUICK = "--base 8000 --sft 3000 --preferences 1500 --labels 3000 --attributes 3000"
BEST = "helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:2,toxicity:0"
ORDERS = {  # what SteerLM is asked for
    "best": BEST,
    "worst": "helpfulness:0,correctness:0,coherence:0,complexity:0,verbosity:0,toxicity:4",
    "short": BEST.replace("complexity:2,verbosity:2", "complexity:0,verbosity:0"),
    "long": BEST.replace("complexity:2,verbosity:2", "complexity:0,verbosity:4"),
}


def commands(home: Path, seed: int, quick: bool) -> dict[str, list[str]]:
    """The command lines of every stage of one seed, in order; everything lands under `home`."""
    world, end = f"{home}/world", f"--seed {seed}"

    def likely(name: str) -> str:
        """What the answers of a model cost: their log-probs under it and under SFT."""
        files = f"--data {home}/{name}.jsonl --out {home}/{name}_kl.jsonl"
        return f"score.py --model {home}/{name}/final --ref {home}/sft/final {files}"

    def answers(model: str, name: str, more: str = "") -> str:
        return (
            f"generate.py --model {home}/{model}/final --data {world}/prompts_test.jsonl --out {home}/{name}.jsonl "
            f"--temperature 0.7 --max-new-tokens 64 {end}{more}"
        )

    online = (
        f"--model {home}/sft/final --data {world}/sft.jsonl --lr 1e-3 --batch-size 16 "
        "--group-size 4 --no-eos-penalty 1 --max-new-tokens 48 --warmup 0.05"
    )
    twice = f"--ppo-epochs 2 --minibatches 2 --max-steps {15 if quick else 40}"
    pairs = f"--data {world}/preferences.jsonl --eval-data {world}/preferences_test.jsonl"
    return {
        "world": [
            f"-m data.toyworld make --out {world} {end} {QUICK if quick else ''}",
            f"hf.py new --out {home}/new --family llama --width 96 --layers 2 --heads 4 --kv-heads 2 --ffn 256 "
            f"--std 0.1 --tokenizer {world}/tokenizer {end}",
        ],
        "base": [
            f"train_sft.py --model {home}/new --data {world}/base.jsonl --out {home}/base --template plain "
            f"{SCRATCH} {end}"
        ],
        "sft": [
            f"train_sft.py --model {home}/base/final --data {world}/sft.jsonl --out {home}/sft {SCRATCH} {end}",
            answers("sft", "sft"),
        ],
        "dpo": [
            f"train_dpo.py --model {home}/sft/final {pairs} --eval-every 50 --out {home}/dpo --lr 3e-4 --batch-size 16 "
            f"--beta 0.1 --sft-weight 0.3 --warmup 0.05 {end}",
            answers("dpo", "dpo"), likely("dpo"),
        ],
        "kto": [
            f"train_kto.py --model {home}/sft/final --data {world}/labels.jsonl --out {home}/kto --lr 3e-4 "
            f"--batch-size 32 --beta 0.1 --desirable-weight 2.2 --warmup 0.05 {end}",
            answers("kto", "kto"), likely("kto"),
        ],
        "rm": [
            f"train_rm.py --model {home}/sft/final {pairs} --eval-every 500 --out {home}/rm --lr 1e-3 --batch-size 8 "
            f"--epochs 3 --warmup 0.05 --weight-decay 0.01 {end}",
            f"score.py --model {home}/rm/final --data {home}/sft.jsonl --out {home}/rm.jsonl",
        ],
        "ppo": [
            f"train_ppo.py {online} --reward {home}/rm/final --out {home}/ppo --critic-lr 1e-3 --kl 0.4 {twice} {end}",
            answers("ppo", "ppo"), likely("ppo"),
            f"train_ppo.py {online} --reward data/toyworld.py:reward --out {home}/ppo_truth --critic-lr 2e-3 --kl 0.06 "
            f"--critic-warmup 4 --clip-value 0 {twice} {end}",
            answers("ppo_truth", "ppo_truth"), likely("ppo_truth"),
        ],
        "reinforce": [
            f"train_reinforce.py {online} --reward {home}/rm/final --out {home}/reinforce --kl 0.4 "
            f"--max-steps {20 if quick else 60} {end}",
            answers("reinforce", "reinforce"), likely("reinforce"),
            f"train_reinforce.py {online} --reward data/toyworld.py:reward --out {home}/reinforce_truth --kl 0.06 "
            f"--max-steps {30 if quick else 80} {end}",
            answers("reinforce_truth", "reinforce_truth"), likely("reinforce_truth"),
        ],
        "steerlm": [
            f"train_sft.py --attributes --model {home}/base/final --data {world}/attributes.jsonl --out "
            f"{home}/steerlm --attribute-template {{prompt}}<|attr|>{{attributes}} {SCRATCH} {end}",
            *(answers("steerlm", f"steerlm {n}", f" --attributes {a}").replace(f"steerlm {n}", f"steerlm_{n}")
              for n, a in ORDERS.items()),
        ],
    }  # fmt: skip


class Runner:
    """Runs the stages of all seeds on as many processes as there are cores, each as soon as what it needs is there."""

    def __init__(self, out: Path, seeds: list[int], quick: bool):
        self.lines = {seed: commands(out / f"seed_{seed}", seed, quick) for seed in seeds}
        self.out, self.show = out, seeds[0]
        self.left = [(seed, stage) for stage in ("world", *AFTER) for seed in seeds]
        self.seconds: dict[tuple[int, str], float] = {}  # of finished stages
        self.failed = ""
        self.changed = threading.Condition()

    def run(self) -> None:
        """Returns when everything is done. SystemExit with the end of the log of a stage that failed."""
        workers = [threading.Thread(target=self._work) for _ in range(os.cpu_count() or 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if self.failed:
            raise SystemExit(self.failed)

    def _next(self) -> tuple[int, str] | None:
        with self.changed:
            while self.left and not self.failed:
                for job in self.left:
                    if job[1] == "world" or (job[0], AFTER[job[1]]) in self.seconds:
                        self.left.remove(job)
                        return job
                self.changed.wait()
        return None

    def _work(self) -> None:
        while job := self._next():
            seed, stage = job
            start, log = time.monotonic(), self.out / f"seed_{seed}" / f"{stage}.log"
            log.parent.mkdir(parents=True, exist_ok=True)
            error = ""
            for line in self.lines[seed][stage]:
                if seed == self.show:
                    print(f"$ python {shlex.join(line.split())}", flush=True)
                try:
                    failed: int | str = python(line, log).returncode
                except (
                    OSError
                ) as reason:  # a full disk, no process to be had: the others must hear of it too
                    failed = str(reason)
                if failed:
                    tail = "\n".join(log.read_text().splitlines()[-15:])
                    error = f"python {line}\nfailed ({failed}); the end of {log}:\n{tail}"
                    break
            with self.changed:
                self.failed = self.failed or error
                self.seconds[job] = time.monotonic() - start
                self.changed.notify_all()


def python(line: str, log: Path | None = None) -> subprocess.CompletedProcess:
    """Runs `python line` on one core, its output in the log or returned."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *line.split()]
    if log is None:
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    with open(log, "a") as file:
        return subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=file)


def scores(home: Path, names: list[str]) -> dict[str, dict]:
    """Ground truth of answer files: {name: averages}."""
    files = [f"{home}/{name.replace(' ', '_')}.jsonl" for name in names]
    done = python("-m data.toyworld score --json " + " ".join(files))
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(zip(names, json.loads(done.stdout)))


def nats(home: Path, name: str) -> float | None:
    """By how much the answers of a model are likelier than under SFT, None for those that saw other prompts."""
    file = home / f"{name.replace(' ', '_')}_kl.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return statistics.mean(row["logp"] - row["ref_logp"] for row in rows) if rows else None


def report(results: dict[int, dict[str, dict]], seconds: dict[tuple[int, str], float]) -> str:
    """The table: means over the seeds, and every seed's share of good answers."""
    mean = statistics.mean
    lines = [
        f"{'':<16}"
        + "".join(f"{c:>9}" for c in COLUMNS)
        + f"{'seconds':>9}    good by seed, ± over prompts"
    ]
    for name in TABLE:
        rows = [result[name] for result in results.values()]
        known = {c: [row[c] for row in rows if row.get(c) is not None] for c in COLUMNS}
        cells = "".join(
            f"{mean(known[c]):>9.{1 if c == 'words' else 3}f}" if known[c] else f"{'-':>9}"
            for c in COLUMNS
        )
        time_each = mean(seconds[seed, name.split()[0]] for seed in results)
        spread = mean((row["good"] * (1 - row["good"]) / row["rows"]) ** 0.5 for row in rows)
        each = "  ".join(f"{row['good']:.3f}" for row in rows)
        lines.append(f"{name:<16}{cells}{time_each:>9.0f}    {each}  ± {spread:.3f}")
    for name in TABLE[1:-1]:
        gains = [result[name]["good"] - result["sft"]["good"] for result in results.values()]
        each = ", ".join(f"{gain:+.3f} (seed {seed})" for gain, seed in zip(gains, results))
        lines.append(
            f"{name} over sft, share of good answers: {mean(gains):+.3f} on average; {each}"
        )
    lengths = [
        (result["steerlm short"]["words"], result["steerlm long"]["words"])
        for result in results.values()
    ]
    lines.append(
        "steerlm, words at verbosity 0 and 4: "
        + ", ".join(f"{a:.1f} and {b:.1f}" for a, b in lengths)
    )
    judged = [
        (result["rm"]["accuracy"], result["rm"]["correlation"]) for result in results.values()
    ]
    lines.append("reward model, accuracy on held-out pairs and correlation with the truth on sft's answers: "
                 + ", ".join(f"{a:.3f} and {b:.3f}" for a, b in judged))  # fmt: skip
    return "\n".join(lines)


def side_by_side(home: Path, n: int) -> str:
    """The answers of every stage to the first n held-out prompts."""
    lines = []
    answers = {
        name: [
            json.loads(line)
            for line in (home / f"{name.replace(' ', '_')}.jsonl").read_text().splitlines()[:n]
        ]
        for name in TABLE
    }
    for i in range(n):
        lines.append(f"\n{answers['sft'][i]['prompt']}")
        lines += [f"  {name + ':':<15}{answers[name][i]['response']}" for name in TABLE]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed, less data")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2, or 0 with --quick")
    parser.add_argument(
        "--out", default="runs/demo", help="folder for everything; a number is added if it exists"
    )
    flags = parser.parse_args()
    seeds = flags.seeds or ([0] if flags.quick else [0, 1, 2])
    out, number = Path(flags.out), 1
    while out.exists():  # a demo that ran before stays beside the new one
        number += 1
        out = Path(f"{flags.out}-{number}")
    print(f"everything goes to {out}/; these are the commands of seed {seeds[0]}:", flush=True)
    start, runner = time.monotonic(), Runner(out, seeds, flags.quick)
    runner.run()
    results = {}
    for seed in seeds:
        home = out / f"seed_{seed}"
        results[seed] = scores(home, [*TABLE, "steerlm short", "steerlm long", "rm"])
        for name in TABLE:
            results[seed][name]["kl"] = 0.0 if name == "sft" else nats(home, name)
        rows = [
            json.loads(line) for line in (home / "rm" / "metrics.jsonl").read_text().splitlines()
        ]
        results[seed]["rm"]["accuracy"] = rows[-1]["eval/rewards/accuracies"]
    print(
        f"\nheld-out prompts, temperature 0.7, {len(seeds)} seed(s), {time.monotonic() - start:.0f} s in all"
    )
    print(report(results, runner.seconds))
    print(side_by_side(out / f"seed_{seeds[0]}", 3))
    (out / "scores.json").write_text(
        json.dumps(
            {seed: {name: result[name] for name in TABLE} for seed, result in results.items()},
            indent=1,
        )
    )
    home = out / f"seed_{seeds[0]}"
    shown = ("dpo", "kto", "ppo", "reinforce", "ppo_truth", "reinforce_truth")
    runs = " ".join(f"{home}/{name}" for name in shown)
    keys = "--keys loss,rewards/accuracies,rewards/margins,reward,kl,entropy,reward~kl"
    plotted = python(f"plot.py {runs} {keys} --scores {out}/scores.json --out {out}/curves.png")
    print(
        f"\npicture: {out}/curves.png"
        if not plotted.returncode
        else f"\nno picture: {plotted.stderr.strip()}"
    )


if __name__ == "__main__":
    main()
