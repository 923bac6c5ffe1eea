"""Linear layer and log-prob in one: hidden states in, log-prob of each target token out, never a whole (M, V) softmax.

The vocabulary goes by in chunks: a matmul makes the logits of one, then one pass over them folds them into a few
numbers a token (forward) or turns them into gradients (backward). On a GPU each pass is one Triton kernel.

Letters: M scored tokens, D width, V vocabulary (or a rank's shard of it), C columns of a chunk.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.device import fused, operator, tl, triton

CHUNK = 2048  # vocabulary columns at a time: large enough for a full-speed matmul, small enough to stay in cache
KEEP_BYTES = (
    256 << 20
)  # logits are kept for the backward when all of them fit this, else computed again
GPU_CHUNK, GPU_KEEP_BYTES = (
    8192,
    1 << 30,
)  # a GPU's matmuls want more columns, and it has the memory
BLOCK = 4096  # columns a kernel holds at a time


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, entropy: bool = False, start: int = 0,
    combine: Callable[[Tensor], Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """log softmax(hidden @ weightᵀ / temperature)[target]: hidden (M, D), weight (V, D), target (M,) int64 -> (M,).

    Logits are fp32 at least (bf16 logits cost 0.015 a log-prob), fp64 for fp64 inputs; so is the result. With `entropy`
    also the entropy of each distribution, (M,).

    Where ranks share the vocabulary, `weight` is the shard that begins at token `start`, and `combine` takes this
    rank's partials, (M, 2), with entropy (M, 3), to those of the whole vocabulary: gather them, then `merge_partials`.
    The gradients are those of the shard; d hidden has to be summed over the ranks.
    """
    logps, entropies = _LinearLogProb.apply(
        hidden, weight, target, temperature, entropy, start, combine
    )
    return (logps, entropies) if entropy else logps


def merge_partials(parts: Tensor) -> Tensor:
    """Partials of the shards, (n, M, 2 or 3), to those of the whole. Columns: log Σ exp of the logits, the target's
    logit (0 where another shard has it), and with entropy the mean logit under the softmax."""
    lse, picked, *mean = parts.unbind(2)
    total = lse.logsumexp(0)
    means = [((lse - total).exp() * m).sum(0) for m in mean]
    return torch.stack((total, picked.sum(0), *means), 1)


def _matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b with sums and result in `dtype`, whatever the inputs are."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


@functools.cache
def _addmm_widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch can add a product of 2-byte matrices to an fp32 one in a single pass."""
    a, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, in total's type."""
    if a.is_cuda and a.dtype != total.dtype and _addmm_widens(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += _matmul(a, b, total.dtype)


class _LinearLogProb(torch.autograd.Function):
    """forward  z = h Wᵀ / τ by chunks of V, folded into running (max, Σ exp, Σ exp z), target logit picked on the way
    backward  dz = (g (onehot - p) - g_H p (z - lse + H)) / τ, again by chunks: dh += dz W,  dW = dzᵀ h
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, entropy, start, combine):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        rows, vocab = hidden.shape[0], weight.shape[0]
        on_gpu = fused(hidden)
        ctx.chunk, budget = (GPU_CHUNK, GPU_KEEP_BYTES) if on_gpu else (CHUNK, KEEP_BYTES)
        keep = (
            any(ctx.needs_input_grad)
            and rows * vocab * exact.itemsize <= budget
            and (on_gpu or not entropy)
        )
        top = torch.full((rows,), float("-inf"), dtype=exact, device=hidden.device)
        total, picked = torch.zeros_like(top), torch.zeros_like(top)
        mixed = torch.zeros_like(top) if entropy else None
        kept = []
        for first in range(0, vocab, ctx.chunk):
            z = _matmul(hidden, weight[first : first + ctx.chunk].t(), exact)  # (M, C)
            if on_gpu:
                torch.ops.plumb.fold_logits(
                    z, target, top, total, mixed, picked, start + first, temperature
                )
            else:
                top, total, mixed, picked = _fold_plain(
                    z, target, top, total, mixed, picked, start + first, temperature
                )
            if keep:
                kept += [z] if on_gpu else [z, top]
        lse = top + total.log()
        mean = [mixed / total] if entropy else []
        if combine is not None:
            lse, picked, *mean = combine(torch.stack((lse, picked, *mean), 1)).t().contiguous()
        entropies = lse - mean[0] if entropy else lse.new_empty(0)
        ctx.temperature, ctx.start, ctx.entropy = temperature, start, entropy
        ctx.save_for_backward(hidden, weight, target, lse, entropies, *kept)
        return picked - lse, entropies

    @staticmethod
    def backward(ctx, grad, d_entropy):
        hidden, weight, target, lse, entropies, *kept = ctx.saved_tensors
        exact, on_gpu = lse.dtype, fused(hidden)
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        grad = grad.contiguous()
        if not ctx.entropy:
            entropies = d_entropy = None
        d_hidden = (
            torch.zeros(hidden.shape, dtype=exact, device=hidden.device) if need_hidden else None
        )
        d_weight = torch.empty_like(weight) if need_weight else None
        for i, first in enumerate(range(0, weight.shape[0], ctx.chunk)):
            w, here = weight[first : first + ctx.chunk], ctx.start + first
            if on_gpu:
                z = kept[i] if kept else _matmul(hidden, w.t(), exact)
                dz = torch.ops.plumb.logit_slopes(
                    z, target, lse, grad, entropies, d_entropy, here, ctx.temperature, weight.dtype
                )
            elif (
                kept
            ):  # turned into gradients in place: they serve once, as retain_graph would find out
                p, top = kept[2 * i : 2 * i + 2]
                dz = p.mul_((-grad * (top - lse).exp())[:, None])
            else:
                z = _matmul(hidden, w.t(), exact)
                z = z.div_(ctx.temperature) if ctx.temperature != 1 else z
                dz = z.sub_(lse[:, None])
                mixing = (z + entropies[:, None]).mul_(-d_entropy[:, None]) if ctx.entropy else 0
                dz = dz.exp_().mul_(mixing - grad[:, None])
            if not on_gpu:
                inside, column = _columns(target, here, dz.shape[1])
                dz.scatter_add_(1, column[:, None], torch.where(inside, grad, 0)[:, None])
                dz = (dz.div_(ctx.temperature) if ctx.temperature != 1 else dz).to(weight.dtype)
            if need_hidden:
                _add_matmul(d_hidden, dz, w)
            if need_weight:
                torch.mm(dz.t(), hidden, out=d_weight[first : first + ctx.chunk])
        return (
            d_hidden.to(hidden.dtype) if need_hidden else None,
            d_weight,
            None,
            None,
            None,
            None,
            None,
        )


def _fold_plain(
    z, target, top, total, mixed, picked, start: int, temperature: float
) -> tuple[Tensor | None, ...]:
    """The running numbers, (M,) each, with a chunk of logits folded in that begins at token `start`.

    z (M, C) becomes exp(z - max so far): from there softmax(z) is one factor a row, without another exp.
    """
    if temperature != 1:
        z.div_(temperature)
    inside, column = _columns(target, start, z.shape[1])
    picked = torch.where(inside, z.gather(1, column[:, None])[:, 0], picked)
    new_top = torch.maximum(top, z.amax(1))
    shrink = (top - new_top).exp_()
    z.sub_(new_top[:, None])
    below = z.clone() if mixed is not None else None
    weight = z.exp_().sum(1)
    if mixed is not None:
        mixed = mixed * shrink + below.mul_(z).sum(1) + weight * new_top
    return new_top, total * shrink + weight, mixed, picked


def _columns(target: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in the chunk, and their column in it (0 for the others)."""
    column = target - start
    inside = (column >= 0) & (column < width)
    return inside, torch.where(inside, column, 0)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _fold_kernel(
    Z, TARGET, TOP, SUM, MIXED, PICKED, start, C, inverse, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row of logits: one pass, the numbers of the row in registers."""
    row = tl.program_id(0).to(tl.int64)
    top, total = tl.load(TOP + row), tl.load(SUM + row)
    mixed = 0.0
    if ENTROPY:
        mixed = tl.load(MIXED + row)
    for c in tl.range(0, C, BLOCK):
        column = c + tl.arange(0, BLOCK)
        z = tl.load(Z + row * C + column, mask=column < C, other=-1.0e30) * inverse
        new_top = tl.maximum(top, tl.max(z, 0))
        shrink, powers = tl.exp(top - new_top), tl.exp(z - new_top)
        total = total * shrink + tl.sum(powers, 0)
        if ENTROPY:
            mixed = mixed * shrink + tl.sum(powers * z, 0)
        top = new_top
    tl.store(TOP + row, top)
    tl.store(SUM + row, total)
    if ENTROPY:
        tl.store(MIXED + row, mixed)
    own = tl.load(TARGET + row) - start
    if (own >= 0) & (own < C):
        tl.store(PICKED + row, tl.load(Z + row * C + own) * inverse)


@triton.jit
def _slope_kernel(
    Z,
    TARGET,
    LSE,
    GRAD,
    ENTROPIES,
    D_ENTROPY,
    D_Z,
    start,
    C,
    inverse,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK columns of a row: D_Z = d loss / d (unscaled logits)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad, own = tl.load(GRAD + row), tl.load(TARGET + row) - start
    logp = tl.load(Z + row * C + column, mask=column < C, other=-1.0e30) * inverse - tl.load(
        LSE + row
    )
    chance = tl.exp(logp)
    slope = grad * (tl.where(column == own, 1.0, 0.0) - chance)
    if ENTROPY:
        slope -= tl.load(D_ENTROPY + row) * chance * (logp + tl.load(ENTROPIES + row))
    tl.store(D_Z + row * C + column, (slope * inverse).to(D_Z.dtype.element_ty), mask=column < C)


@operator(
    "fold_logits",
    "(Tensor z, Tensor target, Tensor(a!) top, Tensor(b!) total, Tensor(c!)? mixed, Tensor(d!) picked, int start, "
    "float temperature) -> ()",
)
def _fold_fused(z, target, top, total, mixed, picked, start, temperature):
    block = min(BLOCK, triton.next_power_of_2(z.shape[1]))
    _fold_kernel[(z.shape[0],)](
        z, target, top, total, top if mixed is None else mixed, picked, start, z.shape[1], 1 / temperature,
        ENTROPY=mixed is not None, BLOCK=block, num_warps=8,
    )  # fmt: skip


@operator(
    "logit_slopes",
    "(Tensor z, Tensor target, Tensor lse, Tensor grad, Tensor? entropies, Tensor? d_entropy, int start, "
    "float temperature, ScalarType dtype) -> Tensor",
)
def _slopes_fused(z, target, lse, grad, entropies, d_entropy, start, temperature, dtype):
    rows, width = z.shape
    d_z = torch.empty(rows, width, dtype=dtype, device=z.device)
    block = min(BLOCK, triton.next_power_of_2(width))
    mixed = entropies is not None
    _slope_kernel[(rows, triton.cdiv(width, block))](
        z, target, lse, grad, entropies if mixed else lse, d_entropy.contiguous() if mixed else lse, d_z, start, width,
        1 / temperature, ENTROPY=mixed, BLOCK=block, num_warps=8,
    )  # fmt: skip
    return d_z


_fold_fused.register_fake(lambda *anything: None)
_slopes_fused.register_fake(lambda z, *anything: z.new_empty(z.shape, dtype=anything[-1]))
