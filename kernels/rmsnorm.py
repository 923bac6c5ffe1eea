"""RMSNorm, arXiv 1910.07467: y = x / √(mean(x²) + eps) · weight, over the last dimension.

Alone, or fused with the addition to the residual stream before it, which then is read and written
once.

Letters: N rows, D width (DP: rounded up to a power of two).
"""

import torch
from torch import Tensor

from kernels.device import fused, operator, processors, tl, triton


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise x (..., D) and scale it by weight (D,) -> (..., D) in x's dtype,
    in which the weight need not be.

    Statistics are computed in fp32 at least, as Llama's are.
    """
    if fused(x):
        return torch.ops.plumb.add_rms_norm(x, None, weight, eps)[0]
    return _RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + more and its RMSNorm: x and more (..., D), weight (D,) -> two (..., D)."""
    if fused(x):
        y, total, _ = torch.ops.plumb.add_rms_norm(x, more, weight, eps)
        return total, y
    total = x + more
    return total, rms_norm(total, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """The plain twin. As the kernel it keeps x and a number a row, where plain torch keeps x twice.

    With u = x · scale and s = dy · weight:  dx = (s - u mean(s · u)) · scale,  dw = Σ dy · u
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        scale = (exact.square().mean(-1, keepdim=True) + eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        unit = (exact * scale).to(x.dtype)  # rounded before the weight, as in Llama
        return (weight * unit).to(x.dtype)

    @staticmethod
    def backward(ctx, d_y):
        x, weight, scale = ctx.saved_tensors
        unit, d_y = x.to(scale.dtype) * scale, d_y.to(scale.dtype)
        d_unit = d_y * unit  # of the weight, row by row
        d_weight = d_unit.flatten(0, -2).sum(0).to(weight.dtype)
        mean = d_unit.mul_(weight).mean(-1, keepdim=True)
        d_x = (d_y * weight).sub_(unit.mul_(mean)).mul_(scale)
        return d_x.to(x.dtype), d_weight, None


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    X, MORE, W, Y, TOTAL, SCALE, N, D, eps, ADD: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr
):
    """Compute ROWS rows of TOTAL = x + more and Y = total · scale · weight.

    SCALE (N,) = 1 / √(mean(total²) + eps) is kept for the backward.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, DP)[None, :]
    inside = (row[:, None] < N) & (d < D)
    at = row[:, None] * D + d
    x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(MORE + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(TOTAL.dtype.element_ty)
        tl.store(TOTAL + at, rounded, mask=inside)
        x = rounded.to(tl.float32)  # normalise the sum as stored, which the next layer reads
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    tl.store(SCALE + row, scale, mask=row < N)
    w = tl.load(W + d, mask=d < D, other=0.0).to(tl.float32)
    unit = (x * scale[:, None]).to(Y.dtype.element_ty)  # rounded before the weight, as in Llama
    tl.store(Y + at, (unit.to(tl.float32) * w).to(Y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N", "steps"])
def backward_kernel(
    D_Y, D_TOTAL, TOTAL, W, SCALE, D_X, D_W, N, D, steps,
    ADD: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip  # in groups: tensors and sizes, then constants
    """Compute `steps` times ROWS rows of D_X, and this program's row of D_W (programs, D).

    D_X includes D_TOTAL, the gradient that arrives at the sum.
    """
    d = tl.arange(0, DP)[None, :]
    d_w = tl.zeros((ROWS, DP), tl.float32)
    for step in tl.range(0, steps):
        row = (tl.program_id(0).to(tl.int64) * steps + step) * ROWS + tl.arange(0, ROWS)
        inside = (row[:, None] < N) & (d < D)
        at = row[:, None] * D + d
        scale = tl.load(SCALE + row, mask=row < N, other=0.0)[:, None]
        unit = tl.load(TOTAL + at, mask=inside, other=0.0).to(tl.float32) * scale
        d_y = tl.load(D_Y + at, mask=inside, other=0.0).to(tl.float32)
        d_w += d_y * unit
        w = tl.load(W + d, mask=d < D, other=0.0).to(tl.float32)  # every time: registers are few
        slope = d_y * w
        d_x = (slope - unit * (tl.sum(slope * unit, 1) / D)[:, None]) * scale
        if ADD:
            d_x += tl.load(D_TOTAL + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(D_X + at, d_x.to(D_X.dtype.element_ty), mask=inside)
    at = tl.program_id(0) * D + d
    tl.store(D_W + at, tl.sum(d_w, 0)[None, :], mask=d < D)


def launch_shape(x: Tensor) -> tuple[int, int, int, int, int]:
    """Return N, D, rows that a program takes at once, DP, warps."""
    width = x.shape[-1]
    padded = triton.next_power_of_2(width)
    warps = 16
    if padded <= 8192:
        warps = 8
    if padded <= 4096:
        warps = 4
    return x.numel() // width, width, max(1, 2048 // padded), padded, warps


@operator(
    "add_rms_norm", "(Tensor x, Tensor? more, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)"
)
def _norm(x, more, weight, eps):
    x = x.contiguous()
    rows, width, rows_each, padded, warps = launch_shape(x)
    y = torch.empty_like(x)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    total = x.new_empty(0) if more is None else torch.empty_like(x)
    added, summed = (x, y) if more is None else (more.contiguous(), total)  # unused without ADD
    forward_kernel[(triton.cdiv(rows, rows_each),)](
        x, added, weight, y, summed, scale, rows, width, eps,
        ADD=more is not None, ROWS=rows_each, DP=padded, num_warps=warps,
    )  # fmt: skip  # in the kernel's groups
    return y, total, scale


@operator(
    "add_rms_norm_backward",
    "(Tensor d_y, Tensor? d_total, Tensor total, Tensor weight, Tensor scale) -> (Tensor, Tensor)",
)
def _norm_backward(d_y, d_total, total, weight, scale):
    total, d_y = total.contiguous(), d_y.contiguous()
    rows, width, rows_each, padded, warps = launch_shape(total)
    programs = min(triton.cdiv(rows, rows_each), 4 * processors(total.device))
    steps = triton.cdiv(rows, programs * rows_each)
    d_x = torch.empty_like(total)
    d_w = torch.empty(programs, width, dtype=torch.float32, device=total.device)
    arriving = d_y if d_total is None else d_total.contiguous()  # unused without ADD
    backward_kernel[(programs,)](
        d_y, arriving, total, weight, scale, d_x, d_w, rows, width, steps,
        ADD=d_total is not None, ROWS=rows_each, DP=padded, num_warps=warps, num_stages=1,
    )  # fmt: skip  # in the kernel's groups
    return d_x, d_w.sum(0).to(weight.dtype)


@_norm.register_fake
def _(x, more, weight, eps):
    rows = x.numel() // x.shape[-1]
    total = x.new_empty(0) if more is None else x.new_empty(x.shape)
    return x.new_empty(x.shape), total, x.new_empty(rows, dtype=torch.float32)


@_norm_backward.register_fake
def _(d_y, d_total, total, weight, scale):
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


def _save_for_backward(ctx, inputs, output):
    x, more, weight, _ = inputs
    _, total, scale = output
    ctx.added = more is not None
    ctx.save_for_backward(total if ctx.added else x, weight, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx, d_y, d_total, d_scale):
    total, weight, scale = ctx.saved_tensors
    if d_y is None:  # only the sum was used
        return d_total, d_total, None, None
    d_total = d_total if ctx.added else None
    d_x, d_w = torch.ops.plumb.add_rms_norm_backward(d_y, d_total, total, weight, scale)
    return d_x, d_x if ctx.added else None, d_w, None


_norm.register_autograd(_backward, setup_context=_save_for_backward)
