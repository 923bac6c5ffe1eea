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

    A pass shuffles the prompts and cuts them into parts; a group is never split. The order depends
    on (seed, step, epoch) alone.
    """
    tree_lengths = samples.data.tree_lengths(config.share_prompts)
    result = []
    for epoch in range(epochs):
        order = np.random.default_rng([config.seed, step, epoch]).permutation(len(samples.data))
        for part in np.array_split(order, minibatches):
            if not len(part):  # more minibatches than prompts
                continue
            part = np.sort(part)
            bins = micro_batches(tree_lengths, part, config.max_tokens, mesh.dp_rank, mesh.dp)
            lengths = samples.scored_lengths[samples.data.responses_of(part)]
            result.append(Update(epoch, part, bins, lengths))
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
    logps = torch.zeros(int(data.scored_len.sum()), dtype=torch.float64)
    batches = (make_batch(data, items, config.share_prompts) for items in bins)
    for batch, hidden in pipeline(model, batches):
        batch_logps = model.logps(hidden, batch, config.temperature)
        logps[batch.token_columns["token_index"].cpu()] = batch_logps.double().cpu()
    return model.mesh.sum(logps).numpy()  # each token is on one rank, 0 on the others


def add_logps(
    samples: Rollout,
    plan: list[Update],
    model: GPT,
    ref: GPT | None,
    config: RolloutConfig,
    recompute: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Add the log-probs of the old policy and of the reference to the samples. Collective.

    They become token columns old_logps and ref_logps. Returns both, (M,) fp64 each, and metrics
    (KL in nats per response). Without a reference the policy takes its place: the KL is then 0.

    The sampler's arithmetic differs from training's, so its log-probs would make the first ratio
    only about 1. recompute=False keeps them if they are known: enough for a single update, whose
    ratio is 1 by definition.
    """
    bins = first_epoch(plan)
    row = {}
    old_logps = samples.logps
    if recompute or np.isnan(old_logps).any():
        old_logps = token_logps(model, samples.data, bins, config)
        row["sampler_gap"] = float(np.abs(samples.logps - old_logps).mean())
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
