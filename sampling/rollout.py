"""Rollouts: the prompts of a step -> samples, rewards and a data set of prompt trees to train on.

    prompts = load_prompts(...)                                      data/dataset.py
    sample = sampler(model, template, config, server)                the policy as it is now, here or on a server
    found = collect(prompts.take(examples), sample, reward, template, config, mesh, seeds(config.seed, step, n, G))
    found.data                                                       n trees of G responses, on every rank the same

A rollout is a function of (weights, seed, step): a sample's random numbers are its own, by (seed, step, place in the
step), whatever rank draws it and whatever else is in the batch. Every rank holds all of a step's samples (they are
small); from there on training goes as over any data set: whole trees are packed into micro-batches and dealt to ranks.

Letters: n prompts, G samples each, R = n G responses, M tokens of all of them.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import RolloutConfig
from data.dataset import Dataset, Prompts, from_trees
from data.templates import Template
from data.trees import make_batch
from model import GPT
from parallel import Mesh
from pipeline import pipeline
from sampling.rewards import Reward, leader
from sampling.sampler import Sample, generate
from sampling.server import Server
from weights.folder import load_model, save_model

# (prompts of token ids, a seed for each of their samples, samples a prompt, temperature) -> samples, prompt by prompt.
Sampler = Callable[[list[list[int]], list[int], int, float], list[Sample]]
SHOWN = 4  # prompts of a step whose samples are logged


@dataclass
class Rollout:
    """Samples of a step with their rewards, in the order of the prompts; the same on every rank."""

    prompts: Prompts  # n
    samples: list[Sample]  # R
    texts: list[str]  # R
    rewards: np.ndarray  # (R,) fp64, the penalty for not ending taken off
    ended: np.ndarray  # (R,) bool
    data: Dataset  # n trees; token column `place` counts the M sampled tokens
    seconds: dict[str, float]  # rollout: drawing, scoring: rewards

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each response, (R,)."""
        return self.data.response_len

    @property
    def logps(self) -> np.ndarray:
        """Log-probs that the sampler reports, (M,) fp64; NaN where a server does not."""
        return np.concatenate([np.asarray(s.logps, np.float64) for s in self.samples])

    def metrics(self) -> dict[str, float]:
        """Means over the samples."""
        groups = self.rewards.reshape(len(self.prompts.ids), -1)
        alike = {
            "frac_reward_zero_std": float((np.ptp(groups, 1) == 0).mean())
        }  # groups that teach nothing
        return {
            "reward": self.rewards.mean().item(),
            "reward_std": self.rewards.std().item(),
            **(alike if groups.shape[1] > 1 else {}),
            "completions/mean_length": self.lengths.mean().item(),
            "completions/ended": self.ended.mean().item(),
        }


def seeds(seed: int, step: int, n: int, group: int) -> list[int]:
    """A seed for each sample of step `step` (from 1; 0 is the evaluation), n prompts with `group` samples each."""
    places = [(i, k) for i in range(n) for k in range(group)]
    return [
        int(np.random.SeedSequence([seed, step, *at]).generate_state(1, np.uint64)[0] >> 1)
        for at in places
    ]


def local(model: GPT, template: Template, config: RolloutConfig) -> Sampler:
    """Samples from the model itself, as its weights are when it is called."""

    def sample(ids: list[list[int]], seeds: list[int], n: int, temperature: float) -> list[Sample]:
        return generate(
            model, ids, config.max_new_tokens, temperature, stop_ids=template.stop_ids,
            batch_size=config.rollout_batch, n=n, seeds=seeds,
        )  # fmt: skip

    return sample


def sampler(
    model: GPT, template: Template, config: RolloutConfig, server: "Server | None" = None
) -> Sampler:
    """What draws samples of the policy as it is now; collective. Only a `leader`'s samples mean anything.

    A server is given the new weights (with --rollout-reload). With pipeline stages no rank has a model to sample from:
    the leaders load all of it, by way of OUT/rollout, for as long as they sample. Where it is too large, take a server.
    """
    mesh = model.mesh
    if server is None and mesh.pp == 1:
        return local(model, template, config)
    if server is None or config.rollout_reload:
        folder = Path(config.out).resolve() / "rollout"
        save_model(model, folder, config.model, template)
        if server:
            mesh.ask(lambda: server.reload(folder))
    if not leader(mesh):
        return lambda ids, seeds, n, temperature: []
    return (
        server.sample
        if server
        else local(load_model(folder, model.dtype, model.device), template, config)
    )


def collect(
    prompts: Prompts, sample: Sampler, reward: Reward, template: Template, config: RolloutConfig, mesh: Mesh,
    seeds: list[int], temperature: float,
) -> Rollout:  # fmt: skip
    """Draws and scores samples of some prompts, as many for each as there are seeds for it. Collective."""
    started = time.perf_counter()
    n, group = len(prompts.ids), len(seeds) // len(prompts.ids)
    mine = list(range(mesh.dp_rank, n, mesh.dp))
    drawn = []
    if mine:
        own = [seeds[i * group + k] for i in mine for k in range(group)]
        drawn = sample([prompts.ids[i] for i in mine], own, group, temperature)
    samples = _exchange(mesh, [i * group + k for i in mine for k in range(group)], drawn)
    texts = [template.tokenizer.decode(s.tokens).strip() for s in samples]
    drew = time.perf_counter()

    found = []
    if mine:
        own = [i * group + k for i in mine for k in range(group)]
        repeated = [i for i in mine for _ in range(group)]
        found = reward(
            [prompts.prompts[i] for i in repeated], [texts[i] for i in own], [prompts.rows[i] for i in repeated],
            trees([prompts.ids[i] for i in mine], [samples[i] for i in own]),
        ).tolist()  # fmt: skip
    rewards = np.array(_exchange(mesh, [i * group + k for i in mine for k in range(group)], found))
    ended = np.array([s.ended for s in samples])
    data = trees(prompts.ids, samples)
    data.add_tokens("place", np.arange(len(data.scored[data.scored == 1])))
    seconds = {"rollout": drew - started, "scoring": time.perf_counter() - drew}
    return Rollout(
        prompts, samples, texts, rewards - config.no_eos_penalty * ~ended, ended, data, seconds
    )


def _exchange(mesh: Mesh, places: list[int], values: list) -> list:
    """The values of all ranks, in the order of their places. Of ranks that share examples the leader's count."""
    parts = mesh.everyone(dict(zip(places, values)) if leader(mesh) else {})
    return [
        value
        for _, value in sorted(
            (item for part in parts for item in part.items()), key=lambda item: item[0]
        )
    ]


def trees(prompts: list[list[int]], samples: list[Sample]) -> Dataset:
    """Prompts and their samples, side by side, as a data set in memory; every sampled token is scored."""
    group = len(samples) // len(prompts)
    return from_trees(
        (ids, [(s.tokens, [1] * len(s.tokens)) for s in samples[i * group : (i + 1) * group]])
        for i, ids in enumerate(prompts)
    )


@torch.no_grad()
def token_logps(
    model: GPT, data: Dataset, bins: list[list[int]], config: RolloutConfig
) -> np.ndarray:
    """Log-prob of every sampled token under a model, (M,) fp64, by the path that training takes; collective.

    bins: this rank's micro-batches. Those of the first update give the very bits that its forward pass will.
    """
    found = torch.zeros(int(data.scored.sum()), dtype=torch.float64)
    batches = (make_batch(data, items, config.share_prompts) for items in bins)
    for batch, hidden in pipeline(model, batches):
        logps = model.logps(hidden, batch, config.temperature)
        found[batch.token_columns["place"].cpu()] = logps.double().cpu()
    return model.mesh.sum(found).numpy()  # a token lies on one rank only, the others have 0 there


def evaluate(
    prompts: Prompts,
    sample: Sampler,
    reward: Reward,
    template: Template,
    config: RolloutConfig,
    mesh: Mesh,
) -> tuple[dict[str, float], Rollout]:
    """Mean reward of one sample to each prompt at --eval-temperature, under eval/; the same draws every time."""
    own = seeds(config.seed, 0, len(prompts.ids), 1)
    found = collect(prompts, sample, reward, template, config, mesh, own, config.eval_temperature)
    return {f"eval/{name}": value for name, value in found.metrics().items()}, found


def check(prompts: Prompts, config: RolloutConfig) -> None:
    """ValueError where a prompt with all its samples at their longest would fit no micro-batch: it would fail later."""
    longest = max(map(len, prompts.ids)) + config.group_size * config.max_new_tokens
    if not config.share_prompts:
        longest += (config.group_size - 1) * max(map(len, prompts.ids))
    if longest > config.max_tokens:
        raise ValueError(
            f"a prompt and its {config.group_size} samples may have {longest} tokens, more than a micro-batch of "
            f"{config.max_tokens}: raise --max-tokens to {longest}, or lower --max-new-tokens or --group-size"
        )


def log_samples(out: str, step: int, found: Rollout) -> None:
    """Appends the samples of the first prompts of a step to OUT/samples.jsonl."""
    group = len(found.samples) // len(found.prompts.ids)
    with open(Path(out) / "samples.jsonl", "a", encoding="utf-8") as file:
        for i in range(min(len(found.samples), SHOWN * group)):
            row = {
                "step": step,
                "prompt": found.prompts.prompts[i // group],
                "response": found.texts[i],
            }
            row |= {"reward": found.rewards[i].item(), "ended": found.samples[i].ended}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def forget_samples(out: str, step: int) -> None:
    """Drops logged samples of steps that a resumed run takes again."""
    path = Path(out) / "samples.jsonl"
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        path.write_text("".join(kept), encoding="utf-8")


# ---- a server --------------------------------------------------------------------------------------------------------
