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

from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch

import losses
import runtime
import training
from commandline import Range, parse
from config import Above0, Amount, Count, RunConfig, Share
from data.dataset import Dataset
from data.trees import TreeBatch
from losses import Pairs, StepLosses
from model import GPT
from passes import forward, make_batches
from pipeline import pipeline
from reference import add_ref_logps, first_reference, renew_reference, response_logps
from reporting import add, means


@dataclass
class Config(RunConfig):
    loss: Literal[losses.DPO_LOSSES] = "sigmoid"  # sigmoid is DPO; formulas and papers: docs/dpo.md
    beta: Above0 = 0.1  # temperature of the implicit reward; smaller strays further; simpo: 2
    label_smoothing: Annotated[float, Range(0, 0.5, below=True)] = 0.0  # assumed share of wrong
    # labels (sigmoid, robust, aot), and exo_pair's ε, which must be above 0: 0.001
    gamma: Amount = 0.5  # simpo: target margin, in units of β-scaled log-prob a token; 0.2 to 1.6
    reward_scale: Above0 = 1.0  # rpo_*: scale of the data's rewards relative to the implicit ones
    f_divergence: Literal[losses.F_DIVERGENCES] = "reverse_kl"  # from the reference; forward_kl and
    # js keep more of it
    mix: list[str] = field(default_factory=list)  # NAME:WEIGHT of losses to add to --loss, which
    # counts 1 unless it is listed; MPO: sigmoid:0.8 bco_pair:0.2 with --sft-weight 1
    ld_alpha: Share = 1.0  # LD-DPO: what tokens count that the longer answer of a pair has more;
    # 1 = DPO, 0.3 to 0.6 for shorter answers
    wpo: bool = False  # weigh a pair by how likely the policy finds it: for pairs of other models
    average_logps: bool = False  # divide log-probs by the response's length, as TRL's ipo does
    sft_weight: Amount = 0.0  # weight of the mean token NLL of the chosen answers;
    # 0.1 to 1 keeps logps/chosen up
    reference_free: bool = False  # the reward is the log-prob itself, as with a uniform reference
    ref: str = ""  # another Hugging Face folder as reference; default: the policy at step 0;
    # none = --reference-free
    ref_every: Count = 0  # TR-DPO: steps after which the reference moves to the policy; 0: never.
    # 256 to 1024
    ref_mix: Annotated[float, Range(0, 1, above=True)] = 1.0  # TR-DPO: how far, α: 1 = it becomes
    # the policy; 0.5 to 0.6 with --ref-every 1 to 64


# ---- the algorithm -----------------------------------------------------------------------------


def policy_pairs(
    model: GPT, hidden: torch.Tensor, batch: TreeBatch, config: Config
) -> tuple[Pairs, torch.Tensor]:
    """Return the pairs of a micro-batch and the log-probs of the chosen answers, (B,) each.

    The pairs hold log-probs of policy and reference. With --ld-alpha they weigh their tokens; the
    chosen answers' own do not.
    """
    logps = model.logps(hidden, batch)  # (M,)
    chosen, rejected = batch.sum_by_response(logps).view(-1, 2).unbind(1)  # (B,)
    all_tokens = chosen
    if config.ld_alpha != 1:
        weights = losses.length_weights(batch.response, batch.lengths, config.ld_alpha)  # (M,)
        chosen, rejected = batch.sum_by_response(weights * logps).view(-1, 2).unbind(1)
    ref_chosen, ref_rejected = batch.columns["ref_logps"].view(-1, 2).unbind(1)
    lengths = batch.lengths.view(-1, 2).unbind(1)
    rewards = batch.columns["reward"].view(-1, 2).unbind(1)
    return Pairs(chosen, rejected, ref_chosen, ref_rejected, *lengths, *rewards), all_tokens


def pair_losses(
    pairs: Pairs, config: Config, delta: float = 0.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of each pair, (B,), and its metrics, (B,) each. delta: bco_pair's δ.

    With --mix it is the weighted sum of several losses, each a metric too.
    """
    mixture = losses.read_mixture(config.loss, config.mix)
    total, metrics = torch.zeros_like(pairs.chosen), {}
    for name, weight in mixture.items():
        per_pair, own = losses.dpo(
            pairs,
            name,
            config.beta,
            config.label_smoothing,
            config.gamma,
            config.reward_scale,
            delta,
            config.average_logps,
            config.f_divergence,
            config.wpo,
        )
        total = total + weight * per_pair
        metrics |= own  # the same for every loss that is mixed
        if len(mixture) > 1 and name not in losses.WHOLE_STEP_LOSSES:
            metrics[f"loss/{name}"] = per_pair.detach()
    return total, metrics


def takes(config: Config, names: tuple[str, ...]) -> bool:
    """Return True if the loss is one of some, or one of them is mixed in."""
    return not set(names).isdisjoint(losses.read_mixture(config.loss, config.mix))


@torch.no_grad()
def all_pairs(
    model: GPT, data: Dataset, examples: np.ndarray, config: Config
) -> tuple[Pairs, torch.Tensor]:
    """Return what `policy_pairs` does, of examples of all ranks, in their order, (n,) each."""
    width = len(Pairs._fields) + 1
    table = torch.zeros(len(data), width, dtype=torch.float64, device=model.device)
    for batch, hidden in forward(model, data, examples, config):
        pairs, chosen = policy_pairs(model, hidden, batch, config)
        table[batch.examples] = torch.stack([column.double() for column in (*pairs, chosen)], 1)
    table = model.mesh.sum(table[torch.from_numpy(examples).to(table.device)])
    *columns, chosen = table.unbind(1)
    return Pairs(*columns), chosen


def step_losses(
    model: GPT, data: Dataset, examples: np.ndarray, batches: list[TreeBatch], config: Config
) -> StepLosses | None:
    """Return the losses of a whole step for --loss aot and aot_unpaired, which sort its pairs.

    None for other losses, and where one micro-batch holds the whole step.
    """
    if not takes(config, losses.WHOLE_STEP_LOSSES) or len(batches) * model.mesh.dp == 1:
        return None
    pairs, _ = all_pairs(model, data, examples, config)
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
    pairs, chosen = all_pairs(model, data, np.arange(len(data)), config)
    per_pair, metrics = pair_losses(pairs, config, delta)
    row = {name: column.mean().item() for name, column in {"loss": per_pair, **metrics}.items()}
    if config.sft_weight:
        row["nll"] = -(chosen.sum() / pairs.len_chosen.sum()).item()
        row["loss"] += config.sft_weight * row["nll"]
    return {f"eval/{name}": value for name, value in row.items()}


def check_rewards(data: Dataset | None, config: Config) -> None:
    """ValueError: --loss reads rewards that a row does not have."""
    if data and takes(config, losses.REWARD_LOSSES) and np.isnan(data.columns["reward"]).any():
        raise ValueError(
            f"--loss {config.loss} needs chosen_reward and rejected_reward in every row"
            if config.loss in losses.REWARD_LOSSES
            else "--mix with rpo_* needs chosen_reward and rejected_reward in every row"
        )


def validate(config: Config) -> None:
    """Raise ValueError for flags that contradict each other or would have no effect."""
    if config.wpo and config.ld_alpha != 1:
        raise ValueError("--wpo weighs pairs by all their tokens: without --ld-alpha")
    no_reference = config.reference_free or config.loss == "simpo" or config.ref == "none"
    if config.ref_every and no_reference:
        raise ValueError("--ref-every moves the reference, and there is none: drop it")
    if config.ref_every and config.base_dtype != "none":
        raise ValueError(
            f"--ref-every with --base-dtype {config.base_dtype}: the new reference would have "
            "other weights than the policy: drop one of the two"
        )
    if config.average_logps and config.loss in losses.NORMALISED_LOSSES and not config.mix:
        raise ValueError(
            f"--loss {config.loss} divides by the lengths itself: drop --average-logps"
        )
    if config.ref_mix != 1 and not config.ref_every:
        raise ValueError("--ref-mix is how far --ref-every moves the reference: set that as well")


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    validate(config)
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
    cost: dict[str, float] = {}
    if config.ref_every:  # scored again in every step
        ref = "none"
    scored = [(train, steps.visited()), *((data, None) for data in heldout.values())]
    cost = add_ref_logps(model, ref, scored, config, config.ld_alpha)
    optimizer = runtime.make_optimizer(model, config)
    loop = training.begin(run, steps, optimizer, cost)
    moving = None
    if config.ref_every:
        moving = first_reference(run, model, config.ref, config.ref_every, loop.state.step)

    # ---- the loop ------------------------------------------------------------------------------
    for step in training.remaining(loop):
        examples = steps.examples(step)
        if moving:
            logps = response_logps(moving, train, examples, config, config.ld_alpha)
            train.columns["ref_logps"] = logps
        batches = make_batches(train, examples, config, run.mesh)
        # Counted over the whole step: the loss does not depend on how it is cut into micro-batches.
        n_pairs = len(examples)
        n_chosen = int(train.scored_len[train.responses_of(examples)[::2]].sum())
        delta = loop.state.extra.get("running_mean", 0.0)
        whole = step_losses(model, train, examples, batches, config)

        totals: dict[str, torch.Tensor] = {}
        for batch, hidden in pipeline(model, batches, optimizer):
            pairs, chosen = policy_pairs(model, hidden, batch, config)
            per_pair, metrics = pair_losses(pairs, config, delta)
            if whole is not None:
                per_pair = whole.of(batch.examples, pairs.chosen, pairs.rejected)
            loss = per_pair.sum() / n_pairs
            if config.sft_weight:
                loss = loss - config.sft_weight * chosen.sum() / n_chosen
                metrics["nll"] = -chosen * n_pairs / n_chosen
            loss.backward()
            add(totals, {"loss": per_pair, **metrics})
        lr = training.learning_rate(config, step, steps.total)
        norm, stopping = optimizer.step(lr, config.clip, run.stop)

        updated = training.check_update(loop, norm)
        row = {**means(totals, n_pairs, run.mesh), "grad_norm": norm, "lr": lr}
        if config.sft_weight:
            row["loss"] += config.sft_weight * row["nll"]
        if updated and takes(config, ("bco_pair",)):
            loop.state.extra = next_delta(loop.state.extra, row, n_pairs)
        training.report_step(loop, row, int(lengths[examples].sum()), batches)
        if moving and loop.state.step % config.ref_every == 0:
            every, mix = config.ref_every, config.ref_mix
            moving = renew_reference(run, model, every, loop.state.step, moving, mix)
        if heldout and training.evaluation_due(loop):
            for data in heldout.values() if moving else ():
                everything = np.arange(len(data))
                logps = response_logps(moving, data, everything, config, config.ld_alpha)
                data.columns["ref_logps"] = logps
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
