"""Frozen weight matrices in fewer bits, and the linear that reads them.

    q = quantize(weight, "nf4")           (O, I) -> codes and scales
    y = quantized_linear(x, q)            x Ŵᵀ, Ŵ being what the codes stand for
    q.cut(dim, first, last)               a tensor rank's slice of the same codes

    format   a weight is stored as                       bits   rounding error
    bf16     bfloat16                                    16     2⁻⁸ of the weight
    fp8      e4m3, the largest of a row at 448           8      2⁻⁴ of the weight
    int8     an integer, the largest of a row at 127     8      largest of its row / 254
    nf4      one of 16 quantiles of a normal             4.13   0.152 of the largest of its 64
             distribution (NormalFloat)

NF4 and the double quantisation of its block scales are those of QLoRA, arXiv 2305.14314 Sec. 3: 64
neighbours of a row share a scale; 256 scales share a unit, after the mean of all was taken off. The
8 bits of a block scale are an integer here, not a float: its error has one bound for all scales.

A kernel turns one tile of codes into weights in registers and multiplies it in the inputs' type,
forward y = x Ŵᵀ and backward dx = dy Ŵ. Codes are stored once: a tile is 64 columns wide, so a row
has one scale in it whichever way it is read. No gradient of Ŵ exists, and nothing is kept for it.

Letters: T tokens, I inputs (columns), O outputs (rows), B blocks of a row, S units of scales.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.device import architecture, fused, is_amd, tl, triton, untraced

Format = Literal["bf16", "fp8", "int8", "nf4"]
FORMATS: tuple[Format, ...] = ("bf16", "fp8", "int8", "nf4")
BLOCK = 64  # columns that share an NF4 scale, and the width of a kernel's tile
GROUP = 256  # NF4 scales that share a unit
LARGEST_FP8 = 448.0
ROWS = 1 << 24  # elements quantised or dequantised at a time, to bound the buffers

# Quantiles of a normal distribution, scaled to end at ±1, with an exact 0 (QLoRA, Appendix E).
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True)
class Quantized:
    """A matrix Ŵ (O, I) as codes and scales; a slice of it keeps the scales of the whole."""

    format: Format
    codes: Tensor  # (O, I) bf16, int8, or uint8 of fp8; nf4: (O, 32 B) uint8, two codes a byte
    scales: Tensor  # (O,) fp32; nf4: (O, B) int8; bf16: (0,)
    units: Tensor  # nf4: (1 + S,) fp32, the mean scale and the unit of every group; others: (0,)
    columns: int  # I
    skip: int = 0  # nf4: columns of the first block that are not in the slice
    first_block: int = 0  # nf4: number of the first block in the whole matrix, row by row
    row_blocks: int = 0  # nf4: blocks in a row of the whole matrix

    @property
    def rows(self) -> int:
        return len(self.codes)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scales.nbytes + self.units.nbytes

    def to(self, device: torch.device | str) -> "Quantized":
        """Return the same codes on a device."""
        codes, scales, units = (x.to(device) for x in (self.codes, self.scales, self.units))
        return replace(self, codes=codes, scales=scales, units=units)

    def cut(self, dim: int, first: int, last: int) -> "Quantized":
        """Return the codes of rows (dim 0) or columns (dim 1) first ... last - 1 of the whole.

        The slice stands for the same numbers. A block that is cut is kept whole.
        """
        if dim == 0:
            codes = self.codes[first:last].clone()
            scales = self.scales[first:last].clone() if len(self.scales) else self.scales
            begin = self.first_block + first * self.row_blocks
            return replace(self, codes=codes, scales=scales, first_block=begin)
        columns = last - first
        if self.format != "nf4":
            return replace(self, codes=self.codes[:, first:last].contiguous(), columns=columns)
        low, high = first // BLOCK, -(-last // BLOCK)
        codes = self.codes[:, low * BLOCK // 2 : high * BLOCK // 2].contiguous()
        return replace(
            self,
            codes=codes,
            scales=self.scales[:, low:high].contiguous(),
            columns=columns,
            skip=first - low * BLOCK,
            first_block=self.first_block + low,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return Ŵ, (O, I). The arithmetic is fp32; a narrower dtype rounds its result."""
        if self.format == "bf16":
            return self.codes.to(dtype)
        out = torch.empty(self.rows, self.columns, dtype=dtype, device=self.codes.device)
        step = max(1, ROWS // max(1, self.columns))
        for first in range(0, self.rows, step):
            out[first : first + step] = self._dequantize_rows(first, first + step)
        return out

    def _dequantize_rows(self, first: int, last: int) -> Tensor:
        """Return some rows of Ŵ in fp32."""
        codes, scales = self.codes[first:last], self.scales[first:last]
        if self.format == "int8":
            return codes.float() * scales[:, None]
        if self.format == "fp8":
            return codes.view(torch.float8_e4m3fn).float() * scales[:, None]
        table = torch.tensor(NF4, device=codes.device)
        values = table[torch.stack((codes & 15, codes >> 4), -1).int()]  # (rows, 32 B, 2)
        rows = torch.arange(first, first + len(codes), device=codes.device)
        blocks = torch.arange(scales.shape[1], device=codes.device)
        number = self.first_block + rows[:, None] * self.row_blocks + blocks
        scale = scales.float() * self.units[1 + number // GROUP] + self.units[0]
        values = values.view(len(codes), -1, BLOCK) * scale[:, :, None]
        return values.flatten(1)[:, self.skip : self.skip + self.columns]


# ---- quantising ----------------------------------------------------------------------------------


@torch.no_grad()
def quantize(weight: Tensor, format: Format) -> Quantized:
    """Round a whole matrix (O, I) to a format. On the meta device only the sizes come out."""
    empty = torch.empty(0, device=weight.device)
    columns = weight.shape[1]
    if format == "bf16":
        return Quantized(format, weight.to(torch.bfloat16), empty, empty, columns)
    if format == "nf4":
        return _quantize_nf4(weight)
    largest = LARGEST_FP8 if format == "fp8" else 127.0
    scales = weight.abs().amax(1).float() / largest  # (O,)
    per_scale = weight.float() / _not_zero(scales)[:, None]
    if format == "fp8":
        codes = per_scale.clamp(-largest, largest).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = per_scale.round().clamp(-largest, largest).to(torch.int8)
    return Quantized(format, codes, scales, empty, columns)


def _quantize_nf4(weight: Tensor) -> Quantized:
    """Round to the nearest of 16 levels a block, and the blocks' scales to 8 bits."""
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    padded = F.pad(weight, (0, blocks * BLOCK - columns)).view(rows, blocks, BLOCK)
    absmax = padded.abs().amax(2).float()  # (O, B)
    flat = absmax.flatten()
    mean = flat.double().mean().float()
    groups = F.pad(flat - mean, (0, -len(flat) % GROUP)).view(-1, GROUP)
    units = groups.abs().amax(1) / 127  # (S,)
    scale_codes = (groups / _not_zero(units)[:, None]).round().clamp(-127, 127)
    exact = (scale_codes * units[:, None] + mean).flatten()[: len(flat)].view(rows, blocks)
    levels = torch.tensor(NF4, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    codes = torch.empty(rows, blocks * BLOCK, dtype=torch.uint8, device=weight.device)
    step = max(1, ROWS // (blocks * BLOCK))
    for first in range(0, rows, step):
        part = slice(first, first + step)
        per_scale = padded[part].float() / _not_zero(exact[part])[:, :, None]
        codes[part] = torch.bucketize(per_scale, between, out_int32=True).flatten(1).to(torch.uint8)
    codes = codes[:, 0::2] | codes[:, 1::2] << 4
    scales = scale_codes.flatten()[: len(flat)].view(rows, blocks).to(torch.int8)
    units = torch.cat((mean[None], units))
    return Quantized("nf4", codes, scales, units, columns, row_blocks=blocks)


def _not_zero(scales: Tensor) -> Tensor:
    """Return the scales with 1 in place of 0, so that a row of zeros divides to zeros."""
    return torch.where(scales == 0, 1.0, scales)


# ---- the linear ----------------------------------------------------------------------------------


@untraced
def quantized_linear(x: Tensor, q: Quantized, bias: Tensor | None = None) -> Tensor:
    """Compute x Ŵᵀ + bias: x (T, I) -> (T, O). Only x and bias have a gradient."""
    y = _QuantizedLinear.apply(x, q)
    return y if bias is None else y + bias


class _QuantizedLinear(torch.autograd.Function):
    """forward: y = x Ŵᵀ    backward: dx = dy Ŵ, which needs neither x nor y, so none is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Quantized) -> Tensor:
        ctx.q = q
        if fused(x):
            return _launch(x, q, backward=False)
        return x @ q.dequantize(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (d_y,) = grads
        if fused(d_y):
            return _launch(d_y, ctx.q, backward=True), None
        return d_y @ ctx.q.dequantize(d_y.dtype), None


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def weight_tile(
    CODES,
    SCALES,
    UNITS,
    row,
    block,
    rows,
    columns,
    code_stride,
    blocks,
    skip,
    first_block,
    row_blocks,
    FORMAT: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
):
    """Return Ŵ at some rows and the WIDTH columns of one block, fp32, zero outside the matrix."""
    at = block * WIDTH + tl.arange(0, WIDTH)  # columns, those before the slice included
    inside = (row < rows)[:, None] & ((at >= skip) & (at < skip + columns))[None, :]
    start = row.to(tl.int64) * code_stride
    if FORMAT == "nf4":
        pair = block * (WIDTH // 2) + tl.arange(0, WIDTH // 2)  # bytes of the block
        byte = tl.load(CODES + start[:, None] + pair[None, :], mask=(row < rows)[:, None], other=0)
        code = tl.interleave(byte & 15, byte >> 4)
        value = tl.zeros(code.shape, tl.float32)
        for level in tl.static_range(16):
            value = tl.where(code == level, LEVELS[level], value)
        group = (first_block + row * row_blocks + block) // GROUP
        unit = tl.load(UNITS + 1 + group, mask=row < rows, other=0)
        scale = tl.load(SCALES + row * blocks + block, mask=row < rows, other=0).to(tl.float32)
        scale = scale * unit + tl.load(UNITS)
    else:
        code = tl.load(CODES + start[:, None] + at[None, :], mask=inside, other=0)
        if FORMAT == "bf16":
            return code.to(tl.float32)
        if FORMAT == "fp8":
            # Exponent and fraction of e4m3 at the places of fp32's; the exponents' biases are 7 and
            # 127, which a product mends, for numbers below the smallest normal one too.
            bits = code.to(tl.int32)
            bits = ((bits & 128) << 24) | ((bits & 127) << 20)
            value = bits.to(tl.float32, bitcast=True) * 2.0**120
        else:
            value = code.to(tl.float32)
        scale = tl.load(SCALES + row, mask=row < rows, other=0)
    return tl.where(inside, value * scale[:, None], 0.0)


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    X,
    CODES,
    SCALES,
    UNITS,
    Y,
    tokens,
    rows,
    columns,
    code_stride,
    blocks,
    skip,
    first_block,
    row_blocks,
    FORMAT: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute M tokens and N outputs of y = x Ŵᵀ, block by block of the inputs."""
    token = tl.program_id(0) * M + tl.arange(0, M)
    row = tl.program_id(1) * N + tl.arange(0, N)
    x_start = token.to(tl.int64) * columns
    sums = tl.zeros((M, N), tl.float32)
    for block in range(0, blocks):
        column = block * WIDTH + tl.arange(0, WIDTH) - skip
        seen = (token < tokens)[:, None] & ((column >= 0) & (column < columns))[None, :]
        x = tl.load(X + x_start[:, None] + column[None, :], mask=seen, other=0.0)
        w = weight_tile(
            CODES,
            SCALES,
            UNITS,
            row,
            block,
            rows,
            columns,
            code_stride,
            blocks,
            skip,
            first_block,
            row_blocks,
            FORMAT,
            WIDTH,
            GROUP,
            LEVELS,
        )
        sums = tl.dot(x, tl.trans(w.to(x.dtype)), sums, input_precision=PRECISION)
    at = token.to(tl.int64)[:, None] * rows + row[None, :]
    kept = (token < tokens)[:, None] & (row < rows)[None, :]
    tl.store(Y + at, sums.to(Y.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    DY,
    CODES,
    SCALES,
    UNITS,
    DX,
    tokens,
    rows,
    columns,
    code_stride,
    blocks,
    skip,
    first_block,
    row_blocks,
    FORMAT: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    LEVELS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute M tokens and one block of columns of dx = dy Ŵ, N outputs at a time."""
    token = tl.program_id(0) * M + tl.arange(0, M)
    block = tl.program_id(1)
    y_start = token.to(tl.int64) * rows
    sums = tl.zeros((M, WIDTH), tl.float32)
    for first in range(0, rows, N):
        row = first + tl.arange(0, N)
        seen = (token < tokens)[:, None] & (row < rows)[None, :]
        d_y = tl.load(DY + y_start[:, None] + row[None, :], mask=seen, other=0.0)
        w = weight_tile(
            CODES,
            SCALES,
            UNITS,
            row,
            block,
            rows,
            columns,
            code_stride,
            blocks,
            skip,
            first_block,
            row_blocks,
            FORMAT,
            WIDTH,
            GROUP,
            LEVELS,
        )
        sums = tl.dot(d_y, w.to(d_y.dtype), sums, input_precision=PRECISION)
    column = block * WIDTH + tl.arange(0, WIDTH) - skip
    at = token.to(tl.int64)[:, None] * columns + column[None, :]
    kept = (token < tokens)[:, None] & ((column >= 0) & (column < columns))[None, :]
    tl.store(DX + at, sums.to(DX.dtype.element_ty), mask=kept)


def tile_sizes(
    arch: int, tokens: int, dtype: torch.dtype, backward: bool
) -> tuple[int, int, int, int]:
    """Return (M, N, warps, stages): tokens and outputs of a tile, the latter of a step backward.

    The largest that tests/unit/test_kernels_offline.py sees without spills in a loop.
    """
    if dtype == torch.float32:  # exact products, which no tensor core computes
        return (16 if tokens <= 16 else 32, 32, 4, 1)
    if tokens <= 16:
        return (16, 64, 8, 3)
    if tokens <= 64:
        return (64, 64, 4, 3)
    if backward:
        wide = arch >= 100 and arch != 120 and not is_amd(arch)
        return (128, 128 if wide else 64, 8, 2)
    return (128, 64 if arch in (86, 120) else 128, 8, 2)


def _launch(x: Tensor, q: Quantized, backward: bool) -> Tensor:
    """Run a kernel: x (T, I) -> (T, O), or backward dy (T, O) -> (T, I)."""
    x, tokens = x.contiguous(), len(x)
    out = x.new_empty(tokens, q.columns if backward else q.rows)
    if not out.numel():
        return out
    m, n, warps, stages = tile_sizes(architecture(x.device), tokens, x.dtype, backward)
    blocks = -(-(q.skip + q.columns) // BLOCK)
    kernel = backward_kernel if backward else forward_kernel
    grid = (triton.cdiv(tokens, m), blocks if backward else triton.cdiv(q.rows, n))
    kernel[grid](
        x,
        q.codes,
        q.scales,
        q.units,
        out,
        tokens,
        q.rows,
        q.columns,
        q.codes.stride(0),
        blocks,
        q.skip,
        q.first_block,
        q.row_blocks,
        FORMAT=q.format,
        WIDTH=BLOCK,
        GROUP=GROUP,
        LEVELS=NF4,
        M=m,
        N=n,
        PRECISION="ieee",  # of fp32 products; naming tf32 fails on gfx950 for any type
        num_warps=warps,
        num_stages=stages,
    )
    return out
