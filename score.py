"""Scores of answers under a reward model: rows in, rows with their scores out.

    python score.py --model rm/final --data answers.jsonl --out scored.jsonl
    python score.py --model dpo/final --ref sft/final --data answers.jsonl --out likely.jsonl

{prompt, response} gains "score" (a model of attributes: "scores": {helpfulness: 3.1, ...}); {prompt, responses: [...]}
a list of them; {prompt, chosen, rejected} gains "chosen_reward" and "rejected_reward", which train_dpo.py's rpo losses
and train_rm.py's margins read. A score is read at the response's last token and does not depend on what else is in the
batch. One prompt's answers share its computation.

Letters: R responses, A outputs of the model.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from config import parse
from data.rows import read_rows, write_rows
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling.scoring import all_answers, load_scorer, score
from weights.folder import DTYPES, load_model


@dataclass
class Flags:
    """Flags of score.py."""

    model: str = ""  # Hugging Face folder of a reward model; or, with --ref, of a language model
    ref: str = ""  # another language model: rows gain "logp" and "ref_logp", whose mean difference is the KL to --ref
    data: str = ""  # JSONL file of prompts and responses
    out: str = ""  # where the rows go, each with its score
    template: Literal["auto", "plain", "chatml", "zephyr", "llama2", "llama3"] = (
        "auto"  # as in training
    )
    max_tokens: int = 8192  # tokens of a micro-batch: lower it when memory runs out
    dtype: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # auto: bf16 on GPUs, else fp32


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, __doc__, argv)
    if not (flags.model and flags.data and flags.out):
        raise ValueError("score.py needs --model, --data and --out")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[flags.dtype if flags.dtype != "auto" else "bf16" if device == "cuda" else "fp32"]
    template = Template(flags.template, load_tokenizer(flags.model))
    rows, answers = all_answers(list(read_rows(flags.data)), template, flags.data)
    if flags.ref:
        folders = {"logp": flags.model, "ref_logp": flags.ref}
        found = [score(load_model(folder, dtype, device), template, answers, flags.max_tokens)
                 for folder in folders.values()]  # fmt: skip
        for row, *logps in zip(rows, *found):
            row |= {
                name: values.tolist() if len(values) > 1 else values.item()
                for name, values in zip(folders, logps)
            }
        write_rows(flags.out, rows)
        gap = np.concatenate(found[0]) - np.concatenate(found[1])
        print(
            f"{len(gap)} responses in {flags.out}; likelier than under {flags.ref} by {gap.mean():.3f} nats"
        )
        return
    model, names = load_scorer(flags.model, dtype, device)
    scores = score(model, template, answers, flags.max_tokens)
    write_rows(
        flags.out,
        ({**row, **as_keys(row, found.tolist(), names)} for row, found in zip(rows, scores)),
    )
    every = np.concatenate(scores)
    print(f"{len(every)} responses scored in {flags.out}; " + ", ".join(
        f"{name} {mean:.3f} ± {std:.3f}" for name, mean, std in zip(names, every.mean(0), every.std(0))))  # fmt: skip


def as_keys(row: dict, scores: list[list[float]], names: tuple[str, ...]) -> dict:
    """The scores of a row's responses as the keys it gains."""
    one = len(names) == 1
    values = [s[0] if one else dict(zip(names, s)) for s in scores]
    if row.get("responses") is not None:
        return {"scores": values}
    if len(values) == 1:
        return {"score" if one else "scores": values[0]}
    return dict(
        zip(
            ("chosen_reward", "rejected_reward") if one else ("chosen_scores", "rejected_scores"),
            values,
        )
    )


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
