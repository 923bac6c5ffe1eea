"""The distance between the sampler's log-probs and training's, and what it says about a server.

`sampler_gap` is the mean |log π reported - log π recomputed| over the tokens of a rollout, in nats,
both at temperature 1. It is the only use of the sampler's own numbers: every other difference of
log-probs is between two that training computed over the same micro-batches.

With a server the gap tells three cases apart. Measured on the CPU with random models of 2 layers,
width 32 and 256, over 500 tokens, and the limits that follow:

    fp32 server, fp32 run                  5e-7 to 8e-7      rounding: below 1e-4
    bf16 server, bf16 run                  0.003 to 0.005    rounding: below 0.05
    bf16 server, fp32 run, or the reverse  0.012 to 0.015    another precision: below OTHER_WEIGHTS
    another random model                   1.7               a wrong server: ends the run
    the weights of step 0, steps later     grows             a stale server: ends the run
"""

import numpy as np
import torch

from config import RolloutConfig
from sampling.rollout import Rollout

ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 0.05}  # same precision
MOVED = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.05}  # least gap called stale
OTHER_WEIGHTS = 0.2  # nats a token that no precision explains
GROWTH = 5.0  # times the gap of the first rollout, beyond which the server is stale
MIN_TOKENS = 16  # with known log-probs: fewer say nothing


def mean_gap(reported: np.ndarray, recomputed: np.ndarray) -> float:
    """Return the mean distance of two (M,) log-probs over the tokens where both are known, or NaN.

    A sampler that reports -inf for a token it drew is infinitely far away.
    """
    known = ~np.isnan(reported)
    if not known.any():
        return float("nan")
    return float(np.abs(reported[known] - recomputed[known]).mean())


class ServerCheck:
    """Check from rollout to rollout that a server samples from the policy's weights.

    The first rollout of a process sets what the server's precision costs.
    """

    def __init__(self, config: RolloutConfig, dtype: torch.dtype):
        self.config = config
        self.dtype = dtype
        self.urls = " ".join(config.rollout_url)
        self.first: float | None = None  # gap of the first rollout
        self.warned = False

    def __call__(
        self, gap: float | None, samples: Rollout, ref_logps: torch.Tensor | None = None
    ) -> None:
        """Check a rollout. ValueError: the server does not serve these weights.

        gap: its sampler_gap, None if the server reports no log-probs. ref_logps: (M,) of the
        reference, which a server that never loads new weights usually still serves.
        """
        if not self.config.rollout_url:
            return
        known = int((~np.isnan(samples.logps)).sum())
        if gap is None or known < MIN_TOKENS:
            if gap is None and not self.warned:
                print(
                    f"warning: {self.urls} reports no log-probs, so nothing would "
                    "show that it samples from old weights: use a server that does (vLLM, SGLang)"
                )
                self.warned = True
            return
        if self.first is None:
            self._check_first(gap)
            self.first = gap
        if samples.age:  # the policy has moved since: engine/kl says how far
            return
        ref_gap = gap
        if ref_logps is not None and self.config.temperature == 1:
            ref_gap = mean_gap(samples.logps, ref_logps.numpy())
        limit = max(2 * self.first, min(GROWTH * self.first, OTHER_WEIGHTS), MOVED[self.dtype])
        if gap > limit or (ref_gap < gap / 2 and gap > ROUNDING[torch.float32]):
            serves = "old weights"
            if ref_gap < gap / 2:
                serves = f"the reference's weights ({ref_gap:.2g} nats a token from them)"
            reload = self.config.rollout_reload
            how = f"--rollout-reload {reload!r} did not load" if reload else "it did not load"
            raise ValueError(
                f"stale server: sampler_gap is {gap:.2g} nats a token and was {self.first:.2g} at "
                f"first: {self.urls} still serves {serves}, because {how} "
                f"{self.config.out}/rollout: "
                + ("fix that command" if reload else "restart it, and go on with --resume auto")
            )

    def _check_first(self, gap: float) -> None:
        """Tell another model (ValueError) from another precision (a note) and from rounding."""
        url = self.urls
        if not gap <= OTHER_WEIGHTS:
            raise ValueError(
                f"wrong server: sampler_gap is {gap:.2g} nats a token, and another precision "
                f"explains at most {OTHER_WEIGHTS}: {url} serves other weights than "
                f"--model {self.config.model}: start it on that folder"
            )
        if gap > ROUNDING[self.dtype]:
            kind = str(self.dtype).removeprefix("torch.")
            print(
                f"note: sampler_gap is {gap:.2g} nats a token, above the rounding of {kind}: {url} "
                "computes in another precision than this run"
            )
