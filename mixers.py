"""Mixers: how the tokens of a block see each other, in training and while sampling.

A block is a mixer and an MLP. A mixer is called with normed hidden states and a view, which says
what is being computed: all trees of a micro-batch (`TreeView`), or one step of sampling
(`SamplingView`). It owns the memory that sampling needs (`new_cache`), because only the mixer knows
what it keeps of the past: attention keeps keys and values, a recurrent mixer would keep a state
that forks where responses begin. Attention is the one mixer so far.

Letters: T tokens, D width, H query heads, G key/value heads, E head size, R rows (answers in
progress), P prompts with a place of their own, N rows of one prompt, L cached positions.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architecture import GPTConfig
from exchange import gather_rows
from kernels.attention import tree_attention
from kernels.cap import soft_cap
from kernels.rope import rope
from layers import ColumnLinear, HeadsNorm, Norm, RowLinear, columns
from layout import TreeLayout
from parallel import Group, Mesh, split
from routing import Routing

# ---- what a mixer sees ---------------------------------------------------------------------------

# GPTConfig.rope's name -> cos and sin, (T, R/2) each, of the R rotated components of a head.
Angles = dict[str, tuple[Tensor, Tensor]]


@dataclass
class TreeView:
    """The trees of a micro-batch, of which this rank computes some rows.

    Under context parallelism queries are this rank's rows, keys and values those of all ranks.
    """

    positions: Tensor  # (T,) of this rank's rows
    layout: TreeLayout  # for this rank's queries
    shares: list[Tensor]  # rows of every context rank
    cp: Group
    angles: Angles = field(default_factory=dict)  # set by the model
    routing: Routing | None = None  # of models with experts


@dataclass
class SharedPrompts:
    """Prompts kept once, each in a place, with the rows that answer them."""

    places: int  # P
    together: int  # N: rows of one prompt at most
    longest: int  # tokens of the longest prompt
    member: Tensor  # (P * N,) row in each seat of each place
    seat: Tensor  # (R,) seat of each row
    hidden: Tensor  # (P, 1, 1, longest) True beyond the end of a prompt


@dataclass
class Extension:
    """R rows that go on with one token each."""

    rows: Tensor  # (R,) 0 ... R - 1
    at: Tensor  # (R,) place of the new token in its row of the cache
    length: int  # places that any row sees
    prompts: SharedPrompts | None  # None: a row holds its prompt as well
    _visible: dict[int, Tensor] = field(default_factory=dict)

    def visible(self, window: int) -> Tensor:
        """Return the mask of the places that each row sees, (R, 1, 1, length)."""
        if window not in self._visible:
            ago = self.at[:, None] - torch.arange(self.length, device=self.at.device)
            seen = (ago >= 0) & (ago < window) if window else ago >= 0
            self._visible[window] = seen[:, None, None]
        return self._visible[window]


@dataclass
class NewPrompts:
    """Whole prompts side by side, to be kept in the rows that begin with them, or in places."""

    layout: TreeLayout
    source: Tensor  # tokens, by place in the flat row: one that several rows keep is there again
    rows: Tensor  # row, or place, that keeps each
    at: Tensor  # its position there
    each_once: bool  # source is just 0, 1, 2, ...
    in_places: bool  # kept in places


@dataclass
class SamplingView:
    """One step of sampling: a flat row of R tokens of answers in progress, then new prompts."""

    positions: Tensor
    extension: Extension | None
    prompts: NewPrompts | None
    caches: dict[int, "KVCache"]  # of every layer, as its mixer made it
    angles: Angles = field(default_factory=dict)
    routing: Routing | None = None


View = TreeView | SamplingView


class Mixer(Protocol):
    """The interface that a block and the sampler need."""

    def __call__(self, x: Tensor, view: View) -> Tensor:
        """(T / tp, D) -> (T / tp, D)."""

    def new_cache(self, rows: int, length: int, places: int, longest: int) -> "KVCache":
        """Return memory for sampling with this layer."""


# ---- attention -----------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values and rotary positions.

    Tensor ranks share the key/value heads, each with the query heads that belong to it.
    """

    def __init__(self, c: GPTConfig, layer: int, mesh: Mesh):
        super().__init__()
        self.layer, self.size, self.window = layer, c.head_size, c.window(layer)
        self.cap = c.score_cap
        self.rope, self.query_growth = c.rope(layer), c.query_growth
        # What q is multiplied by, since attention divides by √E.
        self.q_scale = c.attention_scale * c.head_size**0.5 or 1.0
        first, last = split(c.kv_heads, mesh.tp, mesh.tp_rank)
        self.kv_heads = last - first  # of this rank
        self.group = c.heads // c.kv_heads  # query heads of one key/value head
        query, key = c.heads * c.head_size, c.kv_heads * c.head_size
        self.q = ColumnLinear(c.width, query, c.kv_heads, mesh, c.qkv_bias)
        self.k = ColumnLinear(c.width, key, c.kv_heads, mesh, c.qkv_bias)
        self.v = ColumnLinear(c.width, key, c.kv_heads, mesh, c.qkv_bias)
        self.out = RowLinear(query, c.width, c.kv_heads, mesh, c.out_bias)
        self.qk_norm = c.qk_norm
        self.q_norm: HeadsNorm | Norm
        self.k_norm: HeadsNorm | Norm
        if c.qk_norm == "whole":
            self.q_norm = HeadsNorm(query, c.kv_heads, c.norm_eps, mesh)
            self.k_norm = HeadsNorm(key, c.kv_heads, c.norm_eps, mesh)
        if c.qk_norm == "head":
            self.q_norm = Norm(c.head_size, c.norm, c.norm_eps, mesh)
            self.k_norm = Norm(c.head_size, c.norm, c.norm_eps, mesh)

    def forward(self, x: Tensor, view: View) -> Tensor:
        """(T / tp, D) -> (T / tp, D); in between (T, H, E) with this rank's heads."""
        tokens = len(view.positions)
        q, k, v = columns(x, tokens, self.q, self.k, self.v)
        if self.qk_norm == "whole":
            q, k = self.q_norm(q), self.k_norm(k)
        # No -1 in these shapes: a rank without examples has zero tokens, which decide no size.
        q = q.view(tokens, self.kv_heads * self.group, self.size)
        k = k.view(tokens, self.kv_heads, self.size)
        v = v.view(tokens, self.kv_heads, self.size)
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope != "none":
            cos, sin = view.angles[self.rope]
            q, k = rope(q, cos, sin), rope(k, cos, sin)
        if self.q_scale != 1.0:
            q = q * self.q_scale
        if self.query_growth:
            beta, period = self.query_growth
            growth = 1 + beta * torch.log1p((view.positions // period).float())
            q = q * growth[:, None, None].to(q.dtype)
        if isinstance(view, TreeView):
            k, v = gather_rows(k, view.shares, view.cp), gather_rows(v, view.shares, view.cp)
            y = tree_attention(q, k, v, view.layout, self.window, self.cap)
        else:
            y = view.caches[self.layer].attend(q, k, v, view, self.window)
        return self.out(y.reshape(tokens, self.kv_heads * self.group * self.size))

    def new_cache(self, rows: int, length: int, places: int, longest: int) -> "KVCache":
        """Return empty keys and values for `rows` answers of at most `length` positions.

        places: prompts of at most `longest` tokens that are kept once; 0 = rows hold their own.
        """
        like = torch.empty(0, dtype=self.out.weight.dtype, device=self.out.device)
        if like.device.type == "cpu":  # where attention is in fp32 at least: kernels/attention.py
            like = like.to(torch.promote_types(like.dtype, torch.float32))
        return KVCache(like, self.kv_heads, self.size, rows, length, places, longest, self.cap)


class KVCache:
    """Keys and values of one layer: of the answers in progress, a row each, and of their prompts.

    A row holds its prompt and its answer; or, with places, its answer alone, and each prompt lies
    in a place that all its rows attend to. Nothing beyond a row's position is ever seen.
    """

    def __init__(
        self,
        like: Tensor,
        kv_heads: int,
        size: int,
        rows: int,
        length: int,
        places: int,
        longest: int,
        cap: float = 0.0,
    ):
        self.cap = cap  # of the scores
        self.keys = like.new_zeros(rows, kv_heads, length, size)  # (R, G, L, E)
        self.values = torch.zeros_like(self.keys)
        self.prompt_keys = like.new_zeros(places, kv_heads, longest, size)  # (P, G, longest, E)
        self.prompt_values = torch.zeros_like(self.prompt_keys)

    def copy(self, source: int, row: int, size: int) -> None:
        """Copy the first `size` places of a row to another one."""
        for x in (self.keys, self.values):
            x[row, :, :size] = x[source, :, :size]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, view: SamplingView, window: int) -> Tensor:
        """Attend in one step of sampling and keep its keys and values: q (T, H, E) -> (T, H, E)."""
        rows = len(view.extension.rows) if view.extension else 0
        parts = []
        if view.extension:
            parts.append(self._extend(q[:rows], k[:rows], v[:rows], view.extension, window))
        if view.prompts:
            parts.append(self._begin(q[rows:], k[rows:], v[rows:], view.prompts, window))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _begin(self, q: Tensor, k: Tensor, v: Tensor, new: NewPrompts, window: int) -> Tensor:
        """Attend within new prompts, and keep their keys and values."""
        stores = (self.keys, self.values)
        if new.in_places:
            stores = (self.prompt_keys, self.prompt_values)
        for store, x in zip(stores, (k, v)):
            x = x.to(store.dtype)
            store[new.rows, :, new.at] = x if new.each_once else x[new.source]
        return tree_attention(q, k, v, new.layout, window, self.cap)

    def _extend(self, q: Tensor, k: Tensor, v: Tensor, step: Extension, window: int) -> Tensor:
        """Keep one token of each row, and attend from it to all that its row has seen."""
        dtype, (q, k, v) = q.dtype, (x.to(self.keys.dtype) for x in (q, k, v))
        self.keys[step.rows, :, step.at] = k
        self.values[step.rows, :, step.at] = v
        count, kv_heads = len(q), k.shape[1]
        keys = self.keys[:count, :, : step.length]
        values = self.values[:count, :, : step.length]
        # The query heads of one key/value head are rows of one small matrix: (R, G, H/G, E).
        grouped = q.view(count, kv_heads, q.shape[1] // kv_heads, q.shape[2])
        if step.prompts is None:
            mask = step.visible(window)
            if self.cap:
                out, _ = partial_attention(grouped, keys, values, ~mask, self.cap)
            else:
                out = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=mask)
            return out.reshape(q.shape).to(dtype)
        own, own_weight = partial_attention(grouped, keys, values, ~step.visible(0), self.cap)
        out, weight = self._attend_prompts(grouped, step.prompts)
        # The two parts of one softmax, each weighted by its share of the sum.
        merged = torch.lerp(out, own, torch.sigmoid(own_weight - weight))
        return merged.reshape(q.shape).to(dtype)

    def _attend_prompts(self, q: Tensor, prompts: SharedPrompts) -> tuple[Tensor, Tensor]:
        """Attend from (R, G, H/G, E) to the prompts in places, all rows of one prompt together."""
        _, kv_heads, group, size = q.shape
        places, together = prompts.places, prompts.together
        seated = q.flatten(1, 2)[prompts.member]  # (P * N, H, E)
        seated = seated.view(places, together, kv_heads, group, size).transpose(1, 2)
        seated = seated.reshape(places, kv_heads, together * group, size)  # (P, G, N · H/G, E)
        keys = self.prompt_keys[:places, :, : prompts.longest]
        values = self.prompt_values[:places, :, : prompts.longest]

        def by_row(x: Tensor) -> Tensor:
            x = x.view(places, kv_heads, together, group, -1).transpose(1, 2)
            return x.reshape(places * together, kv_heads, group, -1)[prompts.seat]

        out, weight = partial_attention(seated, keys, values, prompts.hidden, self.cap)
        return by_row(out), by_row(weight)


def partial_attention(
    q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attend to a part of the keys; also return the log of the part's sum of weights, (..., 1)."""
    exact = torch.promote_types(q.dtype, torch.float32)
    if cap:  # as exact as the kernels, since a cap bends what was rounded
        q, keys = q.to(exact), keys.to(exact)
    scores = torch.matmul(q * q.shape[-1] ** -0.5, keys.transpose(-1, -2)).to(exact)
    scores = soft_cap(scores, cap).masked_fill_(hidden, float("-inf"))
    # The clamp keeps a part of which nothing is visible at weight 0.
    top = scores.amax(-1, keepdim=True).clamp_(min=-1e30)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights.to(values.dtype), values).to(exact) / total.clamp(min=1e-30)
    return out, top + total.log()
