"""Updates of a step: which samples each trains on, and the log-probs they start from.

    plan = updates.plan(samples, epochs, minibatches, step, config, mesh)
    old_logps, ref_logps, metrics = updates.add_logps(samples, plan, model, ref, config)
    for update in plan: ...                        update.bins: micro-batches of samples.data

Letters: n prompts, G samples each, R = n G responses, M scored tokens of all of them.
"""

from typing import NamedTuple

import numpy as np
import torch

import losses
from config import RolloutConfig
from data.dataset import Dataset
from data.trees import make_batch, micro_batches
from model import GPT
from parallel import Mesh
from pipeline import pipeline
from sampling.draw import correction, truncated
from sampling.gap import mean_gap
from sampling.rollout import Rollout


class Update(NamedTuple):
    """One optimizer update of a step."""

    epoch: int  # the pass over the rollout that it belongs to, from 0
    prompts: np.ndarray  # (k,) numbers of its prompts in the rollout, ascending
    bins: list[list[int]]  # this rank's micro-batches of them
    lengths: np.ndarray  # (k G,) scored tokens of its responses, over all ranks


def plan(
    samples: Rollout, epochs: int, minibatches: int, step: int, config: RolloutConfig, mesh: Mesh
) -> list[Update]:
    """Plan the updates of a rollout: `epochs` passes over it with `minibatches` updates each.

    The prompts are shuffled and cut into parts; a group is never split. A later pass takes the same
    parts in another order. The order depends on (seed, step, epoch) alone.

    A part keeps its micro-batches, because log-probs are comparable to the bit only where the same
    code computed them on the same flat row: in bf16 another packing moves a log-prob by rounding,
    which a KL in the loss would learn from.
    """
    tree_lengths = samples.data.tree_lengths(config.share_prompts)
    first = []
    order = np.random.default_rng([config.seed, step, 0]).permutation(len(samples.data))
    for part in np.array_split(order, minibatches):
        if not len(part):  # more minibatches than prompts
            continue
        part = np.sort(part)
        bins = micro_batches(tree_lengths, part, config.max_tokens, mesh.dp_rank, mesh.dp)
        lengths = samples.scored_lengths[samples.data.responses_of(part)]
        first.append(Update(0, part, bins, lengths))
    result = list(first)
    for epoch in range(1, epochs):
        order = np.random.default_rng([config.seed, step, epoch]).permutation(len(first))
        result += [first[i]._replace(epoch=epoch) for i in order]
    return result


def first_epoch(plan: list[Update]) -> list[list[int]]:
    """Return this rank's micro-batches of the first pass over a rollout."""
    return [items for update in plan if update.epoch == 0 for items in update.bins]


@torch.no_grad()
def token_logps(
    model: GPT, data: Dataset, bins: list[list[int]], config: RolloutConfig
) -> np.ndarray:
    """Compute the log-prob of every scored token as training does, (M,) fp64. Collective.

    bins: this rank's micro-batches. A first update on the same ones gets bit-identical log-probs.
    """
    return logps_at(model, data, bins, config, (config.temperature,))[0]


@torch.no_grad()
def logps_at(
    model: GPT,
    data: Dataset,
    bins: list[list[int]],
    config: RolloutConfig,
    temperatures: tuple[float, ...],
) -> np.ndarray:
    """Compute `token_logps` at several temperatures in one pass, (temperatures, M). Collective."""
    shape = (len(temperatures), int(data.scored_len.sum()))
    logps = torch.zeros(shape, dtype=torch.float64, device=model.device)
    batches = (make_batch(data, items, config.share_prompts) for items in bins)
    for batch, hidden in pipeline(model, batches):
        tokens = batch.token_columns["token_index"]
        for row, temperature in zip(logps, temperatures):
            row[tokens] = model.logps(hidden, batch, temperature).double()
    return model.mesh.sum(logps.cpu()).numpy()  # each token is on one rank, 0 on the others


def add_logps(
    samples: Rollout,
    plan: list[Update],
    model: GPT,
    ref: GPT | None,
    config: RolloutConfig,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Add the log-probs of the old policy and of the reference to the samples. Collective.

    They become token columns old_logps and ref_logps. Returns both, (M,) fp64 each, and metrics
    (KL in nats per response; sampler_gap, see sampling/gap.py). Without a reference the policy
    takes its place: the KL is then 0.

    Both models are run as in training, over the micro-batches of the updates. The sampler's
    arithmetic differs, so its log-probs would make the first ratio only about 1, and their rounding
    a KL that scaled advantages blow up to unit size. They serve sampler_gap only.
    """
    bins = first_epoch(plan)
    if config.temperature == 1:
        old_logps = token_logps(model, samples.data, bins, config)
        plain = old_logps
    else:
        both = (config.temperature, 1.0)
        old_logps, plain = logps_at(model, samples.data, bins, config, both)
    row = {}
    # Some engines report log-probs at the temperature that they sample at, and not at 1.
    nearest = min((plain, old_logps), key=lambda logps: mean_gap(samples.logps, logps))
    distance = mean_gap(samples.logps, nearest)
    if not np.isnan(distance):
        row["sampler_gap"] = distance
        row["engine/kl"] = float(np.nanmean(samples.logps - nearest))
    drawn = samples.logps
    if truncated(config):
        drawn, nearest = samples.drawn_logps, old_logps
        if not np.isnan(drawn).all():  # of the policy's probability, at most 1
            row["rollout/kept"] = float(np.nanmean(np.exp(nearest - drawn)))
    if correction(config) != "none":
        row |= add_engine_weights(samples, drawn, nearest, config)
    samples.data.add_tokens("old_logps", old_logps)
    old = torch.from_numpy(old_logps)
    if ref is None:
        return old, old, row
    ref_logps = token_logps(ref, samples.data, bins, config)
    samples.data.add_tokens("ref_logps", ref_logps)
    reference = torch.from_numpy(ref_logps)
    for name, kind in (("kl", "k1"), ("kl_k3", "k3")):
        nats = losses.kl_estimate(old, reference, kind).sum().item()
        row[name] = nats / len(samples.samples)
    return old, reference, row


def add_engine_weights(
    samples: Rollout, drawn: np.ndarray, logps: np.ndarray, config: RolloutConfig
) -> dict[str, float]:
    """Add the weights of --engine-correction as a token column, engine_weight; return metrics.

    drawn: log-probs under the sampler, (M,); truncated samples count by those after truncation.
    logps: the policy's, (M,), as training computes them at the temperature that the sampler reports
    at. A token whose log-prob the sampler does not report has weight 1.
    """
    log_ratio = np.nan_to_num(logps - drawn, nan=0.0)
    weights, cut = losses.engine_weights(
        torch.from_numpy(log_ratio),
        torch.from_numpy(samples.scored_lengths),
        correction(config),
        config.engine_by,
        config.engine_cap,
    )
    samples.data.add_tokens("engine_weight", weights.numpy())
    return {"engine/cut": cut.double().mean().item(), "engine/weight": weights.mean().item()}
