"""Quantised weights: their levels and errors are the formats', slices are those of the whole, and
the kernels equal the plain twin that dequantises first."""

import math

import pytest
import torch
import torch.nn.functional as F
from interpreter import EXACT, HALF, law, relative_error

from kernels import quantized
from kernels.quantized import FORMATS, NF4, Quantized, quantize, quantized_linear

SHAPES = [(5, 64), (70, 130), (33, 200)]
# Half of the largest gap between neighbouring levels, in units of the block's scale.
WORST_NF4 = (1.0 - 0.6961928009986877) / 2


def matrix(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=generator)
    weight[rows // 2] *= 30  # one row of another size
    weight[0] = 0
    return weight.to(dtype)


def test_nf4_levels_are_quantiles_of_the_normal_distribution():
    """8 levels above zero and 7 below at even steps of probability, scaled to ±1, and an exact 0:
    Appendix E of QLoRA."""
    most = 0.9677083  # probability of the outermost level
    positive = torch.special.ndtri(torch.linspace(most, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -torch.special.ndtri(torch.linspace(most, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((negative, torch.zeros(1, dtype=torch.float64), positive)).sort().values
    assert torch.allclose(torch.tensor(NF4).double(), levels / levels.max(), atol=1e-6)


def nearest_levels(weight: torch.Tensor, format: str) -> torch.Tensor:
    """Round each number to the nearest level of its row or block, by trying all levels."""
    w = weight.double()
    if format == "bf16":
        return w.to(torch.bfloat16).double()
    if format == "int8":
        levels, size = torch.arange(-127, 128).double() / 127, w.shape[1]
    elif format == "fp8":
        every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).double()
        levels, size = every[every.isfinite()] / 448, w.shape[1]
    else:
        levels, size = torch.tensor(NF4).double(), 64
    out = torch.zeros_like(w)
    for row in range(len(w)):
        for first in range(0, w.shape[1], size):
            part = w[row, first : first + size]
            scaled = levels * part.abs().max()
            out[row, first : first + size] = scaled[(part[:, None] - scaled).abs().argmin(1)]
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("format", ["bf16", "fp8", "int8"])
def test_every_weight_becomes_the_nearest_level(format, shape):
    weight = matrix(*shape)
    ours = quantize(weight, format).dequantize(torch.float64)
    error = (weight.double() - ours).abs()
    least = (weight.double() - nearest_levels(weight, format)).abs()
    assert ((error - least).abs() <= 1e-6 * weight.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_is_the_nearest_level_but_for_its_scales(shape):
    """The scales of blocks are rounded too: by half a unit of 1/127 of their largest distance from
    the mean, which moves a weight by no more."""
    weight = matrix(*shape)
    ours = quantize(weight, "nf4").dequantize(torch.float64)
    blocks = F.pad(weight, (0, -shape[1] % 64)).view(shape[0], -1, 64).abs().amax(2).double()
    scale_error = (blocks - blocks.mean()).abs().max() / 254
    least = (weight.double() - nearest_levels(weight, "nf4")).abs()
    error = (weight.double() - ours).abs()
    assert (error <= least + 1.001 * scale_error + 1e-6).all()


def check_floats(relative: torch.Tensor, half: float) -> None:
    """Check relative errors of rounding to floats, half a unit in the last place being `half`.

    Worst: of a number just above a power of two. Mean: an even spread over ± half a unit, over
    significands spread evenly in the logarithm.
    """
    worst, mean = half / (1 + half), half / 2 * 0.5 / math.log(2)
    assert 0.98 * worst < relative.max() <= 1.0001 * worst
    assert abs(relative.mean() / mean - 1) < 0.02


@pytest.mark.parametrize("format", FORMATS)
def test_errors_are_those_of_the_theory(format):
    """Worst and mean error on normal weights. Rounding to steps of d: worst d/2, mean d/4. NF4: the
    worst is half of the widest gap, the mean the integral over its cells."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    q = quantize(weight, format)
    error = (weight.double() - q.dequantize(torch.float64)).abs()
    largest = weight.abs().amax(1, keepdim=True).double()
    relative = error / weight.abs().double()
    if format == "bf16":
        check_floats(relative, 2**-8)  # 8 bits of significand
    elif format == "int8":
        step = largest / 127
        assert (error / step).max() <= 0.5001 and (error / step).max() > 0.499
        assert abs((error / step).mean() - 0.25) < 0.002
    elif format == "fp8":  # 4 bits of significand, where numbers are normal
        check_floats(relative[weight.abs() / largest * 448 > 2**-6], 2**-4)
    else:
        scale = weight.view(512, 16, 64).abs().amax(2).double()
        per_scale = error.view(512, 16, 64) / scale[:, :, None]
        doubled = ((scale - scale.mean()).abs().max() / 254 / scale.min()).item()
        assert per_scale.max() <= WORST_NF4 + doubled
        # Independent: the mean distance of a normal number to its cell's level at these scales.
        levels, grid = torch.tensor(NF4).double(), torch.linspace(-1, 1, 4001).double()
        nearest = (grid[:, None] - levels).abs().amin(1)
        means = []
        for s in scale.flatten()[:200]:
            density = (-((grid * s) ** 2) / 2).exp()
            means.append((nearest * density).sum() / density.sum() * s)
        expected = torch.stack(means).mean()
        assert abs(error.mean() / expected - 1) < 0.03, (error.mean(), expected)


def test_sizes_are_the_bits_of_the_formats():
    """Bytes of the real buffers; on the meta device the same, without the numbers."""
    rows, columns = 512, 1024
    weights = rows * columns
    expected = {
        "bf16": 2 * weights,
        "fp8": weights + 4 * rows,
        "int8": weights + 4 * rows,
        "nf4": weights // 2 + weights // 64 + 4 * (1 + weights // 64 // 256),
    }
    for format, size in expected.items():
        assert quantize(torch.randn(rows, columns), format).nbytes == size
        assert quantize(torch.empty(rows, columns, device="meta"), format).nbytes == size


@pytest.mark.parametrize("format", FORMATS)
def test_a_slice_stands_for_the_same_numbers(format):
    """Rows and columns cut anywhere, also inside a block, dequantise to the slice of the whole."""
    weight = matrix(70, 330)
    q = quantize(weight, format)
    whole = q.dequantize()
    for first, last in ((0, 23), (23, 70), (69, 70)):
        assert torch.equal(q.cut(0, first, last).dequantize(), whole[first:last])
    for first, last in ((0, 64), (5, 63), (64, 129), (101, 330), (255, 258)):
        assert torch.equal(q.cut(1, first, last).dequantize(), whole[:, first:last])
    cut = q.cut(1, 101, 330).dequantize(torch.bfloat16)
    assert torch.equal(cut, whole[:, 101:].to(torch.bfloat16))


@pytest.mark.parametrize("format", FORMATS)
def test_large_matrices_are_handled_in_parts(format, monkeypatch):
    weight = matrix(70, 130)
    expected = quantize(weight, format)
    whole = expected.dequantize()
    monkeypatch.setattr(quantized, "ROWS", 300)
    q = quantize(weight, format)
    assert torch.equal(q.codes, expected.codes) and torch.equal(q.dequantize(), whole)


@pytest.mark.parametrize("format", FORMATS)
def test_the_linear_is_that_of_the_dequantised_matrix(format):
    """y and dx in float64; a bias has a gradient, and backward keeps neither x nor the matrix."""
    q = quantize(matrix(33, 200), format)
    x = torch.randn(7, 200, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(33, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = quantized_linear(x, q, bias)
    assert not kept
    slope = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, bias), slope)
    w = q.dequantize(torch.float64)
    twin = F.linear(x, w, bias)
    assert (y - twin).abs().max() < 1e-12
    for ours, theirs in zip(grads, torch.autograd.grad(twin, (x, bias), slope), strict=True):
        assert (ours - theirs).abs().max() < 1e-12


# ---- in the interpreter --------------------------------------------------------------------------


def kernel_errors(q: Quantized, tokens: int, dtype: torch.dtype) -> list[float]:
    """Return the errors of y and dx against float64 with the matrix as the kernels round it."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, q.columns, generator=generator).to(dtype).requires_grad_()
    slope = torch.randn(tokens, q.rows, generator=generator).to(dtype)
    y = quantized_linear(x, q)
    (d_x,) = torch.autograd.grad(y, x, slope)
    w = q.dequantize(dtype).double()
    return [
        relative_error(y, x.detach().double() @ w.t()),
        relative_error(d_x, slope.double() @ w),
    ]


@law
@pytest.mark.parametrize("tokens", [3, 40, 150])
@pytest.mark.parametrize("format", FORMATS)
def test_kernels_equal_the_twin(format, tokens):
    """Forward and backward, for odd sizes, rows and columns cut inside blocks, fp32 and bf16."""
    whole = quantize(matrix(70, 200), format)
    for q in (whole, whole.cut(0, 13, 70), whole.cut(1, 37, 150)):
        assert max(kernel_errors(q, tokens, torch.float32)) < EXACT
        assert max(kernel_errors(q, tokens, torch.bfloat16)) < HALF
