"""Kahneman-Tversky optimisation, arXiv 2402.01306: learn from single answers that are marked good or bad.

    python train_kto.py --model sft/final --data thumbs.jsonl --out kto --beta 0.1 --lr 5e-7
    torchrun --nproc_per_node 8 train_kto.py --model sft/final --data thumbs.jsonl --eval-data test.jsonl --out kto

Rows: {prompt, response, label}, text or messages; a row {prompt, chosen, rejected} counts as one good and one bad. The
implicit reward of an answer y to x is β (log π(y|x) - log π_ref(y|x)); a good one should be above the reference point
β z, a bad one below. z is how far the policy has moved on answers that do not belong to their prompts, so each tree
holds a mismatched answer besides its own. The reference is the policy at step 0: it scores both once, beforehand.

Watch rewards/chosen rise and rewards/rejected fall, and kl: far beyond 10 the policy has lost the reference's language.

Letters: B examples of a micro-batch, M scored tokens.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
import losses
import reference
import reporting
import runtime
from config import RunConfig, parse
from data.dataset import Dataset
from data.mismatched import kto_trees
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import TreeBatch, make_batch, micro_batches, pack, step_examples, steps_per_epoch
from model import GPT
from optimizer import AdamW
from parallel import init_mesh
from pipeline import pipeline
from weights.folder import load_model, save_model


@dataclass
class Config(RunConfig):
    loss: Literal[losses.KTO_LOSSES] = "kto"  # apo_zero_unpaired and bco need no mismatched answers
    beta: float = (
        0.1  # temperature of the implicit reward; smaller strays further from the reference
    )
    desirable_weight: float = (
        1.0  # λ_D of good answers; the run's first lines say what would balance the data
    )
    undesirable_weight: float = 1.0  # λ_U of bad answers
    ref: str = ""  # another Hugging Face folder as reference; default: the policy at step 0


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def log_ratios(model: GPT, hidden: torch.Tensor, batch: TreeBatch) -> torch.Tensor:
    """log π(y|x) - log π_ref(y|x) of every response of a batch, (B,)."""
    return batch.sum_by_response(model.logps(hidden, batch)) - batch.columns["ref_logps"]


@torch.no_grad()
def reference_point(
    model: GPT, data: Dataset, examples: np.ndarray, config: Config
) -> torch.Tensor:
    """z of the examples of a whole step, over all micro-batches and ranks.

    A pass of its own over prompt and mismatched answer: the loss of the first example needs z of all of them. It has
    no gradient, so this is far cheaper than to carry mismatched answers through the backward pass as well.
    """
    mesh = model.mesh
    bins = micro_batches(
        branch_lengths(data, 1), examples, config.max_tokens, mesh.dp_rank, mesh.dp
    )
    ratio_sum = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch, hidden in pipeline(model, (make_batch(data, items, only=1) for items in bins)):
        ratio_sum += log_ratios(model, hidden, batch).sum()
    return losses.reference_point(mesh.sum(ratio_sum), len(examples))


def branch_lengths(data: Dataset, k: int) -> np.ndarray:
    """Tokens of each tree's prompt with its response k alone, (n,)."""
    return data.prompt_len + data.response_len[data.response_start[:-1] + k]


def good_among(data: Dataset, examples: np.ndarray) -> float:
    """How many of some examples are desirable."""
    return float(data.columns["label"][data.response_start[examples]].sum())


def example_losses(
    ratio: torch.Tensor, label: torch.Tensor, z: torch.Tensor, config: Config, delta: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The chosen loss of each example, (B,), and its metrics; those of /chosen and /rejected are 0 for the others."""
    match config.loss:
        case "kto":
            per_example = losses.kto(ratio, label, z, config.beta)
        case "apo_zero_unpaired":
            per_example = losses.apo_zero_unpaired(ratio, label, config.beta)
        case "bco":
            per_example = losses.bco(ratio, label, config.beta, delta)
    weight = torch.where(label > 0, config.desirable_weight, config.undesirable_weight)
    reward = config.beta * ratio.detach()
    points: dict[str, torch.Tensor | float] = {
        "kto": config.beta * z,
        "apo_zero_unpaired": 0.0,
        "bco": delta,
    }
    point = points[config.loss]
    return weight * per_example, {
        "rewards/chosen": reward * label,
        "rewards/rejected": reward * (1 - label),
        "rewards/accuracies": torch.where(label > 0, reward > point, reward < point).double(),
    }


def by_class(row: dict[str, float], n: int, n_good: float) -> dict[str, float]:
    """Means over all n examples -> means over the good and over the bad ones; a class that is not there has none."""
    for name, count in (("rewards/chosen", n_good), ("rewards/rejected", n - n_good)):
        value = row.pop(name)
        row |= {name: value * n / count} if count else {}
    if 0 < n_good < n:
        row["rewards/margins"] = row["rewards/chosen"] - row["rewards/rejected"]
    return row


def balance(good: float, bad: float, config: Config) -> str:
    """How the classes weigh against each other, and what the paper advises: λ_D n_D : λ_U n_U of 1 to 4/3."""
    if not good or not bad:
        return f"warning: all rows are {'desirable' if good else 'undesirable'}: nothing tells good from bad"
    now = config.desirable_weight * good / (config.undesirable_weight * bad)
    low = config.undesirable_weight * bad / good
    advice = (
        "within"
        if 1 <= now <= 4 / 3
        else f"--desirable-weight {low:.2f} to {low * 4 / 3:.2f} would be within"
    )
    return f"{good:.0f} desirable, {bad:.0f} undesirable, weighted {now:.2f} to 1; {advice} the paper's 1 to 1.33"


@torch.no_grad()
def evaluate(model: GPT, data: Dataset, config: Config, delta: float) -> dict[str, float]:
    """Loss and metrics over a whole data set, taken for one large step, under eval/."""
    mesh, everything = model.mesh, np.arange(len(data))
    z = torch.zeros((), device=model.device)
    if config.loss == "kto":
        z = reference_point(model, data, everything, config)
    totals: dict[str, torch.Tensor] = {}
    bins = micro_batches(
        branch_lengths(data, 0), everything, config.max_tokens, mesh.dp_rank, mesh.dp
    )
    for batch, hidden in pipeline(model, (make_batch(data, items, only=0) for items in bins)):
        ratio, label = log_ratios(model, hidden, batch), batch.columns["label"]
        per_example, metrics = example_losses(ratio, label, z, config, delta)
        reporting.add(totals, {"loss": per_example, **metrics})
    row = by_class(
        reporting.means(totals, len(data), mesh), len(data), good_among(data, everything)
    )
    row |= {"kl": z.item()} if config.loss == "kto" else {}
    return {f"eval/{name}": value for name, value in row.items()}


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    mesh = init_mesh(config.tp, config.cp, config.pp, config.device, config.timeout_minutes)
    device, dtype = runtime.set_up(config, mesh)
    stop = runtime.Stop(config.max_minutes)
    start = checkpoint.find(config.out, config.resume, mesh=mesh)

    # ---- data --------------------------------------------------------------------------------------------------------
    tokenizer = load_tokenizer(config.model)
    template = Template(config.template, tokenizer)
    with mesh.one_first():  # the others find it in the cache
        train = runtime.load_rows(config.data, "label", template, config)
        heldout = runtime.load_rows(config.eval_data, "label", template, config)
    print(balance(train.columns["label"].sum(), (1 - train.columns["label"]).sum(), config))
    n = len(train.response_len)  # a comparison is two examples
    per_epoch = steps_per_epoch(n, config.batch_size)
    total = runtime.total_steps(config, per_epoch)
    steps = [
        step_examples(n, config.batch_size, step, config.seed, config.shuffle)
        for step in range(total)
    ]
    starts = np.cumsum([0, *map(len, steps)])
    # From here on an example is one tree of the run, in the order of training.
    train = kto_trees(train, steps, config.max_length, config.loss == "kto")
    if heldout:
        heldout = kto_trees(
            heldout, [np.arange(len(heldout.response_len))], config.max_length, config.loss == "kto"
        )
    for data in filter(None, (train, heldout)):
        pack(
            data.tree_lengths(config.share_prompts), config.max_tokens
        )  # a row that does not fit is refused here
    lengths = branch_lengths(train, 0)

    # ---- model and reference -----------------------------------------------------------------------------------------
    model = load_model(config.model, dtype, device, mesh=mesh)
    runtime.prepare_model(model, config, tokenizer)
    print(runtime.describe(config, model, lengths, total))
    cost = {}
    for data in filter(None, (train, heldout)):
        scored, spent = reference.reference_logps(
            model, config.ref, data, np.arange(len(data)), config, print
        )
        data.columns["ref_logps"] = scored
        cost = cost or spent
    optimizer = AdamW(
        model, (config.beta1, config.beta2), config.eps, config.weight_decay, config.zero
    )
    state = checkpoint.State()
    if start:
        state = checkpoint.load(start, optimizer)
        print(f"resumed from {start} after step {state.step}")

    # ---- the loop ----------------------------------------------------------------------------------------------------
    log = reporting.Log(config, state.step, total, mesh)
    meter, nonfinite = reporting.Meter(model.c, device, mesh), runtime.NonFinite()
    if cost and not start:
        log.row({"step": 0, **cost})
    for step in range(state.step, total):
        meter.start()
        examples = np.arange(starts[step], starts[step + 1])
        bins = micro_batches(lengths, examples, config.max_tokens, mesh.dp_rank, mesh.dp)
        batches = [make_batch(train, items, only=0) for items in bins]
        # Counted over the whole step, so that the loss does not depend on how it is cut into micro-batches.
        n_examples = len(examples)
        n_good = good_among(train, examples)
        seen = state.extra or dict.fromkeys(
            ("good", "n_good", "bad", "n_bad"), 0.0
        )  # bco: sums of all rewards so far
        means = [seen[c] / seen[f"n_{c}"] for c in ("good", "bad") if seen[f"n_{c}"]]
        delta = sum(means) / max(1, len(means))
        z, tokens = torch.zeros((), device=device), int(lengths[examples].sum())
        if config.loss == "kto":
            z = reference_point(model, train, examples, config)
            tokens += int(branch_lengths(train, 1)[examples].sum())

        totals: dict[str, torch.Tensor] = {}
        for batch, hidden in pipeline(model, batches, optimizer):
            ratio, label = log_ratios(model, hidden, batch), batch.columns["label"]
            per_example, metrics = example_losses(ratio, label, z, config, delta)
            (per_example.sum() / n_examples).backward()
            reporting.add(totals, {"loss": per_example, **metrics})
        lr = runtime.learning_rate(config, step, total)
        norm, stopping = optimizer.step(lr, config.clip, stop)

        state.step = step + 1
        row = {
            "step": state.step,
            **reporting.means(totals, n_examples, mesh),
            "grad_norm": norm,
            "lr": lr,
        }
        sums = {
            "good": row["rewards/chosen"] * n_examples,
            "bad": row["rewards/rejected"] * n_examples,
        }
        row = by_class(row, n_examples, n_good)
        row |= {"kl": z.item()} if config.loss == "kto" else {}
        row |= {"epoch": state.step / per_epoch, **meter.read(tokens, batches)}
        state.tokens += tokens
        if nonfinite.check(norm, state.step):
            state.skipped += 1
            log.say(
                f"step {state.step}: the gradient is not finite, no update ({state.skipped} so far)"
            )
        elif config.loss == "bco":
            sums |= {"n_good": n_good, "n_bad": n_examples - n_good}
            state.extra = {name: seen[name] + value for name, value in sums.items()}
        if reporting.due(config.log_every, state.step) or state.step == total:
            log.row(row)
        log.progress(row)

        if heldout and (reporting.due(config.eval_every, state.step) or state.step == total):
            result = evaluate(model, heldout, config, delta)
            log.row({"step": state.step, **result})
            log.say(
                f"step {state.step}: "
                + ", ".join(f"{name} {value:.4f}" for name, value in result.items())
            )
            if config.samples:
                runtime.print_samples(model, heldout, config.samples, tokenizer, template, log.say)
            if state.best is None or result["eval/loss"] < state.best:
                state.best, state.best_step = result["eval/loss"], state.step
                save_model(model, Path(config.out) / "best", config.model, template)
        stopping = stopping and state.step < total
        if reporting.due(config.save_every, state.step) or stopping:
            checkpoint.save(config.out, state, optimizer, config.keep)
        if stopping:
            why = stop.reason or "another rank"
            log.say(
                f"stopped by {why} after step {state.step} of {total}; --resume auto goes on from here"
            )
            log.close()
            return
    log.close()
    save_model(model, Path(config.out) / "final", config.model, template)
    print(f"{total} steps done, {state.tokens:,} tokens; the model is in {config.out}/final")


if __name__ == "__main__":
    runtime.run(main)
