"""Linear layer and log-prob in one: hidden states in, the log-prob of each target token out.

No (M, V) softmax is ever held. The vocabulary is taken in chunks: a matmul computes the logits of a
chunk, then one pass over them folds them into a few numbers a token (forward) or turns them into
gradients (backward). On a GPU each pass is one Triton kernel.

Letters: M scored tokens, D width, V vocabulary (or a rank's shard of it), C columns of a chunk.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.cap import cap_slope, capped, soft_cap
from kernels.device import fused, operator, tl, triton

CHUNK = 2048  # columns: enough for a full-speed matmul, few enough to stay in cache
KEEP_BYTES = 256 << 20  # logits up to this size are kept for the backward, larger ones recomputed
GPU_CHUNK = 8192  # the same two on a GPU, whose matmuls need more columns
GPU_KEEP_BYTES = 1 << 30
BLOCK = 4096  # columns that a kernel holds at a time


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    start: int = 0,
    combine: Callable[[Tensor], Tensor] | None = None,
    cap: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute log softmax(hidden @ weightᵀ / temperature)[target].

    hidden (M, D), weight (V, D), target (M,) int64 -> log-probs (M,); with `entropy` also the
    entropy of each distribution, (M,). Logits and results are fp32 (bf16 logits would cost 0.015 a
    log-prob), or fp64 for fp64 inputs. With a cap c the logits z become c tanh(z / c) first.

    Where ranks share the vocabulary, `weight` is the shard that begins at token `start`. `combine`
    takes this rank's partials, (M, 2) or with entropy (M, 3), to those of the whole vocabulary: an
    all-gather, then `merge_partials`. The gradients are those of the shard; the gradient of hidden
    remains to be summed over the ranks.
    """
    logps, entropies = _LinearLogProb.apply(
        hidden, weight, target, temperature, entropy, start, combine, cap
    )
    return (logps, entropies) if entropy else logps


def merge_partials(parts: Tensor) -> Tensor:
    """Merge the partials of n vocabulary shards, (n, M, 2 or 3), into those of the whole.

    Columns: log Σ exp of the logits; the target's logit (0 where another shard has it); with
    entropy also the mean logit under the softmax.
    """
    lse, picked, *mean = parts.unbind(2)
    total = lse.logsumexp(0)
    means = [((lse - total).exp() * m).sum(0) for m in mean]
    return torch.stack((total, picked.sum(0), *means), 1)


class _LinearLogProb(torch.autograd.Function):
    """The chunked log-prob z = h Wᵀ / τ, p = softmax(z), and its gradients.

    forward:  chunks of z are folded into a running (max, Σ exp, Σ exp · z), and the target's logit
              is picked from its chunk
    backward: by chunks again, dz = (g (onehot - p) - g_H p (z - lse + H)) / τ with g, g_H the
              gradients of log-prob and entropy H; dh += dz W, dW = dzᵀ h
    with a cap: z = c tanh(h Wᵀ / c) / τ, and dz is multiplied by the cap's slope
    """

    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, entropy, start, combine, cap):
        exact = torch.promote_types(hidden.dtype, torch.float32)
        rows, vocab = len(hidden), len(weight)
        on_gpu = fused(hidden)
        chunk, budget = (GPU_CHUNK, GPU_KEEP_BYTES) if on_gpu else (CHUNK, KEEP_BYTES)
        # The twin's fold turns logits into powers, which give no slope of the entropy or the cap.
        keep = any(ctx.needs_input_grad) and (on_gpu or not (entropy or cap))
        keep = keep and rows * vocab * exact.itemsize <= budget

        top = torch.full((rows,), float("-inf"), dtype=exact, device=hidden.device)
        total, picked = torch.zeros_like(top), torch.zeros_like(top)
        mixed = torch.zeros_like(top) if entropy else None  # Σ exp(z - top) z
        kept = []
        for first in range(0, vocab, chunk):
            z = matmul(hidden, weight[first : first + chunk].t(), exact)  # (M, C)
            where = (start + first, temperature)
            if on_gpu:
                torch.ops.plumb.fold_logits(z, target, top, total, mixed, picked, *where, cap)
            else:
                z = soft_cap(z, cap)
                top, total, mixed, picked = _fold_plain(
                    z, target, top, total, mixed, picked, *where
                )
            if keep:
                kept += [z] if on_gpu else [z, top]

        lse = top + total.log()
        mean = [mixed / total] if entropy else []
        if combine is not None:
            lse, picked, *mean = combine(torch.stack((lse, picked, *mean), 1)).t().contiguous()
        entropies = lse - mean[0] if entropy else lse.new_empty(0)
        ctx.temperature, ctx.start, ctx.chunk, ctx.entropy = temperature, start, chunk, entropy
        ctx.cap = cap
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
        d_hidden = d_weight = None
        if need_hidden:
            d_hidden = torch.zeros(hidden.shape, dtype=exact, device=hidden.device)
        if need_weight:
            d_weight = torch.empty_like(weight)
        for i, first in enumerate(range(0, len(weight), ctx.chunk)):
            w = weight[first : first + ctx.chunk]  # (C, D)
            where = (ctx.start + first, ctx.temperature)
            if on_gpu:
                z = kept[i] if kept else matmul(hidden, w.t(), exact)
                dz = torch.ops.plumb.logit_slopes(
                    z, target, lse, grad, entropies, d_entropy, *where, ctx.cap, weight.dtype
                )
            elif kept:
                powers, top = kept[2 * i : 2 * i + 2]
                dz = _slopes_of_powers(powers, top, target, lse, grad, *where).to(weight.dtype)
            else:
                z = soft_cap(matmul(hidden, w.t(), exact), ctx.cap)
                bent = cap_slope(z, ctx.cap) if ctx.cap else None
                dz = _slopes_plain(z, target, lse, grad, entropies, d_entropy, *where)
                dz = (dz if bent is None else dz.mul_(bent)).to(weight.dtype)
            if need_hidden:
                add_matmul(d_hidden, dz, w)
            if need_weight:
                torch.mm(dz.t(), hidden, out=d_weight[first : first + ctx.chunk])
        d_hidden = d_hidden.to(hidden.dtype) if need_hidden else None
        return d_hidden, d_weight, *[None] * 6


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute a @ b with sums and result in `dtype`, whatever the inputs are."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and not torch.version.hip:  # AMD's libraries have no product that widens
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, in total's dtype.

    The plain twin on a CPU rounds a product of 2-byte matrices to their dtype first, in which the
    total ends anyway: a product that is widened takes twice the time.
    """
    if a.is_cuda and a.dtype != total.dtype and _addmm_widens(a.device, a.dtype):
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.device.type == "cpu" and not fused(a):
        total += a @ b
    else:
        total += matmul(a, b, total.dtype)


@functools.cache
def _addmm_widens(device: torch.device, dtype: torch.dtype) -> bool:
    """Tell whether this torch adds a product of 2-byte matrices to an fp32 one in a single pass."""
    a, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError):
        return False
    return bool((total == 17).all())


# ---- plain twins ---------------------------------------------------------------------------------


def _fold_plain(
    z, target, top, total, mixed, picked, start: int, temperature: float
) -> tuple[Tensor | None, ...]:
    """Fold a chunk of logits that begins at token `start` into the running numbers, (M,) each.

    z (M, C) becomes exp(z - max so far): from there softmax(z) is one factor a row, without
    another exp.
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


def _slopes_of_powers(powers, top, target, lse, grad, start: int, temperature: float) -> Tensor:
    """Turn the powers exp(z - top) that the fold left, (M, C), into d loss / d logits, in place.

    They serve one backward only; a second one, with retain_graph, would find slopes in them.
    """
    slopes = powers.mul_((-grad * (top - lse).exp())[:, None])
    return _add_onehot(slopes, target, grad, start, temperature)


def _slopes_plain(
    z, target, lse, grad, entropies, d_entropy, start: int, temperature: float
) -> Tensor:
    """Turn recomputed logits z (M, C) into d loss / d logits, in place."""
    if temperature != 1:
        z = z.div_(temperature)
    logp = z.sub_(lse[:, None])
    mixing = 0
    if d_entropy is not None:
        mixing = (logp + entropies[:, None]).mul_(-d_entropy[:, None])
    slopes = logp.exp_().mul_(mixing - grad[:, None])
    return _add_onehot(slopes, target, grad, start, temperature)


def _add_onehot(slopes, target, grad, start: int, temperature: float) -> Tensor:
    """Add grad at the target's column, then divide by the temperature, in place."""
    inside, column = _columns(target, start, slopes.shape[1])
    slopes.scatter_add_(1, column[:, None], torch.where(inside, grad, 0)[:, None])
    return slopes.div_(temperature) if temperature != 1 else slopes


def _columns(target: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Tell which targets lie in the chunk, and in which column of it (0 for the others)."""
    column = target - start
    inside = (column >= 0) & (column < width)
    return inside, torch.where(inside, column, 0)


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["start"])
def fold_kernel(
    Z, TARGET, TOP, SUM, MIXED, PICKED, start, C, inverse,
    ENTROPY: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # in groups: tensors and sizes, then constants
    """Fold one row of logits in one pass, with the row's running numbers in registers."""
    row = tl.program_id(0).to(tl.int64)
    top, total = tl.load(TOP + row), tl.load(SUM + row)
    mixed = 0.0
    if ENTROPY:
        mixed = tl.load(MIXED + row)
    for c in tl.range(0, C, BLOCK):
        column = c + tl.arange(0, BLOCK)
        if CAP > 0:
            z = capped(tl.load(Z + row * C + column, mask=column < C, other=0.0), CAP)
            z = tl.where(column < C, z, -1.0e30) * inverse
        else:
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
        tl.store(PICKED + row, capped(tl.load(Z + row * C + own), CAP) * inverse)


@triton.jit(do_not_specialize=["start"])
def slope_kernel(
    Z, TARGET, LSE, GRAD, ENTROPIES, D_ENTROPY, D_Z, start, C, inverse,
    ENTROPY: tl.constexpr, CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # in groups: tensors and sizes, then constants
    """Compute BLOCK columns of a row of D_Z = d loss / d (unscaled logits)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad, own = tl.load(GRAD + row), tl.load(TARGET + row) - start
    z = capped(tl.load(Z + row * C + column, mask=column < C, other=0.0), CAP)
    logp = z * inverse - tl.load(LSE + row)
    chance = tl.exp(logp)
    slope = grad * (tl.where(column == own, 1.0, 0.0) - chance)
    if ENTROPY:
        slope -= tl.load(D_ENTROPY + row) * chance * (logp + tl.load(ENTROPIES + row))
    slope *= inverse
    if CAP > 0:
        slope *= 1 - (z / CAP) * (z / CAP)
    tl.store(D_Z + row * C + column, slope.to(D_Z.dtype.element_ty), mask=column < C)


@operator(
    "fold_logits",
    "(Tensor z, Tensor target, Tensor(a!) top, Tensor(b!) total, Tensor(c!)? mixed, "
    "Tensor(d!) picked, int start, float temperature, float cap) -> ()",
)
def _fold_fused(z, target, top, total, mixed, picked, start, temperature, cap):
    rows, width = z.shape
    entropy = mixed is not None
    fold_kernel[(rows,)](
        z, target, top, total, mixed if entropy else top, picked, start, width, 1 / temperature,
        ENTROPY=entropy, CAP=cap, BLOCK=min(BLOCK, triton.next_power_of_2(width)), num_warps=8,
    )  # fmt: skip  # in the kernel's groups


@operator(
    "logit_slopes",
    "(Tensor z, Tensor target, Tensor lse, Tensor grad, Tensor? entropies, Tensor? d_entropy, "
    "int start, float temperature, float cap, ScalarType dtype) -> Tensor",
)
def _slopes_fused(z, target, lse, grad, entropies, d_entropy, start, temperature, cap, dtype):
    rows, width = z.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    d_z = torch.empty(rows, width, dtype=dtype, device=z.device)
    entropy = entropies is not None
    if entropy:
        d_entropy = d_entropy.contiguous()
    else:
        entropies = d_entropy = lse  # not read
    slope_kernel[(rows, triton.cdiv(width, block))](
        z, target, lse, grad, entropies, d_entropy, d_z, start, width, 1 / temperature,
        ENTROPY=entropy, CAP=cap, BLOCK=block, num_warps=8,
    )  # fmt: skip  # in the kernel's groups
    return d_z


@_fold_fused.register_fake
def _(*inputs):
    return None


@_slopes_fused.register_fake
def _(z, target, lse, grad, entropies, d_entropy, start, temperature, cap, dtype):
    return z.new_empty(z.shape, dtype=dtype)
