"""Rollouts: sample responses to prompts, score them, lay them out as prompt trees to train on.

    prompts = load(config.data, template, config)
    samples = draw(prompts.take(examples), step, model, reward, template, config, server)
    samples.data                                     n trees of G responses, the same on every rank

A rollout is a function of (weights, seed, step). Each sample has its own random numbers, seeded by
step and position, so neither the rank that draws it nor the rest of the batch matters. Every rank
holds all samples of a step (they are small). Training then works as on any data set: whole trees
are packed into micro-batches and dealt out to the ranks.

A sample is a sequence of tokens plus a mark on those that the policy chose: the scored ones. Other
tokens, such as the output of a tool, are context for what follows them. Only scored tokens have
log-probs, values, rewards, advantages and losses, and only they are counted.

Letters: n prompts, G samples each, R = n G responses, M scored tokens of all of them.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import sources
from config import RolloutConfig
from data.dataset import Dataset, Prompts, from_trees, load_prompts
from data.templates import Template
from disk import drop_rows_after
from model import GPT
from parallel import Mesh
from sampling.ahead import Sampler, seeds
from sampling.draw import check_drawing, correction
from sampling.engine import Engine
from sampling.named import read_weights, totals
from sampling.reload import reload_words
from sampling.rewards import Reward, leader
from sampling.sampler import Sample
from sampling.source import make_sampler

LOGGED_PROMPTS = 4  # of a step: their samples go to OUT/samples.jsonl


@dataclass
class Rollout:
    """The samples of a step with their rewards, prompt by prompt; the same on every rank."""

    prompts: Prompts  # n
    samples: list[Sample]  # R
    texts: list[str]  # R, with all their spaces
    rewards: np.ndarray  # (R,) fp64, less the `length_penalty`
    ended: np.ndarray  # (R,) bool
    data: Dataset  # n trees; token column `token_index` numbers the M scored tokens
    seconds: dict[str, float]  # by phase: rollout, scoring, transfer of weights to a server, and
    # what `lap` adds
    lap_started: float = 0.0  # when the last phase ended
    named: dict[str, np.ndarray] = field(default_factory=dict)  # several rewards, (R,) each
    age: int | None = None  # steps since the weights that drew them, with --rollout-ahead

    @property
    def scored_lengths(self) -> np.ndarray:
        """Scored tokens of each response, (R,) int64."""
        return self.data.scored_len

    @property
    def logps(self) -> np.ndarray:
        """Log-probs of the scored tokens at temperature 1 as the sampler reports them, (M,) fp64.

        NaN where it does not. Its arithmetic is not training's: compare them in sampler_gap only.
        """
        return self._of_scored([s.policy_logps for s in self.samples])

    @property
    def drawn_logps(self) -> np.ndarray:
        """Log-probs under the distribution that drew them, filters included, (M,); NaN: unknown."""
        return self._of_scored([s.logps for s in self.samples])

    def _of_scored(self, logps: list[list[float]]) -> np.ndarray:
        marks = np.concatenate([scored_marks(s) for s in self.samples])
        return np.concatenate([np.asarray(x, np.float64) for x in logps])[marks == 1]

    def tokens(self, config: RolloutConfig) -> int:
        """Return the tokens of all trees, what one pass of training computes."""
        return int(self.data.tree_lengths(config.share_prompts).sum())

    def metrics(self) -> dict[str, float]:
        """Return means over the samples, under the names of metrics.jsonl."""
        row = {
            "reward": self.rewards.mean().item(),
            "reward_std": self.rewards.std().item(),
        }
        groups = self.rewards.reshape(len(self.prompts.ids), -1)  # (n, G)
        if groups.shape[1] > 1:  # a group of equal rewards teaches nothing
            row["frac_reward_zero_std"] = float((np.ptp(groups, 1) == 0).mean())
        row |= {f"reward/{name}": column.mean().item() for name, column in self.named.items()}
        row["completions/mean_length"] = self.data.response_len.mean().item()
        row["completions/ended"] = self.ended.mean().item()
        if self.age is not None:
            row["rollout/age"] = self.age
        return row

    def record_server(self, server: Engine, step: int, seconds: float) -> None:
        """Record the age of samples that servers drew, and seconds of transfer and of waiting."""
        if server.ahead:
            self.age = server.ahead.age(step)
            seconds -= server.ahead.waited
            self.seconds["rollout"] += server.ahead.waited
        self.seconds["transfer"] = seconds

    def lap(self, phase: str) -> None:
        """Add the time since the last phase ended to `phase`."""
        now = time.perf_counter()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self.lap_started
        self.lap_started = now

    def throughput(self, training_tokens: int, config: RolloutConfig) -> dict[str, float]:
        """Return seconds and tokens per second of each phase, under the names of metrics.jsonl.

        The rollout counts sampled tokens, scoring the tokens of all trees, training
        `training_tokens`.
        """
        tokens = {
            "rollout": int(self.scored_lengths.sum()),
            "scoring": self.tokens(config),
            "training": training_tokens,
        }
        row = {}
        for phase, seconds in self.seconds.items():
            row[f"{phase}_seconds"] = seconds
            if phase in tokens:
                row[f"{phase}_tokens_per_second"] = tokens[phase] / seconds
        return row


def refuse_correction(config: RolloutConfig, why: str) -> None:
    """Raise ValueError for flags of the ratio to the sampler, where they are asked for in vain."""
    if config.replay_routing:
        raise ValueError(f"--replay-routing is for train_reinforce.py and train_ppo.py: {why}")
    if config.rollout_ahead:
        raise ValueError(f"--rollout-ahead is for train_reinforce.py and train_ppo.py: {why}")
    if correction(config) != "none":
        raise ValueError(f"--engine-correction is for train_reinforce.py and train_ppo.py: {why}")


def validate(config: RolloutConfig) -> None:
    """Raise ValueError for flags that no training from samples can run with."""
    if correction(config) == "none" and (config.engine_by != "token" or config.engine_cap != 2.0):
        raise ValueError("--engine-by and --engine-cap are for --engine-correction: set it as well")
    if config.rollout_reload and not config.rollout_url:
        raise ValueError("--rollout-reload is for --rollout-url: give the server's address as well")
    if config.rollout_transfer == "nccl" and not config.rollout_url:
        raise ValueError("--rollout-transfer nccl needs --rollout-url: it names the servers")
    if config.rollout_transfer == "nccl" and config.rollout_reload:
        raise ValueError("--rollout-reload and --rollout-transfer nccl are two ways: drop one")
    if config.rollout_ahead and not config.rollout_url:
        raise ValueError("--rollout-ahead is for --rollout-url: this process cannot draw and train")
    if config.rollout_ahead and getattr(config, "refill", 0):
        raise ValueError(
            "--refill chooses prompts by the rewards of the first draw, and --rollout-ahead draws "
            "before that: drop one of the two"
        )
    check_drawing(config)
    reload_words(config.rollout_reload)
    read_weights(config.reward_weights)
    if config.overlong_buffer > config.max_new_tokens:
        raise ValueError(
            f"--overlong-buffer {config.overlong_buffer} is more than --max-new-tokens "
            f"{config.max_new_tokens}: a fifth of it is common"
        )
    if config.base_dtype != "none" and (config.pp > 1 or config.rollout_url):
        flag = f"--pp {config.pp}" if config.pp > 1 else "--rollout-url"
        raise ValueError(
            f"--base-dtype {config.base_dtype} with {flag}: samples would come from the weights "
            "before rounding, and not from the policy that trains: drop one of the two"
        )


# ---- prompts ---------------------------------------------------------------------------------


def load(files: list[str], template: Template, config: RolloutConfig) -> Prompts | None:
    """Load the prompts of JSONL files, leaving room for a response; None if there are no files."""
    if not files:
        return None
    files = sources.paths(files, "data")
    longest = config.max_length - config.max_new_tokens
    return load_prompts(
        files, template, longest, config.overlong, config.max_bad_rows, ignore=config.ignore_keys
    )


def load_sets(template: Template, config: RolloutConfig) -> dict[str, Prompts]:
    """Load the prompts of every set of --eval-data, by its name."""
    sets = sources.named_sets(config.eval_data, config.best_by)
    return {name: load(files, template, config) for name, files in sets.items()}


def tree_limits(prompts: Prompts, config: RolloutConfig) -> np.ndarray:
    """Return how many tokens each prompt and its samples may have, (n,)."""
    group = config.group_size
    copies = 1 if config.share_prompts else group
    return np.array([copies * len(ids) + group * config.max_new_tokens for ids in prompts.ids])


def check_fits(prompts: Prompts, config: RolloutConfig) -> None:
    """Raise ValueError if a prompt with all samples at full length would exceed a micro-batch.

    Otherwise the run would fail later, at the first step with such samples.
    """
    longest = int(tree_limits(prompts, config).max())
    if longest > config.max_tokens:
        raise ValueError(
            f"a prompt and its {config.group_size} samples may have {longest} tokens, more than a "
            f"micro-batch of {config.max_tokens}: raise --max-tokens to {longest}, or lower "
            "--max-new-tokens or --group-size"
        )


# ---- sampling --------------------------------------------------------------------------------


def collect(
    prompts: Prompts,
    sample: Sampler,
    reward: Reward,
    template: Template,
    config: RolloutConfig,
    mesh: Mesh,
    seeds: list[int],
    temperature: float,
) -> Rollout:
    """Draw and score samples of some prompts, one per seed and equally many per prompt. Collective.

    Each rank draws and scores those of its share of the prompts; every rank returns all of them.
    """
    started, n = time.perf_counter(), len(prompts.ids)
    group = len(seeds) // n
    mine = list(range(mesh.dp_rank, n, mesh.dp))  # this rank's prompts
    places = [i * group + k for i in mine for k in range(group)]  # of their samples among all R
    own_seeds = [seeds[place] for place in places]
    # A rank without prompts calls it as well: a sharded model is gathered by all.
    drawn = sample([prompts.ids[i] for i in mine], own_seeds, group, temperature)
    samples = _exchange(mesh, places, drawn)
    texts = [template.tokenizer.decode(s.tokens) for s in samples]
    sampled = time.perf_counter()

    scores: list = []
    if mine:
        repeated = [place // group for place in places]
        values = reward(
            [prompts.prompts[i] for i in repeated],
            [texts[place] for place in places],
            [prompts.rows[i] for i in repeated],
            trees([prompts.ids[i] for i in mine], [samples[place] for place in places]),
        )
        names = values.dtype.names
        scores = [dict(zip(names, row)) for row in values.tolist()] if names else values.tolist()
    rewards, named = totals(_exchange(mesh, places, scores), config)
    ended = np.array([s.ended for s in samples])  # (R,)
    data = trees(prompts.ids, samples)
    data.add_tokens("token_index", np.arange(data.scored_len.sum()))
    scored = time.perf_counter()
    return Rollout(
        prompts,
        samples,
        texts,
        rewards - length_penalty(data.scored_len, ended, config),
        ended,
        data,
        seconds={"rollout": sampled - started, "scoring": scored - sampled},
        lap_started=scored,
        named=named,
    )


def length_penalty(lengths: np.ndarray, ended: np.ndarray, config: RolloutConfig) -> np.ndarray:
    """Return what is subtracted from the reward for length and for not ending, (R,).

    DAPO's soft punishment, arXiv 2503.14476 Eq. 13: 0 up to --max-new-tokens less
    --overlong-buffer, then rising in a line to --overlong-penalty. lengths, ended (R,).
    """
    penalty = config.no_eos_penalty * ~ended
    if config.overlong_buffer:
        excess = lengths - (config.max_new_tokens - config.overlong_buffer)
        share = np.clip(excess / config.overlong_buffer, 0.0, 1.0)
        penalty = penalty + config.overlong_penalty * share
    return penalty


def _exchange(mesh: Mesh, places: list[int], values: list) -> list:
    """Return the values of all ranks in the order of their places; only leaders' values count."""
    parts = mesh.everyone(dict(zip(places, values)) if leader(mesh) else {})
    by_place = {place: value for part in parts for place, value in part.items()}
    return [by_place[place] for place in sorted(by_place)]


def draw(
    prompts: Prompts,
    step: int,
    model: GPT,
    reward: Reward,
    template: Template,
    config: RolloutConfig,
    server: Engine | None,
) -> Rollout:
    """Draw and score the samples of training step `step` (from 1) from the policy. Collective."""
    started = time.perf_counter()
    sample = make_sampler(model, template, config, server, step)
    transfer = time.perf_counter() - started
    own_seeds = seeds(config.seed, step, len(prompts.ids), config.group_size)
    samples = collect(
        prompts, sample, reward, template, config, model.mesh, own_seeds, config.temperature
    )
    if server:
        samples.record_server(server, step, transfer)
    return samples


def evaluate(
    sets: dict[str, Prompts],
    model: GPT,
    reward: Reward,
    template: Template,
    config: RolloutConfig,
    server: Engine | None,
) -> tuple[dict[str, dict[str, float]], Rollout]:
    """Draw and score one sample per prompt at --eval-temperature, with the same seeds every time.

    Returns the metrics of every set, under eval/, and the samples of the first. Collective.
    """
    sample = make_sampler(model, template, config, server)
    drawn, results = {}, {}
    for name, prompts in sets.items():
        own_seeds = seeds(config.seed, 0, len(prompts.ids), 1)
        more = model.mesh, own_seeds, config.eval_temperature
        drawn[name] = collect(prompts, sample, reward, template, config, *more)
        results[name] = {f"eval/{key}": value for key, value in drawn[name].metrics().items()}
    return results, next(iter(drawn.values()))


def scored_marks(sample: Sample) -> list[int]:
    """Return 1 for each token that the policy chose, else 0. ValueError if it chose none."""
    marks = sample.scored if sample.scored is not None else [1] * len(sample.tokens)
    if len(marks) != len(sample.tokens) or not any(marks):
        raise ValueError(
            f"a sample of {len(sample.tokens)} tokens has {len(marks)} marks, {sum(marks)} of them "
            "scored: mark every token, and at least one as the policy's"
        )
    return marks


def trees(prompts: list[list[int]], samples: list[Sample]) -> Dataset:
    """Return prompts and their samples, side by side, as a data set in memory."""
    group = len(samples) // len(prompts)
    data = from_trees(
        (ids, [(s.tokens, scored_marks(s)) for s in samples[i * group : (i + 1) * group]])
        for i, ids in enumerate(prompts)
    )
    parts = [x for s in samples for x in (s.prompt_experts, s.experts) if x is not None]
    if parts:
        data.experts = np.concatenate(parts)
    return data


# ---- OUT/samples.jsonl -----------------------------------------------------------------------


def log_samples(samples: Rollout, step: int, config: RolloutConfig, mesh: Mesh) -> None:
    """Append the samples of a step's first prompts to OUT/samples.jsonl, if they are due."""
    every = config.log_samples
    if not mesh.main or not every or (step != 1 and step % every):
        return
    group = len(samples.samples) // len(samples.prompts.ids)
    path = Path(config.out) / "samples.jsonl"
    # A JSON escape can hold half of a surrogate pair, UTF-8 cannot.
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        for i in range(min(len(samples.samples), LOGGED_PROMPTS * group)):
            row = {
                "step": step,
                "prompt": samples.prompts.prompts[i // group],
                "response": samples.texts[i],
                "reward": samples.rewards[i].item(),
                "tokens": len(samples.samples[i].tokens),
                "ended": samples.samples[i].ended,
            }
            if samples.age is not None:
                row["age"] = samples.age
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def drop_samples_after(step: int, config: RolloutConfig, mesh: Mesh) -> None:
    """Drop logged samples of later steps, which a resumed run repeats."""
    if mesh.main:
        drop_rows_after(Path(config.out) / "samples.jsonl", step)


def print_samples(samples: Rollout, n: int, say: Callable[[str], Any]) -> None:
    """Print the first n prompts and responses of an evaluation."""
    for prompt, text in list(zip(samples.prompts.prompts, samples.texts))[:n]:
        say(f"  prompt  {str(prompt)[-300:]!r}\n  answer  {text.strip()!r}")
