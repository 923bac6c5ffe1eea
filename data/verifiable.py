"""Verifiable instructions: prompts with constraints that a program can check, and the exact checks.

    python -m data.verifiable make --out data --seed 0     # train.jsonl and test.jsonl
    python -m data.verifiable score answers.jsonl          # rows of {prompt, response, constraints}
    python train_reinforce.py --data data/train.jsonl --reward data/verifiable.py:reward ...

A prompt asks something about an everyday topic under one to three constraints. The test asks about
other topics, and combines kinds of constraints that never meet in training. The default kinds are
those that a small chat model sometimes meets; --kinds adds others, which it hardly ever does.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from data.rows import read_rows, write_rows

TOPICS = {
    "train": (
        "rain bread bicycles sleep tea rivers books cats trains gardens music salt winter bridges "
        "honey chess maps wool clocks apples mountains candles boats soup dogs kites"
    ).split(),
    "test": "bees islands coffee paint snow libraries football glass forests letters".split(),
}
QUESTIONS = (
    "Tell me something about {}.",
    "Why do people like {}?",
    "Describe {} to a child.",
    "Give me a tip about {}.",
    "What should I know about {}?",
)


def words(text: str) -> list[str]:
    """Return the words of a text: runs of letters, with apostrophes inside."""
    return re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text)


def sentences(text: str) -> list[str]:
    """Return the sentences of a text: parts that end with . ! or ? before white space or the end.

    Example: "One. Two? 3.5 m" -> ["One.", "Two?", "3.5 m"].
    """
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if part]


def bullets(text: str) -> list[str] | None:
    """Return the items if every line that is not empty starts with "- " or "* ", else None."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or not all(re.match(r"[-*] \S", line) for line in lines):
        return None
    return lines


def has_word(text: str, word: str) -> bool:
    """Return True if a word, in any case, is in a text."""
    return word.casefold() in (one.casefold() for one in words(text))


def is_object(text: str, keys: list[str]) -> bool:
    """Return True if a text is a JSON object with exactly the given keys, in any order."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and sorted(value) == sorted(keys)


class Kind(NamedTuple):
    """A kind of constraint: what it asks for, the values it may take, whether a text holds it."""

    ask: str  # instruction, with {} for the value
    values: tuple
    holds: Callable[[str, Any], bool]


KINDS = {
    "max": Kind("Use at most {} words.", (12, 16, 20, 25), lambda t, n: len(words(t)) <= n),
    "without": Kind(
        'Do not use the word "{}".',
        ("the", "and", "is", "of", "can"),
        lambda t, word: not has_word(t, word),
    ),
    "use": Kind(
        'Use the word "{}".', ("small", "because", "blue", "friend", "often", "never"), has_word
    ),
    "no_commas": Kind("Do not use commas.", (None,), lambda t, _: "," not in t),
    "one_sentence": Kind(
        "Answer in one sentence.",
        (None,),
        lambda t, _: len(sentences(t)) == 1 and t.strip()[-1] in ".!?",
    ),
    "question": Kind("End with a question.", (None,), lambda t, _: t.strip().endswith("?")),
    "begin": Kind(
        'Begin your answer with the word "{}".',
        ("Well", "Yes", "Today", "Listen"),
        lambda t, word: words(t)[0] == word and t.strip().startswith(word),
    ),
    "lower": Kind("Write in lower case only.", (None,), lambda t, _: t == t.lower()),
    "bullets": Kind(
        "Answer with exactly {} bullet points, each on a line that starts with a dash.",
        (2, 3, 4),
        lambda t, n: len(bullets(t) or []) == n,
    ),
    "json": Kind(
        "Answer with a JSON object with the keys {} and nothing else.",
        (["topic", "fact"], ["name", "reason"], ["title", "text"]),
        is_object,
    ),
    "finish": Kind(
        'Finish with the words "{}"',
        ("That is all.", "Have a nice day.", "Now you know."),
        lambda t, phrase: t.rstrip().endswith(phrase),
    ),
    "letter": Kind(
        'Every sentence must contain the letter "{}".',
        ("k", "w", "g", "b"),
        lambda t, letter: all(letter in one.lower() for one in sentences(t)),
    ),
}
EASY = ("max", "without", "use", "no_commas", "one_sentence", "question", "begin")
# Two of these exclude or imply each other, or make the other's check pointless.
CONFLICTS = (
    {"one_sentence", "bullets"},
    {"question", "finish"},
    {"lower", "begin"},
    {"lower", "finish"},
    *({"json", kind} for kind in KINDS if kind not in ("json", "max", "without", "use")),
    *({"bullets", kind} for kind in ("begin", "finish", "question")),
)
# Combinations that only the test asks for, alone or among three.
HELD_OUT = ({"max", "without"}, {"use", "question"}, {"no_commas", "begin"}, {"lower", "use"})
SHORTEST = 3  # words of an answer: an empty one must not hold "do not use commas"


def check(response: str, constraints: dict[str, Any]) -> dict[str, bool]:
    """Return {kind: whether a response holds it}. Fewer than SHORTEST words hold nothing.

    ValueError: an unknown kind.
    """
    unknown = constraints.keys() - KINDS.keys()
    if unknown:
        raise ValueError(
            f"unknown constraint {', '.join(sorted(unknown))}: have {', '.join(KINDS)}"
        )
    enough = len(words(response)) >= SHORTEST
    return {kind: enough and KINDS[kind].holds(response, v) for kind, v in constraints.items()}


def reward(prompt: str | list, response: str, row: dict) -> float:
    """Return the share of a row's constraints that a response holds, for --reward."""
    held = check(response, row["constraints"])
    return sum(held.values()) / len(held)


# ---- prompts -------------------------------------------------------------------------------------


def allowed(kinds: set[str], split: str) -> bool:
    """Return True if some kinds can be asked for together in a split."""
    if any(pair <= kinds for pair in CONFLICTS):
        return False
    return split == "test" or not any(pair <= kinds for pair in HELD_OUT)


def draw_row(rng: random.Random, split: str, kinds: tuple[str, ...] = EASY) -> dict:
    """Draw a row {prompt, constraints} with one to three constraints.

    prompt: a list of one message. constraints: {kind: value}, value None for kinds without one.
    """
    chosen: list[str] = []
    for kind in rng.sample(kinds, min(len(kinds), rng.choice((1, 1, 2, 2, 3)))):
        if allowed({*chosen, kind}, split):
            chosen.append(kind)
    constraints = {kind: rng.choice(KINDS[kind].values) for kind in chosen}
    asks = []
    for kind, value in constraints.items():
        text = " and ".join(f'"{key}"' for key in value) if isinstance(value, list) else value
        asks.append(KINDS[kind].ask.format(text))
    question = rng.choice(QUESTIONS).format(rng.choice(TOPICS[split]))
    content = " ".join([question, *asks])
    return {"prompt": [{"role": "user", "content": content}], "constraints": constraints}


def make_rows(n: int, split: str, seed: int, kinds: tuple[str, ...] = EASY) -> list[dict]:
    """Return n rows of a split, "train" or "test": a function of the arguments alone."""
    rng = random.Random(f"verifiable {split} {seed}")
    return [draw_row(rng, split, kinds) for _ in range(n)]


# ---- scores --------------------------------------------------------------------------------------


def score_rows(rows: list[dict]) -> dict[str, float]:
    """Return means over answered rows: {all, held, words, rows, and each kind: share held}.

    all: share of responses that hold all their constraints; held: share of constraints that are.
    A row has a "response" or a list of "responses".
    """
    everything, length = [], []
    by_kind: dict[str, list[bool]] = {}
    for row in rows:
        for response in row.get("responses") or [row["response"]]:
            held = check(response, row["constraints"])
            everything.append(all(held.values()))
            length.append(len(words(response)))
            for kind, value in held.items():
                by_kind.setdefault(kind, []).append(value)
    each = [value for values in by_kind.values() for value in values]
    means = {
        "all": sum(everything) / len(everything),
        "held": sum(each) / len(each),
        "words": sum(length) / len(length),
        "rows": float(len(everything)),
    }
    return means | {kind: sum(by_kind[kind]) / len(by_kind[kind]) for kind in sorted(by_kind)}


def main(argv: list[str] | None = None) -> None:
    """Make data or score answers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("make", help="write train.jsonl and test.jsonl")
    make.add_argument("--out", required=True, help="folder for both files")
    make.add_argument("--seed", type=int, default=0, help="of the rows; default 0")
    make.add_argument("--train", type=int, default=400, help="rows to train on; default 400")
    make.add_argument("--test", type=int, default=150, help="rows to measure on; default 150")
    make.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(EASY))
    scoring = commands.add_parser("score", help="print the scores of answered rows as JSON")
    scoring.add_argument("files", nargs="+", help="JSONL files, as generate.py --data writes them")
    flags = parser.parse_args(argv)
    if flags.command == "make":
        if min(flags.train, flags.test) < 1:
            parser.error("--train and --test must be at least 1")
        Path(flags.out).mkdir(parents=True, exist_ok=True)
        for split in ("train", "test"):
            rows = make_rows(getattr(flags, split), split, flags.seed, tuple(flags.kinds))
            write_rows(Path(flags.out) / f"{split}.jsonl", rows)
        return
    for file in flags.files:
        scores = score_rows(list(read_rows(file)))
        print(json.dumps({"file": file, **{k: round(v, 4) for k, v in scores.items()}}))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"error: {error}")
