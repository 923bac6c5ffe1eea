"""Attention over prompt trees.

A batch is one flat row of T tokens holding trees: a prompt, then its responses side by side. A response sees its prompt
and itself, never a sibling. As a mask: key j is visible to query i iff j <= i < kv_end[j] and, with a sliding window
W, position[i] - position[j] < W.

Three Triton kernels (forward, dQ, dK and dV) walk lists of tiles made once a batch on the host: hidden tiles are not in
them, tiles seen whole come first and skip the mask. Each kernel is ONE loop with the mask inside a run-time `if`: two
loops that share accumulators make ptxas serialise every wgmma (warning C7515). Every sum has a fixed order, there are
no atomics: the same batch gives the same bits.

Letters: T tokens, H query heads, G key/value heads, E head size (EP: rounded up to a power of two), M queries and N
keys of a tile.
"""

import functools
import inspect

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import tiles
from kernels.device import architecture, fused, operator, processors, tl, triton, untraced
from layout import Spans, query_runs

LOG2E = 1.4426950408889634


class TreeLayout:
    """Where the trees of a batch lie, and the masks that attention needs: built once a batch, used by every layer.

    spans: for every tree (prompt length, [response lengths]), in the order of the flat row.
    rows: under context parallelism the places in the flat row of the queries that are here, (n,) int64, ascending, on
    the host; None: all of them. Spans, kv_end and positions are those of the whole row all the same.
    index: rows on the device.
    """

    def __init__(
        self, spans: Spans, kv_end: Tensor, positions: Tensor, rows: np.ndarray | None = None
    ):
        self.spans, self.kv_end, self.positions, self.rows, self.index = (
            spans,
            kv_end,
            positions,
            rows,
            None,
        )
        self.sizes = [n for prompt, responses in spans for n in (prompt, *responses)]
        self.runs = query_runs(spans, rows)
        if rows is not None:
            self.index = torch.from_numpy(rows)
            if kv_end.is_cuda:
                self.index = self.index.pin_memory().to(kv_end.device, non_blocking=True)
        self._masks: dict[tuple[int, int, int, torch.dtype], Tensor | None] = {}
        self._plans: dict[tuple, list[Tensor]] = {}

    def shard(self, rows: np.ndarray) -> "TreeLayout":
        """The same trees where only the queries at `rows` are here: one of the shares of tiles.share_rows.

        ValueError: rows are not ascending places of the flat row.
        """
        rows = np.asarray(rows, np.int64)
        if (np.diff(rows, prepend=-1, append=len(self.kv_end)) <= 0).any():
            raise ValueError(
                f"rows must be ascending and each once, from 0 to {len(self.kv_end) - 1}: sort them"
            )
        return TreeLayout(self.spans, self.kv_end, self.positions, rows)

    def mask(self, queries: int, keys: int, window: int, dtype: torch.dtype) -> Tensor | None:
        """What the last `queries` of `keys` tokens in a row see, (queries, keys), added to the scores.

        None where plain causal attention over all of them is the same.
        """
        name = (queries, keys, window, dtype)
        if name not in self._masks:
            if queries == keys and not 0 < window < keys:
                self._masks[name] = None
            else:
                device = self.kv_end.device
                ago = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(
                    keys, device=device
                )
                hidden = (ago < 0) | (ago >= window) if window else ago < 0
                self._masks[name] = torch.zeros(
                    queries, keys, dtype=dtype, device=device
                ).masked_fill_(hidden, float("-inf"))
        return self._masks[name]

    @untraced
    def plan(self, q: Tensor, kv_heads: int, window: int) -> list[Tensor]:
        """What the kernels walk: kv_end, positions, then items and tiles of forward, dQ and dK/dV, and the slots.

        Made on the host from the spans, so that nothing waits for the device; one copy brings all of it over.
        """
        heads, device = q.shape[1], q.device
        sizes = tiles.tile_sizes(architecture(device), q.shape[2], q.dtype)
        name = (sizes, heads, kv_heads, window, tiles.SPLIT)
        if name not in self._plans:
            arrays = tiles.plan(
                self.spans, sizes, heads, kv_heads, window, processors(device), self.rows
            )
            padded = [
                np.pad(x.ravel(), (0, -x.size % 4)) for x in arrays
            ]  # 16 bytes: what fast loads are aligned to
            flat = torch.from_numpy(np.concatenate(padded).astype(np.int32))
            if device.type == "cuda":
                flat = flat.pin_memory().to(device, non_blocking=True)
            parts = flat.split([x.size for x in padded])
            self._plans[name] = [self.kv_end, self.positions] + [
                part[: x.size].view(x.shape) for part, x in zip(parts, arrays)
            ]
        return self._plans[name]

    @untraced
    def segments(self) -> tuple[Tensor, int] | None:
        """(starts and end of every segment, the longest) where all trees are plain sequences, else None."""
        if any(len(responses) > 1 for _, responses in self.spans):
            return None
        if "segments" not in self._plans:
            sizes = [prompt + sum(responses) for prompt, responses in self.spans]
            starts = torch.tensor(np.cumsum([0, *sizes]), dtype=torch.int32)
            if self.kv_end.is_cuda:
                starts = starts.pin_memory().to(self.kv_end.device, non_blocking=True)
            self._plans["segments"] = (starts, max(sizes))
        return self._plans["segments"]


# ---- kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def _rows(base, rows, stride, E: tl.constexpr, EP: tl.constexpr):
    """Rows of a (., E) matrix, zero from component E on. Rows past the end are clamped by the caller: no mask."""
    e = tl.arange(0, EP)
    if E == EP:
        return tl.load(base + rows[:, None] * stride + e[None, :])
    else:
        return tl.load(base + rows[:, None] * stride + e[None, :], mask=e[None, :] < E, other=0.0)


@triton.jit
def _visible(i, j, KV_END, POSITION, T, WINDOW: tl.constexpr):
    """The mask of queries i and keys j, which broadcast. kv_end <= T hides queries past T, 0 hides keys past it."""
    seen = (j <= i) & (i < tl.load(KV_END + j, mask=j < T, other=0))
    if WINDOW > 0:
        ago = tl.load(POSITION + i, mask=i < T, other=0) - tl.load(
            POSITION + j, mask=j < T, other=0
        )
        seen = seen & (ago < WINDOW)
    return seen


@triton.jit
def _forward(
    Q, K, V, OUT, LSE, KV_END, POSITION, ITEMS, LISTS, T, scale, q_t, q_h, k_t, k_h, v_t, v_h, H,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT (T, H, E), LSE (H, T) = log2 Σ 2^(q k scale), scale = log2(e) / √E: one tile of queries, one head."""
    head = tl.program_id(0)
    item = ITEMS + tl.program_id(1) * 8
    first, full, total = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    i = tl.load(item) * M + tl.arange(0, M)
    rows = tl.minimum(i, T - 1).to(tl.int64)
    q = _rows(Q + head * q_h, rows, q_t, E, EP)
    K += head // GROUP * k_h
    V += head // GROUP * v_h
    top = tl.full(
        (M,), -1.0e29, tl.float32
    )  # above what hidden pairs get, so that they count exp(-huge) = 0
    weight = tl.zeros((M,), tl.float32)
    out = tl.zeros((M, EP), tl.float32)
    for t in tl.range(0, total):
        n0 = tl.load(LISTS + first + t) * N
        ahead = tl.minimum(tl.arange(0, N), T - 1 - n0)
        k = _rows(K + n0.to(tl.int64) * k_t, ahead, k_t, E, EP)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if t >= full:
            j = n0 + tl.arange(0, N)
            s = tl.where(_visible(i[:, None], j[None, :], KV_END, POSITION, T, WINDOW), s, -1.0e30)
        new_top = tl.maximum(top, tl.max(s, 1))
        p = tl.math.exp2(s * scale - (new_top * scale)[:, None])
        shrink = tl.math.exp2((top - new_top) * scale)
        weight = weight * shrink + tl.sum(p, 1)
        out = out * shrink[:, None]
        v = _rows(V + n0.to(tl.int64) * v_t, ahead, v_t, E, EP)
        out = tl.dot(p.to(v.dtype), v, out, input_precision=PRECISION)
        top = new_top
    weight = tl.where(weight == 0.0, 1.0, weight)
    e = tl.arange(0, EP)
    at = OUT + (rows[:, None] * H + head) * E + e[None, :]
    tl.store(
        at,
        (out / weight[:, None]).to(OUT.dtype.element_ty),
        mask=(i[:, None] < T) & (e[None, :] < E),
    )
    tl.store(LSE + head.to(tl.int64) * T + i, top * scale + tl.math.log2(weight), mask=i < T)


@triton.jit
def _d_q(
    Q, K, V, OUT, D_OUT, LSE, DELTA, D_Q, KV_END, POSITION, ITEMS, LISTS, T, scale, root,
    q_t, q_h, k_t, k_h, v_t, v_h, H,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """D_Q (T, H, E), and DELTA (H, T) = Σ out · d_out for dK and dV, of one tile of queries and one head."""
    head = tl.program_id(0)
    item = ITEMS + tl.program_id(1) * 8
    first, full, total = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    i = tl.load(item) * M + tl.arange(0, M)
    rows = tl.minimum(i, T - 1).to(tl.int64)
    d_out = _rows(D_OUT + head * E, rows, H * E, E, EP)
    delta = tl.sum(
        _rows(OUT + head * E, rows, H * E, E, EP).to(tl.float32) * d_out.to(tl.float32), 1
    )
    tl.store(DELTA + head.to(tl.int64) * T + i, delta, mask=i < T)
    lse = tl.load(LSE + head.to(tl.int64) * T + rows)
    q = _rows(Q + head * q_h, rows, q_t, E, EP)
    K += head // GROUP * k_h
    V += head // GROUP * v_h
    d_q = tl.zeros((M, EP), tl.float32)
    for t in tl.range(0, total):
        n0 = tl.load(LISTS + first + t) * N
        ahead = tl.minimum(tl.arange(0, N), T - 1 - n0)
        k = _rows(K + n0.to(tl.int64) * k_t, ahead, k_t, E, EP)
        v = _rows(V + n0.to(tl.int64) * v_t, ahead, v_t, E, EP)
        p = tl.math.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale - lse[:, None])
        if t >= full:
            j = n0 + tl.arange(0, N)
            p = tl.where(_visible(i[:, None], j[None, :], KV_END, POSITION, T, WINDOW), p, 0.0)
        d_p = tl.dot(d_out, tl.trans(v), input_precision=PRECISION)
        d_s = p * (d_p - delta[:, None])
        d_q = tl.dot(d_s.to(k.dtype), k, d_q, input_precision=PRECISION)
    e = tl.arange(0, EP)
    at = D_Q + (rows[:, None] * H + head) * E + e[None, :]
    tl.store(at, (d_q * root).to(D_Q.dtype.element_ty), mask=(i[:, None] < T) & (e[None, :] < E))


@triton.jit
def _d_kv(
    Q, K, V, D_OUT, LSE, DELTA, D_K, D_V, PARTIAL, KV_END, POSITION, ITEMS, LISTS, T, scale, root,
    q_t, q_h, k_t, k_h, v_t, v_h, G,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """D_K and D_V (T, G, E) of one tile of keys and one head, over all query heads of its group; or a part of the sum,
    into PARTIAL (slots, G, 2, N, EP)."""
    g = tl.program_id(0)
    item = ITEMS + tl.program_id(1) * 8
    first, full, total = tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    low, high, slot = tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    j = tl.load(item) * N + tl.arange(0, N)
    rows = tl.minimum(j, T - 1).to(tl.int64)
    k = _rows(K + g * k_h, rows, k_t, E, EP)
    v = _rows(V + g * v_h, rows, v_t, E, EP)
    d_k = tl.zeros((N, EP), tl.float32)
    d_v = tl.zeros((N, EP), tl.float32)
    for step in tl.range(low, high):
        head = g * GROUP + step // total
        t = step % total
        m0 = tl.load(LISTS + first + t) * M
        ahead = tl.minimum(tl.arange(0, M), T - 1 - m0)
        q = _rows(Q + head * q_h + m0.to(tl.int64) * q_t, ahead, q_t, E, EP)
        d_out = _rows(
            D_OUT + head * E + m0.to(tl.int64) * (G * GROUP * E), ahead, G * GROUP * E, E, EP
        )
        lse = tl.load(LSE + head.to(tl.int64) * T + m0 + ahead)
        delta = tl.load(DELTA + head.to(tl.int64) * T + m0 + ahead)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale - lse[None, :]
        if t >= full:
            i = m0 + tl.arange(0, M)
            s = tl.where(_visible(i[None, :], j[:, None], KV_END, POSITION, T, WINDOW), s, -1.0e30)
        p = tl.math.exp2(s)
        d_v = tl.dot(p.to(d_out.dtype), d_out, d_v, input_precision=PRECISION)
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
        own = (
            PARTIAL
            + (slot.to(tl.int64) * G + g) * (2 * N * EP)
            + tl.arange(0, N)[:, None] * EP
            + e[None, :]
        )
        tl.store(own, d_k * root)
        tl.store(own + N * EP, d_v)


@triton.jit
def _merge(PARTIAL, SLOTS, D_K, D_V, T, G, N: tl.constexpr, E: tl.constexpr, EP: tl.constexpr):
    """Adds up the parts of a split tile of dK (third program id 0) or dV (1); slots after its first have nothing."""
    slot, g, which = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile, parts = tl.load(SLOTS + 2 * slot), tl.load(SLOTS + 2 * slot + 1)
    e = tl.arange(0, EP)
    total = tl.zeros((N, EP), tl.float32)
    for part in tl.range(0, parts):
        own = PARTIAL + (((slot + part).to(tl.int64) * G + g) * 2 + which) * (N * EP)
        total += tl.load(own + tl.arange(0, N)[:, None] * EP + e[None, :])
    j = tile * N + tl.arange(0, N)
    at = (j[:, None].to(tl.int64) * G + g) * E + e[None, :]
    inside = (j[:, None] < T) & (e[None, :] < E)
    if parts > 0:
        if which == 0:
            tl.store(D_K + at, total.to(D_K.dtype.element_ty), mask=inside)
        else:
            tl.store(D_V + at, total.to(D_V.dtype.element_ty), mask=inside)


def _common(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[tuple, dict, tuple]:
    """What all three kernels are told: strides, constants, tiles."""
    heads, size = q.shape[1:]
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    constants = {
        "GROUP": heads // k.shape[1], "E": size, "EP": max(16, triton.next_power_of_2(size)), "WINDOW": window,
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return strides, constants, tiles.tile_sizes(architecture(q.device), size, q.dtype)


@operator(
    "tree_attention",
    "(Tensor q, Tensor k, Tensor v, Tensor[] plan, int window) -> (Tensor, Tensor)",
)
def _attention(q, k, v, plan, window):
    kv_end, positions, items, lists = plan[:4]
    tokens, heads, size = q.shape
    strides, constants, ((m, n, warps, stages), _, _) = _common(q, k, v, window)
    out = torch.empty((tokens, heads, size), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    _forward[(heads, len(items))](
        q, k, v, out, lse, kv_end, positions, items, lists, tokens, LOG2E * size**-0.5, *strides, heads,
        **constants, M=m, N=n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


@_attention.register_fake
def _(q, k, v, plan, window):
    tokens, heads, size = q.shape
    return q.new_empty(tokens, heads, size), q.new_empty((heads, tokens), dtype=torch.float32)


@operator(
    "tree_attention_backward",
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor[] plan, int window) "
    "-> (Tensor, Tensor, Tensor)",
)
def _attention_backward(d_out, q, k, v, out, lse, plan, window):
    kv_end, positions, _, _, items, lists, key_items, key_lists, slots = plan
    tokens, heads, size = q.shape
    kv_heads = k.shape[1]
    strides, constants, (_, (m, n, warps, stages), (key_m, key_n, key_warps, key_stages)) = _common(
        q, k, v, window
    )
    d_out = d_out.contiguous()
    delta = torch.empty_like(lse)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    scale, root = LOG2E * size**-0.5, size**-0.5
    _d_q[(heads, len(items))](
        q, k, v, out, d_out, lse, delta, d_q, kv_end, positions, items, lists, tokens, scale, root, *strides, heads,
        **constants, M=m, N=n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    padded = constants["EP"]
    partial = lse.new_empty(max(1, len(slots)), kv_heads, 2, key_n, padded) if len(slots) else lse
    _d_kv[(kv_heads, len(key_items))](
        q, k, v, d_out, lse, delta, d_k, d_v, partial, kv_end, positions, key_items, key_lists, tokens, scale, root,
        *strides, kv_heads, **constants, M=key_m, N=key_n, num_warps=key_warps, num_stages=key_stages,
    )  # fmt: skip
    if len(slots):
        grid = (len(slots), kv_heads, 2)
        _merge[grid](
            partial, slots, d_k, d_v, tokens, kv_heads, N=key_n, E=size, EP=padded, num_warps=4
        )
    return d_q, d_k, d_v


@_attention_backward.register_fake
def _(d_out, q, k, v, out, lse, plan, window):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _save(ctx, inputs, output):
    q, k, v, plan, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, *plan)
    ctx.set_materialize_grads(False)  # nothing flows into the log-sum-exp


def _gradients(ctx, d_out, d_lse):
    q, k, v, out, lse, *plan = ctx.saved_tensors
    grads = torch.ops.plumb.tree_attention_backward(d_out, q, k, v, out, lse, plan, ctx.window)
    return *grads, [None] * len(plan), None


_attention.register_autograd(_gradients, setup_context=_save)


# ---- dispatch and the plain twin -------------------------------------------------------------------------------------


def tree_attention(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, window: int = 0) -> Tensor:
    """softmax(q kᵀ / √E + mask) v over the trees of `layout`.

    q (T, H, E), k and v (T, G, E) with H a multiple of G; window 0 sees everything. Returns (T, H, E).
    Of a layout.shard(rows), q and the result are those n rows, (n, H, E), while k and v stay whole; the gradients of k
    and v are then what these queries alone give: a part of the sum over the ranks.
    """
    if (
        q.shape[0] == 0 or not fused(q) or q.shape[2] > (128 if q.dtype == torch.float32 else 256)
    ):  # would not fit
        return _attention_plain(q, k, v, layout, window)
    if layout.rows is None and _varlen_serves(q, k, window) and (segments := layout.segments()):
        return _varlen(q, k, v, *segments)
    return tree_attention_fused(q, k, v, layout, window)


def tree_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, window: int = 0
) -> Tensor:
    """The same by plumb's own kernels, whatever the layout.

    They count queries as they count keys, from the start of the flat row: rows of a shard are first put in their
    places. The zeros between are computed only where they share a tile with own rows, and no slope comes back to them.
    """
    if layout.index is not None:
        q = q.new_zeros(len(k), *q.shape[1:]).index_copy(0, layout.index, q)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.ops.plumb.tree_attention(q, k, v, layout.plan(q, k.shape[1], window), window)[0]
    return out if layout.index is None else out.index_select(0, layout.index)


@functools.cache
def _varlen_parameters() -> frozenset[str]:
    """What this torch's varlen_attn takes (it changes with every release); empty where there is none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def _varlen_serves(q: Tensor, k: Tensor, window: int) -> bool:
    """Whether torch's packed attention can take plain sequences over. Not where runs must repeat bit for bit: its
    backward adds with atomics."""
    needed = {"window_size"} | ({"enable_gqa"} if q.shape[1] != k.shape[1] else set())
    return (
        q.is_cuda and q.dtype != torch.float32 and not window and architecture(q.device) >= 80
        and needed <= _varlen_parameters() and not torch.are_deterministic_algorithms_enabled()
    )  # fmt: skip


def _varlen(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    grouped = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    return varlen_attn(q, k, v, starts, starts, longest, longest, window_size=(-1, 0), **grouped)


def _attention_plain(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, window: int) -> Tensor:
    """One scaled_dot_product_attention a run of queries: its keys are [prompt; response] up to the last one it sees.

    `split`, not slices: its backward is one concatenation, where every slice would fill a whole (T, H, E) of zeros.
    """
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # (heads, T, E)
    if k.shape[0] != q.shape[0]:
        k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    if not layout.runs:  # still a function of all three: other ranks wait for these gradients
        return (q * k[:, :0] * v[:, :0]).transpose(0, 1)
    queries = q.split([run[0] for run in layout.runs], 1)
    k, v = k.split(layout.sizes, 1), v.split(layout.sizes, 1)
    out = []
    for own, (_, seen, branch) in zip(queries, layout.runs):
        keys, values = (torch.cat([x[part] for part in branch], 1)[:, :seen] for x in (k, v))
        out.append(_attend(own, keys, values, layout, window))
    return torch.cat(out, 1).transpose(0, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, layout: TreeLayout, window: int) -> Tensor:
    mask = layout.mask(q.shape[1], k.shape[1], window, q.dtype)
    return F.scaled_dot_product_attention(
        q[None], k[None], v[None], attn_mask=mask, is_causal=mask is None
    )[0]
