"""RMSNorm, arXiv 1910.07467: y = x / √(mean(x²) + eps) · weight, over the last dimension."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> (..., D) in x's dtype. Statistics are fp32 at least, as Llama's are."""
    if x.dtype in (torch.bfloat16, torch.float16):
        return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)
    return F.rms_norm(x, weight.shape, weight, eps)
