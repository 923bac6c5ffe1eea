"""Direct preference optimisation and its family, arXiv 2305.18290: learn from pairs of answers.

    python train_dpo.py --model sft/final --data prefs.jsonl --out dpo --beta 0.1 --lr 5e-7
    torchrun --nproc_per_node 8 train_dpo.py --model sft/final --data prefs.jsonl --eval-every 50

Rows: {prompt, chosen, rejected}, text or messages. The implicit reward of an answer y to x is
β (log π(y|x) - log π_ref(y|x)); the loss makes that of the chosen answer larger (--loss says how).
Both answers share their prompt, which is computed once. The reference is the policy at step 0: it
scores every answer once, before training.

Watch rewards/accuracies rise from 0.5 and rewards/margins grow; if logps/chosen falls far, --beta
or --lr is off.

Letters: B pairs of a micro-batch (responses: chosen, rejected, chosen, ...), n of a step, M scored
tokens.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch

import losses
import runtime
import training
from commandline import Range, parse
from config import Above0, Amount, RunConfig
from data.dataset import Dataset
from data.trees import TreeBatch
from losses import Pairs, StepLosses
from model import GPT
from passes import forward, make_batches
from pipeline import pipeline
from reference import add_ref_logps
from reporting import add, means


@dataclass
class Config(RunConfig):
    loss: Literal[losses.DPO_LOSSES] = "sigmoid"  # sigmoid is DPO; formulas and papers: docs/dpo.md
    beta: Above0 = 0.1  # temperature of the implicit reward; smaller strays further; simpo: 2
    label_smoothing: Annotated[float, Range(0, 0.5, below=True)] = 0.0  # assumed share of wrong
    # labels (sigmoid, robust, aot), and exo_pair's ε, which must be above 0: 0.001
    gamma: Amount = 0.5  # simpo: target margin, in units of β-scaled log-prob a token; 0.3 to 1.6
    reward_scale: Above0 = 1.0  # rpo_*: scale of the data's rewards relative to the implicit ones
    f_divergence: Literal[losses.F_DIVERGENCES] = "reverse_kl"  # from the reference; forward_kl and
    # js keep more of it
    wpo: bool = False  # weigh a pair by how likely the policy finds it: for pairs of other models
    average_logps: bool = False  # divide log-probs by the response's length, as TRL's ipo does
    sft_weight: Amount = 0.0  # weight of the mean token NLL of the chosen answers;
    # 0.1 to 1 keeps logps/chosen up
    reference_free: bool = False  # the reward is the log-prob itself, as with a uniform reference
    ref: str = ""  # another Hugging Face folder as reference; default: the policy at step 0;
    # none = --reference-free


# ---- the algorithm -----------------------------------------------------------------------------


def policy_pairs(model: GPT, hidden: torch.Tensor, batch: TreeBatch) -> Pairs:
    """Return the pairs of a micro-batch, (B,) each: log-probs of policy and reference."""
    logps = model.logps(hidden, batch)  # (M,)
    chosen, rejected = batch.sum_by_response(logps).view(-1, 2).unbind(1)  # (B,)
    ref_chosen, ref_rejected = batch.columns["ref_logps"].view(-1, 2).unbind(1)
    lengths = batch.lengths.view(-1, 2).unbind(1)
    rewards = batch.columns["reward"].view(-1, 2).unbind(1)
    return Pairs(chosen, rejected, ref_chosen, ref_rejected, *lengths, *rewards)


def pair_losses(
    pairs: Pairs, config: Config, delta: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of each pair, (B,), and its metrics, (B,) each. delta: bco_pair's δ."""
    return losses.dpo(
        pairs,
        config.loss,
        config.beta,
        config.label_smoothing,
        config.gamma,
        config.reward_scale,
        delta,
        config.average_logps,
        config.f_divergence,
        config.wpo,
    )


@torch.no_grad()
def all_pairs(model: GPT, data: Dataset, examples: np.ndarray, config: Config) -> Pairs:
    """Return the pairs of some examples, those of all ranks, in their order, (n,) each."""
    pairs = torch.zeros(len(data), len(Pairs._fields), dtype=torch.float64, device=model.device)
    for batch, hidden in forward(model, data, examples, config):
        columns = [column.double() for column in policy_pairs(model, hidden, batch)]
        pairs[batch.examples] = torch.stack(columns, 1)
    return Pairs(*model.mesh.sum(pairs[torch.from_numpy(examples).to(pairs.device)]).unbind(1))


def step_losses(
    model: GPT, data: Dataset, examples: np.ndarray, batches: list[TreeBatch], config: Config
) -> StepLosses | None:
    """Return the losses of a whole step for --loss aot and aot_unpaired, which sort its pairs.

    None for other losses, and where one micro-batch holds the whole step.
    """
    if config.loss not in losses.WHOLE_STEP_LOSSES or len(batches) * model.mesh.dp == 1:
        return None
    pairs = all_pairs(model, data, examples, config)
    chosen, rejected = pairs.chosen.requires_grad_(), pairs.rejected.requires_grad_()
    per_pair, _ = pair_losses(pairs, config)
    return StepLosses(examples.tolist(), chosen, rejected, per_pair)


def next_delta(state: dict[str, float], row: dict[str, float], n: int) -> dict[str, float]:
    """Return bco_pair's δ after a step of n pairs, the mean of all rewards and their count."""
    mean, count = state.get("running_mean", 0.0), state.get("running_count", 0.0) + n
    step_mean = (row["rewards/chosen"] + row["rewards/rejected"]) / 2
    return {"running_mean": mean + (step_mean - mean) * n / count, "running_count": count}


@torch.no_grad()
def evaluate(model: GPT, data: Dataset, config: Config, delta: float) -> dict[str, float]:
    """Return loss and metrics over a whole data set, under eval/."""
    pairs = all_pairs(model, data, np.arange(len(data)), config)
    per_pair, metrics = pair_losses(pairs, config, delta)
    row = {name: column.mean().item() for name, column in {"loss": per_pair, **metrics}.items()}
    if config.sft_weight:
        row["nll"] = -(pairs.chosen.sum() / pairs.len_chosen.sum()).item()
        row["loss"] += config.sft_weight * row["nll"]
    return {f"eval/{name}": value for name, value in row.items()}


def check_rewards(data: Dataset | None, config: Config) -> None:
    """ValueError: --loss reads rewards that a row does not have."""
    if data and config.loss in losses.REWARD_LOSSES and np.isnan(data.columns["reward"]).any():
        raise ValueError(
            f"--loss {config.loss} needs chosen_reward and rejected_reward in every row"
        )


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    run = runtime.start(config)
    pair_losses(Pairs(*torch.ones(8, 1)), config)  # ValueError: settings the loss cannot take

    # ---- data ----------------------------------------------------------------------------------
    train = runtime.load_rows(run, config.data, "preference")
    heldout = runtime.load_sets(run, "preference")
    check_rewards(train, config)
    for data in heldout.values():
        check_rewards(data, config)
    lengths = train.tree_lengths(config.share_prompts)
    steps = training.plan_steps(config, len(train), train.file_start)

    # ---- model and reference -------------------------------------------------------------------
    model = runtime.load_model(run)
    print(training.describe(model, lengths, steps, config))
    ref = "none" if config.reference_free or config.loss == "simpo" else config.ref
    scored = [(train, steps.visited()), *((data, None) for data in heldout.values())]
    cost = add_ref_logps(model, ref, scored, config)
    optimizer = runtime.make_optimizer(model, config)
    loop = training.begin(run, steps, optimizer, cost)

    # ---- the loop ------------------------------------------------------------------------------
    for step in training.remaining(loop):
        examples = steps.examples(step)
        batches = make_batches(train, examples, config, run.mesh)
        # Counted over the whole step: the loss does not depend on how it is cut into micro-batches.
        n_pairs = len(examples)
        n_chosen = int(train.scored_len[train.responses_of(examples)[::2]].sum())
        delta = loop.state.extra.get("running_mean", 0.0)
        whole = step_losses(model, train, examples, batches, config)

        totals: dict[str, torch.Tensor] = {}
        for batch, hidden in pipeline(model, batches, optimizer):
            pairs = policy_pairs(model, hidden, batch)
            per_pair, metrics = pair_losses(pairs, config, delta)
            if whole is not None:
                per_pair = whole.of(batch.examples, pairs.chosen, pairs.rejected)
            loss = per_pair.sum() / n_pairs
            if config.sft_weight:
                loss = loss - config.sft_weight * pairs.chosen.sum() / n_chosen
                metrics["nll"] = -pairs.chosen * n_pairs / n_chosen
            loss.backward()
            add(totals, {"loss": per_pair, **metrics})
        lr = training.learning_rate(config, step, steps.total)
        norm, stopping = optimizer.step(lr, config.clip, run.stop)

        updated = training.check_update(loop, norm)
        row = {**means(totals, n_pairs, run.mesh), "grad_norm": norm, "lr": lr}
        if config.sft_weight:
            row["loss"] += config.sft_weight * row["nll"]
        if updated and config.loss == "bco_pair":
            loop.state.extra = next_delta(loop.state.extra, row, n_pairs)
        training.report_step(loop, row, int(lengths[examples].sum()), batches)
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
