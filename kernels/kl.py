"""Two linear layers over one vocabulary and the divergence of their distributions, in one.

Hidden states of a student and a teacher in, one divergence a token out, for distillation. With
p = softmax(z_t / τ) of the teacher and q = softmax(z_s / τ) of the student:

    forward        KL(p ‖ q)                                    covers all that the teacher does
    reverse        KL(q ‖ p)                                    keeps to what the teacher does
    jsd            β KL(p ‖ m) + (1 - β) KL(q ‖ m), m = β p + (1 - β) q     GKD, arXiv 2306.13649
    skew_forward   KL(p ‖ α p + (1 - α) q)                      DistiLLM, arXiv 2402.03898
    skew_reverse   KL(q ‖ (1 - α) p + α q)                      the same

The vocabulary is taken in chunks, as in kernels/logprob.py. Pass 1 finds log Σ exp of both; pass 2
sums the divergence and the mean slope; the backward, pass 3, turns slopes into gradients. On a GPU
each pass over a chunk is one Triton kernel, after two matmuls. A CPU keeps what one pass computed
for the next, up to KEEP_BYTES. Beyond that, and on a GPU, each pass computes it again, so that no
large (M, V) matrix is ever held.

Letters: M scored tokens, D width, V vocabulary (or a rank's shard of it), C columns of a chunk.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from kernels.cap import cap_slope, soft_cap
from kernels.device import fused, operator, tl, triton
from kernels.logprob import CHUNK, GPU_CHUNK, KEEP_BYTES, add_matmul, matmul

Divergence = Literal["forward", "reverse", "jsd", "skew_forward", "skew_reverse"]
Caps = tuple[float, float]  # of the student's logits and the teacher's: kernels/cap.py
DIVERGENCES: tuple[Divergence, ...] = ("forward", "reverse", "jsd", "skew_forward", "skew_reverse")
BLOCK = 2048  # columns of both sides that a kernel holds at a time


def linear_kl(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    divergence: Divergence = "forward",
    mix: float = 0.5,
    temperature: float = 1.0,
    gather: Callable[[Tensor], Tensor] | None = None,
    caps: Caps = (0.0, 0.0),
) -> Tensor:
    """Compute the divergence of softmax(teacher_hidden @ teacher_weightᵀ / τ) and the student's.

    hidden (M, D), weight (V, D), teacher_hidden (M, D'), teacher_weight (V, D') -> (M,) in nats,
    fp32 or, for fp64 inputs, fp64. mix: β of jsd, α of the skewed ones; not read by the others.
    Gradients go to the student's two inputs. caps: soft caps of the logits.

    Where ranks share the vocabulary the weights are this rank's shards, and `gather` takes (M, k)
    of this rank to (ranks, M, k) of all. The gradient of hidden remains to be summed over them.
    """
    return _LinearKL.apply(
        hidden, weight, teacher_hidden, teacher_weight, divergence, mix, temperature, gather, caps
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
    incoming gradient g, times the slope of a cap; dh += dz W, dW = dzᵀ h.
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
        caps: Caps,
    ) -> Tensor:
        on_gpu = fused(hidden)
        settings = divergence, mix, temperature
        sides = hidden, weight, teacher_hidden, teacher_weight
        exact = torch.promote_types(hidden.dtype, torch.float32)
        logit_bytes = 2 * len(hidden) * len(weight) * exact.itemsize
        keep = not on_gpu and any(ctx.needs_input_grad) and logit_bytes <= KEEP_BYTES
        chunks = list(_chunks(*sides, caps)) if keep else None
        if on_gpu:
            lse = _log_sums_fused(sides, temperature, caps)
        else:
            lse = _log_sums(chunks or _chunks(*sides, caps), temperature)
        if gather is not None:
            lse = gather(lse).logsumexp(0)
        sums = torch.zeros_like(lse)  # of terms and of slopes
        kept = []
        for _, z, teacher_z in chunks or _chunks(*sides, caps):
            if on_gpu:
                torch.ops.plumb.kl_sums(z, teacher_z, lse, sums, *settings)
                continue
            bent = cap_slope(z, caps[0]) if keep and caps[0] else None  # before z is overwritten
            term, slope, chance = _pieces_of(z, teacher_z, lse, settings)
            sums += torch.stack([term.sum(1), slope.sum(1)], 1)
            if keep:
                kept += [slope, chance] if bent is None else [slope * bent, chance * bent]
        if gather is not None:
            sums = gather(sums).sum(0)
        ctx.settings, ctx.caps = settings, caps
        ctx.save_for_backward(*sides, lse, sums, *kept)
        return sums[:, 0].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *sides, lse, sums = ctx.saved_tensors[:6]
        kept = ctx.saved_tensors[6:]
        hidden, weight = sides[:2]
        temperature, caps = ctx.settings[2], ctx.caps
        need_hidden, need_weight, *_ = ctx.needs_input_grad
        grad = grads[0].contiguous()
        d_hidden = torch.zeros(hidden.shape, dtype=lse.dtype, device=hidden.device)
        d_weight = torch.empty_like(weight) if need_weight else None
        chunks = zip(range(0, len(weight), CHUNK), kept[::2], kept[1::2])
        for first, *parts in chunks if kept else _chunks(*sides, caps):
            bent = cap_slope(parts[0], caps[0]) if caps[0] and not kept else None
            if fused(hidden):
                dtype = weight.dtype if bent is None else lse.dtype
                dz = torch.ops.plumb.kl_slopes(*parts, lse, sums, grad, *ctx.settings, dtype)
            else:
                slope, chance = parts if kept else _pieces_of(*parts, lse, ctx.settings)[1:]
                dz = slope.addcmul(chance, sums[:, 1:], value=-1)
                dz = dz.mul_(grad[:, None] / temperature)
            dz = (dz if bent is None else dz.mul_(bent)).to(weight.dtype)
            last = first + dz.shape[1]
            if need_hidden:
                add_matmul(d_hidden, dz, weight[first:last])
            if d_weight is not None:
                torch.mm(dz.t(), hidden, out=d_weight[first:last])
        return d_hidden.to(hidden.dtype), d_weight, *[None] * 7


def _chunks(
    hidden: Tensor, weight: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, caps: Caps
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield (first column, student's logits, teacher's logits) of every chunk, (M, C) each.

    They are capped here, by torch's operations on every device: a few more passes over a chunk for
    the one family that has caps.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    chunk = GPU_CHUNK if fused(hidden) else CHUNK
    for first in range(0, len(weight), chunk):
        part = slice(first, first + chunk)
        z = soft_cap(matmul(hidden, weight[part].t(), exact), caps[0])
        teacher_z = matmul(teacher_hidden, teacher_weight[part].t(), exact)
        yield first, z, soft_cap(teacher_z, caps[1])


def _log_sums(chunks: Iterable[tuple[int, Tensor, Tensor]], temperature: float) -> Tensor:
    """Return log Σ exp(logits / τ) over this shard, (M, 2): the student's, the teacher's."""
    lse = None
    for _, *logits in chunks:
        chunk = torch.stack([(z / temperature).logsumexp(1) for z in logits], 1)
        lse = chunk if lse is None else torch.logaddexp(lse, chunk)
    assert lse is not None
    return lse


def _pieces_of(
    z: Tensor, teacher_z: Tensor, lse: Tensor, settings: tuple[Divergence, float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Turn a chunk's logits, in place, into terms, slopes and the student's probabilities."""
    divergence, mix, temperature = settings
    q = z.div_(temperature).sub_(lse[:, :1])
    p = teacher_z.div_(temperature).sub_(lse[:, 1:])
    term, slope = pieces(divergence, mix, p, q)
    return term, slope, q.exp_()


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _mixed(p, q, log_p_share, log_q_share):
    """Compute log(share of p · exp(p) + share of q · exp(q))."""
    p += log_p_share
    q += log_q_share
    top = tl.maximum(p, q)
    return top + tl.log(tl.exp(p - top) + tl.exp(q - top))


@triton.jit
def _pieces(p, q, mix, log_mix, log_rest, DIVERGENCE: tl.constexpr):
    """Compute what `pieces` does, by the same formulas."""
    student = tl.exp(q)
    if DIVERGENCE == "forward":
        slope = -tl.exp(p)
        term = slope * (q - p)
    elif DIVERGENCE == "reverse":
        term = student * (q - p)
        slope = term + student
    elif DIVERGENCE == "jsd":
        m = _mixed(p, q, log_mix, log_rest)
        slope = (1 - mix) * student * (q - m)
        term = mix * tl.exp(p) * (p - m) + slope
    elif DIVERGENCE == "skew_forward":
        m = _mixed(p, q, log_mix, log_rest)
        term = tl.exp(p) * (p - m)
        slope = (mix - 1) * tl.exp(p + q - m)
    else:
        m = _mixed(p, q, log_rest, log_mix)
        term = student * (q - m)
        slope = term + student - mix * tl.exp(2 * q - m)
    return term, slope


@triton.jit
def sums_kernel(
    Z, TEACHER, LSE, SUMS, C, inverse, mix, log_mix, log_rest,
    DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # in groups: tensors and sizes, then constants
    """Add a chunk's terms and slopes of one row to SUMS (M, 2)."""
    row = tl.program_id(0).to(tl.int64)
    lse, teacher_lse = tl.load(LSE + 2 * row), tl.load(LSE + 2 * row + 1)
    terms = tl.zeros((BLOCK,), tl.float32)
    slopes = tl.zeros((BLOCK,), tl.float32)
    for c in tl.range(0, C, BLOCK):
        column = c + tl.arange(0, BLOCK)
        z = tl.load(Z + row * C + column, mask=column < C, other=-1.0e30)
        teacher_z = tl.load(TEACHER + row * C + column, mask=column < C, other=-1.0e30)
        q, p = z * inverse - lse, teacher_z * inverse - teacher_lse
        term, slope = _pieces(p, q, mix, log_mix, log_rest, DIVERGENCE)
        terms += term
        slopes += slope
    tl.store(SUMS + 2 * row, tl.load(SUMS + 2 * row) + tl.sum(terms, 0))
    tl.store(SUMS + 2 * row + 1, tl.load(SUMS + 2 * row + 1) + tl.sum(slopes, 0))


@triton.jit
def slope_kernel(
    Z, TEACHER, LSE, SUMS, GRAD, D_Z, C, inverse, mix, log_mix, log_rest,
    DIVERGENCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip  # in groups: tensors and sizes, then constants
    """Compute BLOCK columns of a row of D_Z = d loss / d (the student's unscaled logits)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(Z + row * C + column, mask=column < C, other=-1.0e30)
    teacher_z = tl.load(TEACHER + row * C + column, mask=column < C, other=-1.0e30)
    q, p = z * inverse - tl.load(LSE + 2 * row), teacher_z * inverse - tl.load(LSE + 2 * row + 1)
    _, slope = _pieces(p, q, mix, log_mix, log_rest, DIVERGENCE)
    slope -= tl.exp(q) * tl.load(SUMS + 2 * row + 1)
    slope *= tl.load(GRAD + row) * inverse
    tl.store(D_Z + row * C + column, slope.to(D_Z.dtype.element_ty), mask=column < C)


def _log_sums_fused(sides: tuple[Tensor, ...], temperature: float, caps: Caps) -> Tensor:
    """Return what `_log_sums` does, by the log-prob's kernel with targets in no chunk."""
    rows, device = len(sides[0]), sides[0].device
    nowhere = torch.full((rows,), -1, device=device)
    # Tensors of their own: rows of one would start at any multiple of 4 bytes, by the batch.
    tops = [torch.full((rows,), float("-inf"), device=device) for _ in range(2)]
    totals, unused = [torch.zeros_like(top) for top in tops], torch.empty_like(tops[0])
    for _, *logits in _chunks(*sides, caps):
        for z, top, total in zip(logits, tops, totals):
            torch.ops.plumb.fold_logits(z, nowhere, top, total, None, unused, 0, temperature, 0.0)
    return torch.stack([top + total.log() for top, total in zip(tops, totals)], 1)


def _scalars(mix: float, temperature: float) -> tuple[float, ...]:
    """Return 1 / τ, mix and the logs of mix and 1 - mix, that of 0 being a number that counts 0."""
    return 1 / temperature, mix, *(math.log(x) if x > 0 else -1.0e30 for x in (mix, 1 - mix))


@operator(
    "kl_sums",
    "(Tensor z, Tensor teacher_z, Tensor lse, Tensor(a!) sums, str divergence, float mix, "
    "float temperature) -> ()",
)
def _sums_fused(z, teacher_z, lse, sums, divergence, mix, temperature):
    rows, width = z.shape
    sums_kernel[(rows,)](
        z, teacher_z, lse, sums, width, *_scalars(mix, temperature),
        DIVERGENCE=divergence, BLOCK=min(BLOCK, triton.next_power_of_2(width)), num_warps=8,
    )  # fmt: skip  # in the kernel's groups


@operator(
    "kl_slopes",
    "(Tensor z, Tensor teacher_z, Tensor lse, Tensor sums, Tensor grad, str divergence, float mix, "
    "float temperature, ScalarType dtype) -> Tensor",
)
def _slopes_fused(z, teacher_z, lse, sums, grad, divergence, mix, temperature, dtype):
    rows, width = z.shape
    block = min(BLOCK, triton.next_power_of_2(width))
    d_z = torch.empty(rows, width, dtype=dtype, device=z.device)
    slope_kernel[(rows, triton.cdiv(width, block))](
        z, teacher_z, lse, sums, grad, d_z, width, *_scalars(mix, temperature),
        DIVERGENCE=divergence, BLOCK=block, num_warps=8,
    )  # fmt: skip  # in the kernel's groups
    return d_z


@_sums_fused.register_fake
def _(*inputs):
    return None


@_slopes_fused.register_fake
def _(z, teacher_z, lse, sums, grad, divergence, mix, temperature, dtype):
    return z.new_empty(z.shape, dtype=dtype)
