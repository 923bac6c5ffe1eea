"""Rotary position embedding, arXiv 2104.09864, in Llama's layout: pairs are (i, i + R/2).

Letters: T tokens, H heads, E head size, R rotated components of each head (the first R; R = E
except in GPT-NeoX).
"""

import torch
from torch import Tensor

from kernels.device import fused, operator, tl, triton


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R components of every head: x (T, H, E), cos and sin (T, R/2) -> (T, H, E).

    The plain twin computes in x's dtype, as transformers does; the kernel in fp32.
    """
    if fused(x):
        return torch.ops.plumb.rope(x if x.stride(-1) == 1 else x.contiguous(), cos, sin, False)
    half = cos.shape[1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


@triton.jit
def rotate_kernel(
    X, COS, SIN, OUT, x_t, x_h, H, sign,
    E: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip  # in groups: tensors and sizes, then constants
    """Rotate HEADS heads of one token; sign -1 rotates back, which is the gradient."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    inside = (head < H) & (pair < HALF)
    cos = tl.load(COS + token * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32)
    sin = tl.load(SIN + token * HALF + pair, mask=pair < HALF, other=0.0).to(tl.float32) * sign
    x = X + token * x_t + head.to(tl.int64) * x_h
    out = OUT + (token * H + head) * E
    a = tl.load(x + pair, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + HALF + pair, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + pair, (a * cos - b * sin).to(OUT.dtype.element_ty), mask=inside)
    tl.store(out + HALF + pair, (b * cos + a * sin).to(OUT.dtype.element_ty), mask=inside)
    if REST > 0:  # components that are not rotated
        more = 2 * HALF + tl.arange(0, REST)[None, :]
        inside = (head < H) & (more < E)
        tl.store(out + more, tl.load(x + more, mask=inside, other=0.0), mask=inside)


@operator("rope", "(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor")
def _rope(x, cos, sin, back):
    tokens, heads, size = x.shape
    half = cos.shape[1]
    rest = size - 2 * half
    heads_each = min(32, triton.next_power_of_2(heads))
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rotate_kernel[(tokens, triton.cdiv(heads, heads_each))](
        x, cos, sin, out, x.stride(0), x.stride(1), heads, -1.0 if back else 1.0,
        E=size, HALF=half, HEADS=heads_each, PAIRS=triton.next_power_of_2(half),
        REST=triton.next_power_of_2(rest) if rest else 0, num_warps=4,
    )  # fmt: skip  # in the kernel's groups
    return out


@_rope.register_fake
def _(x, cos, sin, back):
    return x.new_empty(x.shape)


def _save_for_backward(ctx, inputs, output):
    _, cos, sin, ctx.back = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx, d_out):
    d_x = torch.ops.plumb.rope(d_out.contiguous(), *ctx.saved_tensors, not ctx.back)
    return d_x, None, None, None


_rope.register_autograd(_backward, setup_context=_save_for_backward)
