"""Kahneman-Tversky optimisation, arXiv 2402.01306: learn from single answers marked good or bad.

    python train_kto.py --model sft/final --data thumbs.jsonl --out kto --beta 0.1 --lr 5e-7
    torchrun --nproc_per_node 8 train_kto.py --model sft/final --data thumbs.jsonl --out kto

Rows: {prompt, response, label}, text or messages; a row {prompt, chosen, rejected} counts as one
good and one bad answer. The implicit reward of an answer y to x is β (log π(y|x) - log π_ref(y|x));
that of a good answer should be above the reference point β z, that of a bad one below. z measures
how far the policy has moved on answers to other prompts, so each tree holds such a mismatched
answer beside its own. The reference is the policy at step 0: it scores both once, before training.

Watch rewards/chosen rise, rewards/rejected fall, and kl: far beyond 10 the policy has lost the
reference's language.

Letters: B examples of a micro-batch, n of a step.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import losses
import runtime
import training
from commandline import parse
from config import Above0, Amount, RunConfig
from data.dataset import Dataset
from data.mismatched import kto_trees
from data.trees import TreeBatch
from model import GPT
from passes import forward, make_batches, token_lengths
from pipeline import pipeline
from reference import add_ref_logps
from reporting import add, means

OWN, MISMATCHED = 0, 1  # the responses of a tree


@dataclass
class Config(RunConfig):
    loss: Literal[losses.KTO_LOSSES] = "kto"  # apo_zero_unpaired and bco need no mismatched answers
    beta: Above0 = 0.1  # temperature of the implicit reward; smaller strays further
    desirable_weight: Amount = 1.0  # λ_D of good answers; a run first prints what balances the data
    undesirable_weight: Amount = 1.0  # λ_U of bad answers
    average_logps: bool = False  # divide log-ratios by the answer's length, so that long answers
    # weigh no more; then a larger β, 1 to 10
    sft_weight: Amount = 0.0  # weight of the mean token NLL of the good answers; 0.1 to 1
    ref: str = ""  # another Hugging Face folder as reference; default: the policy at step 0


# ---- the algorithm -----------------------------------------------------------------------------


def log_ratios(
    model: GPT, hidden: torch.Tensor, batch: TreeBatch, config: Config
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log π(y|x) - log π_ref(y|x) and log π(y|x) of a micro-batch's responses, (B,) each.

    With --average-logps the log-ratio is per token.
    """
    logps = batch.sum_by_response(model.logps(hidden, batch))  # (B,)
    ratio = logps - batch.columns["ref_logps"]
    return (ratio / batch.lengths if config.average_logps else ratio), logps


@torch.no_grad()
def reference_point(
    model: GPT, data: Dataset, examples: np.ndarray, config: Config
) -> torch.Tensor:
    """Return z of the examples of a whole step, over all micro-batches and ranks: a scalar.

    This takes its own pass over the mismatched answers, since the first example's loss needs z of
    all. Without gradients it is far cheaper than mismatched answers in the backward pass.
    Only --loss kto has a reference point: 0 for the others.
    """
    if config.loss != "kto":
        return torch.zeros((), device=model.device)
    ratio_sum = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch, hidden in forward(model, data, examples, config, only=MISMATCHED):
        ratio_sum += log_ratios(model, hidden, batch, config)[0].sum()
    return losses.reference_point(model.mesh.sum(ratio_sum), len(examples))


def example_losses(
    ratio: torch.Tensor, label: torch.Tensor, z: torch.Tensor, config: Config, delta: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the weighted loss of each example, (B,), and its metrics, (B,) each.

    rewards/chosen is 0 for bad answers, rewards/rejected for good ones: see `by_class`.
    """
    match config.loss:
        case "kto":
            per_example = losses.kto(ratio, label, z, config.beta)
        case "apo_zero_unpaired":
            per_example = losses.apo_zero_unpaired(ratio, label, config.beta)
        case "bco":
            per_example = losses.bco(ratio, label, config.beta, delta)
    weight = torch.where(label > 0, config.desirable_weight, config.undesirable_weight)
    reward = config.beta * ratio.detach()
    points: dict[str, torch.Tensor | float] = {"kto": config.beta * z, "bco": delta}
    point = points.get(config.loss, 0.0)  # a good answer's reward should be above it
    return weight * per_example, {
        "rewards/chosen": reward * label,
        "rewards/rejected": reward * (1 - label),
        "rewards/accuracies": torch.where(label > 0, reward > point, reward < point).double(),
    }


def by_class(row: dict[str, float], n: int, n_good: float) -> dict[str, float]:
    """Turn means over all n examples into means over the good and over the bad ones, if any.

    n = 4, n_good = 1: rewards/chosen 0.5 -> 2.0, rewards/rejected -0.75 -> -1.0, margins 3.0
    """
    row = dict(row)
    for name, count in (("rewards/chosen", n_good), ("rewards/rejected", n - n_good)):
        mean = row.pop(name)
        if count:
            row[name] = mean * n / count
    if 0 < n_good < n:
        row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
    return row


def bco_delta(sums: dict[str, float]) -> float:
    """Return bco's δ: midway between the mean rewards of good and bad answers so far, or 0."""
    known = [kind for kind in ("good", "bad") if sums.get(f"n_{kind}")]
    return sum(sums[kind] / sums[f"n_{kind}"] for kind in known) / max(1, len(known))


def add_rewards(
    sums: dict[str, float], row: dict[str, float], n: int, n_good: float
) -> dict[str, float]:
    """Return the sums that `bco_delta` reads after a step; row: means over all its n examples."""
    step = {
        "good": row["rewards/chosen"] * n,
        "bad": row["rewards/rejected"] * n,
        "n_good": n_good,
        "n_bad": n - n_good,
    }
    return {name: sums.get(name, 0.0) + value for name, value in step.items()}


@torch.no_grad()
def evaluate(model: GPT, data: Dataset, config: Config, delta: float) -> dict[str, float]:
    """Return loss and metrics over a whole data set, treated as one large step, under eval/."""
    examples = np.arange(len(data))
    z = reference_point(model, data, examples, config)
    n_good_tokens = count_good_tokens(data, examples)
    totals: dict[str, torch.Tensor] = {}
    for batch, hidden in forward(model, data, examples, config, only=OWN):
        (ratio, logps), label = log_ratios(model, hidden, batch, config), batch.columns["label"]
        per_example, metrics = example_losses(ratio, label, z, config, delta)
        if config.sft_weight:
            metrics["nll"] = -logps * label * len(data) / max(1, n_good_tokens)
            per_example = per_example + config.sft_weight * metrics["nll"]
        add(totals, {"loss": per_example, **metrics})
    row = means(totals, len(data), model.mesh)
    row = by_class(row, len(data), count_good(data, examples))
    if config.loss == "kto":
        row["kl"] = z.item()
    return {f"eval/{name}": value for name, value in row.items()}


def count_good(data: Dataset, examples: np.ndarray) -> float:
    """Return how many of some examples are desirable."""
    return float(data.columns["label"][data.response_start[examples]].sum())


def count_good_tokens(data: Dataset, examples: np.ndarray) -> int:
    """Return how many scored tokens the desirable ones of some examples have."""
    own = data.response_start[examples]
    return int(data.scored_len[own] @ (data.columns["label"][own] > 0))


def make_trees(data: Dataset, order: list[np.ndarray], config: Config) -> Dataset:
    """Return a tree for each example of each step, in the order of training."""
    trees = kto_trees(data, order, config.max_length, config.loss == "kto")
    runtime.check_fit(trees, config)
    return trees


def balance(good: float, bad: float, config: Config) -> str:
    """Return a line on how many examples are good and bad, and on how their weights balance them.

    The paper advises λ_D n_D / λ_U n_U between 1 and 4/3.
    """
    if not good or not bad:
        kind = "desirable" if good else "undesirable"
        return f"warning: all rows are {kind}: there is nothing to tell good from bad"
    ratio = config.desirable_weight * good / (config.undesirable_weight * bad)
    low = config.undesirable_weight * bad / good
    advice = f"--desirable-weight {low:.2f} to {low * 4 / 3:.2f} would be within"
    if 1 <= ratio <= 4 / 3:
        advice = "within"
    return (
        f"{good:.0f} desirable, {bad:.0f} undesirable, weighted {ratio:.2f} to 1; {advice} "
        "the paper's 1 to 1.33"
    )


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    run = runtime.start(config)

    # ---- data ----------------------------------------------------------------------------------
    train = runtime.load_rows(run, config.data, "label", whole_trees=False)
    heldout = runtime.load_sets(run, "label")
    print(balance(train.columns["label"].sum(), (1 - train.columns["label"]).sum(), config))
    steps = training.plan_steps(  # a comparison is two examples
        config, len(train.response_len), train.response_start[train.file_start]
    )
    order = [steps.examples(step) for step in range(steps.total)]
    starts = np.cumsum([0, *map(len, order)])  # from here on, an example is a tree of the run
    train = make_trees(train, order, config)
    for name, data in heldout.items():
        heldout[name] = make_trees(data, [np.arange(len(data.response_len))], config)
    lengths = token_lengths(train, config, only=OWN)
    costs = lengths + (token_lengths(train, config, only=MISMATCHED) if config.loss == "kto" else 0)

    # ---- model and reference -------------------------------------------------------------------
    model = runtime.load_model(run)
    print(training.describe(model, lengths, steps, config))
    scored = [(data, None) for data in (train, *heldout.values())]
    cost = add_ref_logps(model, config.ref, scored, config)
    optimizer = runtime.make_optimizer(model, config)
    loop = training.begin(run, steps, optimizer, cost)

    # ---- the loop ------------------------------------------------------------------------------
    for step in training.remaining(loop):
        examples = np.arange(starts[step], starts[step + 1])
        batches = make_batches(train, examples, config, run.mesh, only=OWN)
        # Counted over the whole step: the loss does not depend on how it is cut into micro-batches.
        n_examples = len(examples)
        n_good = count_good(train, examples)
        n_good_tokens = count_good_tokens(train, examples)
        delta = bco_delta(loop.state.extra)
        z = reference_point(model, train, examples, config)

        totals: dict[str, torch.Tensor] = {}
        for batch, hidden in pipeline(model, batches, optimizer):
            ratio, logps = log_ratios(model, hidden, batch, config)
            label = batch.columns["label"]
            per_example, metrics = example_losses(ratio, label, z, config, delta)
            if config.sft_weight:
                metrics["nll"] = -logps * label * n_examples / max(1, n_good_tokens)
                per_example = per_example + config.sft_weight * metrics["nll"]
            (per_example.sum() / n_examples).backward()
            add(totals, {"loss": per_example, **metrics})
        lr = training.learning_rate(config, step, steps.total)
        norm, stopping = optimizer.step(lr, config.clip, run.stop)

        updated = training.check_update(loop, norm)
        row = {**means(totals, n_examples, run.mesh), "grad_norm": norm, "lr": lr}
        if updated and config.loss == "bco":
            loop.state.extra = add_rewards(loop.state.extra, row, n_examples, n_good)
        row = by_class(row, n_examples, n_good)
        if config.loss == "kto":
            row["kl"] = z.item()
        training.report_step(loop, row, int(costs[examples].sum()), batches)
        if heldout and training.evaluation_due(loop):
            results = {name: evaluate(model, data, config, delta) for name, data in heldout.items()}
            result = training.report_evaluation(loop, results)
            training.print_samples(loop, model, heldout)
            if training.is_best(loop, result["eval/loss"]):
                runtime.save_model(run, model, "best")
        if training.save_or_stop(loop, stopping):
            return
    training.finish(loop, model)


if __name__ == "__main__":
    runtime.run(main)
