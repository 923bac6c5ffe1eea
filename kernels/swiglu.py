"""SwiGLU, arXiv 2002.05202: silu(gate) · up. The backward computes silu again instead of keeping it.

The kernels are elementwise, fp32 inside; what they read and write once is all the memory they touch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.device import fused, operator, tl, triton

BLOCK = 2048  # elements a program


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up (T, F) -> (T, F)."""
    if fused(gate):
        return torch.ops.plumb.swiglu(gate.contiguous(), up.contiguous())
    return F.silu(gate) * up


@triton.jit
def _forward(GATE, UP, OUT, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(GATE + at, mask=at < n, other=0.0).to(tl.float32)
    up = tl.load(UP + at, mask=at < n, other=0.0).to(tl.float32)
    tl.store(OUT + at, (gate * tl.sigmoid(gate) * up).to(OUT.dtype.element_ty), mask=at < n)


@triton.jit
def _backward(D_OUT, GATE, UP, D_GATE, D_UP, n, BLOCK: tl.constexpr):
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
    _forward[(triton.cdiv(n, BLOCK),)](gate, up, out, n, BLOCK=BLOCK, num_warps=8)
    return out


@operator("swiglu_backward", "(Tensor d_out, Tensor gate, Tensor up) -> (Tensor, Tensor)")
def _swiglu_backward(d_out, gate, up):
    d_gate, d_up, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    _backward[(triton.cdiv(n, BLOCK),)](
        d_out.contiguous(), gate, up, d_gate, d_up, n, BLOCK=BLOCK, num_warps=8
    )
    return d_gate, d_up


_swiglu.register_fake(lambda gate, up: torch.empty_like(gate))
_swiglu_backward.register_fake(
    lambda d_out, gate, up: (torch.empty_like(gate), torch.empty_like(up))
)
_swiglu.register_autograd(
    lambda ctx, d_out: torch.ops.plumb.swiglu_backward(d_out, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)
