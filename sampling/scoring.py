"""Scores of responses under a model: the library of score.py, reward models and SteerLM.

A reward model's score is read at the response's last token and does not depend on what else is in
the batch. The responses to one prompt share its computation.

Letters: A outputs of the model.
"""

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

import numpy as np
import torch
from tqdm import tqdm

from data import attributes
from data.chat import as_chat, as_row
from data.dataset import Dataset, from_trees
from data.encode import encode_pair, sampled_ids
from data.formats import answers_of, known_attributes
from data.keys import canonical
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import make_batch, pack
from model import GPT
from parallel import ALONE, Mesh
from pipeline import pipeline
from weights.config_json import reward_standard, score_names
from weights.folder import load_model

Answers = tuple[str | list, list]  # a prompt and its responses, text or messages


@torch.no_grad()
def score(
    model: GPT,
    template: Template,
    answers: list[Answers],
    max_tokens: int = 8192,
    rows: list[dict] | None = None,
    tail: Collection[int] = (),
) -> list[np.ndarray]:
    """Score every response to every prompt: one (responses, A) array per prompt, fp32 or fp64.

    A language model has no scores and gives log P(response | prompt): (responses,) arrays. Trees
    are packed into flat rows of at most max_tokens tokens, or more where a single tree has more.
    rows: those of the answers; where they carry sampled ids, these are scored and not the text.
    tail: see `tail_of`.
    """
    trees = from_trees(
        encode_pair(template, *answer, sampled_ids(row))[:2]
        for answer, row in zip(answers, rows or [{}] * len(answers))
    )
    scores = score_trees(model, with_tail(trees, tail, template.end), max_tokens)
    return [standardised(model, one) for one in scores] if model.c.outputs else scores


def standardised(model: GPT, scores: np.ndarray) -> np.ndarray:
    """Return a reward model's scores (R, A) less the mean, over the deviation, of its folder.

    score.py --standardize measures both; without them the scores are what the model gives.
    """
    mean, std = reward_standard(model.hf_config)
    return ((scores - np.array(mean)) / np.array(std)).astype(scores.dtype)


def tail_of(folder: str, names: tuple[str, ...], template: Template, read: str) -> list[int]:
    """Return the ids behind the end of an answer at whose last one a reward model is read.

    read: "end", at the end of turn, as train_rm.py trains; "last", at the last token of the text
    that the chat template writes, often a line end, as reward models trained with transformers are;
    "auto" takes "last" for a folder whose outputs nobody has named, and says so.
    """
    unnamed = all(name.startswith("LABEL_") for name in names)
    if not template.tail or read == "end" or (read == "auto" and not unnamed):
        return []
    shown = template.tokenizer.decode(template.tail, False)
    print(
        f"the reward model {folder} is read at the last token that its chat template writes, "
        f"{shown!r} behind the end of turn; at the end of turn with --reward-read end"
    )
    return template.tail


def with_tail(data: Dataset, tail: Collection[int], end: int | None) -> Dataset:
    """Return trees in which every response that has ended goes on with some ids, not scored."""
    if not tail:
        return data
    trees = []
    for i in range(len(data)):
        at = data.tree_start[i] + data.prompt_len[i]
        answers = []
        for length in data.response_len[data.response_start[i] : data.response_start[i + 1]]:
            ids = list(data.tokens[at : at + length])
            more = list(tail) if ids and ids[-1] == end else []
            answers.append((ids + more, [*data.scored[at : at + length], *[0] * len(more)]))
            at += length
        prompt = data.tokens[data.tree_start[i] : data.tree_start[i] + data.prompt_len[i]]
        trees.append((list(prompt), answers))
    return from_trees(trees)


@torch.no_grad()
def score_trees(model: GPT, data: Dataset, max_tokens: int = 8192) -> list[np.ndarray]:
    """Score trees of token ids as `score` does. Only the last pipeline stage has scores."""
    scores = [np.empty(0)] * len(data)
    lengths = data.tree_lengths()
    bins = pack(lengths, max(max_tokens, int(lengths.max())))
    shown = tqdm(bins, "scoring", disable=None, leave=False)
    batches = (make_batch(data, items) for items in shown)
    for batch, hidden in pipeline(model, batches):
        if model.c.outputs:
            batch_scores = model.score(hidden, batch, batch.last)  # (R, A)
        else:
            batch_scores = batch.sum_by_response(model.logps(hidden, batch))  # (R,)
        sizes = np.diff(data.response_start)[batch.examples]  # responses of each tree
        parts = np.split(batch_scores.cpu().numpy(), np.cumsum(sizes)[:-1])
        for i, part in zip(batch.examples, parts):
            scores[i] = part
    return scores


def with_whole_experts(mesh: Mesh) -> Mesh:
    """Return a grid for a model whose experts no ranks share, whatever --ep is."""
    return replace(mesh, ep=1, groups=mesh.groups | {"ep": ALONE})


def load_scorer(
    folder: str,
    dtype: torch.dtype,
    device: torch.device | str,
    mesh: Mesh = Mesh(),  # noqa: B008 - a mesh of one never changes
) -> tuple[GPT, tuple[str, ...]]:
    """Load a reward model and the names of its outputs.

    Warns where transformers would read its scores at another token.
    """
    mesh = with_whole_experts(mesh)  # ranks score one by one
    model = load_model(folder, dtype, device, scores=(), mesh=mesh)
    config = model.hf_config
    pad = config.get("pad_token_id")
    if pad is not None and pad in load_tokenizer(folder).stops:
        print(
            f"warning: {folder} pads with its end token, so transformers reads its scores one "
            "token before the end and gets others than plumb",
        )
    return model, score_names(config)


def all_answers(
    rows: list[dict], template: Template | None, file: str
) -> tuple[list[dict], list[Answers]]:
    """Return the rows that can be scored, and their prompts and responses.

    template: of the model that scores them; None behind a server. Rows that the template refuses
    (an empty response, for example) are counted and left out. ValueError names a row without prompt
    or response, or the file if no row is left.
    """
    kept, answers = [], []
    reasons: Counter[str] = Counter()
    for number, row in enumerate(rows, 1):
        try:
            content, _, options = canonical(row)
            prompt, responses = answers_of(content, template is not None and template.plain)
            answer = as_chat(prompt, options), responses
        except ValueError as error:
            raise ValueError(f"row {number} of {file}: {error}") from None
        try:
            if template:
                template.pair(*answer)
        except ValueError as error:
            reasons[str(error)] += 1
            continue
        kept.append(row)
        answers.append(answer)
    for reason, n in reasons.items():
        print(f"{file}: {n} of {len(rows)} rows left out: {reason}")
    if not answers:
        raise ValueError(f"{file} has no row that can be scored")
    return kept, answers


def annotate(
    folder: str,
    answers: list[Answers],
    template_name: str,
    max_tokens: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> list[dict]:
    """Predict attributes with an attribute model: rows {prompt, response, attributes}.

    Predictions are rounded to whole numbers from 0 to 4. Several responses to a prompt make one row
    {prompt, responses: [...], attributes: [...]}.
    """
    model, names = load_scorer(folder, dtype, device)
    known_attributes(names)
    template = Template(template_name, load_tokenizer(folder))
    rows: list[dict] = []
    for (prompt, responses), scores in zip(answers, score(model, template, answers, max_tokens)):
        values = [dict(zip(names, map(attributes.whole, one))) for one in scores.tolist()]
        if len(responses) > 1:
            rows.append({**as_row(prompt), "responses": responses, "attributes": values})
        else:
            rows.append({**as_row(prompt), "response": responses[0], "attributes": values[0]})
    return rows
