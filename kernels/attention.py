"""Attention over prompt trees: dispatch, plain-torch twin, Triton kernels.

A batch is one flat row of T tokens that holds trees: a prompt, then its responses side by side. A
response sees its prompt and itself, never a sibling. As a mask: key j is visible to query i iff
j <= i < kv_end[j] and, with a sliding window W, position[i] - position[j] < W. A soft cap bends the
scores first (kernels/cap.py).

Three Triton kernels (forward, dQ, dK and dV) walk lists of tiles made once a batch on the host:
hidden tiles are left out, fully visible tiles come first and skip the mask. Each kernel is ONE loop
with the mask inside a run-time `if`: two loops that share accumulators make ptxas serialise every
wgmma (warning C7515). Every sum has a fixed order and nothing is added with atomics, so the same
batch gives the same bits.

Letters: T tokens, H query heads, G key/value heads, E head size (EP: rounded up to a power of two),
M queries and N keys of a tile.
"""

import functools
import inspect

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tiles
from kernels.cap import tanh
from kernels.device import architecture, fused, is_amd, operator, tl, triton, untraced
from layout import TreeLayout

LOG2E = 1.4426950408889634


# ---- dispatch ------------------------------------------------------------------------------------


def tree_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, window: int = 0, cap: float = 0.0
) -> Tensor:
    """Compute softmax(q kᵀ / √E + mask) v over the trees of `layout`, differentiable by q, k and v.

    q (T, H, E), k and v (T, G, E) with H a multiple of G -> (T, H, E). Window 0 sees everything.
    With a cap c the scores s = q kᵀ / √E become c tanh(s / c).
    Under context parallelism `layout` is a layout.shard(rows): q and the result hold those n rows,
    (n, H, E), while k and v stay whole. The gradients of k and v are then the part that these
    queries give, to be summed over the ranks.
    """
    largest = 128 if q.dtype == torch.float32 else 256  # head size whose tiles fit in shared memory
    if len(q) == 0 or q.shape[2] > largest or not fused(q):
        return plain_attention(q, k, v, layout, window, cap)
    if not cap and varlen_serves(q, k, layout, window):
        return varlen_attention(q, k, v, layout)
    return tree_attention_fused(q, k, v, layout, window, cap)


def tree_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, window: int = 0, cap: float = 0.0
) -> Tensor:
    """Compute `tree_attention` with the Triton kernels of this file, whatever the layout.

    The kernels index queries as they index keys, by place in the flat row, so a shard's rows are
    scattered to their places first. The zeros between them are computed only where they share a
    tile with this rank's rows, and receive no gradient.
    """
    if layout.index is not None:
        q = q.new_zeros(len(k), *q.shape[1:]).index_copy(0, layout.index, q)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    work_lists = tiles.work_lists(layout, q, k.shape[1], window, cap > 0)
    out, _ = torch.ops.plumb.tree_attention(q, k, v, work_lists, window, cap)
    return out if layout.index is None else out.index_select(0, layout.index)


# ---- plain packing: torch's varlen_attn ----------------------------------------------------------


def varlen_serves(q: Tensor, k: Tensor, layout: TreeLayout, window: int) -> bool:
    """Tell whether torch's varlen_attn can compute this: plain sequences on a GPU, all rows here.

    Not under deterministic algorithms: its backward adds with atomics. Not on AMD's GPUs, where
    nobody has tried it here.
    """
    needed = {"window_size"} | ({"enable_gqa"} if q.shape[1] != k.shape[1] else set())
    return (
        layout.rows is None
        and window == 0
        and q.is_cuda
        and q.dtype != torch.float32
        and architecture(q.device) >= 80
        and not is_amd(architecture(q.device))
        and needed <= _varlen_parameters()
        and not torch.are_deterministic_algorithms_enabled()
        and segments(layout) is not None
    )


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout) -> Tensor:
    """Compute `tree_attention` of plain sequences with torch's varlen_attn: (T, H, E)."""
    from torch.nn.attention.varlen import varlen_attn

    starts, longest = segments(layout)
    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0), **grouped)


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """Names of varlen_attn's parameters, which change between releases; empty without it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


@untraced
def segments(layout: TreeLayout) -> tuple[Tensor, int] | None:
    """Return where sequences start and the last one ends, (trees + 1,) int32, and the longest one.

    None where some tree has several responses, and so is no plain sequence.
    """
    if any(len(responses) > 1 for _, responses in layout.spans):
        return None
    if "segments" not in layout.cache:
        sizes = [prompt + sum(responses) for prompt, responses in layout.spans]
        starts = torch.tensor(np.cumsum([0, *sizes]), dtype=torch.int32)
        if layout.kv_end.is_cuda:
            starts = starts.pin_memory().to(layout.kv_end.device, non_blocking=True)
        layout.cache["segments"] = (starts, max(sizes))
    return layout.cache["segments"]


# ---- plain twin ----------------------------------------------------------------------------------


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, window: int, cap: float = 0.0
) -> Tensor:
    """Compute `tree_attention` in plain torch: one scaled_dot_product_attention a run of queries.

    A run's keys are its branch, [prompt; response], up to the last key that it sees. Rows are cut
    with `split`: its backward is one concatenation, where each slice would fill a whole (T, H, E).
    """
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (heads, T, E)
    on_cpu = q.device.type == "cpu"
    if k.shape[0] != q.shape[0] and (cap or not on_cpu):  # torch's CPU kernel shares keys itself
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    if not layout.runs:  # still a function of all three: other ranks wait for these gradients
        return (q * k[:, :0].sum() * v[:, :0].sum()).transpose(0, 1)
    queries = q.split([run.queries for run in layout.runs], 1)
    k, v = k.split(layout.sizes, 1), v.split(layout.sizes, 1)
    out = []
    for run_queries, run in zip(queries, layout.runs):
        keys, values = (torch.cat([x[i] for i in run.parts], 1)[:, : run.keys] for x in (k, v))
        out.append(attend_run(run_queries, keys, values, layout, window, cap))
    return torch.cat(out, 1).transpose(0, 1)


def attend_run(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, window: int, cap: float
) -> Tensor:
    """Attend from consecutive queries (H, n, E) to keys (H or fewer, m, E) that end at the last.

    On a CPU torch's kernel takes a third longer for 2-byte floats than for fp32.
    """
    queries, keys, dtype = q.shape[1], k.shape[1], v.dtype
    if q.device.type == "cpu" and dtype.itemsize == 2:
        q, k, v = q.float(), k.float(), v.float()
    if cap:
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = torch.matmul(q.to(exact) * q.shape[2] ** -0.5, k.to(exact).transpose(1, 2))
        scores = cap * torch.tanh(scores / cap) + causal_mask(layout, queries, keys, window, exact)
        return torch.matmul(scores.softmax(-1), v.to(exact)).to(dtype)
    causal = queries == keys and not 0 < window < keys  # torch's own mask is the same
    mask = None if causal else causal_mask(layout, queries, keys, window, q.dtype)
    out = F.scaled_dot_product_attention(
        q[None],
        k[None],
        v[None],
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=k.shape[0] != q.shape[0],
    )
    return out[0].to(dtype)


def causal_mask(
    layout: TreeLayout, queries: int, keys: int, window: int, dtype: torch.dtype
) -> Tensor:
    """Return the mask of the last `queries` of `keys` consecutive tokens, to be added to scores.

    (queries, keys), 0 or -inf.
    """
    name = ("mask", queries, keys, window, dtype)
    if name not in layout.cache:
        device = layout.kv_end.device
        places = torch.arange(keys, device=device)
        distance = places[keys - queries :, None] - places  # (queries, keys)
        hidden = distance < 0
        if window:
            hidden |= distance >= window
        mask = torch.zeros(queries, keys, dtype=dtype, device=device)
        layout.cache[name] = mask.masked_fill_(hidden, float("-inf"))
    return layout.cache[name]


# ---- kernels -------------------------------------------------------------------------------------


@triton.jit
def _load_rows(base, rows, stride, E: tl.constexpr, EP: tl.constexpr):
    """Load rows of a (., E) matrix, zero from column E on. The caller clamps rows, so no mask."""
    e = tl.arange(0, EP)
    if E == EP:
        return tl.load(base + rows[:, None] * stride + e[None, :])
    else:
        return tl.load(base + rows[:, None] * stride + e[None, :], mask=e[None, :] < E, other=0.0)


@triton.jit
def _visible(i, j, KV_END, POSITION, T, WINDOW: tl.constexpr):
    """Compute the mask of queries i and keys j, which broadcast; places past T are hidden."""
    seen = (j <= i) & (i < tl.load(KV_END + j, mask=j < T, other=0))
    if WINDOW > 0:
        query_position = tl.load(POSITION + i, mask=i < T, other=0)
        key_position = tl.load(POSITION + j, mask=j < T, other=0)
        seen = seen & (query_position - key_position < WINDOW)
    return seen


@triton.jit(do_not_specialize=["T"])
def forward_kernel(
    Q, K, V, OUT, LSE, KV_END, POSITION, ITEMS, LISTS, T, scale, inner,
    q_t, q_h, k_t, k_h, v_t, v_h, H,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip  # in groups: tensors and sizes, strides, constants
    """Compute OUT (T, H, E) and LSE (H, T) of one tile of queries and one head.

    LSE = log2 Σ 2^(q k scale), scale = log2(e) / √E. With a cap c: LSE = log2 Σ 2^(tanh(q k inner)
    scale), inner = 1 / (c √E), scale = c log2(e).
    """
    head = tl.program_id(0).to(tl.int64)
    item = ITEMS + tl.program_id(1) * 8
    first, full, total = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    i = tl.load(item) * M + tl.arange(0, M)
    rows = tl.minimum(i, T - 1).to(tl.int64)
    q = _load_rows(Q + head * q_h, rows, q_t, E, EP)
    K += head // GROUP * k_h
    V += head // GROUP * v_h
    # The first maximum is above the score of hidden pairs, so that they count exp(-huge) = 0.
    top = tl.full((M,), -1.0e29, tl.float32)
    weight = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, EP), tl.float32)
    for t in tl.range(0, total):
        n0 = tl.load(LISTS + first + t) * N
        ahead = tl.minimum(tl.arange(0, N), T - 1 - n0)
        k = _load_rows(K + n0.to(tl.int64) * k_t, ahead, k_t, E, EP)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CAPPED:
            s = tanh(s * inner)
        if t >= full:
            j = n0 + tl.arange(0, N)
            s = tl.where(_visible(i[:, None], j[None, :], KV_END, POSITION, T, WINDOW), s, -1.0e30)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.math.exp2(s * scale - (new_top * scale)[:, None])
        shrink = tl.math.exp2((top - new_top) * scale)
        weight = weight * shrink + tl.sum(p, 1)
        out = out * shrink[:, None]
        v = _load_rows(V + n0.to(tl.int64) * v_t, ahead, v_t, E, EP)
        out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
        top = new_top
    weight = tl.where(weight == 0.0, 1.0, weight)
    e = tl.arange(0, EP)
    at = OUT + (rows[:, None] * H + head) * E + e[None, :]
    inside = (i[:, None] < T) & (e[None, :] < E)
    tl.store(at, (out / weight[:, None]).to(OUT.dtype.element_ty), mask=inside)
    tl.store(LSE + head * T + i, top * scale + tl.math.log2(weight), mask=i < T)


@triton.jit(do_not_specialize=["T"])
def d_q_kernel(
    Q, K, V, OUT, D_OUT, LSE, DELTA, D_Q, KV_END, POSITION, ITEMS, LISTS, T, scale, inner, root,
    q_t, q_h, k_t, k_h, v_t, v_h, H,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip  # in groups: tensors and sizes, strides, constants
    """Compute D_Q (T, H, E) of one tile of queries and one head, and DELTA for dK and dV.

    DELTA (H, T) = Σ out · d_out over the head; root = 1 / √E.
    """
    head = tl.program_id(0).to(tl.int64)
    item = ITEMS + tl.program_id(1) * 8
    first, full, total = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    i = tl.load(item) * M + tl.arange(0, M)
    rows = tl.minimum(i, T - 1).to(tl.int64)
    d_out = _load_rows(D_OUT + head * E, rows, H * E, E, EP)
    out = _load_rows(OUT + head * E, rows, H * E, E, EP)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(DELTA + head * T + i, delta, mask=i < T)
    lse = tl.load(LSE + head * T + rows)
    q = _load_rows(Q + head * q_h, rows, q_t, E, EP)
    K += head // GROUP * k_h
    V += head // GROUP * v_h
    d_q = tl.zeros((M, EP), tl.float32)
    for t in tl.range(0, total):
        n0 = tl.load(LISTS + first + t) * N
        ahead = tl.minimum(tl.arange(0, N), T - 1 - n0)
        k = _load_rows(K + n0.to(tl.int64) * k_t, ahead, k_t, E, EP)
        v = _load_rows(V + n0.to(tl.int64) * v_t, ahead, v_t, E, EP)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if CAPPED:
            s = tanh(s * inner)
        p = tl.math.exp2(s * scale - lse[:, None])
        if t >= full:
            j = n0 + tl.arange(0, N)
            p = tl.where(_visible(i[:, None], j[None, :], KV_END, POSITION, T, WINDOW), p, 0.0)
        if CAPPED:
            p *= 1 - s * s  # here, as fewer registers hold one tile than p and s
        d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_s = p * (d_p - delta[:, None])
        d_q = tl.dot(d_s.to(k.dtype), k, d_q, input_precision=PRECISION)
    e = tl.arange(0, EP)
    at = D_Q + (rows[:, None] * H + head) * E + e[None, :]
    tl.store(at, (d_q * root).to(D_Q.dtype.element_ty), mask=(i[:, None] < T) & (e[None, :] < E))


@triton.jit(do_not_specialize=["T"])
def d_kv_kernel(
    Q, K, V, D_OUT, LSE, DELTA, D_K, D_V, PARTIAL, KV_END, POSITION, ITEMS, LISTS, T,
    scale, inner, root,
    q_t, q_h, k_t, k_h, v_t, v_h, G,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    WINDOW: tl.constexpr, CAPPED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip  # in groups: tensors and sizes, strides, constants
    """Compute D_K and D_V (T, G, E) of one tile of keys and one head, summed over its query heads.

    Of a split tile this program sums its steps only, into PARTIAL (slots, G, 2, N, EP).
    """
    g = tl.program_id(0).to(tl.int64)
    item = ITEMS + tl.program_id(1) * 8
    first, full, total = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    low, high, slot = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    j = tl.load(item) * N + tl.arange(0, N)
    rows = tl.minimum(j, T - 1).to(tl.int64)
    k = _load_rows(K + g * k_h, rows, k_t, E, EP)
    v = _load_rows(V + g * v_h, rows, v_t, E, EP)
    d_k = tl.zeros((N, EP), tl.float32)
    d_v = tl.zeros((N, EP), tl.float32)
    for step in tl.range(low, high):
        head = g * GROUP + step // total
        t = step % total
        m0 = tl.load(LISTS + first + t) * M
        ahead = tl.minimum(tl.arange(0, M), T - 1 - m0)
        q = _load_rows(Q + head * q_h + m0.to(tl.int64) * q_t, ahead, q_t, E, EP)
        d_out_t = G * GROUP * E  # stride of a token
        d_out = _load_rows(D_OUT + head * E + m0.to(tl.int64) * d_out_t, ahead, d_out_t, E, EP)
        lse = tl.load(LSE + head * T + m0 + ahead)
        delta = tl.load(DELTA + head * T + m0 + ahead)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
        if CAPPED:
            s = tanh(s * inner)
        power = s * scale - lse[None, :]
        if t >= full:
            i = m0 + tl.arange(0, M)
            seen = _visible(i[None, :], j[:, None], KV_END, POSITION, T, WINDOW)
            power = tl.where(seen, power, -1.0e30)
        p = tl.math.exp2(power)
        d_v = tl.dot(p.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
        if CAPPED:
            p *= 1 - s * s
        d_p = tl.dot(v, tl.trans(d_out), input_precision=PRECISION)
        d_s = p * (d_p - delta[None, :])
        d_k = tl.dot(d_s.to(q.dtype), q, d_k, input_precision=PRECISION)
    e = tl.arange(0, EP)
    if slot < 0:
        at = (rows[:, None] * G + g) * E + e[None, :]
        inside = (j[:, None] < T) & (e[None, :] < E)
        tl.store(D_K + at, (d_k * root).to(D_K.dtype.element_ty), mask=inside)
        tl.store(D_V + at, d_v.to(D_V.dtype.element_ty), mask=inside)
    else:
        part = PARTIAL + (slot * G + g) * (2 * N * EP)
        cells = part + tl.arange(0, N)[:, None] * EP + e[None, :]
        tl.store(cells, d_k * root)
        tl.store(cells + N * EP, d_v)


@triton.jit(do_not_specialize=["T"])
def merge_kernel(
    PARTIAL, SLOTS, D_K, D_V, T, G, N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr
):
    """Sum a split tile of dK (third program id 0) or dV (1) in order, at its first slot only."""
    slot, g, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile, parts = tl.load(SLOTS + 2 * slot), tl.load(SLOTS + 2 * slot + 1)
    e = tl.arange(0, EP)
    total = tl.zeros((N, EP), tl.float32)
    for part in tl.range(0, parts):
        at = PARTIAL + (((slot + part).to(tl.int64) * G + g) * 2 + which) * (N * EP)
        total += tl.load(at + tl.arange(0, N)[:, None] * EP + e[None, :])
    j = tile * N + tl.arange(0, N)
    at = (j[:, None].to(tl.int64) * G + g) * E + e[None, :]
    inside = (j[:, None] < T) & (e[None, :] < E)
    if parts > 0:
        if which == 0:
            tl.store(D_K + at, total.to(D_K.dtype.element_ty), mask=inside)
        else:
            tl.store(D_V + at, total.to(D_V.dtype.element_ty), mask=inside)


# ---- operators: the kernels as torch sees them ---------------------------------------------------


def _launch_arguments(
    q: Tensor, k: Tensor, v: Tensor, window: int, cap: float
) -> tuple[tuple[float, float], tuple, dict, tuple]:
    """Return what all three kernels take: scale and inner, strides, constants, tile sizes."""
    heads, size = q.shape[1:]
    root = size**-0.5
    scales = (LOG2E * cap, root / cap) if cap else (LOG2E * root, 0.0)
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    constants = {
        "GROUP": heads // k.shape[1],
        "E": size,
        "EP": max(16, triton.next_power_of_2(size)),
        "WINDOW": window,
        "CAPPED": cap > 0,
        "PRECISION": "ieee",  # of fp32 products; naming tf32 fails on gfx950 for any type
    }
    sizes = tiles.tile_sizes(architecture(q.device), size, q.dtype, cap > 0)
    return scales, strides, constants, sizes


@operator(
    "tree_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor[] work_lists, int window, float cap) -> "
    "(Tensor, Tensor)",
)
def _attention(q, k, v, work_lists, window, cap):
    kv_end, positions, items, lists = work_lists[:4]
    tokens, heads, size = q.shape
    scales, strides, constants, sizes = _launch_arguments(q, k, v, window, cap)
    m, n, warps, stages = sizes[0]
    out = torch.empty((tokens, heads, size), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    forward_kernel[(heads, len(items))](
        q, k, v, out, lse, kv_end, positions, items, lists, tokens, *scales,
        *strides, heads,
        **constants, M=m, N=n, num_warps=warps, num_stages=stages,
    )  # fmt: skip  # in the kernel's groups
    return out, lse


@_attention.register_fake
def _(q, k, v, work_lists, window, cap):
    tokens, heads, size = q.shape
    return q.new_empty(tokens, heads, size), q.new_empty((heads, tokens), dtype=torch.float32)


@operator(
    "tree_attention_backward",
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] work_lists, "
    "int window, float cap) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(d_out, q, k, v, out, lse, work_lists, window, cap):
    kv_end, positions, _, _, items, lists, key_items, key_lists, slots = work_lists
    tokens, heads, size = q.shape
    kv_heads = k.shape[1]
    scales, strides, constants, sizes = _launch_arguments(q, k, v, window, cap)
    _, query_tiles, key_tiles = sizes
    d_out = d_out.contiguous()
    delta = torch.empty_like(lse)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    root = size**-0.5

    m, n, warps, stages = query_tiles
    d_q_kernel[(heads, len(items))](
        q, k, v, out, d_out, lse, delta, d_q, kv_end, positions, items, lists, tokens,
        *scales, root,
        *strides, heads,
        **constants, M=m, N=n, num_warps=warps, num_stages=stages,
    )  # fmt: skip  # in the kernel's groups

    m, n, warps, stages = key_tiles
    padded = constants["EP"]
    partial = lse  # not written where no tile is split
    if len(slots):
        partial = lse.new_empty(len(slots), kv_heads, 2, n, padded)
    d_kv_kernel[(kv_heads, len(key_items))](
        q, k, v, d_out, lse, delta, d_k, d_v, partial, kv_end, positions, key_items, key_lists,
        tokens, *scales, root,
        *strides, kv_heads,
        **constants, M=m, N=n, num_warps=warps, num_stages=stages,
    )  # fmt: skip  # in the kernel's groups
    if len(slots):
        merge_kernel[(len(slots), kv_heads, 2)](
            partial, slots, d_k, d_v, tokens, kv_heads, N=n, E=size, EP=padded, num_warps=4
        )
    return d_q, d_k, d_v


@_attention_backward.register_fake
def _(d_out, q, k, v, out, lse, work_lists, window, cap):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save_for_backward(ctx, inputs, output):
    q, k, v, work_lists, ctx.window, ctx.cap = inputs
    ctx.save_for_backward(q, k, v, *output, *work_lists)
    ctx.set_materialize_grads(False)  # no gradient arrives at the log-sum-exp


def _backward(ctx, d_out, d_lse):
    q, k, v, out, lse, *lists = ctx.saved_tensors
    grads = torch.ops.plumb.tree_attention_backward(
        d_out, q, k, v, out, lse, lists, ctx.window, ctx.cap
    )
    return *grads, [None] * len(lists), None, None


_attention.register_autograd(_backward, setup_context=_save_for_backward)
