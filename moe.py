"""Mixtures of experts: a router sends every token to a few of many MLPs.

    p = softmax(x Wᵀ)                 over the E experts, fp32 at least
    y = Σ_k w_k · expert_k(x)         the K experts of highest p; w = p, or p / Σ_k p_k
    y + σ(x v) · shared(x)            with an MLP that all tokens take (Qwen2-MoE)

(Switch Transformers, arXiv 2101.03961; Mixtral, 2401.04088.) Or, as in GLM-4.5 (2508.06471) and
DeepSeek-V3 (2412.19437):

    s = σ(x Wᵀ)                       in fp32 at least
    y = Σ_k w_k · expert_k(x)         the K experts of highest s + b; w = c s / Σ_k s_k
    y + shared(x)

b corrects the choice alone, and no gradient reaches it: routing.py moves it towards even loads. No
token is dropped and no expert has a capacity: what a token gets does not depend on the tokens
beside it, so neither on packing nor on the layout.

With tensor parallelism every rank holds a share of each expert's hidden width. The router works on
the rank's own rows, and its logits are gathered as the rows are, so that their gradients are summed
over the ranks, each of which has seen a part of the experts' outputs only.

With expert parallelism (--ep n) rank i of n, neighbours among dp x cp, holds experts i E/n to
(i+1) E/n whole, or its tensor share of them. The rows of all n ranks go to where their experts are
and come back; weights and the sum over a token's experts stay where the token is:

    forward    all-gather of E counts, all-to-all of the rows, experts, all-to-all of their outputs
    backward   all-to-all of the outputs' gradients, experts, all-to-all of the rows' gradients

An expert's gradient is whole on its rank, as it saw all of the n ranks' rows: it is summed over the
dp x cp / n ranks that hold the same experts. Every rank runs every layer, rows or none.

Letters: T tokens, N rows, D width, E experts, K experts of a token, n ranks that share experts.
"""

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from architecture import GPTConfig
from exchange import exchange
from kernels.grouped import grouped_mlp
from kernels.swiglu import swiglu
from layers import Layer, Linear, Weight
from mlp import MLP
from parallel import Mesh, enter, exit, split
from routing import Routing, Tally


class Expert(MLP):
    """An MLP with a gate that multiplies the rows it is given, without a collective of its own."""

    def __init__(self, c: GPTConfig, mesh: Mesh):
        super().__init__(c, c.expert_ffn, mesh)
        for layer in self.modules():
            if isinstance(layer, Layer):
                declared = layer.declared.items()
                layer.declared = {name: replace(w, expert=True) for name, w in declared}

    @property
    def plain(self) -> bool:
        """Return whether its linears are their weights: no adapter, no bias, nothing quantised."""
        linears = (self.gate, self.up, self.down)
        return all(x.adapter is None and x.base is None and x.bias is None for x in linears)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(N, D) -> (N, D): this tensor rank's part of the sum over the hidden width."""
        hidden = swiglu(self.gate.matmul(x), self.up.matmul(x))
        return self.down.matmul(hidden)


class Router(Linear):
    """The linear that scores the experts, and where scores are sigmoids a correction of them."""

    correction: nn.Parameter | None  # b, (E,), fp32 at least

    def __init__(self, c: GPTConfig, mesh: Mesh):
        super().__init__(c.width, c.experts, mesh)
        if c.router == "sigmoid":
            fixed = Weight((c.experts,), decays=False, trains=False, start="zeros", exact=True)
            self.declare("correction", fixed)
        else:
            self.register_parameter("correction", None)

    def forward(self, x: Tensor) -> Tensor:
        """(T, D) -> logits (T, E), with a correction in fp32 at least, as its families do."""
        if self.correction is None:
            return super().forward(x)
        exact = self.correction.dtype
        return F.linear(x.to(exact), self.weight.to(exact))


class Experts(nn.Module):
    """The MLPs of a sparse layer and their router."""

    def __init__(self, c: GPTConfig, layer: int, mesh: Mesh):
        super().__init__()
        self.place = sum(map(c.sparse, range(layer)))  # among the sparse layers
        self.active, self.normalised, self.tp = c.active, c.normalised, mesh.group("tp")
        self.scale = c.routed_scale
        self.router = Router(c, mesh)
        self.tally = Tally(c.experts, c.router)
        self.total, self.ep = c.experts, mesh.group("ep")
        first, last = split(c.experts, mesh.ep, mesh.ep_rank)  # this rank's experts
        self.experts = nn.ModuleDict({str(e): Expert(c, mesh) for e in range(first, last)})
        self.shared = MLP(c, c.shared_ffn, mesh) if c.shared_ffn else None
        self.shared_gate = Linear(c.width, 1, mesh) if c.shared_ffn and c.shared_gated else None

    def forward(self, x: Tensor, tokens: int, routing: Routing | None = None) -> Tensor:
        """(T / tp, D), T = tokens -> (T / tp, D)."""
        logits = enter(self.router(x), tokens, self.tp)  # (T, E)
        fixed = None
        if routing and routing.fixed is not None:
            fixed = routing.fixed[:, self.place]
        scores = self.active, self.normalised, fixed, self.router.correction
        weights, chosen = route(logits, *scores)  # (T, K)
        if self.scale != 1.0:
            weights = weights * self.scale
        if routing and routing.chosen is not None:
            routing.chosen.append(chosen)
        if routing and routing.copies is not None:
            weights = self.tally.observe(weights, logits, chosen, routing.copies, self.tp.n)
        y = self.mix(enter(x, tokens, self.tp), weights.to(x.dtype), chosen)
        y = y if self.tp.n == 1 else exit(y, self.tp)
        if self.shared is None:
            return y
        shared = self.shared(x, tokens)
        if self.shared_gate is None:
            return y + shared
        return y + torch.sigmoid(self.shared_gate(x)) * shared

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return this tensor rank's part of the weighted outputs of each token's experts, (T, D).

        x: (T, D). Tokens are sorted by expert, and each expert multiplies its own at once; one
        without tokens multiplies none, so that its gradient is there, and zero.
        """
        width, k = x.shape[1], self.active
        order = chosen.flatten().argsort(stable=True)  # (T K,)
        counts = torch.bincount(chosen.flatten(), minlength=self.total)  # (E,)
        rows = x[:, None].expand(-1, k, -1).reshape(-1, width)[order]  # (T K, D)
        y = self.multiply(rows, counts) if self.ep.n == 1 else self.elsewhere(rows, counts)
        return (y[inverse(order)].view(-1, k, width) * weights[..., None]).sum(1)

    def multiply(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Return what this rank's experts make of rows sorted by expert, (N, D) -> (N, D)."""
        experts = cast(list[Expert], list(self.experts.values()))
        sizes = counts.tolist()
        if all(expert.plain for expert in experts):
            weights = zip(*((e.gate.weight, e.up.weight, e.down.weight) for e in experts))
            return grouped_mlp(rows, sizes, *weights)
        parts = rows.split(sizes)
        return torch.cat([expert(part) for expert, part in zip(experts, parts)])

    def elsewhere(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Return what all ranks' experts make of rows sorted by expert, (N, D) -> (N, D).

        counts: rows of each expert, (E,). What arrives is sorted by rank and then by expert, and is
        sorted by expert alone for `multiply`.
        """
        n, i = self.ep.n, self.ep.place
        by_rank = self.ep.all_gather(counts[None], "ep").view(n, n, -1)  # from, to, expert of `to`
        here = by_rank[:, i]  # (n, E / n)
        sizes = by_rank.sum(2).tolist()
        send, receive = sizes[i], [row[i] for row in sizes]
        expert = torch.arange(here.shape[1], device=rows.device).expand_as(here).flatten()
        order = expert.repeat_interleave(here.flatten()).argsort(stable=True)
        arrived = exchange(rows, send, receive, self.ep)
        y = self.multiply(arrived[order], here.sum(0))[inverse(order)]
        return exchange(y, receive, send, self.ep)


def inverse(order: Tensor) -> Tensor:
    """Return the permutation that undoes another one, (N,)."""
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return back


def route(
    logits: Tensor,
    active: int,
    normalised: bool,
    fixed: Tensor | None = None,
    correction: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weights of each token's experts, (T, K), fp32 at least, and which they are.

    logits: (T, E). normalised: the weights of a token sum to 1. fixed: experts to take whatever
    their probabilities are, (T, K); -1 where the likeliest are taken. Their weights are those of
    these logits, so the router learns all the same (routing replay, arXiv 2510.11370).
    correction: what the choice adds to the sigmoids of the logits, (E,); None: softmax.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    if correction is None:
        p = torch.softmax(logits, -1, dtype=exact)
        weights, chosen = p.topk(active, -1)
    else:
        p = torch.sigmoid(logits.to(exact))
        chosen = (p + correction).topk(active, -1).indices
        weights = p.gather(-1, chosen)
    if fixed is not None:
        chosen = torch.where(fixed < 0, chosen, fixed.long())
        weights = p.gather(-1, chosen)
    if normalised:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)  # sigmoids may all be 0
    return weights, chosen
