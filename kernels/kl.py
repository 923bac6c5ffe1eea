"""Two linear layers over one vocabulary and the divergence of their distributions, in one.

Hidden states of a student and a teacher in, one divergence a token out, for distillation. With
p = softmax(z_t / τ) of the teacher and q = softmax(z_s / τ) of the student:

    forward        KL(p ‖ q)                                    covers all that the teacher does
    reverse        KL(q ‖ p)                                    keeps to what the teacher does
    jsd            β KL(p ‖ m) + (1 - β) KL(q ‖ m), m = β p + (1 - β) q     GKD, arXiv 2306.13649
    skew_forward   KL(p ‖ α p + (1 - α) q)                      DistiLLM, arXiv 2402.03898
    skew_reverse   KL(q ‖ (1 - α) p + α q)                      the same

No (M, V) matrix is ever held: the vocabulary is taken in chunks, as in kernels/logprob.py. Pass 1
finds log Σ exp of both; pass 2 sums the divergence and the mean slope; the backward, pass 3, turns
slopes into gradients. On every device these are torch's own operations.

Letters: M scored tokens, D width, V vocabulary (or a rank's shard of it), C columns of a chunk.
"""

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.device import fused
from kernels.logprob import CHUNK, GPU_CHUNK, add_matmul, matmul

Divergence = Literal["forward", "reverse", "jsd", "skew_forward", "skew_reverse"]
DIVERGENCES: tuple[Divergence, ...] = ("forward", "reverse", "jsd", "skew_forward", "skew_reverse")


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    divergence: Divergence = "forward",
    mix: float = 0.5,
    temperature: float = 1.0,
    gather: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Compute the divergence of softmax(teacher_hidden @ teacher_weightᵀ / τ) and the student's.

    hidden (M, D), weight (V, D), teacher_hidden (M, D'), teacher_weight (V, D') -> (M,) in nats,
    fp32 or, for fp64 inputs, fp64. mix: β of jsd, α of the skewed ones; not read by the others.
    Gradients go to the student's two inputs.

    Where ranks share the vocabulary the weights are this rank's shards, and `gather` takes (M, k)
    of this rank to (ranks, M, k) of all. The gradient of hidden remains to be summed over them.
    """
    return _LinearKL.apply(
        hidden, weight, teacher_hidden, teacher_weight, divergence, mix, temperature, gather
    )


def pieces(divergence: Divergence, mix: float, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Return each column's term of the divergence, and its slope q ∂divergence / ∂q.

    p, q: log-probs of teacher and student, any shape. The slope counts q alone, not that all
    columns of a distribution sum to 1, which the caller adds.
    """
    if divergence == "forward":
        chance = p.exp()
        return chance * (p - q), -chance
    if divergence == "reverse":
        term = q.exp() * (q - p)
        return term, term + q.exp()
    if divergence == "jsd":
        m = _mixture(p, q, mix)
        to_student = (1 - mix) * q.exp() * (q - m)
        return mix * p.exp() * (p - m) + to_student, to_student
    if divergence == "skew_forward":
        m = _mixture(p, q, mix)
        return p.exp() * (p - m), -(1 - mix) * (p + q - m).exp()
    m = _mixture(p, q, 1 - mix)
    term = q.exp() * (q - m)
    return term, term + q.exp() - mix * (2 * q - m).exp()


def _mixture(p: Tensor, q: Tensor, share: float) -> Tensor:
    """Return log(share exp(p) + (1 - share) exp(q))."""
    log = torch.tensor([share, 1 - share], dtype=p.dtype, device=p.device).log()
    return torch.logaddexp(p + log[0], q + log[1])


class _LinearKL(torch.autograd.Function):
    """The chunked divergence and its gradients.

    With a = ∂divergence / ∂q and s = q a (`pieces`), softmax gives dz = g (s - q Σ s) / τ for an
    incoming gradient g; dh += dz W, dW = dzᵀ h.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        divergence: Divergence,
        mix: float,
        temperature: float,
        gather: Callable[[Tensor], Tensor] | None,
    ) -> Tensor:
        ctx.settings = divergence, mix, temperature
        sides = hidden, weight, teacher_hidden, teacher_weight
        exact = torch.promote_types(hidden.dtype, torch.float32)
        lse = torch.full((len(hidden), 2), float("-inf"), dtype=exact, device=hidden.device)
        for _, *logits in _chunks(*sides, temperature):
            chunk = torch.stack([z.logsumexp(1) for z in logits], 1)
            lse = torch.logaddexp(lse, chunk)
        if gather is not None:
            lse = gather(lse).logsumexp(0)
        sums = torch.zeros_like(lse)  # of terms and of slopes
        for _, z, teacher_z in _chunks(*sides, temperature):
            q, p = z.sub_(lse[:, :1]), teacher_z.sub_(lse[:, 1:])
            sums += torch.stack([x.sum(1) for x in pieces(divergence, mix, p, q)], 1)
        if gather is not None:
            sums = gather(sums).sum(0)
        ctx.save_for_backward(*sides, lse, sums[:, 1:])
        return sums[:, 0].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *sides, lse, slope_sum = ctx.saved_tensors
        hidden, weight = sides[:2]
        divergence, mix, temperature = ctx.settings
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        factor = grads[0][:, None] / temperature
        d_hidden = torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device)
        d_weight = torch.empty_like(weight) if need_weight else None
        for first, z, teacher_z in _chunks(*sides, temperature):
            q, p = z.sub_(lse[:, :1]), teacher_z.sub_(lse[:, 1:])
            _, slope = pieces(divergence, mix, p, q)
            dz = (factor * (slope - q.exp() * slope_sum)).to(weight.dtype)
            last = first + dz.shape[1]
            if need_hidden:
                add_matmul(d_hidden, dz, weight[first:last])
            if d_weight is not None:
                torch.mm(dz.t(), hidden, out=d_weight[first:last])
        return d_hidden.to(hidden.dtype), d_weight, *[None] * 6


def _chunks(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    temperature: float,
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first column, student's logits / τ, teacher's logits / τ) of every chunk, (M, C)."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    chunk = GPU_CHUNK if fused(hidden) else CHUNK
    for first in range(0, len(weight), chunk):
        part = slice(first, first + chunk)
        z = matmul(hidden, weight[part].t(), exact)
        teacher_z = matmul(teacher_hidden, teacher_weight[part].t(), exact)
        if temperature != 1:
            z /= temperature
            teacher_z /= temperature
        yield first, z, teacher_z
