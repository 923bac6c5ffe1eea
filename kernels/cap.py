"""Soft caps: x -> c tanh(x / c), which keeps scores and logits within (-c, c).

Gemma 2 caps the scores of its attention and its logits (arXiv 2408.00118 Sec. 2). c = 0: no cap.
With y = c tanh(x / c) the slope is dy/dx = 1 - (y / c)²: the backward passes need y alone.
"""

from torch import Tensor

from kernels.device import tl, triton


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Return c tanh(x / c), in place of x; c = 0 leaves it as it is."""
    return x.div_(cap).tanh_().mul_(cap) if cap else x


def cap_slope(capped: Tensor, cap: float) -> Tensor:
    """Return the slope of the cap where it gave `capped`: 1 - (capped / c)²."""
    return (capped / cap).square_().neg_().add_(1)


@triton.jit
def tanh(x):
    """Compute tanh by exp, which is there on every kind of GPU, and near 0 by its series.

    There the difference of two numbers near 1 would lose the digits of x.
    """
    y = x * x
    series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
    return tl.where(y < 0.0625, series, 2 * tl.sigmoid(2 * x) - 1)


@triton.jit
def capped(x, CAP: tl.constexpr):
    """Compute what `soft_cap` does."""
    if CAP > 0:
        x = CAP * tanh(x / CAP)
    return x
