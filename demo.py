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
import math
import statistics
import time
from pathlib import Path
from typing import Any

from data.rows import read_rows
from data.toyworld import score_file
from disk import write_text
from plots.series import last_row
from stages import Stage, file_name, output_of, run_stages, side_by_side, write_commands

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

SHOWN_ROWS = ("sft", "preferences", "labels")  # files of the world

UNCLEAR = "within the noise: a gain of less than twice its standard error over prompts"
SHORT = (
    "The quick demo trains on a third of the rows, online methods for a third of the steps: "
    "it shows that everything runs; `make demo` shows what the methods reach."
)

Scores = dict[str, dict[str, Any]]  # row of the table -> {column: value}


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


def stage_name(seed: int, stage: str) -> str:
    """Return the name of a seed's stage, as the screen shows it."""
    return f"{stage}, seed {seed}"


def all_stages(out: Path, seeds: list[int], quick: bool) -> list[Stage]:
    """Return the stages of all seeds, those first that others wait for."""
    lines = {seed: commands(out / f"seed_{seed}", seed, quick) for seed in seeds}
    stages = []
    for stage in ("world", *AFTER):
        for seed in seeds:
            needs = stage_name(seed, AFTER[stage]) if stage in AFTER else ""
            log = out / f"seed_{seed}" / f"{stage}.log"
            stages.append(Stage(stage_name(seed, stage), needs, lines[seed][stage], log))
    return stages


def result_of(home: Path, stage: str) -> str:
    """Return what a finished stage reached, in a few words."""
    if stage == "world":
        rows = {
            name: sum(1 for _ in read_rows(home / f"world/{name}.jsonl")) for name in SHOWN_ROWS
        }
        return ", ".join(f"{n:,} rows for {name}" for name, n in rows.items())
    if stage == "rm":
        return f"accuracy on held-out pairs {rm_accuracy(home):.3f}"
    if stage == "base":
        return f"loss {last_row(home / 'base')['loss']:.3f}"
    names = [name for name in TABLE if name.split()[0] == stage]
    shares = {name: score_file(home / f"{file_name(name)}.jsonl")["good"] for name in names}
    return "good answers: " + ", ".join(f"{name} {share:.3f}" for name, share in shares.items())


# ---- the results


def collect(home: Path) -> Scores:
    """Return the scores of a seed: the rows of TABLE, "steerlm short", "steerlm long" and "rm"."""
    names = [*TABLE, "steerlm short", "steerlm long", "rm"]
    files = " ".join(f"{home}/{file_name(name)}.jsonl" for name in names)
    done = output_of(f"-m data.toyworld score --json {files}")
    if done.returncode:
        raise SystemExit(done.stderr)
    scores = dict(zip(names, json.loads(done.stdout)))
    for name in TABLE:
        scores[name]["kl"] = 0.0 if name == "sft" else mean_kl(home, name)
    scores["rm"]["accuracy"] = rm_accuracy(home)
    return scores


def rm_accuracy(home: Path) -> float:
    """Return the reward model's accuracy on held-out pairs."""
    return last_row(home / "rm")["eval/rewards/accuracies"]


def mean_kl(home: Path, name: str) -> float | None:
    """Return the mean log-prob of a model's answers minus SFT's; None if they were not scored.

    SteerLM's are not: it saw other prompts.
    """
    file = home / f"{file_name(name)}_kl.jsonl"
    rows = list(read_rows(file)) if file.exists() else []
    return statistics.mean(row["logp"] - row["ref_logp"] for row in rows) if rows else None


def report(results: dict[int, Scores], seconds: dict[str, float]) -> str:
    """Return the table, means over the seeds, and the lines below it. seconds: of every stage."""
    header = "".join(f"{column:>9}" for column in COLUMNS)
    lines = [f"{'':<21}{header}{'seconds':>9}    good by seed, ± over prompts"]
    for name in TABLE:
        stage = name.split()[0]
        stage_seconds = statistics.mean(seconds[stage_name(seed, stage)] for seed in results)
        lines.append(_table_row(name, [scores[name] for scores in results.values()], stage_seconds))
    for name in TABLE[1:-1]:
        gains = [scores[name]["good"] - scores["sft"]["good"] for scores in results.values()]
        each = ", ".join(f"{gain:+.3f} (seed {seed})" for gain, seed in zip(gains, results))
        mean = statistics.mean(gains)
        each = f"; {each}" if len(gains) > 1 else ""
        unclear = "" if abs(mean) > 2 * noise(name, results) else " (within the noise)"
        lines.append(f"{name} over sft, share of good answers: {mean:+.3f}{each}{unclear}")
    if "(within the noise)" in "".join(lines):
        lines.append(UNCLEAR)
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


def noise(name: str, results: dict[int, Scores]) -> float:
    """Return the standard error over prompts of a row's mean gain over SFT."""
    variance = 0.0
    for scores in results.values():
        for row in (scores[name], scores["sft"]):
            variance += row["good"] * (1 - row["good"]) / row["rows"]
    return math.sqrt(variance) / len(results)


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
    stages = all_stages(out, seeds, flags.quick)
    write_commands(stages, out / "commands.sh")

    start = time.monotonic()
    seconds = {}
    for done in run_stages(stages):
        seconds[done.stage.name] = done.seconds
        log = done.stage.log
        print(done.line(result_of(log.parent, log.stem)), flush=True)
    results = {seed: collect(out / f"seed_{seed}") for seed in seeds}
    took = time.monotonic() - start
    print(f"\nheld-out prompts, temperature 0.7, {len(seeds)} seed(s), {took:.0f} s in total")
    print(report(results, seconds))
    if flags.quick:
        print(SHORT)
    home = out / f"seed_{seeds[0]}"
    print(side_by_side(home, TABLE, 3))

    table = {seed: {name: scores[name] for name in TABLE} for seed, scores in results.items()}
    write_text(out / "scores.json", json.dumps(table, indent=1))
    runs = " ".join(f"{home}/{name}" for name in PLOTTED)
    drawn = output_of(
        f"plot.py {runs} --keys {KEYS} --scores {out}/scores.json --out {out}/curves.png"
    )
    if drawn.returncode:
        print(f"\nno picture: {drawn.stderr.strip()}")
    else:
        print(f"\npicture: {out}/curves.png")


if __name__ == "__main__":
    main()
