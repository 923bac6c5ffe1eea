"""Samples of later steps, which servers draw while this step trains: --rollout-ahead K.

Before a step the servers get the newest weights, and begin to draw the samples of the K-th step
after it. A step's samples are therefore K steps old, those of the first K steps of a process as
many as went before. `engine_weights` corrects for that: its μ are the weights that drew a sample.

Servers get no weights while they draw, so a sample is of one policy; a step waits for what is being
drawn. With the same server the samples are a function of the seed, of K and of the step at which
the process began: a resumed run goes on with samples of age 0, and no prompt is lost or repeated.
"""

import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Protocol

import numpy as np

from data.dataset import Prompts
from parallel import Mesh
from sampling.rewards import leader
from sampling.sampler import Sample
from sampling.together import start

# (prompts as token ids, a seed per sample, samples per prompt, temperature) -> samples by prompt.
Sampler = Callable[[list[list[int]], list[int], int, float], list[Sample]]


class Steps(Protocol):
    """The steps of a run: how many, and the examples of each, numbered from 0."""

    @property
    def total(self) -> int:
        """Number of steps."""

    def examples(self, step: int) -> np.ndarray:
        """Return the examples of a step."""


def seeds(seed: int, step: int, n: int, group: int) -> list[int]:
    """Return a seed for each of `group` samples to each of n prompts, prompt by prompt.

    step: from 1; 0 is the evaluation. A seed depends on (seed, step, prompt, sample) alone.
    """
    return [
        int(np.random.SeedSequence([seed, step, i, k]).generate_state(1, np.uint64)[0] >> 1)
        for i in range(n)
        for k in range(group)
    ]


class Ahead:
    """The samples that are being drawn for later steps, of this rank's prompts."""

    def __init__(self, sample: Sampler, prompts: Prompts, steps: Steps, ahead: int):
        self.sample = sample
        self.prompts = prompts
        self.steps = steps
        self.ahead = ahead
        self.first = 0  # step at which this process began, from 1
        self.drawing: dict[int, Future] = {}  # by step
        self.waited = 0.0  # seconds of the last `finish`

    def age(self, step: int) -> int:
        """Return by how many steps the weights that drew a step's samples are old."""
        return min(self.ahead, step - self.first)

    def finish(self, mesh: Mesh) -> None:
        """Wait until no server draws anything, on all ranks. OSError: one failed. Collective."""
        started = time.perf_counter()
        failed: Exception | None = None
        for future in self.drawing.values():
            failed = failed or future.exception()  # type: ignore[assignment]
        failures = [error for error in mesh.everyone(failed) if error]
        if failures:
            raise failures[0]
        self.waited = time.perf_counter() - started

    def sampler(self, step: int, seed: int, group: int, temperature: float, mesh: Mesh) -> Sampler:
        """Return a sampler of a step's samples; with its draw that of the K-th later step begins.

        step: from 1.
        """
        self.first = self.first or step
        ready = self.drawing.pop(step, None)

        def begin() -> None:
            for later in range(step + 1, min(step + self.ahead, self.steps.total) + 1):
                if later in self.drawing:
                    continue
                chosen = self.prompts.take(self.steps.examples(later - 1))
                n = len(chosen.ids)
                table = np.array(seeds(seed, later, n, group)).reshape(n, group)
                mine = range(mesh.dp_rank, n, mesh.dp)
                ids, own = [chosen.ids[i] for i in mine], table[list(mine)].ravel().tolist()
                draw = partial(self.sample, ids, own, group, temperature)
                self.drawing[later] = start(draw)  # a process that ends does not wait for it

        if ready is not None:
            begin()
            return lambda ids, seeds, n, temperature: ready.result()
        if not leader(mesh):
            return lambda ids, seeds, n, temperature: []

        def draw(
            ids: list[list[int]], seeds: list[int], n: int, temperature: float
        ) -> list[Sample]:
            drawn = self.sample(ids, seeds, n, temperature)
            begin()
            return drawn

        return draw
