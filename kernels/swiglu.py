"""SwiGLU, arXiv 2002.05202: silu(gate) · up."""

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate and up (T, F) -> (T, F)."""
    return F.silu(gate) * up
