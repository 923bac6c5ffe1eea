"""Frequencies of the rotary positions, plain or stretched for texts longer than first trained on.

Letters: R rotated components of a head.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Linear(NamedTuple):
    """All waves are `factor` times as long (position interpolation, arXiv 2306.15595)."""

    factor: float


class Llama3(NamedTuple):
    """Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""

    factor: float
    low: float  # waves longer than original / low are long
    high: float  # waves shorter than original / high are short
    original: int  # positions trained on before the stretching


class Yarn(NamedTuple):
    """As Llama3, blended over components; scores are sharpened as well (arXiv 2309.00071)."""

    factor: float
    original: int
    fast: float  # components that turn more often than this within `original` are kept
    slow: float  # those that turn less often are stretched
    truncate: bool  # round the two ends of the blend to whole components
    amplitude: float  # of cos and sin, so scores grow by its square


class Divisors(NamedTuple):
    """Each wave is stretched by a factor of its own (LongRoPE, arXiv 2402.13753)."""

    factors: tuple[float, ...]  # one for each of the R/2 frequencies
    amplitude: float  # of cos and sin, so scores grow by its square


Scaling = Linear | Llama3 | Yarn | Divisors


def frequencies(theta: float, size: int, scaling: Scaling | None = None) -> Tensor:
    """Return radians a position for each rotated pair, (R/2,) fp32, R = size.

    Computed in fp32 step by step as transformers does, so that angles agree to the last bit.
    """
    plain = 1.0 / (theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    if scaling is None:
        return plain
    if isinstance(scaling, Linear):
        return plain / scaling.factor
    if isinstance(scaling, Divisors):
        powers = theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
        return 1.0 / (torch.tensor(scaling.factors, dtype=torch.float32) * powers)
    if isinstance(scaling, Yarn):
        return _yarn(theta, size, scaling)
    factor, low, high, original = scaling
    wavelength = 2 * math.pi / plain
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * plain / factor + blend * plain
    stretched = torch.where(wavelength > original / low, plain / factor, plain)
    middle = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(middle, blended, stretched)


def _yarn(theta: float, size: int, scaling: Yarn) -> Tensor:
    """Return the frequencies of YaRN: blended over components, by how often they turn."""
    powers = theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)

    def component(turns: float) -> float:
        """Return which component turns so often within the original length."""
        return size * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = component(scaling.fast), component(scaling.slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    if first == last:
        last += 0.001
    stretched = ((torch.arange(size // 2, dtype=torch.float32) - first) / (last - first)).clamp(
        0, 1
    )
    kept = 1 - stretched
    return 1.0 / (scaling.factor * powers) * (1 - kept) + 1.0 / powers * kept


def amplitude(scaling: Scaling | None) -> float:
    """Return what cos and sin are multiplied by."""
    return scaling.amplitude if isinstance(scaling, Yarn | Divisors) else 1.0
