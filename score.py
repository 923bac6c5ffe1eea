"""Score the responses of a file with a reward model, or compare their log-probs under two models.

    python score.py --model rm/final --data answers.jsonl --out scored.jsonl
    python score.py --model predictor/final --data answers.jsonl --out annotated.jsonl --attributes
    python score.py --model dpo/final --ref sft/final --data answers.jsonl --out likely.jsonl
    python score.py --model chat --judge sampling/judges/pairwise.json --data p.jsonl --out j.jsonl

Each row gains its scores. {prompt, response}: "score", or "scores": {helpfulness: 3.1, ...} from a
model of attributes. {prompt, responses: [...]}: a list of them. {prompt, chosen, rejected}:
"chosen_reward" and "rejected_reward", for train_dpo.py's rpo losses and train_rm.py's margins.

With --attributes the file holds rows {prompt, response, attributes: {helpfulness: 3, ...}} instead,
rounded to whole numbers from 0 to 4: the data of train_sft.py --attributes (SteerLM).

--standardize keeps the mean and the deviation of these scores in the reward model's config.json:
from then on its scores, here and as --reward, are less that mean, over that deviation. Do it on
answers of the policy that will be trained: then KL penalties and clips mean the same for any model.

With --judge a language model judges by a template (sampling/judge.py). A single answer gains its
"score"; a row {prompt, chosen, rejected} the chosen answer's value against the other, from 0 to 1,
"ahead" of it and "behind" it. Agreement with gold labels ({label: true}, or chosen) and the bias
for a place are printed, and how many replies would be unparsable.

With --ref each row gains "logp" and "ref_logp", the log-probs of its response under both models.
Their mean difference estimates the KL to --ref if --model sampled the responses. Both are computed
on the same micro-batches, from the sampled ids where the rows carry them (best_of_n.py).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import hub
from commandline import parse
from config import Number
from data.formats import ATTRIBUTES
from data.jinja import read_kwargs
from data.rows import read_rows, write_rows
from data.templates import Template
from data.tokenizer import load_tokenizer
from disk import write_text
from kernels.device import pick_device
from parallel import Mesh
from sampling.judge import agreement, load_judge, ranked_right, text_of
from sampling.judge_server import ask_server
from sampling.scoring import (
    Answers,
    all_answers,
    annotate,
    load_scorer,
    score,
    standardised,
    tail_of,
)
from weights.config_json import read_json
from weights.folder import DTYPES, load_model


@dataclass
class Flags:
    """Flags of score.py."""

    model: str = ""  # Hugging Face folder of a reward model; with --ref, of a language model
    ref: str = ""  # another language model, to compare log-probs with
    judge: str = ""  # template of a judge: --model is a language model that judges by it, a folder
    # or a server's address, http://host:8000
    data: str = ""  # JSONL file of prompts and responses
    out: str = ""  # JSONL file for the scored rows
    standardize: bool = False  # keep mean and deviation of these scores in --model's config.json:
    # from then on its scores have mean 0 and deviation 1 on such answers, also as --reward
    attributes: bool = False  # write SteerLM's attributes, whole numbers from 0 to 4
    template: Literal["auto", "plain", "chatml", "zephyr", "llama2", "llama3"] = (
        "auto"  # chat format, as in training
    )
    template_kwargs: str = ""  # a JSON object of values for the chat template, for example
    # '{"enable_thinking": false}'
    reward_read: Literal["auto", "end", "last"] = "auto"  # token at which a reward model is read:
    # the end of turn, or the last that its template writes; auto: by the folder, which is said
    max_tokens: Number = 8192  # tokens per micro-batch: lower it when memory runs out
    dtype: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # auto: bf16 on GPUs, else fp32
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU if there is one


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, __doc__, argv)
    if not (flags.model and flags.data and flags.out):
        raise ValueError("score.py needs --model, --data and --out")
    if flags.ref and flags.attributes:
        raise ValueError("--ref compares language models, --attributes needs a reward model")
    if flags.standardize and not Path(flags.model).is_dir():
        raise ValueError(f"--standardize writes into --model, and {flags.model} is no folder here")
    hub.resolve(flags, ("model", "ref"))
    if flags.standardize and (flags.ref or flags.attributes or flags.judge):
        raise ValueError("--standardize is for a reward model's scores: drop the other flags")
    if flags.judge and (flags.ref or flags.attributes):
        raise ValueError("--judge goes with neither --ref nor --attributes: drop one of them")
    device = pick_device(flags.device)
    best_dtype = "bf16" if device == "cuda" else "fp32"
    dtype = DTYPES[best_dtype if flags.dtype == "auto" else flags.dtype]
    template = None
    if not served(flags):
        kwargs = read_kwargs(flags.template_kwargs)
        template = Template(flags.template, load_tokenizer(flags.model), kwargs)
    rows, answers = all_answers(list(read_rows(flags.data)), template, flags.data)
    if template is None or flags.judge:
        write_verdicts(rows, answers, dtype, device, flags)
    elif flags.ref:
        write_logps(rows, answers, template, dtype, device, flags)
    elif flags.attributes:
        rows = annotate(flags.model, answers, flags.template, flags.max_tokens, dtype, device)
        print(f"{len(rows)} rows in {write_rows(flags.out, rows)}")
    else:
        write_scores(rows, answers, template, dtype, device, flags)


def served(flags: Flags) -> bool:
    """Return whether --model is the address of a server. ValueError: it does more than judge."""
    address = flags.model.startswith(("http://", "https://"))
    if address and not flags.judge:
        raise ValueError(f"--model {flags.model} is a server, which can only judge: give --judge")
    return address


def write_scores(
    rows: list[dict],
    answers: list[Answers],
    template: Template,
    dtype: torch.dtype,
    device: str,
    flags: Flags,
) -> None:
    """Write the rows with their scores under --model; print the mean of each output."""
    model, names = load_scorer(flags.model, dtype, device)
    tail = tail_of(flags.model, names, template, flags.reward_read)
    if flags.standardize:
        model.hf_config.pop("reward_standard", None)
    scores = score(model, template, answers, flags.max_tokens, rows, tail)
    if flags.standardize:
        standardize(np.concatenate(scores), names, flags.model)
        model.hf_config |= read_json(Path(flags.model) / "config.json")
        scores = [standardised(model, one) for one in scores]
    scored = [{**row, **as_keys(row, values.tolist(), names)} for row, values in zip(rows, scores)]
    write_rows(flags.out, scored)
    table = np.concatenate(scores)  # (responses, outputs)
    columns = zip(names, table.mean(0), table.std(0))
    summary = ", ".join(f"{name} {mean:.3f} ± {std:.3f}" for name, mean, std in columns)
    print(f"{len(table)} responses scored in {flags.out}; {summary}")


def standardize(scores: np.ndarray, names: tuple[str, ...], folder: str) -> None:
    """Write mean and deviation of scores (responses, A) into a folder's config.json.

    ValueError: attributes, whose scale is that of their labels, or equal scores.
    """
    if set(names) & set(ATTRIBUTES):
        raise ValueError(f"--standardize is for rewards, and {folder} gives attributes")
    mean, std = scores.mean(0, np.float64), scores.std(0, dtype=np.float64)
    if not (std > 0).all():
        raise ValueError("--standardize needs answers of different scores: their deviation is 0")
    path = Path(folder) / "config.json"
    standard = {"mean": mean.tolist(), "std": std.tolist()}
    raw = {**read_json(path), "reward_standard": standard}
    write_text(path, json.dumps(raw, indent=2) + "\n")
    print(f"mean {mean.round(3).tolist()} and deviation {std.round(3).tolist()} are in {path}")


def write_logps(
    rows: list[dict],
    answers: list[Answers],
    template: Template,
    dtype: torch.dtype,
    device: str,
    flags: Flags,
) -> None:
    """Write the rows with their log-probs under --model and --ref; print the mean difference."""
    logps = {}
    for key, folder in (("logp", flags.model), ("ref_logp", flags.ref)):
        model = load_model(folder, dtype, device)
        logps[key] = score(model, template, answers, flags.max_tokens, rows)
        for row, values in zip(rows, logps[key]):
            row[key] = values.tolist() if len(values) > 1 else values.item()
    write_rows(flags.out, rows)
    gap = np.concatenate(logps["logp"]) - np.concatenate(logps["ref_logp"])
    print(
        f"{len(gap)} responses in {flags.out}; log-prob under {flags.model} minus {flags.ref}: "
        f"{gap.mean():.3f} nats on average"
    )


def write_verdicts(
    rows: list[dict], answers: list[Answers], dtype: torch.dtype, device: str, flags: Flags
) -> None:
    """Write the rows with a judge's values; print its agreement with labels and its bias."""
    if served(flags):
        judge = ask_server(flags.model, flags.judge)
    else:
        judge = load_judge(
            flags.model, flags.judge, dtype, device, flags.max_tokens, Mesh(), flags.template
        )
    number = 2 if judge.template.compares else 1
    if any(len(responses) != number for _, responses in answers):
        raise ValueError(
            f"--judge {flags.judge} reads {number} answer{'s' * (number - 1)} a row: rows of "
            + ("{prompt, chosen, rejected}" if number == 2 else "{prompt, response}")
        )
    questions = []
    for prompt, responses in answers:
        texts = [*map(text_of, responses), ""]  # a judge of single answers gets no other
        questions.append((text_of(prompt), texts[0], texts[1]))
    if judge.template.compares:
        ahead, behind = judge.compare(questions)
        values = [{"ahead": a, "behind": b} for a, b in zip(ahead.tolist(), behind.tolist())]
        result = agreement(ahead, behind)
        each = f"ahead {result.first:.3f}, behind {result.second:.3f}"
        summary = (
            f"chosen wins {result.both:.3f} ({each}), "
            f"same winner in both orders {result.consistent:.3f}, "
            f"bias for the first {result.bias:+.3f}"
        )
    else:
        scores = judge.values(questions).values
        values = [{"score": score} for score in scores.tolist()]
        summary = f"score {scores.mean():.3f} ± {scores.std():.3f}"
        labels = np.array([row.get("label") for row in rows])
        if all(type(label) is bool for label in labels.tolist()) and 0 < labels.sum() < len(labels):
            right = ranked_right(scores, labels.astype(bool))
            summary += f"; a good answer scores above a bad one in {right:.3f} of all pairs"
    write_rows(flags.out, [{**row, **value} for row, value in zip(rows, values)])
    print(f"{len(rows)} rows judged in {flags.out}; {summary}\n{judge.report()}")


def as_keys(row: dict, scores: list[list[float]], names: tuple[str, ...]) -> dict:
    """Return the keys that a row gains from the scores of its responses.

    Example: a row {prompt, chosen, rejected}, scores [[1.5], [0.2]] of one output
    -> {"chosen_reward": 1.5, "rejected_reward": 0.2}.
    """
    one_output = len(names) == 1
    values = [s[0] if one_output else dict(zip(names, s)) for s in scores]
    if row.get("responses") is not None:
        return {"scores": values}
    if len(values) == 1:
        return {"score" if one_output else "scores": values[0]}
    suffix = "reward" if one_output else "scores"
    return {f"chosen_{suffix}": values[0], f"rejected_{suffix}": values[1]}


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
