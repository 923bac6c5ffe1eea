"""Refill: draw groups until a step has enough of them whose rewards differ. DAPO, arXiv 2503.14476.

A group of equal rewards has an advantage of 0 and teaches nothing. With --refill K, groups without
spread are replaced by samples of other prompts, in at most K further rounds. Rounds and prompts are
a function of (weights, seed, step), so a resumed run draws the same ones.

Letters: n prompts of a step, G samples each, R = n G responses.
"""

import time

import numpy as np

from config import RolloutConfig
from data.dataset import Prompts
from data.templates import Template
from model import GPT
from sampling.ahead import seeds
from sampling.engine import Engine
from sampling.rewards import Reward
from sampling.rollout import Rollout, collect, trees
from sampling.source import make_sampler


def draw(
    train: Prompts,
    examples: np.ndarray,
    rounds: int,
    step: int,
    model: GPT,
    reward: Reward,
    template: Template,
    config: RolloutConfig,
    server: Engine | None,
) -> tuple[Rollout, dict[str, float]]:
    """Draw the samples of step `step` (from 1), and refill at most `rounds` times. Collective.

    examples (n,): the step's prompts in `train`. Returns n groups, those with spread first drawn
    first, and metrics: refill/groups, how many were drawn, and refill/spread, the share of those
    with spread. If too few have spread, groups without fill the step.
    """
    started = time.perf_counter()
    sample = make_sampler(model, template, config, server, step)
    transfer = time.perf_counter() - started
    rng = np.random.default_rng([config.seed, step, 1])
    others = rng.permutation(np.setdiff1d(np.arange(len(train.ids)), examples))
    n, group = len(examples), config.group_size
    parts: list[Rollout] = []
    drawn = np.array([], np.int64)  # numbers of the prompts in the order of drawing
    spread = np.array([], bool)  # whether their rewards differ
    new = np.asarray(examples)
    while len(new):
        own_seeds = seeds(config.seed, step, len(drawn) + len(new), group)[len(drawn) * group :]
        part = collect(
            train.take(new),
            sample,
            reward,
            template,
            config,
            model.mesh,
            own_seeds,
            config.temperature,
        )
        parts.append(part)
        drawn = np.concatenate([drawn, new])
        spread = np.concatenate([spread, np.ptp(part.rewards.reshape(-1, group), 1) > 0])
        missing = max(0, n - int(spread.sum())) if len(parts) <= rounds else 0
        new, others = others[:missing], others[missing:]
    # With spread before without, each in the order of drawing; then all in that order again.
    kept = np.sort(np.argsort(~spread, kind="stable")[:n])  # (n,)
    row = {"refill/groups": float(len(drawn)), "refill/spread": spread.mean().item()}
    samples = _select(parts, train.take(drawn[kept]), kept, group)
    if server:
        samples.record_server(server, step, transfer)
    return samples, row


def _select(parts: list[Rollout], prompts: Prompts, kept: np.ndarray, group: int) -> Rollout:
    """Return the rollout of some groups, by their number over all parts, (n,)."""
    places = (kept[:, None] * group + np.arange(group)).ravel()  # (R,) of their responses
    samples = [sample for part in parts for sample in part.samples]
    texts = [text for part in parts for text in part.texts]
    chosen = [samples[place] for place in places]
    data = trees(prompts.ids, chosen)
    data.add_tokens("token_index", np.arange(data.scored_len.sum()))
    return Rollout(
        prompts,
        chosen,
        [texts[place] for place in places],
        np.concatenate([part.rewards for part in parts])[places],
        np.concatenate([part.ended for part in parts])[places],
        data,
        seconds={name: sum(part.seconds[name] for part in parts) for name in parts[0].seconds},
        lap_started=parts[-1].lap_started,
        named={
            name: np.concatenate([part.named[name] for part in parts])[places]
            for name in parts[0].named
        },
    )
