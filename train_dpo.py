"""Direct preference optimisation and its family, arXiv 2305.18290: learn from pairs which answer is better.

    python train_dpo.py --model sft/final --data prefs.jsonl --out dpo --beta 0.1 --lr 5e-7
    torchrun --nproc_per_node 8 train_dpo.py --model sft/final --data prefs.jsonl --eval-data test.jsonl --eval-every 50

Rows: {prompt, chosen, rejected}, text or messages. The implicit reward of an answer y to x is
β (log π(y|x) - log π_ref(y|x)); the loss asks that the chosen answer's be larger (--loss says how). Both answers hang
on one prompt, which is computed once. The reference is the policy at step 0: it scores every answer once, beforehand.

Watch rewards/accuracies rise from 0.5 and rewards/margins grow; logps/chosen falling far means β or lr is off.

Letters: B pairs of a micro-batch, M scored tokens, R = 2B responses (chosen, rejected, chosen, ...).
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
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import (
    TreeBatch,
    make_batch,
    micro_batches,
    pack,
    step_examples,
    steps_per_epoch,
    visited,
)
from losses import Pairs
from model import GPT
from optimizer import AdamW
from parallel import init_mesh
from pipeline import pipeline
from weights.folder import load_model, save_model


@dataclass
class Config(RunConfig):
    loss: Literal[losses.DPO_LOSSES] = (
        "sigmoid"  # sigmoid is DPO; formulas and papers are in losses.py
    )
    beta: float = 0.1  # temperature of the implicit reward; smaller strays further from the reference; simpo: 2
    label_smoothing: float = (
        0.0  # believed share of wrong labels (sigmoid, robust, aot); exo_pair: 0.001
    )
    gamma: float = (
        0.5  # simpo: the margin asked for, in units of β-scaled log-prob a token; 0.3 to 1.6
    )
    reward_scale: float = 1.0  # rpo_*: scale of the data's rewards against the implicit ones
    average_logps: bool = False  # divide log-probs by the response's length first; TRL's ipo does
    sft_weight: float = (
        0.0  # weight of the mean token NLL of the chosen answers; 0.1-1 keeps logps/chosen up
    )
    reference_free: bool = False  # reward is the log-prob itself, as if the reference were uniform
    ref: str = ""  # another Hugging Face folder as reference; default: the policy at step 0; none = --reference-free


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def policy_pairs(model: GPT, hidden: torch.Tensor, batch: TreeBatch) -> Pairs:
    """The policy's summed log-probs of a batch of pairs beside the reference's, every field (B,)."""
    logps = model.logps(hidden, batch)  # (M,)
    chosen, rejected = batch.sum_by_response(logps).view(-1, 2).unbind(1)  # (B,)
    ref = batch.columns["ref_logps"].view(-1, 2)
    lengths, gt = batch.lengths.view(-1, 2), batch.columns["reward"].view(-1, 2)
    return Pairs(chosen, rejected, *ref.unbind(1), *lengths.unbind(1), *gt.unbind(1))


def pair_losses(
    pairs: Pairs, config: Config, running_mean: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The chosen loss of each pair, (B,), and its metrics."""
    return losses.dpo(
        pairs, config.loss, config.beta, config.label_smoothing, config.gamma, config.reward_scale, running_mean,
        config.average_logps,
    )  # fmt: skip


@torch.no_grad()
def all_pairs(model: GPT, data: Dataset, examples: np.ndarray, config: Config) -> Pairs:
    """The pairs of some examples, those of other ranks among them; every field (n,), in the order of `examples`."""
    mesh = model.mesh
    lengths = data.tree_lengths(config.share_prompts)
    bins = micro_batches(lengths, examples, config.max_tokens, mesh.dp_rank, mesh.dp)
    found = torch.zeros(len(data), len(Pairs._fields), dtype=torch.float64, device=model.device)
    batches = (make_batch(data, items, config.share_prompts) for items in bins)
    for batch, hidden in pipeline(model, batches):
        found[batch.examples] = torch.stack(
            [field.double() for field in policy_pairs(model, hidden, batch)], 1
        )
    return Pairs(*mesh.sum(found[torch.from_numpy(examples).to(found.device)]).unbind(1))


def whole_step(model: GPT, data: Dataset, examples: np.ndarray, config: Config) -> torch.Tensor:
    """Losses and their slopes by both log-probs, (n, 3), of the examples of a step, for losses that sort all of them.

    One pass without gradients finds the log-probs; the slopes then stand in for the loss, micro-batch by micro-batch.
    """
    pairs = all_pairs(model, data, examples, config)
    pairs = pairs._replace(
        chosen=pairs.chosen.requires_grad_(), rejected=pairs.rejected.requires_grad_()
    )
    per_pair, _ = pair_losses(pairs, config, 0.0)
    slopes = torch.autograd.grad(per_pair.sum(), (pairs.chosen, pairs.rejected))
    return torch.stack((per_pair.detach(), *slopes), 1)


@torch.no_grad()
def evaluate(model: GPT, data: Dataset, config: Config, running_mean: float) -> dict[str, float]:
    """Loss and metrics over a whole data set, under eval/."""
    per_pair, metrics = pair_losses(
        all_pairs(model, data, np.arange(len(data)), config), config, running_mean
    )
    return {
        f"eval/{name}": value.mean().item() for name, value in {"loss": per_pair, **metrics}.items()
    }


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    mesh = init_mesh(config.tp, config.cp, config.pp, config.device, config.timeout_minutes)
    device, dtype = runtime.set_up(config, mesh)
    stop = runtime.Stop(config.max_minutes)
    start = checkpoint.find(config.out, config.resume, mesh=mesh)
    pair_losses(
        Pairs(*torch.ones(8, 1)), config, 0.0
    )  # settings that the loss cannot take are refused here

    # ---- data --------------------------------------------------------------------------------------------------------
    tokenizer = load_tokenizer(config.model)
    template = Template(config.template, tokenizer)
    with mesh.one_first():  # the others find it in the cache
        train = runtime.load_rows(config.data, "preference", template, config)
        heldout = runtime.load_rows(config.eval_data, "preference", template, config)
    for data in filter(None, (train, heldout)):
        pack(
            data.tree_lengths(config.share_prompts), config.max_tokens
        )  # a row that does not fit is refused here
        if config.loss in losses.REWARD_LOSSES and np.isnan(data.columns["reward"]).any():
            raise ValueError(
                f"--loss {config.loss} needs chosen_reward and rejected_reward in every row"
            )
    lengths = train.tree_lengths(config.share_prompts)

    # ---- model and reference -----------------------------------------------------------------------------------------
    model = load_model(config.model, dtype, device, mesh=mesh)
    runtime.prepare_model(model, config, tokenizer)
    per_epoch = steps_per_epoch(len(train), config.batch_size)
    total = runtime.total_steps(config, per_epoch)
    print(runtime.describe(config, model, lengths, total))
    seen = visited(len(train), config.batch_size, total, config.seed, config.shuffle)
    cost = {}
    for data, examples in [(train, seen)] + (
        [(heldout, np.arange(len(heldout)))] if heldout else []
    ):
        if config.reference_free or config.ref == "none" or config.loss == "simpo":
            data.columns["ref_logps"] = np.zeros(len(data.response_len))
        else:
            scored, spent = reference.reference_logps(
                model, config.ref, data, examples, config, print
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
        examples = step_examples(len(train), config.batch_size, step, config.seed, config.shuffle)
        bins = micro_batches(lengths, examples, config.max_tokens, mesh.dp_rank, mesh.dp)
        batches = [make_batch(train, items, config.share_prompts) for items in bins]
        # Counted over the whole step, so that the loss does not depend on how it is cut into micro-batches.
        n_pairs = len(examples)
        n_chosen = int(train.scored_len[train.responses_of(examples)[::2]].sum())
        running_mean = state.extra.get("running_mean", 0.0)
        known, place = None, {example: i for i, example in enumerate(examples.tolist())}
        if config.loss in losses.WHOLE_STEP_LOSSES and len(batches) * mesh.dp > 1:
            known = whole_step(model, train, examples, config)

        totals: dict[str, torch.Tensor] = {}
        for batch, hidden in pipeline(model, batches, optimizer):
            pairs = policy_pairs(model, hidden, batch)
            per_pair, metrics = pair_losses(pairs, config, running_mean)
            loss = per_pair.sum() / n_pairs
            if known is not None:
                per_pair, *slopes = known[[place[example] for example in batch.examples]].unbind(1)
                loss = (slopes[0] * pairs.chosen + slopes[1] * pairs.rejected).sum() / n_pairs
            if config.sft_weight:
                loss = loss - config.sft_weight * pairs.chosen.sum() / n_chosen
                metrics["nll"] = -pairs.chosen * n_pairs / n_chosen
            loss.backward()
            reporting.add(totals, {"loss": per_pair, **metrics})
        lr = runtime.learning_rate(config, step, total)
        norm, stopping = optimizer.step(lr, config.clip, stop)

        state.step = step + 1
        row = {
            "step": state.step,
            **reporting.means(totals, n_pairs, mesh),
            "grad_norm": norm,
            "lr": lr,
        }
        if config.sft_weight:
            row["loss"] += config.sft_weight * row["nll"]
        tokens = int(lengths[examples].sum())
        row |= {"epoch": state.step / per_epoch, **meter.read(tokens, batches)}
        state.tokens += tokens
        if nonfinite.check(norm, state.step):
            state.skipped += 1
            log.say(
                f"step {state.step}: the gradient is not finite, no update ({state.skipped} so far)"
            )
        elif config.loss == "bco_pair":  # δ: the mean of all rewards seen so far
            n = state.extra.get("running_count", 0.0) + n_pairs
            mean = (row["rewards/chosen"] + row["rewards/rejected"]) / 2
            state.extra = {
                "running_mean": running_mean + (mean - running_mean) * n_pairs / n,
                "running_count": n,
            }
        if reporting.due(config.log_every, state.step) or state.step == total:
            log.row(row)
        log.progress(row)

        if heldout and (reporting.due(config.eval_every, state.step) or state.step == total):
            result = evaluate(model, heldout, config, running_mean)
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
