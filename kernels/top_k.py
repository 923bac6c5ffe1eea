"""The likeliest tokens of a linear layer over a vocabulary, and all others as one bucket.

A distribution over V tokens becomes one of K + 1 outcomes, for a teacher whose K likeliest tokens
are kept on disk:

    ids, p = linear_top_k(teacher_hidden, teacher_weight, k)     (M, K), log-probs (M, K + 1)
    q = linear_buckets(hidden, weight, ids).log_softmax(1)       the student's of the same outcomes
    bucket_divergence(p, q, "reverse", mix)                      (M,)

Merging outcomes never raises a divergence, so this is a lower bound of what kernels/kl.py computes;
docs/distill.md has the gap. Where K is V there is no bucket, and both are the same.

The bucket's log Σ exp is summed from its own logits, never as 1 minus the rest, which would lose
all digits where K tokens hold nearly everything. No (M, V) matrix is ever held. There is no Triton
kernel for it: torch's operations run on every device.

Letters: M scored tokens, D width, V vocabulary (or a rank's shard of it), C columns of a chunk.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernels.cap import cap_slope, soft_cap
from kernels.device import fused
from kernels.kl import Divergence, pieces
from kernels.logprob import CHUNK, GPU_CHUNK, KEEP_BYTES, add_matmul, matmul

INF = float("inf")


@torch.no_grad()
def linear_top_k(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    temperature: float = 1.0,
    start: int = 0,
    gather: Callable[[Tensor], Tensor] | None = None,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the K likeliest tokens, (M, K), and log-probs of them and of the rest, (M, K + 1).

    Likeliest first. hidden (M, D), weight (V, D). The log-prob of the rest is -inf where K is V.
    Where ranks share the vocabulary, `weight` is the shard that begins at token `start`, and
    `gather` takes a tensor of this rank to those of all, (ranks, ...). cap: soft cap of the logits.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.new_empty(len(hidden), 0, dtype=exact)  # of the K best so far
    ids = torch.empty(len(hidden), 0, dtype=torch.int64, device=hidden.device)
    rest = logits.new_full((len(hidden),), -INF)
    for first, z in _chunks(hidden, weight, temperature, cap):
        columns = torch.arange(first, first + z.shape[1], device=z.device).expand_as(z)
        logits, ids, rest = _keep(
            torch.cat([logits, z], 1), torch.cat([ids, columns + start], 1), rest, k
        )
    if gather is not None:
        missing = k - logits.shape[1]  # a small shard has fewer than K
        logits = torch.nn.functional.pad(logits, (0, missing), value=-INF)
        ids = torch.nn.functional.pad(ids, (0, missing))
        # (ranks, M, K) -> (M, ranks K)
        logits, ids = (torch.cat(list(gather(x)), 1) for x in (logits, ids))
        logits, ids, rest = _keep(logits, ids, gather(rest).logsumexp(0), k)
    return ids, torch.cat([logits, rest[:, None]], 1).log_softmax(1)


def _keep(logits: Tensor, ids: Tensor, rest: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the K largest logits with their tokens, and the rest with all others added."""
    top, place = logits.topk(min(k, logits.shape[1]), 1)
    others = logits.scatter(1, place, -INF).logsumexp(1)
    return top, ids.gather(1, place), torch.logaddexp(rest, others)


def linear_buckets(
    hidden: Tensor,
    weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    start: int = 0,
    gather: Callable[[Tensor], Tensor] | None = None,
    cap: float = 0.0,
) -> Tensor:
    """Return hidden @ weightᵀ / τ at K tokens of each row and log Σ exp of all others, (M, K + 1).

    hidden (M, D), weight (V, D), ids (M, K), which may not repeat in a row. fp32 or, for fp64
    inputs, fp64. start, gather, cap: as in `linear_top_k`; the gradient of hidden remains to be
    summed over the ranks.
    """
    return _LinearBuckets.apply(hidden, weight, ids, temperature, start, gather, cap)


def bucket_divergence(p: Tensor, q: Tensor, divergence: Divergence, mix: float) -> Tensor:
    """Return the divergence of log-probs of a teacher and a student over K + 1 outcomes, (M,)."""
    terms, _ = pieces(divergence, mix, p, q)
    return terms.sum(1)


class _LinearBuckets(torch.autograd.Function):
    """The chunked buckets and their gradients.

    With z = h Wᵀ / τ and b the bucket's log Σ exp: dz_j = g_j at a token j of its own, and
    g_b exp(z_j - b) at any other; then dh += dz W / τ, dW = dzᵀ h / τ, with a cap's slope in dz.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        ids: Tensor,
        temperature: float,
        start: int,
        gather: Callable[[Tensor], Tensor] | None,
        cap: float,
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        # Masked logits give no slope of a cap.
        keep = not cap and len(hidden) * len(weight) * exact.itemsize <= KEEP_BYTES
        own = ids - start
        picked = torch.zeros(ids.shape, dtype=exact, device=hidden.device)
        rest = picked.new_full((len(hidden),), -INF)
        kept = []
        for first, z in _chunks(hidden, weight, temperature, cap):
            inside, place = _places(own, first, z)
            picked += torch.where(inside, z.gather(1, place), 0)
            z = _mask(z, inside, place)
            rest = torch.logaddexp(rest, z.logsumexp(1))
            if keep:
                kept.append(z)
        sums = torch.cat([picked, rest[:, None]], 1)
        if gather is not None:
            sums = gather(sums)
            sums = torch.cat([sums[..., :-1].sum(0), sums[..., -1:].logsumexp(0)], 1)
        ctx.temperature, ctx.cap = temperature, cap
        ctx.save_for_backward(hidden, weight, own, sums[:, -1:], *kept)
        return sums

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, own, rest, *kept = ctx.saved_tensors
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        grad = grads[0] / ctx.temperature
        rest = torch.where(rest == -INF, 0, rest)  # no token is left for the bucket
        d_hidden = torch.zeros(hidden.shape, dtype=grad.dtype, device=hidden.device)
        d_weight = torch.empty_like(weight) if need_weight else None
        chunks = _split(kept) if kept else _chunks(hidden, weight, ctx.temperature, ctx.cap)
        for first, z in chunks:
            inside, place = _places(own, first, z)
            bent = cap_slope(z * ctx.temperature, ctx.cap) if ctx.cap else None
            masked = z if kept else _mask(z, inside, place)
            dz = (masked - rest).exp_().mul_(grad[:, -1:])
            dz.scatter_add_(1, place, torch.where(inside, grad[:, :-1], 0))
            dz = (dz if bent is None else dz.mul_(bent)).to(weight.dtype)
            last = first + dz.shape[1]
            if need_hidden:
                add_matmul(d_hidden, dz, weight[first:last])
            if d_weight is not None:
                torch.mm(dz.t(), hidden, out=d_weight[first:last])
        return d_hidden.to(hidden.dtype), d_weight, *[None] * 5


def _chunks(
    hidden: Tensor, weight: Tensor, temperature: float, cap: float
) -> Iterator[tuple[int, Tensor]]:
    """Yield (first column, logits / τ) of every chunk, (M, C) each."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    chunk = GPU_CHUNK if fused(hidden) else CHUNK
    for first in range(0, len(weight), chunk):
        z = soft_cap(matmul(hidden, weight[first : first + chunk].t(), exact), cap)
        yield first, z.div_(temperature)


def _split(kept: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yield (first column, logits) of chunks that were kept."""
    first = 0
    for z in kept:
        yield first, z
        first += z.shape[1]


def _places(own: Tensor, first: int, z: Tensor) -> tuple[Tensor, Tensor]:
    """Return which tokens are in a chunk, and their columns there; 0 for those that are not."""
    inside = (own >= first) & (own < first + z.shape[1])
    return inside, torch.where(inside, own - first, 0)


def _mask(z: Tensor, inside: Tensor, place: Tensor) -> Tensor:
    """Set a chunk's logits at some columns to -inf, in place; those not inside stay."""
    return z.scatter_reduce_(1, place, torch.where(inside, -INF, INF).to(z.dtype), "amin")
