"""SwiGLU, arXiv 2002.05202: silu(gate) · up. The backward recomputes silu instead of keeping it.

The kernels are elementwise, compute in fp32, and read and write each tensor once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.device import fused, operator, tl, triton

BLOCK = 2048  # elements a program


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Compute silu(gate) · up: gate and up (T, F) -> (T, F)."""
    if fused(gate):
        return torch.ops.plumb.swiglu(gate.contiguous(), up.contiguous())
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """The plain twin. It keeps what the kernel keeps: plain torch would keep silu(gate) as well."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, d_out):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d_out * up, gate), F.silu(gate).mul_(d_out)


@triton.jit
def forward_kernel(GATE, UP, OUT, n, BLOCK: tl.constexpr):
    """Compute BLOCK elements of OUT = silu(gate) · up."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(UP + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(OUT + at, (gate * tl.sigmoid(gate) * up).to(OUT.dtype.element_ty), mask=at < n)


@triton.jit
def backward_kernel(D_OUT, GATE, UP, D_GATE, D_UP, n, BLOCK: tl.constexpr):
    """Compute BLOCK elements of both gradients."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(UP + at, mask=at < n, other=0.0).to(tl.float32)
    d_out = tl.load(D_OUT + at, mask=at < n, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate = d_out * up * sigmoid * (1 + gate * (1 - sigmoid))
    tl.store(D_GATE + at, d_gate.to(D_GATE.dtype.element_ty), mask=at < n)
    tl.store(D_UP + at, (d_out * gate * sigmoid).to(D_UP.dtype.element_ty), mask=at < n)


@operator("swiglu", "(Tensor gate, Tensor up) -> Tensor")
def _swiglu(gate, up):
    out, n = torch.empty_like(gate), gate.numel()
    forward_kernel[(triton.cdiv(n, BLOCK),)](gate, up, out, n, BLOCK=BLOCK, num_warps=8)
    return out


@operator("swiglu_backward", "(Tensor d_out, Tensor gate, Tensor up) -> (Tensor, Tensor)")
def _swiglu_backward(d_out, gate, up):
    d_gate, d_up, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    backward_kernel[(triton.cdiv(n, BLOCK),)](
        d_out.contiguous(), gate, up, d_gate, d_up, n, BLOCK=BLOCK, num_warps=8
    )
    return d_gate, d_up


@_swiglu.register_fake
def _(gate, up):
    return torch.empty_like(gate)


@_swiglu_backward.register_fake
def _(d_out, gate, up):
    return torch.empty_like(gate), torch.empty_like(up)


def _save_for_backward(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_out):
    return torch.ops.plumb.swiglu_backward(d_out, *ctx.saved_tensors)


_swiglu.register_autograd(_backward, setup_context=_save_for_backward)
