"""A linear on few rows of a CPU, as in a step of sampling: Y = X Wᵀ + b.

Such a product reads all of W to do little with it, so it should run at the speed of memory. The
libraries that torch calls (MKL for fp32, oneDNN for bf16) reach about half of that, probably since
they lay W out anew in every call. The same product asked for in another way is faster:

    bf16   (W Xᵀ)ᵀ           W is then the left factor, which is read as it lies
    fp32   [X W_1ᵀ, X W_2ᵀ, ...] of BLOCK outputs each, which stay in the cache

One thread, ms, F.linear / here, for 8 rows:

    outputs, inputs     bf16            fp32
    1536,  576           0.29 /  0.20    0.79 /  0.57
     576, 1536           0.27 /  0.20    0.84 /  0.67
    49152, 576           8.5  /  5.3     38   / 20

Letters: T rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 192  # outputs of one product in fp32


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + b: x (T, inputs), weight (outputs, inputs) -> (T, outputs)."""
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    rows = x.shape[0]
    if x.dtype == torch.bfloat16 and 1 < rows <= 64:
        y = torch.mm(weight, x.t()).t().contiguous()
    elif x.dtype == torch.float32 and 3 < rows < 16:
        y = x.new_empty(rows, len(weight))
        for part, w in zip(y.split(BLOCK, 1), weight.split(BLOCK), strict=True):
            torch.mm(x, w.t(), out=part)
    else:
        return F.linear(x, weight, bias)
    return y if bias is None else y + bias
