"""The MLPs of many experts at once, on rows that are sorted by expert.

    g = X_e G_eᵀ,  u = X_e U_eᵀ,  Y_e = (silu(g) · u) D_eᵀ        for each expert e

A loop over the experts starts a handful of small matmuls for each of them and leaves most of a GPU
idle. Here three kernels take all experts: one computes gate, up and SwiGLU, one a product with
one weight or the sum of two (down, and the gradient of X), one the gradients of the weights.

A program computes a tile of M rows of one expert; the tiles are listed on the host (`plan`), as
attention's are. Where an expert's weight lies is its distance from the first expert's, so weights
stay where they are. Every sum is taken by one program in one order: results are deterministic.

Letters: N rows, D width, F hidden width, E experts, W tiles.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kernels.device import architecture, fused, is_amd, tl, triton, untraced, upload
from kernels.linear import linear
from kernels.swiglu import swiglu

# (M, N, K, warps, stages) of the three kernels by architecture, for 2-byte types: tiles that
# tests/unit/test_kernels_offline.py sees without spills in a loop.
TILES = {
    80: ((128, 64, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 3)),
    86: ((128, 64, 32, 8, 3), (128, 128, 32, 8, 3), (128, 128, 32, 8, 3)),
    942: ((128, 64, 32, 8, 2), (128, 128, 32, 8, 2), (128, 128, 32, 8, 2)),
}
EXACT = ((32, 32, 32, 4, 1),) * 3  # fp32
FEW_ROWS = 16  # an expert with at most so many rows on average takes tiles of as many


def tile_sizes(arch: int, dtype: torch.dtype, rows_each: float) -> tuple[tuple[int, ...], ...]:
    """Return (M, N, K, warps, stages) of SwiGLU, of a product, and of a weight's gradient."""
    if dtype == torch.float32:
        return EXACT
    table = TILES[86 if arch in (86, 89, 120) else 80]
    if is_amd(arch):
        table = TILES[942]
    if rows_each > FEW_ROWS:
        return table
    return (*((FEW_ROWS, n, k, 4, stages) for _, n, k, _, stages in table[:2]), table[2])


def plan(counts: Sequence[int], m: int) -> np.ndarray:
    """List tiles of m rows that belong to one expert each: (expert, first row, end), (W, 3)."""
    tiles, start = [], 0
    for expert, count in enumerate(counts):
        end = start + count
        tiles += [(expert, row, end) for row in range(start, end, m)]
        start = end
    return np.array(tiles, np.int64).reshape(-1, 3)


def grouped_mlp(
    x: Tensor,
    counts: Sequence[int],
    gates: Sequence[Tensor],
    ups: Sequence[Tensor],
    downs: Sequence[Tensor],
) -> Tensor:
    """Compute every expert's MLP on its own rows: x (N, D), sorted by expert -> (N, D).

    counts: rows of each expert; gates, ups: weights (F, D) each; downs: (D, F).
    """
    if fused(x):
        return _GroupedMLP.apply(x.contiguous(), tuple(counts), *gates, *ups, *downs)
    parts = []
    for rows, gate, up, down in zip(x.split(list(counts)), gates, ups, downs, strict=True):
        parts.append(linear(swiglu(linear(rows, gate), linear(rows, up)), down))
    return torch.cat(parts)


class _Work:
    """Places of the weights and rows of a batch, on the device: one upload."""

    def __init__(self, x: Tensor, counts: tuple[int, ...], weights: Sequence[Sequence[Tensor]]):
        n = len(counts)
        arch = architecture(x.device)
        self.sizes = tile_sizes(arch, x.dtype, len(x) / n)
        distances = [
            [(w.data_ptr() - of_kind[0].data_ptr()) // w.element_size() for w in of_kind]
            for of_kind in weights
        ]
        starts = np.cumsum([0, *counts])
        tiles = [plan(counts, self.sizes[i][0]) for i in range(2)]
        arrays = [np.array(row, np.int64).ravel() for row in (*distances, starts, *tiles)]
        # Whole multiples of 16 bytes: Triton compiles anew for a pointer that stops being one.
        padded = [np.pad(row, (0, row.size % 2)) for row in arrays]
        parts = upload(np.concatenate(padded), x.device).split([row.size for row in padded])
        self.distances, self.starts, self.tiles = parts[: len(weights)], parts[-3], parts[-2:]
        self.programs = [len(t) for t in tiles]
        # 16 bytes: what a load takes at once
        whole = all(w.data_ptr() % 16 == 0 for of_kind in weights for w in of_kind)
        self.align = 16 // x.element_size() if whole else 1


class _GroupedMLP(torch.autograd.Function):
    """All experts, and their gradients; an expert without rows gets zeros."""

    @staticmethod
    @untraced
    def forward(ctx, x, counts, *weights):
        n = len(counts)
        kinds = gates, ups, downs = weights[:n], weights[n : 2 * n], weights[2 * n :]
        work = _Work(x, counts, kinds)
        rows, hidden, width = len(x), len(gates[0]), x.shape[1]
        gate, up, out = (x.new_empty(rows, hidden) for _ in range(3))
        if rows:
            m, n_tile, k, warps, stages = work.sizes[0]
            grid = (work.programs[0], triton.cdiv(hidden, n_tile))
            swiglu_kernel[grid](
                x,
                gates[0],
                ups[0],
                work.distances[0],
                work.distances[1],
                work.tiles[0],
                gate,
                up,
                out,
                width,
                hidden,
                ALIGN=work.align,
                M=m,
                N=n_tile,
                K=k,
                PRECISION="ieee",
                num_warps=warps,
                num_stages=stages,
            )
        y = _product(work, out, downs, 2, transposed=True)
        ctx.work, ctx.experts = work, n
        ctx.save_for_backward(x, gate, up, out, *weights)
        return y

    @staticmethod
    @untraced
    def backward(ctx, dy):
        x, gate, up, out, *weights = ctx.saved_tensors
        work, n = ctx.work, ctx.experts
        gates, ups, downs = weights[:n], weights[n : 2 * n], weights[2 * n :]
        dy = dy.contiguous()
        d_out = _product(work, dy, downs, 2, transposed=False)
        d_gate, d_up = torch.ops.plumb.swiglu_backward(d_out, gate, up)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _product(work, d_gate, gates, 0, transposed=False, second=(d_up, ups, 1))
        grads = []
        for slopes, inputs, of_kind, first in (
            (d_gate, x, gates, 2),
            (d_up, x, ups, 2 + n),
            (dy, out, downs, 2 + 2 * n),
        ):
            needed = any(ctx.needs_input_grad[first : first + n])
            grads += _weight_gradients(work, slopes, inputs, of_kind) if needed else [None] * n
        return dx, None, *grads


def _product(work, x, weights, kind, transposed, second=None):
    """Return X_e W_eᵀ (transposed) or X_e W_e of every expert; plus the same of a second pair."""
    outputs, inputs = weights[0].shape if transposed else weights[0].shape[::-1]
    y = x.new_empty(len(x), outputs)
    if not len(x):
        return y
    m, n, k, warps, stages = work.sizes[1]
    x2, weights2, kind2 = second or (x, weights, kind)
    product_kernel[(work.programs[1], triton.cdiv(outputs, n))](
        x,
        x2,
        weights[0],
        weights2[0],
        work.distances[kind],
        work.distances[kind2],
        work.tiles[1],
        y,
        inputs,
        outputs,
        ALIGN=work.align,
        TRANSPOSED=transposed,
        DUAL=second is not None,
        M=m,
        N=n,
        K=k,
        PRECISION="ieee",
        num_warps=warps,
        num_stages=stages,
    )
    return y


def _weight_gradients(work, slopes, inputs, weights):
    """Return dYᵀ_e X_e of every expert, in the shape of its weight."""
    rows, columns = weights[0].shape
    grads = slopes.new_empty(len(weights), rows, columns)
    m, n, k, warps, stages = work.sizes[2]
    gradient_kernel[(len(weights), triton.cdiv(rows, m), triton.cdiv(columns, n))](
        slopes,
        inputs,
        work.starts,
        grads,
        rows,
        columns,
        M=m,
        N=n,
        K=k,
        PRECISION="ieee",
        num_warps=warps,
        num_stages=stages,
    )
    return grads.unbind(0)


@triton.jit
def swiglu_kernel(
    X,
    GATES,
    UPS,
    GATE_AT,
    UP_AT,
    TILES_AT,
    GATE,
    UP,
    OUT,
    columns,
    rows,
    ALIGN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a tile of g = X Gᵀ, of u = X Uᵀ, and of silu(g) · u."""
    tile = TILES_AT + tl.program_id(0) * 3
    expert, end = tl.load(tile), tl.load(tile + 2)
    row = tl.load(tile + 1) + tl.arange(0, M)
    output = tl.program_id(1) * N + tl.arange(0, N)
    gates = GATES + tl.multiple_of(tl.load(GATE_AT + expert), ALIGN)
    ups = UPS + tl.multiple_of(tl.load(UP_AT + expert), ALIGN)
    x_start, w_start = row * columns, output.to(tl.int64) * columns
    gate, up = tl.zeros((M, N), tl.float32), tl.zeros((M, N), tl.float32)
    for first in range(0, columns, K):
        column = first + tl.arange(0, K)
        inside = (column < columns)[None, :]
        x_seen, w_seen = (row < end)[:, None] & inside, (output < rows)[:, None] & inside
        x = tl.load(X + x_start[:, None] + column[None, :], mask=x_seen, other=0.0)
        at = w_start[:, None] + column[None, :]
        w = tl.load(gates + at, mask=w_seen, other=0.0)
        gate = tl.dot(x, tl.trans(w), gate, input_precision=PRECISION)
        w = tl.load(ups + at, mask=w_seen, other=0.0)
        up = tl.dot(x, tl.trans(w), up, input_precision=PRECISION)
    at = row[:, None] * rows + output[None, :]
    kept = (row < end)[:, None] & (output < rows)[None, :]
    kind = OUT.dtype.element_ty
    tl.store(GATE + at, gate.to(kind), mask=kept)
    tl.store(UP + at, up.to(kind), mask=kept)
    gate, up = (
        gate.to(kind).to(tl.float32),
        up.to(kind).to(tl.float32),
    )  # as the backward reads them
    tl.store(OUT + at, (gate * tl.sigmoid(gate) * up).to(kind), mask=kept)


@triton.jit
def _add_product(sums, X, WEIGHTS, row, end, output, columns, outputs, TRANSPOSED, K, PRECISION):
    """Add a tile of X Wᵀ (TRANSPOSED: W is (outputs, columns)) or of X W to sums."""
    x_start = row * columns
    for first in range(0, columns, K):
        column = first + tl.arange(0, K)
        x_seen = (row < end)[:, None] & (column < columns)[None, :]
        x = tl.load(X + x_start[:, None] + column[None, :], mask=x_seen, other=0.0)
        if TRANSPOSED:
            at = output.to(tl.int64)[:, None] * columns + column[None, :]
            seen = (output < outputs)[:, None] & (column < columns)[None, :]
            w = tl.trans(tl.load(WEIGHTS + at, mask=seen, other=0.0))
        else:
            at = column.to(tl.int64)[:, None] * outputs + output[None, :]
            seen = (column < columns)[:, None] & (output < outputs)[None, :]
            w = tl.load(WEIGHTS + at, mask=seen, other=0.0)
        sums = tl.dot(x, w, sums, input_precision=PRECISION)
    return sums


@triton.jit
def product_kernel(
    X,
    X2,
    WEIGHTS,
    WEIGHTS2,
    W_AT,
    W2_AT,
    TILES_AT,
    Y,
    columns,
    outputs,
    ALIGN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    DUAL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a tile of Y = X W, or with DUAL of X W + X2 W2, for one expert's W."""
    tile = TILES_AT + tl.program_id(0) * 3
    expert, end = tl.load(tile), tl.load(tile + 2)
    row = tl.load(tile + 1) + tl.arange(0, M)
    output = tl.program_id(1) * N + tl.arange(0, N)
    sums = tl.zeros((M, N), tl.float32)
    w = WEIGHTS + tl.multiple_of(tl.load(W_AT + expert), ALIGN)
    sums = _add_product(sums, X, w, row, end, output, columns, outputs, TRANSPOSED, K, PRECISION)
    if DUAL:
        w = WEIGHTS2 + tl.multiple_of(tl.load(W2_AT + expert), ALIGN)
        sums = _add_product(
            sums, X2, w, row, end, output, columns, outputs, TRANSPOSED, K, PRECISION
        )
    at = row[:, None] * outputs + output[None, :]
    kept = (row < end)[:, None] & (output < outputs)[None, :]
    tl.store(Y + at, sums.to(Y.dtype.element_ty), mask=kept)


@triton.jit
def gradient_kernel(
    DY,
    X,
    STARTS,
    D_W,
    rows,
    columns,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute a tile of one expert's dW = dYᵀ X, over its rows; zeros where it has none."""
    expert = tl.program_id(0).to(tl.int64)
    start, end = tl.load(STARTS + expert), tl.load(STARTS + expert + 1)
    row = tl.program_id(1) * M + tl.arange(0, M)
    column = tl.program_id(2) * N + tl.arange(0, N)
    sums = tl.zeros((M, N), tl.float32)
    for first in range(start, end, K):
        token = first + tl.arange(0, K)
        seen = (token < end)[:, None]
        at = token[:, None] * rows + row[None, :]
        dy = tl.load(DY + at, mask=seen & (row < rows)[None, :], other=0.0)
        at = token[:, None] * columns + column[None, :]
        x = tl.load(X + at, mask=seen & (column < columns)[None, :], other=0.0)
        sums = tl.dot(tl.trans(dy), x, sums, input_precision=PRECISION)
    at = expert * rows * columns + row.to(tl.int64)[:, None] * columns + column[None, :]
    kept = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(D_W + at, sums.to(D_W.dtype.element_ty), mask=kept)
