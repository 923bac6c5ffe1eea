"""Helpers for tests of online algorithms: samples drawn apart from a script, unscored tokens."""

import json
import math
from pathlib import Path

import pytest
import torch

from config import RolloutConfig
from data.dataset import load_prompts
from data.templates import Template
from data.tokenizer import load_tokenizer
from parallel import Mesh
from sampling import ahead, rollout, source
from sampling.rewards import load_reward
from sampling.sampler import Sample
from weights.folder import load_model

WORDS = "regex:[aeiou] "  # a reward that random responses earn now and then


def drawn(toy: Path, model: Path, config: RolloutConfig) -> rollout.Rollout:
    """Return the samples of step 1 for the first six prompts of the toy world, in float64."""
    template = Template("auto", load_tokenizer(model))
    file = toy / "world" / "sft.jsonl"
    prompts = load_prompts([file], template, 1000, log=lambda line: None).take(range(6))
    sample = source.local_sampler(load_model(model, torch.float64), template, config)
    reward = load_reward(config.reward, template)
    seeds = ahead.seeds(0, 1, 6, config.group_size)
    return rollout.collect(prompts, sample, reward, template, config, Mesh(), seeds, 1.0)


def read_samples(out: Path) -> list[dict]:
    """Return the rows of OUT/samples.jsonl."""
    return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]


# ---- samples with tokens that the policy did not choose, such as the output of a tool ---------


def mark(tokens: list[int]) -> list[int]:
    """Return marks: the first token scored, the last one not, and some in the middle not.

    Example: [5, 6, 7, 8] -> [1, 0, 1, 0].
    """
    middle = [int(token % 3 != 0) for token in tokens[1:-1]]
    return ([1, *middle, 0] if len(tokens) > 1 else [1])[: len(tokens)]


def with_marks(sample: Sample) -> Sample:
    """Return a sample with marks; its unscored tokens have no log-prob."""
    marks = mark(sample.tokens)
    logps = [logp if scored else math.nan for logp, scored in zip(sample.logps, marks)]
    return sample._replace(scored=marks, logps=logps, policy_logps=logps)


def sample_with_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make rollouts draw samples with unscored tokens for the rest of a test."""
    generate = source.generate

    def draw(*args, **flags) -> list[Sample]:
        return [with_marks(sample) for sample in generate(*args, **flags)]

    monkeypatch.setattr(source, "generate", draw)


def scored_places(samples: rollout.Rollout, unscored: bool) -> list[list[int]]:
    """Return the places of each response's scored tokens, computed apart from the rollout."""
    places = []
    for sample in samples.samples:
        marks = mark(sample.tokens) if unscored else [1] * len(sample.tokens)
        places.append([t for t, scored in enumerate(marks) if scored])
    gaps = [len(own) < len(s.tokens) - 1 for own, s in zip(places, samples.samples)]
    assert any(gaps) == unscored, "no token in the middle of a response is unscored"
    return places
