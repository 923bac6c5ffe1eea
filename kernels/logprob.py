"""Linear layer and log-prob in one: hidden states in, log-prob of each target token out, never a whole (M, V) softmax.

Letters: M scored tokens, D width, V vocabulary.
"""

import torch
from torch import Tensor

CHUNK = 2048  # vocabulary columns at a time: large enough for a full-speed matmul, small enough to stay in cache
KEEP_BYTES = 256 << 20  # logits are kept for the backward when all of them fit this, else computed again


def linear_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """log softmax(hidden @ weightᵀ)[target]: hidden (M, D), weight (V, D), target (M,) int64 -> (M,).

    Logits are fp32 at least (bf16 logits cost 0.015 a log-prob), fp64 for fp64 inputs; so is the result.
    """
    return _LinearLogProb.apply(hidden, weight, target)


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with sums and result in `dtype`, whatever the inputs are."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


class _LinearLogProb(torch.autograd.Function):
    """forward  z = h Wᵀ by chunks of V, folded into running (max, Σ exp), target logit picked out on the way
    backward  dz = g (onehot - softmax(z)), again by chunks: dh += dz W,  dW = dzᵀ h

    What is kept of a chunk is exp(z - max so far): from there softmax(z) is one factor a row, without another exp.
    """

    @staticmethod
    def forward(ctx, hidden, weight, target):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        rows, vocab = hidden.shape[0], weight.shape[0]
        keep = any(ctx.needs_input_grad) and rows * vocab * exact.itemsize <= KEEP_BYTES
        top = torch.full((rows,), float("-inf"), dtype=exact, device=hidden.device)
        total = torch.zeros_like(top)
        picked = torch.zeros_like(top)
        kept = []
        for start in range(0, vocab, CHUNK):
            z = _matmul(hidden, weight[start : start + CHUNK].t(), exact)  # (M, chunk)
            inside, column = _columns(target, start, z.shape[1])
            picked = torch.where(inside, z.gather(1, column[:, None])[:, 0], picked)
            new_top = torch.maximum(top, z.amax(1))
            p = z.sub_(new_top[:, None]).exp_()
            total = total * (top - new_top).exp_() + p.sum(1)
            top = new_top
            if keep:
                kept += [p, top]
        lse = top + total.log()
        ctx.save_for_backward(hidden, weight, target, lse, *kept)
        return picked - lse

    @staticmethod
    def backward(ctx, grad):
        hidden, weight, target, lse, *kept = ctx.saved_tensors
        exact = lse.dtype
        need_hidden, need_weight, _ = ctx.needs_input_grad
        d_hidden = torch.zeros(hidden.shape, dtype=exact, device=hidden.device) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        for i, start in enumerate(range(0, weight.shape[0], CHUNK)):
            w = weight[start : start + CHUNK]
            if kept:  # turned into gradients in place: they serve once, as retain_graph would find out
                p, top = kept[2 * i : 2 * i + 2]
            else:
                p, top = _matmul(hidden, w.t(), exact).sub_(lse[:, None]).exp_(), lse
            dz = p.mul_((-grad * (top - lse).exp())[:, None])
            inside, column = _columns(target, start, dz.shape[1])
            dz.scatter_add_(1, column[:, None], torch.where(inside, grad, 0)[:, None])
            dz = dz.to(weight.dtype)
            if need_hidden:
                d_hidden += _matmul(dz, w, exact)
            if need_weight:
                torch.mm(dz.t(), hidden, out=d_weight[start : start + CHUNK])
        return d_hidden.to(hidden.dtype) if need_hidden else None, d_weight, None


def _columns(target: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in the chunk, and their column in it (0 for the others)."""
    column = target - start
    inside = (column >= 0) & (column < width)
    return inside, torch.where(inside, column, 0)
