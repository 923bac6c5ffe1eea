"""The whole pipeline in minutes on a laptop, by the commands a user types; then a results table.

    python demo.py            three seeds, 10 to 15 minutes on 2 cores    (make demo)
    python demo.py --quick    one seed, a fraction of the data            (make demo DEMO=quick)

For every seed:
  - a toy world with its tokenizer, and a base model trained from scratch on right answers
  - SFT on the answers of careless writers
  - from SFT: DPO on pairs, KTO on labelled answers, a reward model on the pairs; PPO and REINFORCE
    against that reward model and against the true reward; DPO and REINFORCE also with LoRA
  - from the base model: SteerLM on answers with attributes
Then each model answers held-out prompts at temperature 0.7, and the answers are scored exactly.
`kl` is the mean log-prob of a model's answers, minus that under SFT, in nats.
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
from typing import Any

from disk import lines_of, write_text

ROOT = Path(__file__).parent
COLUMNS = ["good", "gold", "correct", "complete", "coherent", "polite", "rude", "words", "kl"]
# Rows of the table; each has a file of answers.
TABLE = [
    "sft",
    "dpo",
    "dpo lora",
    "kto",
    "ppo",
    "ppo truth",
    "reinforce",
    "reinforce truth",
    "reinforce truth lora",
    "steerlm best",
    "steerlm worst",
]
AFTER = {  # stage: the stage that it needs
    "base": "world",
    "sft": "base",
    "rm": "sft",
    "dpo": "sft",
    "kto": "sft",
    "steerlm": "base",
    "ppo": "rm",
    "reinforce": "rm",
}
SCRATCH = "--lr 2e-3 --batch-size 8 --warmup 0.05 --weight-decay 0.05"
QUICK = "--base 8000 --sft 3000 --preferences 1500 --labels 3000 --attributes 3000"
BEST = "helpfulness:4,correctness:4,coherence:4,complexity:2,verbosity:2,toxicity:0"
ORDERS = {  # attributes that SteerLM is asked for
    "best": BEST,
    "worst": "helpfulness:0,correctness:0,coherence:0,complexity:0,verbosity:0,toxicity:4",
    "short": BEST.replace("complexity:2,verbosity:2", "complexity:0,verbosity:0"),
    "long": BEST.replace("complexity:2,verbosity:2", "complexity:0,verbosity:4"),
}
PLOTTED = ("dpo", "kto", "ppo", "reinforce", "ppo_truth", "reinforce_truth")
KEYS = "loss,rewards/accuracies,rewards/margins,reward,kl,entropy,reward~kl"

Scores = dict[str, dict[str, Any]]  # row of the table -> {column: value}
Job = tuple[int, str]  # seed, stage


def file_name(name: str) -> str:
    """Return the name of a table row in file names, "ppo truth" -> "ppo_truth"."""
    return name.replace(" ", "_")


def read_json_lines(file: Path) -> list[dict]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in lines_of(file.read_text(encoding="utf-8"))]


# ---- the commands


def commands(home: Path, seed: int, quick: bool) -> dict[str, list[str]]:
    """Return {stage: command lines} of one seed, in order; every file lands under `home`."""
    world = f"{home}/world"
    base = f"{home}/base/final"
    sft = f"{home}/sft/final"
    end = f"--seed {seed}"

    def answer(model: str, name: str, more: str = "") -> str:
        """Return the command that answers the held-out prompts with a model."""
        return (
            f"generate.py --model {home}/{model}/final --data {world}/prompts_test.jsonl "
            f"--out {home}/{name}.jsonl --temperature 0.7 --max-new-tokens 64 {end}{more}"
        )

    def answer_and_score(name: str) -> list[str]:
        """Return the commands for a model's answers and their log-probs, its own and SFT's."""
        score = (
            f"score.py --model {home}/{name}/final --ref {sft} "
            f"--data {home}/{name}.jsonl --out {home}/{name}_kl.jsonl"
        )
        return [answer(name, name), score]

    stages: dict[str, list[str]] = {}
    stages["world"] = [
        f"-m data.toyworld make --out {world} {end} {QUICK if quick else ''}",
        f"hf.py new --out {home}/new --family llama --width 96 --layers 2 --heads 4 --kv-heads 2 "
        f"--ffn 256 --std 0.1 --tokenizer {world}/tokenizer {end}",
    ]
    stages["base"] = [
        f"train_sft.py --model {home}/new --data {world}/base.jsonl --out {home}/base "
        f"--template plain {SCRATCH} {end}"
    ]
    stages["sft"] = [
        f"train_sft.py --model {base} --data {world}/sft.jsonl --out {home}/sft {SCRATCH} {end}",
        answer("sft", "sft"),
    ]

    pairs = f"--data {world}/preferences.jsonl --eval-data {world}/preferences_test.jsonl"
    stages["dpo"] = [
        f"train_dpo.py --model {sft} {pairs} --eval-every 50 --out {home}/dpo --lr 3e-4 "
        f"--batch-size 16 --beta 0.1 --sft-weight 0.3 --warmup 0.05 {end}",
        *answer_and_score("dpo"),
        f"train_dpo.py --model {sft} {pairs} --out {home}/dpo_lora --lora 64 --lr 1e-3 "
        f"--batch-size 16 --beta 0.1 --sft-weight 0.3 --warmup 0.05 {end}",
        *answer_and_score("dpo_lora"),
    ]
    stages["kto"] = [
        f"train_kto.py --model {sft} --data {world}/labels.jsonl --out {home}/kto --lr 3e-4 "
        f"--batch-size 32 --beta 0.1 --desirable-weight 2.2 --warmup 0.05 {end}",
        *answer_and_score("kto"),
    ]
    stages["rm"] = [
        f"train_rm.py --model {sft} {pairs} --eval-every 500 --out {home}/rm --lr 1e-3 "
        f"--batch-size 8 --epochs 3 --warmup 0.05 --weight-decay 0.01 {end}",
        f"score.py --model {home}/rm/final --data {home}/sft.jsonl --out {home}/rm.jsonl",
    ]

    online = (
        f"--model {sft} --data {world}/sft.jsonl --batch-size 16 --group-size 4 "
        "--no-eos-penalty 1 --max-new-tokens 48 --warmup 0.05"
    )
    whole = "--lr 1e-3"
    model_reward = f"--reward {home}/rm/final"
    true_reward = "--reward data/toyworld.py:reward"
    twice = f"--ppo-epochs 2 --minibatches 2 --max-steps {15 if quick else 40}"
    stages["ppo"] = [
        f"train_ppo.py {online} {whole} {model_reward} --out {home}/ppo --critic-lr 1e-3 --kl 0.4 "
        f"{twice} {end}",
        *answer_and_score("ppo"),
        f"train_ppo.py {online} {whole} {true_reward} --out {home}/ppo_truth --critic-lr 2e-3 "
        f"--kl 0.06 --critic-warmup 4 --clip-value 0 {twice} {end}",
        *answer_and_score("ppo_truth"),
    ]
    stages["reinforce"] = [
        f"train_reinforce.py {online} {whole} {model_reward} --out {home}/reinforce --kl 0.4 "
        f"--max-steps {20 if quick else 60} {end}",
        *answer_and_score("reinforce"),
        f"train_reinforce.py {online} {whole} {true_reward} --out {home}/reinforce_truth "
        f"--kl 0.06 --max-steps {30 if quick else 80} {end}",
        *answer_and_score("reinforce_truth"),
        f"train_reinforce.py {online} --lora 64 --lr 2e-3 {true_reward} "
        f"--out {home}/reinforce_truth_lora --kl 0.06 --max-steps {30 if quick else 80} {end}",
        *answer_and_score("reinforce_truth_lora"),
    ]
    stages["steerlm"] = [
        f"train_sft.py --attributes --model {base} --data {world}/attributes.jsonl "
        f"--out {home}/steerlm --attribute-template {{prompt}}<|attr|>{{attributes}} "
        f"{SCRATCH} {end}"
    ]
    for name, order in ORDERS.items():
        stages["steerlm"].append(answer("steerlm", f"steerlm_{name}", f" --attributes {order}"))
    return stages


# ---- running them


class Runner:
    """Runs the stages of all seeds, a process a core, each stage once the one it needs is done."""

    def __init__(self, out: Path, seeds: list[int], quick: bool):
        self.out = out
        self.lines = {seed: commands(out / f"seed_{seed}", seed, quick) for seed in seeds}
        self.shown_seed = seeds[0]  # its commands are printed
        self.pending = [(seed, stage) for stage in ("world", *AFTER) for seed in seeds]
        self.seconds: dict[Job, float] = {}  # of finished stages
        self.failure = ""
        self.changed = threading.Condition()

    def run(self) -> None:
        """Run everything. SystemExit: a stage failed; the message has the end of its log."""
        workers = [threading.Thread(target=self._work) for _ in range(os.cpu_count() or 1)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        if self.failure:
            raise SystemExit(self.failure)

    def _work(self) -> None:
        while job := self._next():
            start = time.monotonic()
            failure = self._run_stage(*job)
            with self.changed:
                self.failure = self.failure or failure
                self.seconds[job] = time.monotonic() - start
                self.changed.notify_all()

    def _next(self) -> Job | None:
        """Wait for a stage that can start; None when none is left."""
        with self.changed:
            while self.pending and not self.failure:
                for seed, stage in self.pending:
                    if stage == "world" or (seed, AFTER[stage]) in self.seconds:
                        self.pending.remove((seed, stage))
                        return seed, stage
                self.changed.wait()
        return None

    def _run_stage(self, seed: int, stage: str) -> str:
        """Run the commands of a stage; return "" or the message of the one that failed."""
        log = self.out / f"seed_{seed}" / f"{stage}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        for line in self.lines[seed][stage]:
            if seed == self.shown_seed:
                print(f"$ python {shlex.join(line.split())}", flush=True)
            try:
                status: int | str = python(line, log).returncode
            except OSError as error:  # a full disk, no more processes: stop the other workers too
                status = str(error)
            if status:
                tail = "\n".join(log.read_text().splitlines()[-15:])
                return f"python {line}\nfailed ({status}); the end of {log}:\n{tail}"
        return ""


def python(line: str, log: Path | None = None) -> subprocess.CompletedProcess:
    """Run `python line` on one core; its output is appended to the log, or returned."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, *line.split()]
    if log is None:
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    with open(log, "a") as file:
        return subprocess.run(command, cwd=ROOT, env=env, stdout=file, stderr=file)


# ---- the results


def collect(home: Path) -> Scores:
    """Return the scores of a seed: the rows of TABLE, "steerlm short", "steerlm long" and "rm"."""
    names = [*TABLE, "steerlm short", "steerlm long", "rm"]
    files = " ".join(f"{home}/{file_name(name)}.jsonl" for name in names)
    done = python(f"-m data.toyworld score --json {files}")
    if done.returncode:
        raise SystemExit(done.stderr)
    scores = dict(zip(names, json.loads(done.stdout)))
    for name in TABLE:
        scores[name]["kl"] = 0.0 if name == "sft" else mean_kl(home, name)
    rm_metrics = read_json_lines(home / "rm" / "metrics.jsonl")
    scores["rm"]["accuracy"] = rm_metrics[-1]["eval/rewards/accuracies"]
    return scores


def mean_kl(home: Path, name: str) -> float | None:
    """Return the mean log-prob of a model's answers minus SFT's; None if they were not scored.

    SteerLM's are not: it saw other prompts.
    """
    file = home / f"{file_name(name)}_kl.jsonl"
    rows = read_json_lines(file) if file.exists() else []
    return statistics.mean(row["logp"] - row["ref_logp"] for row in rows) if rows else None


def report(results: dict[int, Scores], seconds: dict[Job, float]) -> str:
    """Return the table, means over the seeds, and the lines below it."""
    header = "".join(f"{column:>9}" for column in COLUMNS)
    lines = [f"{'':<21}{header}{'seconds':>9}    good by seed, ± over prompts"]
    for name in TABLE:
        stage = name.split()[0]
        stage_seconds = statistics.mean(seconds[seed, stage] for seed in results)
        lines.append(_table_row(name, [scores[name] for scores in results.values()], stage_seconds))
    for name in TABLE[1:-1]:
        gains = [scores[name]["good"] - scores["sft"]["good"] for scores in results.values()]
        each = ", ".join(f"{gain:+.3f} (seed {seed})" for gain, seed in zip(gains, results))
        mean = statistics.mean(gains)
        lines.append(f"{name} over sft, share of good answers: {mean:+.3f} on average; {each}")
    lengths = []
    rewards = []
    for scores in results.values():
        short = scores["steerlm short"]["words"]
        long = scores["steerlm long"]["words"]
        lengths.append(f"{short:.1f} and {long:.1f}")
        rewards.append(f"{scores['rm']['accuracy']:.3f} and {scores['rm']['correlation']:.3f}")
    lines.append(f"steerlm, words at verbosity 0 and 4: {', '.join(lengths)}")
    lines.append(
        "reward model, accuracy on held-out pairs and correlation with the truth on sft's answers: "
        + ", ".join(rewards)
    )
    return "\n".join(lines)


def _table_row(name: str, rows: list[dict], seconds: float) -> str:
    """Return a line of the table from one row a seed."""
    cells = ""
    for column in COLUMNS:
        values = [row[column] for row in rows if row.get(column) is not None]
        digits = 1 if column == "words" else 3
        cell = f"{statistics.mean(values):.{digits}f}" if values else "-"
        cells += f"{cell:>9}"
    each = "  ".join(f"{row['good']:.3f}" for row in rows)
    spread = statistics.mean((row["good"] * (1 - row["good"]) / row["rows"]) ** 0.5 for row in rows)
    return f"{name:<21}{cells}{seconds:>9.0f}    {each}  ± {spread:.3f}"


def side_by_side(home: Path, n: int) -> str:
    """Return the answers of every model to the first n held-out prompts."""
    rows = {name: read_json_lines(home / f"{file_name(name)}.jsonl") for name in TABLE}
    lines = []
    for i in range(n):
        lines.append(f"\n{rows['sft'][i]['prompt']}")
        lines += [f"  {name + ':':<22}{rows[name][i]['response']}" for name in TABLE]
    return "\n".join(lines)


def main() -> None:
    """Run the demo and print its results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one seed, less data")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2, or 0 with --quick")
    parser.add_argument(
        "--out", default="runs/demo", help="folder for all files; numbered if it exists"
    )
    flags = parser.parse_args()
    if flags.seeds and (min(flags.seeds) < 0 or len(set(flags.seeds)) < len(flags.seeds)):
        parser.error("--seeds must be different numbers of at least 0")
    seeds = flags.seeds or ([0] if flags.quick else [0, 1, 2])
    out = Path(flags.out)
    number = 1
    while out.exists():  # an earlier demo is kept
        number += 1
        out = Path(f"{flags.out}-{number}")
    print(f"writing to {out}/; these are the commands of seed {seeds[0]}:", flush=True)

    start = time.monotonic()
    runner = Runner(out, seeds, flags.quick)
    runner.run()
    results = {seed: collect(out / f"seed_{seed}") for seed in seeds}
    seconds = time.monotonic() - start
    print(f"\nheld-out prompts, temperature 0.7, {len(seeds)} seed(s), {seconds:.0f} s in total")
    print(report(results, runner.seconds))
    home = out / f"seed_{seeds[0]}"
    print(side_by_side(home, 3))

    table = {seed: {name: scores[name] for name in TABLE} for seed, scores in results.items()}
    write_text(out / "scores.json", json.dumps(table, indent=1))
    runs = " ".join(f"{home}/{name}" for name in PLOTTED)
    done = python(f"plot.py {runs} --keys {KEYS} --scores {out}/scores.json --out {out}/curves.png")
    if done.returncode:
        print(f"\nno picture: {done.stderr.strip()}")
    else:
        print(f"\npicture: {out}/curves.png")


if __name__ == "__main__":
    main()
