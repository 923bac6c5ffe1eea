"""Mixtures of experts: a router sends every token to a few of many MLPs.

    p = softmax(x Wᵀ)                 over the E experts, fp32 at least
    y = Σ_k w_k · expert_k(x)         the K experts of highest p; w = p, or p / Σ_k p_k
    y + σ(x v) · shared(x)            with an MLP that all tokens take (Qwen2-MoE)

(Switch Transformers, arXiv 2101.03961; Mixtral, 2401.04088.) No token is dropped and no expert has
a capacity: what a token gets does not depend on the tokens beside it, so neither on packing nor on
the layout.

With tensor parallelism every rank holds a share of each expert's hidden width. The router works on
the rank's own rows, and its logits are gathered as the rows are, so that their gradients are summed
over the ranks, each of which has seen a part of the experts' outputs only.

Letters: T tokens, D width, E experts, K experts of a token.
"""

import torch
from torch import Tensor, nn

from architecture import GPTConfig
from kernels.swiglu import swiglu
from layers import Linear
from mlp import MLP
from parallel import Mesh, enter, exit
from routing import Routing, Tally


class Expert(MLP):
    """An MLP with a gate that multiplies the rows it is given, without a collective of its own."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """(N, D) -> (N, D): this tensor rank's part of the sum over the hidden width."""
        hidden = swiglu(self.gate.matmul(x), self.up.matmul(x))
        return self.down.matmul(hidden)


class Experts(nn.Module):
    """The MLPs of a sparse layer and their router."""

    def __init__(self, c: GPTConfig, mesh: Mesh):
        super().__init__()
        self.active, self.normalised, self.tp = c.active, c.normalised, mesh.group("tp")
        self.router = Linear(c.width, c.experts, mesh)
        self.tally = Tally(c.experts)
        self.experts = nn.ModuleList(Expert(c, c.expert_ffn, mesh) for _ in range(c.experts))
        self.shared = MLP(c, c.shared_ffn, mesh) if c.shared_ffn else None
        if c.shared_ffn:
            self.shared_gate = Linear(c.width, 1, mesh)

    def forward(self, x: Tensor, tokens: int, routing: Routing | None = None) -> Tensor:
        """(T / tp, D), T = tokens -> (T / tp, D)."""
        logits = enter(self.router(x), tokens, self.tp)  # (T, E)
        weights, chosen = route(logits, self.active, self.normalised)  # (T, K)
        if routing:
            weights = self.tally.observe(weights, logits, chosen, routing.copies, self.tp.n)
        y = self.mix(enter(x, tokens, self.tp), weights.to(x.dtype), chosen)
        y = y if self.tp.n == 1 else exit(y, self.tp)
        if self.shared is None:
            return y
        return y + torch.sigmoid(self.shared_gate(x)) * self.shared(x, tokens)

    def mix(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Return this tensor rank's part of the weighted outputs of each token's experts, (T, D).

        x: (T, D). Tokens are sorted by expert, and each expert multiplies its own at once; one
        without tokens multiplies none, so that its gradient is there, and zero.
        """
        width, k = x.shape[1], self.active
        order = chosen.flatten().argsort(stable=True)  # (T K,)
        counts = torch.bincount(chosen.flatten(), minlength=len(self.experts)).tolist()
        rows = x[:, None].expand(-1, k, -1).reshape(-1, width)[order]  # (T K, D)
        parts = [expert(part) for expert, part in zip(self.experts, rows.split(counts))]
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return (torch.cat(parts)[back].view(-1, k, width) * weights[..., None]).sum(1)


def route(logits: Tensor, active: int, normalised: bool) -> tuple[Tensor, Tensor]:
    """Return the weights of each token's experts, (T, K), fp32 at least, and which they are.

    logits: (T, E). normalised: the weights of a token sum to 1.
    """
    exact = torch.promote_types(logits.dtype, torch.float32)
    weights, chosen = torch.softmax(logits, -1, dtype=exact).topk(active, -1)
    if normalised:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen
