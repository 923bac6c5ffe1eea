"""The embedded default data: a small village to ask about, answers of known quality, a scorer.

    python -m data.toyworld make --out toy --seed 0    # tokenizer and data of every stage: seconds
    python -m data.toyworld score answers.jsonl        # rows of {prompt, response} -> true quality
    python train_ppo.py --reward data/toyworld.py:reward ...

The world is in data/toy/: village.py (facts, prompts), scoring.py, answers.py, tokenizer.py.
"""

import argparse
import json
import math
import random
import statistics
import sys
from pathlib import Path

from data.toy.answers import answer, preference
from data.toy.scoring import Score, score
from data.toy.tokenizer import make_tokenizer
from data.toy.village import sample_prompt

COLUMNS = ("good", "gold", "correct", "complete", "coherent", "polite", "rude", "words")


def reward(prompt: str | list, response: str, row: dict) -> float:
    """Return the true utility of a response, -1 to 4.5, as a reward function for --reward."""
    return score(prompt if isinstance(prompt, str) else prompt[-1]["content"], response).utility


def response_row(rng: random.Random, style: str) -> dict[str, str]:
    """Return {prompt, response}, the answer in a style of data/toy/answers.py."""
    prompt = sample_prompt(rng, "train")
    return {"prompt": prompt.text, "response": answer(prompt, rng, style)}


def attribute_row(rng: random.Random, split: str) -> dict:
    """Return a noisy answer with its true attributes."""
    prompt = sample_prompt(rng, split)
    text = answer(prompt, rng)
    return {"prompt": prompt.text, "response": text, "attributes": score(prompt, text).attributes}


def label_row(rng: random.Random) -> dict:
    """Return a noisy answer with a label, true if it is good; one label in 20 is wrong."""
    row = response_row(rng, "noisy")
    return {**row, "label": score(row["prompt"], row["response"]).good != (rng.random() < 0.05)}


FILES = {  # name: rows, description, function that draws one
    "base": (
        24000,
        "right answers {prompt, response}, train with --template plain",
        lambda rng: response_row(rng, "base"),
    ),
    "sft": (10000, "noisy answers {prompt, response}", lambda rng: response_row(rng, "noisy")),
    "preferences": (
        4000,
        "pairs, some with the worse answer chosen",
        lambda rng: preference(rng, "train"),
    ),
    "preferences_test": (
        500,
        "held-out pairs, all labelled right",
        lambda rng: preference(rng, "test", flips=False),
    ),
    "labels": (
        8000,
        "noisy answers {prompt, response, label}, some labels wrong",
        label_row,
    ),
    "attributes": (
        10000,
        "noisy answers with attributes 0-4",
        lambda rng: attribute_row(rng, "train"),
    ),
    "attributes_test": (
        500,
        "the same for held-out prompts",
        lambda rng: attribute_row(rng, "test"),
    ),
    "prompts_test": (
        512,
        "held-out prompts {prompt}",
        lambda rng: {"prompt": sample_prompt(rng, "test").text},
    ),
}


def make(out: Path, seed: int, counts: dict[str, int]) -> None:
    """Write out/tokenizer and out/NAME.jsonl for every NAME of FILES, counts[NAME] rows each.

    The first rows of a file do not depend on its count, nor on the other files.
    """
    make_tokenizer(out / "tokenizer", random.Random(f"{seed} tokenizer"))
    for name, (_, description, row) in FILES.items():
        rng = random.Random(f"{seed} {name}")
        lines = [json.dumps(row(rng)) + "\n" for _ in range(counts[name])]
        (out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{out / name}.jsonl: {len(lines)} rows, {description}")


def averages(scores: list[Score]) -> dict[str, float]:
    """Return the mean of each of COLUMNS."""
    rows = [
        {**vars(s), "good": s.good, "gold": s.gold, "polite": s.tone > 0, "rude": s.tone < 0}
        for s in scores
    ]
    return {name: sum(row[name] for row in rows) / len(rows) for name in COLUMNS}


def score_file(path: str | Path) -> dict:
    """Return {file, rows, *COLUMNS} of a JSONL file of {prompt, response}.

    Rows that score.py has scored give `correlation` too: of its scores with the utility.
    ValueError names file:line of a bad row.
    """
    scores = []
    learned = []  # by score.py
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                row = _parse(line)
                scores.append(score(row["prompt"], row["response"]))
                learned.append(row.get("score"))
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
    if not scores:
        raise ValueError(f"{path} is empty: give a file that generate.py wrote")
    result = {"file": str(path), "rows": len(scores), **averages(scores)}
    if all(isinstance(value, float) for value in learned) and len({*learned}) > 1:
        result["correlation"] = statistics.correlation(learned, [s.utility for s in scores])
    return result


def _parse(line: str) -> dict:
    row = json.loads(line)
    if isinstance(row, dict):
        texts = (row.get("prompt"), row.get("response"))
        if all(isinstance(text, str) for text in texts):
            return row
    raise ValueError("no `prompt` and `response` strings: give a file that generate.py wrote")


def print_table(results: list[dict]) -> None:
    """Print a row a file, a column for each of COLUMNS."""
    columns = list(COLUMNS)
    if any("correlation" in result for result in results):
        columns.append("correlation")
    width = max(len(result["file"]) for result in results)
    print(f"{'file':<{width}}", *(f"{name:>8}" for name in columns))
    for result in results:
        cells = []
        for name in columns:
            digits = 1 if name == "words" else 3
            cells.append(f"{result.get(name, math.nan):{max(8, len(name))}.{digits}f}")
        print(f"{result['file']:<{width}}", *cells)


def main(argv: list[str] | None = None) -> None:
    """Run the command line, `make` or `score`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    maker = commands.add_parser("make", help="write a tokenizer and the data of every stage")
    maker.add_argument("--out", type=Path, required=True, help="folder to write to")
    maker.add_argument("--seed", type=int, default=0, help="changes everything but the village")
    for name, (count, description, _) in FILES.items():
        maker.add_argument(
            "--" + name.replace("_", "-"),
            type=int,
            default=count,
            metavar="N",
            help=f"rows of {name}.jsonl, {description}; default: {count}",
        )
    scorer = commands.add_parser("score", help="print the true quality of answers")
    scorer.add_argument("files", nargs="+", metavar="FILE", help="JSONL of {prompt, response}")
    scorer.add_argument("--json", action="store_true", help="print a JSON list, not a table")
    flags = parser.parse_args(argv)
    if flags.command == "make":
        for name in ("seed", *FILES):
            if getattr(flags, name) < 0:
                parser.error(f"--{name.replace('_', '-')} must be at least 0")
        make(flags.out, flags.seed, vars(flags))
        return
    try:
        results = [score_file(path) for path in flags.files]
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if flags.json:
        print(json.dumps(results, indent=1))
    else:
        print_table(results)


if __name__ == "__main__":
    main()
