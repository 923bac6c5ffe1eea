"""Rotary position embedding, arXiv 2104.09864, in Llama's layout: component i turns with component i + E/2.

Letters: T tokens, H heads, E head size, R rotated components of each head (the first R; R = E but for GPT-NeoX).
"""

import torch
from torch import Tensor


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the first R of E components of every head: x (T, H, E), cos and sin (T, R/2) -> (T, H, E)."""
    half = cos.shape[1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    a, b, rest = x.split((half, half, x.shape[-1] - 2 * half), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
