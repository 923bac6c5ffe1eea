"""One draw of a sampler: a token a row, after temperature, top-k, top-p and forbidden tokens.

Letters: R rows (samples in progress), V vocabulary.
"""

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from config import RolloutConfig
from kernels.device import upload


def truncated(config: RolloutConfig) -> bool:
    """Return True if samples come from a part of the policy's distribution, renormalised."""
    return bool(config.top_k or config.top_p < 1 or config.min_new_tokens)


def correction(config: RolloutConfig) -> str:
    """Return what --engine-correction means: none, truncate or mask."""
    if config.engine_correction != "auto":
        return config.engine_correction
    return "truncate" if config.rollout_ahead else "none"


def check_drawing(config: RolloutConfig) -> None:
    """Raise ValueError for flags of drawing that no sampler can follow."""
    if config.min_new_tokens >= config.max_new_tokens:
        raise ValueError(
            f"--min-new-tokens {config.min_new_tokens} must be below --max-new-tokens "
            f"{config.max_new_tokens}"
        )
    if not all(config.stop):
        raise ValueError("--stop with an empty text would end every sample at once: drop it")
    if truncated(config) and config.rollout_url and correction(config) != "none":
        raise ValueError(
            "--engine-correction with --top-k, --top-p or --min-new-tokens needs the log-probs "
            "after truncation, which servers do not report: drop one of them, or --rollout-url"
        )


def ends_too_early(
    drawn: np.ndarray, min_new_tokens: int, stop_ids: Collection[int], logits: Tensor
) -> Tensor:
    """Return which tokens a row must not draw yet, (R, V) bool: end tokens of short responses."""
    short = upload(torch.from_numpy(drawn < min_new_tokens), logits.device)  # (R,)
    ends = torch.zeros(logits.shape[1], dtype=torch.bool)
    ends[[i for i in stop_ids if i < len(ends)]] = True
    return short[:, None] & upload(ends, logits.device)


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one token a row from logits (R, V) with uniform numbers (R,).

    Returns, (R,) each: the tokens; their log-probs under the distribution they are drawn from;
    their log-probs under the softmax of the logits themselves. Filters apply in Hugging Face's
    order: first the forbidden tokens (R, V) go, then temperature, then the top_k likeliest, then
    the smallest set with probability top_p.
    """
    if forbidden is not None:
        allowed = logits.masked_fill(forbidden, float("-inf"))
        token, logps, _ = sample(allowed, uniform, temperature, top_k, top_p)
        chosen = logits.gather(1, token[:, None])[:, 0]
        return token, logps, chosen - logits.logsumexp(-1)
    if temperature == 0:
        top, best = logits.max(-1)
        return best, torch.zeros_like(top), top - logits.logsumexp(-1)
    top = logits.amax(-1, keepdim=True)  # (R, 1)
    filtered = 0 < top_k < logits.shape[1] or top_p < 1
    weights, total = logits - top, None  # in place from here on: (R, V) is large
    if temperature != 1 or filtered:
        scaled = weights / temperature
        total = weights.exp_().sum(-1, keepdim=True)  # (R, 1)
        weights = scaled
    weights.exp_()
    if filtered:
        token, share = _draw_filtered(weights, uniform, top_k, top_p)
    else:
        token, share = _draw(weights, uniform)
    chosen = logits.gather(1, token) - top
    total = share if total is None else total
    return token[:, 0], (chosen / temperature - share.log())[:, 0], (chosen - total.log())[:, 0]


def _draw(weights: Tensor, uniform: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """Return the token whose share of [0, 1) holds the uniform number, and Σ weights: (R, 1) each.

    First the block of tokens, then the token in it: a running sum over a whole vocabulary, in fp64
    so that no token's share is rounded away, took longer than the rest of the step.
    """
    vocabulary = weights.shape[1]
    whole = vocabulary // block * block
    sums = []
    if whole:
        sums.append(weights[:, :whole].unflatten(1, (-1, block)).sum(-1))
    if whole < vocabulary:
        sums.append(weights[:, whole:].sum(-1, keepdim=True))
    edges = torch.cat(sums, 1).double().cumsum(-1)  # (R, V / block)
    aim = uniform.double()[:, None] * edges[:, -1:]  # (R, 1)
    index = torch.searchsorted(edges, aim, right=True).clamp_(max=edges.shape[1] - 1)  # (R, 1)
    size = edges.diff(dim=1, prepend=torch.zeros_like(aim)).gather(1, index)
    rest = 1 - (edges.gather(1, index) - aim) / size  # where in its block, of 1
    tokens = index * block + torch.arange(block, device=weights.device)  # (R, block)
    inside = weights.gather(1, tokens.clamp(max=vocabulary - 1)).double()
    inside = inside.masked_fill_(tokens >= vocabulary, 0).cumsum(-1)
    place = torch.searchsorted(inside, rest * inside[:, -1:], right=True)
    return (index * block + place).clamp_(max=vocabulary - 1), edges[:, -1:]


def _draw_filtered(
    weights: Tensor, uniform: Tensor, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """Draw as `_draw` among the top_k likeliest, and of these the fewest that make up top_p."""
    vocabulary = weights.shape[1]
    total = None  # of all weights, if top_k leaves all of them
    if not 0 < top_k < vocabulary:
        total = weights.sum(-1, keepdim=True, dtype=torch.float64)
    size = min(top_k or 512, vocabulary)
    while True:
        ordered, index = weights.topk(size)
        edges = ordered.double().cumsum(-1)
        # Sorting a whole vocabulary is slow, and top_p seldom needs it.
        if total is None or size == vocabulary or bool((edges[:, -1:] >= top_p * total).all()):
            break
        size = min(8 * size, vocabulary)
    kept = torch.full_like(index[:, :1], size)  # (R, 1) number of tokens
    if top_p < 1:
        limit = top_p * (edges[:, -1:] if total is None else total)
        before = edges - ordered
        kept = (before < limit).sum(-1, keepdim=True).clamp_(min=1)
    share = edges.gather(1, kept - 1)
    place = torch.searchsorted(edges, uniform.double()[:, None] * share, right=True)
    return index.gather(1, torch.minimum(place, kept - 1)), share
