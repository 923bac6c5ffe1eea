"""Rows of bench/cpu_vs_trl.py: the same texts and tokens for both sides, from preference files."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

BATCH, MAX_LENGTH = 4, 1024  # rows a step; tokens of prompt and answer
Pair = tuple[str, str, str]  # prompt, chosen, rejected


def read_rows(path: str | Path, limit: int | None = None) -> list[dict]:
    """Return the first `limit` objects of a JSONL file, all by default."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in itertools.islice(lines, limit)]


def write_rows(path: str | Path, rows: list[dict]) -> None:
    """Write objects as JSONL."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_pairs(path: str, limit: int = 400) -> list[Pair]:
    """Return the first `limit` pairs of a preference file as plain texts."""

    def text(field) -> str:
        return field if isinstance(field, str) else field[-1]["content"]

    keys = ("prompt", "chosen", "rejected")
    return [tuple(text(row[key]) for key in keys) for row in read_rows(path, limit)]


def digest(sequences: list[list[list[int]]]) -> str:
    """Hash the token ids of every sequence of every row."""
    return hashlib.sha256(json.dumps(sequences).encode()).hexdigest()


def steps_reversed(rows: list) -> list:
    """Return the same steps, each with its rows from last to first."""
    return [row for i in range(0, len(rows), BATCH) for row in reversed(rows[i : i + BATCH])]


class Tokens:
    """plumb's tokenizer, and transformers' beside it unless `tiny`.

    The two split runs of spaces differently, so only texts that both tokenise alike are taken.
    Prompts must end in a line break, which the tokenizer merges with nothing.
    """

    def __init__(self, model: str, tiny: bool):
        from data.templates import Template
        from data.tokenizer import load_tokenizer

        self.template = Template("plain", load_tokenizer(Path(model)))
        self.peer = None
        if not tiny:
            from transformers import AutoTokenizer

            self.peer = AutoTokenizer.from_pretrained(model)

    def prompt(self, prompt: str) -> list[int]:
        """Return the ids of a prompt."""
        return list(self.template.prompt(prompt))

    def pair(self, prompt: str, answers: list[str]) -> tuple[list[int], list[list[int]]]:
        """Return the ids of a prompt and of its answers."""
        prompt_ids, responses, _ = self.template.pair(prompt, list(answers))
        return list(prompt_ids), [list(ids) for ids, _ in responses]

    def same_prompt(self, prompt: str) -> bool:
        """Tell whether both sides read the same ids in a prompt."""
        return self.peer is None or self.peer(prompt)["input_ids"] == self.prompt(prompt)

    def same_pair(self, prompt: str, answers: list[str]) -> bool:
        """Tell whether both sides read the same ids in a prompt and its answers."""
        if self.peer is None:
            return True
        prompt_ids, ids = self.pair(prompt, answers)
        whole = [
            self.peer(prompt + answer + self.peer.eos_token)["input_ids"] for answer in answers
        ]
        alone = self.peer(prompt)["input_ids"]
        return alone == prompt_ids and whole == [prompt_ids + answer for answer in ids]


# ---- workloads: processes that return what the runs need -----------------------------------------


def choose_prompts(spec: dict) -> dict:
    """Choose prompts of at most 200 tokens from the first rows of the files: texts and ids."""
    tokens = Tokens(spec["model"], spec["tiny"])
    files = zip(*(read_pairs(path, 4 * spec["prompts"]) for path in spec["data"]))
    texts = [prompt + "\n" for pairs in files for prompt, _, _ in pairs]
    texts = [text for text in texts if len(tokens.prompt(text)) <= 200 and tokens.same_prompt(text)]
    texts = texts[: spec["prompts"]]
    return {"texts": texts, "prompts": [tokens.prompt(text) for text in texts]}


def choose_pairs(spec: dict) -> dict:
    """Write work/<workload>.jsonl for each workload that the files can fill; describe each by name.

    data: the file; counts: tokens of prompt and answers of every row; tokens: how many plumb
    computes in each step; digest: of every token that a step trains on or scores.
    """
    tokens = Tokens(spec["model"], spec["tiny"])
    files = []
    for path in spec["data"]:
        pairs = read_pairs(path)
        files.append([pair for pair in pairs if tokens.same_pair(pair[0] + "\n", pair[1:])])
    workloads = {}
    needed = spec["steps"] * BATCH
    for name in spec["workloads"]:
        make = WORKLOADS[name]
        candidates = itertools.chain.from_iterable(make(pairs, tokens) for pairs in files)
        pairs = list(itertools.islice(fitting(candidates, tokens), needed))
        if len(pairs) < needed:
            print(f"{name}: {len(pairs)} of {needed} pairs: give another --data or fewer --steps")
            continue
        path = Path(spec["work"]) / f"{spec['algorithm']}_{name.replace(' ', '_')}.jsonl"
        rows, counts, sequences = (singles if spec["algorithm"] == "kto" else both_answers)(pairs)
        write_rows(path, rows)
        # A pair's prompt is computed once for both answers. KTO computes it with the row's own and
        # with a mismatched answer.
        passes = 2 if spec["algorithm"] == "kto" else 1
        sums = [passes * sum(map(sum, counts[i : i + BATCH])) for i in range(0, len(counts), BATCH)]
        workloads[name] = {"data": str(path), "counts": counts, "tokens": sums}
        workloads[name]["digest"] = digest(sequences)
    return workloads


def long_prompts(pairs: list[Pair], tokens: Tokens) -> Iterator[Pair]:
    """Yield pairs with short answers, other pairs of the file before them as solved examples."""
    short = [p for p in pairs if max(map(len, tokens.pair(p[0] + "\n", p[1:])[1])) <= 200]
    for i, (question, chosen, rejected) in enumerate(short):
        prompt, shot = f"Question: {question}\nAnswer:\n", i
        while len(tokens.pair(prompt, [chosen, rejected])[0]) < 500:
            shot = (shot + 1) % len(short)
            prompt = f"Question: {short[shot][0]}\nAnswer:\n{short[shot][1]}\n\n{prompt}"
        yield prompt, chosen, rejected


def long_answers(pairs: list[Pair], tokens: Tokens) -> Iterator[Pair]:
    """Yield pairs with a short prompt and answers of 150 tokens or more."""
    for question, *answers in pairs:
        prompt_ids, ids = tokens.pair(question + "\n", answers)
        if len(prompt_ids) <= 100 and min(map(len, ids)) >= 150:
            yield question + "\n", *answers


def as_they_are(pairs: list[Pair], tokens: Tokens) -> Iterator[Pair]:
    """Yield the pairs of the file in its order, a line break after each prompt."""
    for question, *answers in pairs:
        yield question + "\n", *answers


WORKLOADS = {
    "long prompts": long_prompts,
    "long answers": long_answers,
    "as they are": as_they_are,
}


def fitting(pairs: Iterator[Pair], tokens: Tokens) -> Iterator[tuple]:
    """Yield (prompt, answers, prompt ids, answers' ids) of pairs within MAX_LENGTH."""
    for prompt, *answers in pairs:
        prompt_ids, ids = tokens.pair(prompt, answers)
        if len(prompt_ids) + max(map(len, ids)) <= MAX_LENGTH and tokens.same_pair(prompt, answers):
            yield prompt, answers, prompt_ids, ids


def both_answers(pairs: list[tuple]) -> tuple[list[dict], list, list]:
    """Return rows of preferences, their token counts, and their [chosen, rejected] sequences."""
    rows, counts, sequences = [], [], []
    for prompt, (chosen, rejected), prompt_ids, ids in pairs:
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        counts.append([len(prompt_ids), *map(len, ids)])
        sequences.append([prompt_ids + answer for answer in ids])
    return rows, counts, sequences


def singles(pairs: list[tuple]) -> tuple[list[dict], list, list]:
    """Return as many labelled answers as pairs: rows, token counts, [own, mismatched] sequences.

    Four pairs fill two steps, chosen and rejected in turn, so that a step holds four prompts: TRL
    would take the other answer to the same prompt for a mismatched one.
    """
    examples = []
    for i in range(0, len(pairs), BATCH):
        for first in (0, 1):
            for j, (prompt, answers, prompt_ids, ids) in enumerate(pairs[i : i + BATCH]):
                k = (first + j) % 2
                row = {"prompt": prompt, "completion": answers[k], "label": k == 0}
                examples.append((row, prompt_ids, ids[k]))
    examples = examples[: len(pairs)]
    rows, counts, sequences = [], [], []
    for i, (row, prompt_ids, answer) in enumerate(examples):
        after = i + 1 if (i + 1) % BATCH else i + 1 - BATCH  # the next row of the step
        rows.append(row)
        counts.append([len(prompt_ids), len(answer)])
        sequences.append([prompt_ids + answer, prompt_ids + examples[after][2]])
    return rows, counts, sequences
