"""Reward models: learn to score an answer, from pairs (arXiv 2203.02155 Eq. 1) or from attributes.

    python train_rm.py --model sft/final --data prefs.jsonl --out rm --lr 1e-5
    torchrun --nproc_per_node 8 train_rm.py --model sft/final --data hs.jsonl --loss regression

Rows: {prompt, chosen, rejected}; for --loss regression {prompt, response, attributes: {helpfulness:
4, ...}}, or HelpSteer's columns. A score head replaces the vocabulary head; it is read at the last
token of a response, its end token where it has one. Both answers share their prompt, which is
computed once. score.py applies the result, and transformers loads it as
AutoModelForSequenceClassification.

Watch eval/rewards/accuracies: one epoch is usually best, a reward model overfits fast.

Letters: R responses of a micro-batch, B = R / 2 pairs (chosen, rejected, chosen, ...), A outputs.
"""

from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
import torch

import losses
import runtime
import training
from commandline import parse
from config import Amount, RunConfig
from data.dataset import Dataset
from data.formats import ATTRIBUTES, known_attributes
from data.trees import TreeBatch, make_batch
from model import GPT
from passes import forward, make_batches
from pipeline import pipeline
from reporting import add, means


@dataclass
class Config(RunConfig):
    loss: Literal[losses.REWARD_MODEL_LOSSES] = "bradley_terry"  # margin_bt and scaled_bt weigh a
    # pair by how much better the data says its chosen answer is; regression learns attributes
    centering: Amount = 0.0  # weight of r_c² + r_r², which pulls scores towards 0; 0.001 to 0.01
    attributes: list[str] = field(default_factory=list)  # regression: names of what to learn;
    # default: all that the data has
    lr: Amount = 1e-5  # peak learning rate; 1e-6 to 1e-5 for 7B models


# ---- the algorithm -----------------------------------------------------------------------------


def score_losses(
    scores: torch.Tensor, batch: TreeBatch, names: tuple[str, ...], config: Config
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of each pair, (B,), or of each attribute, (R, A); and metrics of that shape.

    scores: (R, A).
    """
    if config.loss == "regression":
        labels = torch.stack([batch.columns[name] for name in names], 1)  # NaN where missing
        errors = losses.regression(scores, labels)
        return errors, {"rewards/errors": errors.detach().sqrt()}
    margin = batch.columns["margin"][::2]
    return losses.pairwise_reward(scores.view(-1, 2), margin, config.loss, config.centering)


def count_items(data: Dataset, examples: np.ndarray, names: tuple[str, ...], config: Config) -> int:
    """Return what the loss of some examples is divided by: their pairs, or the labels they have."""
    if config.loss == "regression":
        rows = data.responses_of(examples)
        return int(sum((~np.isnan(data.columns[name][rows])).sum() for name in names))
    return len(examples)


def with_deviation(row: dict[str, float], name: str = "rewards") -> dict[str, float]:
    """Replace the mean square of the scores, if there is one, by their standard deviation."""
    row = dict(row)
    square = row.pop(f"{name}/square", None)
    if square is not None:
        row[f"{name}/std"] = max(0.0, square - row[f"{name}/mean"] ** 2) ** 0.5
    return row


@torch.no_grad()
def evaluate(model: GPT, data: Dataset, names: tuple[str, ...], config: Config) -> dict[str, float]:
    """Return loss and metrics over a whole data set, under eval/; regression also by attribute."""
    examples, totals = np.arange(len(data)), {}
    shape = (len(data.response_len), len(names))
    all_scores = torch.zeros(shape, dtype=torch.float64, device=model.device)
    for batch, hidden in forward(model, data, examples, config):
        scores = model.score(hidden, batch, batch.last)  # (R, A)
        all_scores[data.responses_of(batch.examples)] = scores.double()
        per_item, metrics = score_losses(scores, batch, names, config)
        add(totals, {"loss": per_item, **metrics})
    row = means(totals, count_items(data, examples, names, config), model.mesh)
    row = {f"eval/{name}": value for name, value in row.items()}
    if config.loss != "regression":
        return with_deviation(row, "eval/rewards")
    return row | attribute_metrics(model.mesh.sum(all_scores).cpu(), data, names)


def attribute_metrics(
    scores: torch.Tensor, data: Dataset, names: tuple[str, ...]
) -> dict[str, float]:
    """Return mean absolute error and correlation of each attribute, of scores (responses, A)."""
    row = {}
    for name, column in zip(names, scores.T):
        labels = torch.from_numpy(np.array(data.columns[name], np.float64))
        known = ~labels.isnan()
        predicted, labels = column[known], labels[known]
        if len(labels):
            row[f"eval/error/{name}"] = (predicted - labels).abs().mean().item()
        if len(labels) > 1 and labels.std() > 0 and predicted.std() > 0:
            both = torch.stack((predicted, labels))
            row[f"eval/correlation/{name}"] = torch.corrcoef(both)[0, 1].item()
    return row


@torch.no_grad()
def print_scores(loop: training.Loop, model: GPT, sets: dict[str, Dataset]) -> None:
    """Print the first --samples prompts of the first set, and their answers with their scores."""
    data = next(iter(sets.values()))
    n = min(loop.run.config.samples, len(data))
    if not n:
        return
    decode = loop.run.template.tokenizer.decode
    batch = make_batch(data, list(range(n))).to(model.device)
    scores = iter(model.score(model(batch), batch, batch.last).tolist())
    tokens = iter(batch.tokens.tolist())
    for prompt_len, sizes in batch.spans:
        prompt = decode(list(islice(tokens, prompt_len)))
        loop.log.say(f"  prompt  {prompt[-300:].strip()!r}")
        for size in sizes:
            numbers = ", ".join(f"{score:.3f}" for score in next(scores))
            loop.log.say(f"  {numbers}  {decode(list(islice(tokens, size))).strip()!r}")


def learned_attributes(data: Dataset, config: Config) -> tuple[str, ...]:
    """Return the attributes to learn. ValueError: the data has none of them."""
    known_attributes(config.attributes)
    present = [name for name in ATTRIBUTES if not np.isnan(data.columns[name]).all()]
    if not present:
        raise ValueError(f"no row of --data has an attribute: {', '.join(ATTRIBUTES)}")
    for name in config.attributes:
        if name not in present:
            raise ValueError(f"no row of --data has {name}: it has {', '.join(present)}")
    return tuple(name for name in present if name in (config.attributes or present))


def add_margins(data: Dataset, config: Config) -> None:
    """Fill gaps in the column `margin` with the difference of a pair's rewards.

    ValueError: neither is there, and the loss needs it.
    """
    reward = data.columns["reward"].reshape(-1, 2)
    difference = np.repeat(reward[:, 0] - reward[:, 1], 2)  # (responses,)
    margin = data.columns["margin"]
    data.columns["margin"] = np.where(np.isnan(margin), difference, margin)
    if config.loss != "bradley_terry" and np.isnan(data.columns["margin"]).any():
        raise ValueError(
            f"--loss {config.loss} needs margin, or chosen_reward and rejected_reward, in every row"
        )


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    run = runtime.start(config)

    # ---- data ----------------------------------------------------------------------------------
    regression = config.loss == "regression"
    kind = "attributes" if regression else "preference"
    train = runtime.load_rows(run, config.data, kind)
    heldout = runtime.load_sets(run, kind)
    names = learned_attributes(train, config) if regression else ("reward",)
    for data in (train, *heldout.values()):
        if not regression:
            add_margins(data, config)
    lengths = train.tree_lengths(config.share_prompts)
    steps = training.plan_steps(config, len(train), train.file_start)

    # ---- model ---------------------------------------------------------------------------------
    model = runtime.load_model(run, scores=names)
    print(training.describe(model, lengths, steps, config))
    print(f"scores: {', '.join(names)}")
    optimizer = runtime.make_optimizer(model, config)
    loop = training.begin(run, steps, optimizer)

    # ---- the loop ------------------------------------------------------------------------------
    for step in training.remaining(loop):
        examples = steps.examples(step)
        batches = make_batches(train, examples, config, run.mesh)
        # Counted over the whole step: the loss does not depend on how it is cut into micro-batches.
        n_items = max(1, count_items(train, examples, names, config))  # 0: no row has a label

        totals: dict[str, torch.Tensor] = {}
        for batch, hidden in pipeline(model, batches, optimizer):
            scores = model.score(hidden, batch, batch.last)  # (R, A)
            per_item, metrics = score_losses(scores, batch, names, config)
            (per_item.sum() / n_items).backward()
            add(totals, {"loss": per_item, **metrics})
        lr = training.learning_rate(config, step, steps.total)
        norm, stopping = optimizer.step(lr, config.clip, run.stop)

        training.check_update(loop, norm)
        row = {**means(totals, n_items, run.mesh), "grad_norm": norm, "lr": lr}
        training.report_step(loop, with_deviation(row), int(lengths[examples].sum()), batches)
        if heldout and training.evaluation_due(loop):
            results = {name: evaluate(model, data, names, config) for name, data in heldout.items()}
            result = training.report_evaluation(loop, results)
            print_scores(loop, model, heldout)
            if training.is_best(loop, result["eval/loss"]):
                runtime.save_model(run, model, "best")
        if training.save_or_stop(loop, stopping):
            return
    training.finish(loop, model)


if __name__ == "__main__":
    runtime.run(main)
