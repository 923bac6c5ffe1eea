"""The sources of samples: the model of this process, or servers that are sent its weights.

Each sample has its own random numbers, seeded by step and position, so neither the rank that draws
it nor the rest of the batch matters.
"""

from contextlib import nullcontext
from pathlib import Path

import numpy as np

from architecture import GPTConfig
from config import RolloutConfig
from data.templates import Template
from model import GPT
from sampling.ahead import Sampler
from sampling.chosen import of_model
from sampling.engine import Engine
from sampling.rewards import leader
from sampling.sampler import Sample, generate
from weights.folder import load_model, save_model
from weights.peft import lora_of, save_adapter


def local_sampler(
    model: GPT,
    template: Template,
    config: RolloutConfig,
    mixed: tuple[GPT, float] | None = None,
) -> Sampler:
    """Return a sampler that draws from a model in this process, with its current weights.

    mixed: another model and its share a of the geometric mixture p^(1-a) q^a, token by token.
    """

    def sample(ids: list[list[int]], seeds: list[int], n: int, temperature: float) -> list[Sample]:
        with model.whole(), mixed[0].whole() if mixed else nullcontext():
            return generate(
                model,
                ids,
                config.max_new_tokens,
                temperature,
                config.top_k,
                config.top_p,
                stop_ids=template.stop_ids,
                batch_size=config.rollout_batch,
                n=n,
                seeds=seeds,
                stop_texts=config.stop,
                decode=template.tokenizer.decode,
                min_new_tokens=config.min_new_tokens,
                keep_experts=config.replay_routing,
                mixed=mixed,
            )

    return sample


def make_sampler(
    model: GPT,
    template: Template,
    config: RolloutConfig,
    server: Engine | None = None,
    step: int = 0,
) -> Sampler:
    """Return a sampler that draws from the policy with its current weights. Collective.

    step: of training, from 1; with --rollout-ahead its samples are those of older weights. Only a
    `leader`'s samples count. Servers receive the weights first, where they learn. With pipeline
    stages no rank has a whole model to sample from: the leaders load one, by way of OUT/rollout,
    for as long as they sample. If that does not fit, use a server.
    """
    mesh = model.mesh
    if config.replay_routing and not model.c.experts:
        raise ValueError("--replay-routing is for mixtures of experts, and this model is none")
    model.replays = config.replay_routing  # on the batches of its samples
    if server is None and mesh.pp == 1:
        return local_sampler(model, template, config)
    folder = Path(config.out).resolve() / "rollout"
    if server is None or server.learns:
        if server and server.adapters:
            save_adapter(model, folder, config.model, lora_of(config))
        else:
            save_model(model, folder, config.model, template)
    if server and server.ahead:
        server.ahead.finish(mesh)
    if server and server.learns:
        server.loaded(folder, *mesh.ask(lambda: server.load(folder)))
    if server and server.ahead and step:
        draws = config.seed, config.group_size, config.temperature
        return _with_sparse_layers(server.ahead.sampler(step, *draws, mesh), model.c)
    if not leader(mesh):
        return lambda ids, seeds, n, temperature: []
    if server:
        return _with_sparse_layers(server.sample, model.c)
    return local_sampler(load_model(folder, model.dtype, model.device), template, config)


def _with_sparse_layers(sampler: Sampler, c: GPTConfig) -> Sampler:
    """Return a sampler of servers that keeps the experts of a model's sparse layers, if any."""

    def sample(ids: list[list[int]], seeds: list[int], n: int, temperature: float) -> list[Sample]:
        return [
            one._replace(
                experts=of_model(one.experts, c), prompt_experts=of_model(one.prompt_experts, c)
            )
            for one in sampler(ids, seeds, n, temperature)
        ]

    return sample


def with_reference(policy: Sampler, ref: Sampler, count: int) -> Sampler:
    """Return a sampler whose last `count` samples to each prompt are the reference's."""

    def sample(ids: list[list[int]], seeds: list[int], n: int, temperature: float) -> list[Sample]:
        table = np.array(seeds).reshape(len(ids), n)
        own = n - count
        parts = [(policy, table[:, :own]), (ref, table[:, own:])]
        drawn: list[list[Sample]] = [[] for _ in ids]
        for sampler, part in parts:
            if not part.shape[1]:
                continue
            flat = sampler(ids, part.ravel().tolist(), part.shape[1], temperature)
            for i in range(len(ids)):
                drawn[i] += flat[i * part.shape[1] : (i + 1) * part.shape[1]]
        return [one for group in drawn for one in group]

    return sample
