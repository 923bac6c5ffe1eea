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
from collections import Counter

import numpy as np
import torch
from tqdm import tqdm

from data import attributes
from data.dataset import Dataset, from_trees
from data.formats import answers_of, known_attributes
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import make_batch, pack
from model import GPT
from parallel import Mesh
from pipeline import pipeline
from weights.config_json import score_names
from weights.folder import load_model

Answers = tuple[str | list, list]  # a prompt and its responses, text or messages


@torch.no_grad()
def score(
    model: GPT, template: Template, answers: list[Answers], max_tokens: int = 8192
) -> list[np.ndarray]:
    """Scores of every response to every prompt: a list of (responses, A) arrays, fp32 at least.

    Of a language model, which scores nothing, it is log P(response | prompt): (responses,) arrays. Trees are packed
    into flat rows of at most max_tokens tokens (more where a single tree has more).
    """
    trees = from_trees(template.pair(prompt, responses)[:2] for prompt, responses in answers)
    return score_trees(model, trees, max_tokens)


@torch.no_grad()
def score_trees(model: GPT, data: Dataset, max_tokens: int = 8192) -> list[np.ndarray]:
    """`score` of trees of token ids, as they are. With pipeline stages the last one has them, the others nothing."""
    scores = [np.empty(0)] * len(data)
    lengths = data.tree_lengths()
    bins = pack(lengths, max(max_tokens, int(lengths.max())))
    batches = (
        make_batch(data, items) for items in tqdm(bins, "scoring", disable=None, leave=False)
    )
    for batch, hidden in pipeline(model, batches):
        if model.c.outputs:
            found = model.score(hidden, batch, batch.last)
        else:
            found = batch.sum_by_response(model.logps(hidden, batch))
        sizes = [int(data.response_start[i + 1] - data.response_start[i]) for i in batch.examples]
        for i, part in zip(batch.examples, np.split(found.cpu().numpy(), np.cumsum(sizes)[:-1])):
            scores[i] = part
    return scores


def load_scorer(
    folder: str,
    dtype: torch.dtype,
    device: torch.device | str,
    mesh: Mesh = Mesh(),  # noqa: B008 - a mesh of one never changes
) -> tuple[GPT, tuple[str, ...]]:
    """A reward model and the names of its outputs; warns where transformers would read its scores elsewhere."""
    model = load_model(folder, dtype, device, scores=(), mesh=mesh)
    raw, tokenizer = model.hf_config, load_tokenizer(folder)
    if raw.get("pad_token_id") is not None and raw["pad_token_id"] in tokenizer.stops:
        print(f"warning: {folder} pads with its end token, so transformers reads scores one token before the end; here "
              "they are read at the end token, as most reward models are trained", file=sys.stderr)  # fmt: skip
    return model, score_names(raw)


def all_answers(
    rows: list[dict], template: Template, file: str
) -> tuple[list[dict], list[Answers]]:
    """Rows of a file that can be scored, and their prompts and responses.

    Rows that the template cannot take (a sampler may have said nothing) are counted, reported and left out.
    ValueError names a row without prompt or response, or the file where nothing is left.
    """
    kept, answers, reasons = [], [], Counter()
    for number, row in enumerate(rows, 1):
        try:
            found = answers_of(row, template.plain)
        except ValueError as error:
            raise ValueError(f"row {number} of {file}: {error}") from None
        try:
            template.pair(*found)
        except ValueError as error:
            reasons[str(error)] += 1
            continue
        kept.append(row)
        answers.append(found)
    for reason, n in reasons.items():
        print(f"{file}: {n} of {len(rows)} rows left out: {reason}")
    if not answers:
        raise ValueError(f"{file} has no row that can be scored")
    return kept, answers


def annotate(
    folder: str,
    answers: list[Answers],
    template: str,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> list[dict]:
    """Rows {prompt, response, attributes} with an attribute model's predictions, whole numbers from 0 to 4.

    Several responses to a prompt make {prompt, responses: [...], attributes: [...]}.
    """
    model, names = load_scorer(folder, dtype, device)
    known_attributes(names)
    rows = []
    for (prompt, responses), found in zip(
        answers, score(model, Template(template, load_tokenizer(folder)), answers, max_tokens)
    ):
        values = [dict(zip(names, map(attributes.whole, one))) for one in found.tolist()]
        several = {"responses": responses, "attributes": values}
        rows.append(
            {
                "prompt": prompt,
                **(
                    several
                    if len(responses) > 1
                    else {"response": responses[0], "attributes": values[0]}
                ),
            }
        )
    return rows
