"""Layers that declare their weights, and linears that own their collectives.

A layer says everything about a weight once, as a `Weight`: its shape, how tensor ranks cut it,
whether it decays and trains, how it starts. Loading, saving, checkpoints, the optimizer, plan.py
and the memory line read that declaration.

With tensor parallelism every rank holds ceil(T / n) rows of the residual stream between two blocks
(the last rows are padded with zeros). Rank i of n works on all T rows with its share of a matrix:

    ColumnLinear   Y_i = enter(X) W_iᵀ      outputs are cut
                   forward: all-gather X              backward: reduce-scatter dX
    RowLinear      Y = exit(X_i W_iᵀ)       inputs are cut
                   forward: reduce-scatter the sums   backward: all-gather dY
    Vocabulary     logits_i = X E_iᵀ        tokens are cut
                   log-probs are merged from a few numbers a token

Letters: T tokens, M scored tokens, D width, V vocabulary, n tensor ranks.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cap import soft_cap
from kernels.kl import Divergence, linear_kl
from kernels.linear import linear
from kernels.logprob import linear_logprob, merge_partials
from kernels.quantized import Format, Quantized, quantize, quantized_linear
from kernels.rmsnorm import add_rms_norm, rms_norm
from kernels.top_k import linear_buckets, linear_top_k
from parallel import Group, Mesh, enter, exit, split, sum_over

Start = Literal["normal", "residual", "ones", "zeros", "uniform"]

# ---- the declaration of a weight -----------------------------------------------------------------


@dataclass(frozen=True)
class Cut:
    """The share of each tensor rank: dimension `dim` in `units` equal units, dealt out evenly.

    Nothing is padded: 5 units over 2 ranks are 2 and 3.
    """

    dim: int
    units: int


@dataclass(frozen=True)
class Weight:
    """All that a layer declares of one weight.

    The weight's name is its place in the model (blocks.0.mixer.q.weight), and weights/table.py
    derives the name on disk from it.
    """

    shape: tuple[int, ...]  # of the whole weight, before tensor ranks cut it
    cut: Cut | None = None  # None: every tensor rank holds all of it
    decays: bool = True  # whether AdamW's weight decay applies
    trains: bool = True  # False: no gradient moves it
    # residual: normal, but smaller by √(2 layers), as in GPT-2; uniform: within 1 / √inputs
    start: Start = "normal"
    both_ends: bool = False  # held by the first and by the last pipeline stage (a tied embedding)
    expert: bool = False  # held by one of the ranks that share the experts of a layer (--ep)
    exact: bool = False  # held in fp32 at least, whatever the model's dtype

    def held_in(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype that holds it in a model of a dtype."""
        return torch.promote_types(dtype, torch.float32) if self.exact else dtype

    def slice(self, mesh: Mesh) -> tuple[int, int, int] | None:
        """Return (dimension, first, last + 1) of this tensor rank's slice; None: it holds all."""
        if self.cut is None:
            return None
        size = self.shape[self.cut.dim] // self.cut.units
        first, last = split(self.cut.units, mesh.tp, mesh.tp_rank)
        return self.cut.dim, first * size, last * size

    def local_shape(self, mesh: Mesh) -> tuple[int, ...]:
        """Return the shape of this tensor rank's slice."""
        shape = list(self.shape)
        if piece := self.slice(mesh):
            dim, first, last = piece
            shape[dim] = last - first
        return tuple(shape)

    def replicas(self, mesh: Mesh) -> str:
        """Name the group of ranks that hold the same piece, over which its gradients are summed.

        A weight that every tensor rank holds whole has seen only that rank's rows (norms, biases
        added after a reduce-scatter, the score head) or heads (norms of q and k), so its gradient
        is summed over tp as well.
        """
        if self.both_ends and mesh.pp > 1:
            return "ends dp cp"
        if self.expert and mesh.ep > 1:
            return "edp" if mesh.tp == 1 or self.cut else "edp tp"
        return "dp cp" if mesh.tp == 1 or self.cut else "dp cp tp"


class Layer(nn.Module):
    """A module that declares the weights it owns."""

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, mesh: Mesh):
        super().__init__()
        self.mesh = mesh
        self.declared: dict[str, Weight] = {}

    def declare(self, name: str, weight: Weight) -> None:
        """Create this rank's slice of a weight, uninitialised, and keep its declaration."""
        self.declared[name] = weight
        tensor = torch.empty(weight.local_shape(self.mesh))
        self.register_parameter(name, nn.Parameter(tensor, requires_grad=weight.trains))


def weights_of(model: nn.Module) -> dict[str, Weight]:
    """Return the declaration of every weight of a model by name, ordered as named_parameters."""
    return {
        f"{path}.{name}": weight
        for path, layer in model.named_modules()
        if isinstance(layer, Layer)
        for name, weight in layer.declared.items()
    }


# ---- norms ---------------------------------------------------------------------------------------


class Norm(Layer):
    """RMSNorm, or LayerNorm with a bias; over the last dimension. Kinds: see GPTConfig.norm."""

    def __init__(self, size: int, kind: str, eps: float, mesh: Mesh):
        super().__init__(mesh)
        self.eps = eps
        self.has_bias = kind.startswith("layer")
        self.less_one = kind.endswith("1p")  # the weight is stored less 1
        start: Start = "zeros" if self.less_one else "ones"
        self.declare("weight", Weight((size,), decays=False, start=start))
        if self.has_bias:
            self.declare("bias", Weight((size,), decays=False, start="zeros"))

    def forward(self, x: Tensor) -> Tensor:
        if self.has_bias:
            weight = self.weight + 1 if self.less_one else self.weight
            return F.layer_norm(x, weight.shape, weight, self.bias, self.eps)
        return rms_norm(x, self.rms_weight(), self.eps)

    def rms_weight(self) -> Tensor:
        """Return the weight that multiplies; 1 + w is kept in fp32 at least, as in Gemma."""
        if not self.less_one:
            return self.weight
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)) + 1

    def add(self, x: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """Return (x + update, its norm), in one kernel where there is one."""
        if self.has_bias:
            x = x + update
            return x, self(x)
        return add_rms_norm(x, update, self.rms_weight(), self.eps)


class HeadsNorm(Layer):
    """RMSNorm over all heads of q or k at once, of which this rank has some (OLMo 2).

        y_i = x_i / √(Σ_i |x_i|² / N + eps) · w_i      N components in all heads
        forward: all-reduce of a number a token        backward: the same of its gradient

    A rank holds the weights of its heads only, so their gradients are whole here.
    """

    def __init__(self, size: int, heads: int, eps: float, mesh: Mesh):
        super().__init__(mesh)
        self.size, self.eps, self.tp = size, eps, mesh.group("tp")
        self.declare("weight", Weight((size,), Cut(0, heads), decays=False, start="ones"))

    def forward(self, x: Tensor) -> Tensor:
        """(T, N / n) -> (T, N / n). Statistics are in fp32 at least."""
        if self.tp.n == 1:
            return rms_norm(x, self.weight, self.eps)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        squares = sum_over(exact.square().sum(-1, keepdim=True), self.tp)  # (T, 1)
        unit = exact * torch.rsqrt(squares / self.size + self.eps)
        return unit.to(x.dtype) * self.weight


# ---- linears -------------------------------------------------------------------------------------


class Linear(Layer):
    """Y = X Wᵀ + b. Every tensor rank holds all of W.

    Whatever changes the product (an adapter, a quantised W) belongs in `matmul`: the collectives of
    the subclasses go around it. A quantised W lies in `base`, and `weight` keeps its shape only.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        mesh: Mesh,
        bias: bool = False,
        cut: Cut | None = None,
        start: Start = "normal",
    ):
        super().__init__(mesh)
        self.tp: Group = mesh.group("tp")
        self.adapter: Adapter | None = None
        self.base: Quantized | None = None
        self.declare("weight", Weight((outputs, inputs), cut, start=start))
        if bias:
            rows = cut if cut and cut.dim == 0 else None
            self.declare("bias", Weight((outputs,), rows, decays=False, start="zeros"))
        else:
            self.register_parameter("bias", None)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return x W_iᵀ + bias for this rank's slice W_i, and what the adapter adds."""
        if self.base is None:
            y = linear(x, self.weight, bias)
        else:
            y = quantized_linear(x, self.base, bias)
        return y if self.adapter is None else y + self.adapter(x)

    def quantize(self, whole: Tensor, format: Format) -> None:
        """Hold W frozen in fewer bits: whole (outputs, inputs) is that of all tensor ranks.

        It is rounded as a whole and then cut, so that every layout computes with the same numbers.
        """
        rounded = quantize(whole, format)
        piece = self.declared["weight"].slice(self.mesh)
        self.base = rounded.cut(*piece) if piece else rounded
        self.weight = nn.Parameter(self.weight.to("meta"), requires_grad=False)

    @property
    def device(self) -> torch.device:
        return self.weight.device if self.base is None else self.base.codes.device

    def merged_weight(self, original: Tensor | None = None) -> Tensor:
        """Return this rank's slice of W + s B A, the one matrix that does what both do.

        original: W before it was quantised; the update goes on top of it.
        """
        weight = self.weight if original is None else original
        if self.adapter is None:
            return weight.to(self.weight.dtype)
        a, b = self.adapter.a, self.adapter.b
        exact = torch.promote_types(a.dtype, torch.float32)
        update = self.adapter.scale * (b.to(exact) @ a.to(exact))
        return (weight.to(exact) + update).to(self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x, self.bias)


def frozen_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """Return the bytes of this rank's frozen weights, unless quantised in dtype.

    Without what no gradient moves in any case: the corrections of routers, a few kB.
    """
    quantised = [m.base for m in model.modules() if isinstance(m, Linear) and m.base is not None]
    declared = weights_of(model)
    frozen = [n for n, p in model.named_parameters() if declared[n].trains and not p.requires_grad]
    elements = sum(model.get_parameter(name).numel() for name in frozen)
    elements -= sum(base.rows * base.columns for base in quantised)
    return elements * dtype.itemsize + sum(base.nbytes for base in quantised)


class Adapter(Layer):
    """A low-rank update of a linear, y = W x + s B A x (LoRA, arXiv 2106.09685 Sec. 4.1).

    It is cut as its linear is, so that it needs no collective of its own:

        ColumnLinear   Y_i = X W_iᵀ + s (X Aᵀ) B_iᵀ    A (r, inputs) whole, B (outputs, r) cut as W
        RowLinear      Σ_i X_i (W_i + s B A_i)ᵀ        A cut as W, B whole: the partial products
                                                       X_i A_iᵀ Bᵀ join the linear's own sum

    The half that every tensor rank holds whole sees a part of its gradient on each, so its
    gradients are summed over tp too, which its declaration says. For backward A keeps x and B keeps
    A x; the frozen W keeps nothing, and no gradient of it is computed.
    """

    a: nn.Parameter
    b: nn.Parameter

    def __init__(self, linear: Linear, rank: int, scale: float, dropout: float):
        super().__init__(linear.mesh)
        self.scale, self.dropout = scale, dropout
        outputs, inputs = linear.declared["weight"].shape
        cut = linear.declared["weight"].cut
        a_cut = cut if cut and cut.dim == 1 else None
        b_cut = cut if cut and cut.dim == 0 else None
        expert = linear.declared["weight"].expert
        self.declare("a", Weight((rank, inputs), a_cut, start="uniform", expert=expert))
        self.declare("b", Weight((outputs, rank), b_cut, start="zeros", expert=expert))

    def forward(self, x: Tensor) -> Tensor:
        """(T, inputs) -> (T, outputs). Dropout acts in training passes only."""
        if self.dropout and torch.is_grad_enabled():
            x = F.dropout(x, self.dropout)
        return self.scale * F.linear(F.linear(x, self.a), self.b)


class ColumnLinear(Linear):
    """Y_i = X W_iᵀ + b_i: each tensor rank computes its share of the outputs for all T rows."""

    def __init__(self, inputs: int, outputs: int, units: int, mesh: Mesh, bias: bool = False):
        super().__init__(inputs, outputs, mesh, bias, Cut(0, units))

    def forward(self, x: Tensor, rows: int) -> Tensor:  # type: ignore[override]
        """(T / n, inputs), T = rows -> (T, outputs / n)."""
        return columns(x, rows, self)[0]


def columns(x: Tensor, rows: int, *linears: ColumnLinear) -> list[Tensor]:
    """Apply several column-parallel linears to the same x (T / n, D), T = rows.

    One all-gather serves them all. Returns (T, outputs / n) of each.
    """
    gathered = enter(x, rows, linears[0].tp)  # (T, D)
    return [linear.matmul(gathered, linear.bias) for linear in linears]


class RowLinear(Linear):
    """Y = Σ_i X_i W_iᵀ + b: each tensor rank multiplies its share of the inputs."""

    def __init__(self, inputs: int, outputs: int, units: int, mesh: Mesh, bias: bool = False):
        super().__init__(inputs, outputs, mesh, bias, Cut(1, units), start="residual")

    def forward(self, x: Tensor) -> Tensor:
        """(T, inputs / n) -> (T / n, outputs). The bias is added once, after the sum."""
        if self.tp.n == 1:
            return self.matmul(x, self.bias)
        y = exit(self.matmul(x), self.tp)
        return y if self.bias is None else y + self.bias


# ---- the vocabulary ------------------------------------------------------------------------------


class Vocabulary(Layer):
    """One vector a token: the embedding, the output head, or both at once where they are tied."""

    def __init__(
        self, tokens: int, width: int, mesh: Mesh, tied: bool = False, logit_cap: float = 0.0
    ):
        super().__init__(mesh)
        self.tokens, self.tp, self.cap = tokens, mesh.group("tp"), logit_cap
        self.first, self.end = split(tokens, mesh.tp, mesh.tp_rank)  # this rank's tokens
        self.declare("weight", Weight((tokens, width), Cut(0, tokens), both_ends=tied))

    def embed(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T / n, D): the sum over tensor ranks, each of which looks up its own tokens."""
        if self.tp.n == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.first
        inside = (local >= 0) & (local < len(self.weight))
        vectors = F.embedding(torch.where(inside, local, 0), self.weight)
        return exit(vectors * inside[:, None], self.tp)

    def logps(
        self, x: Tensor, target: Tensor, temperature: float = 1.0, entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the log-prob of each target (M,) given x (M, D), the same on every tensor rank.

        fp32 at least. entropy: also the entropy of each distribution, (M,). Never holds (M, V).
        """
        merge = self._merge if self.tp.n > 1 else None
        return linear_logprob(
            x, self.weight, target, temperature, entropy, self.first, merge, self.cap
        )

    def kl(
        self,
        x: Tensor,
        teacher: "Vocabulary",
        teacher_x: Tensor,
        divergence: Divergence,
        mix: float,
        temperature: float,
    ) -> Tensor:
        """Return the divergence from a teacher's distribution of each row, (M,), on every rank.

        x (M, D) and teacher_x (M, D') -> fp32 at least; see kernels/kl.py. Never holds (M, V).
        """
        gather = self._gather if self.tp.n > 1 else None
        weights = self.weight, teacher_x, teacher.weight
        caps = self.cap, teacher.cap
        return linear_kl(x, *weights, divergence, mix, temperature, gather, caps)

    def top_k(self, x: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """Return the K likeliest tokens of each row, (M, K), and log-probs (M, K + 1).

        The last is that of all others; see kernels/top_k.py. The same on every tensor rank.
        """
        gather = self._gather if self.tp.n > 1 else None
        return linear_top_k(x, self.weight, k, temperature, self.first, gather, self.cap)

    def buckets(self, x: Tensor, ids: Tensor, temperature: float) -> Tensor:
        """Return the logits / τ at K tokens of each row and log Σ exp of all others, (M, K + 1)."""
        gather = self._gather if self.tp.n > 1 else None
        return linear_buckets(x, self.weight, ids, temperature, self.first, gather, self.cap)

    def _gather(self, partials: Tensor) -> Tensor:
        """Return the partials of all tensor ranks, (n, M, k), by an all-gather of k a token."""
        gathered = self.tp.all_gather(partials.contiguous(), "logps")
        return gathered.view(self.tp.n, *partials.shape)

    def _merge(self, partials: Tensor) -> Tensor:
        """Merge the ranks' log-probs by one all-gather of a few floats a token."""
        gathered = self.tp.all_gather(partials, "logps")
        return merge_partials(gathered.view(self.tp.n, *partials.shape))

    def logits(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, V), fp32 at least; for sampling, not for training."""
        z = linear(x, self.weight)
        if self.tp.n > 1:
            z = gather_slices(z, 1, self.tokens, self.tp)
        return soft_cap(z.to(torch.promote_types(z.dtype, torch.float32)), self.cap)


@torch.no_grad()
def is_finite(x: Tensor) -> bool:
    """Return whether no element is NaN or infinite, without a buffer of x's size."""
    if not x.numel():
        return True
    low, high = torch.aminmax(x)  # NaN goes through
    return bool(torch.isfinite(low) & torch.isfinite(high))


def gather_slices(x: Tensor, dim: int, units: int, tp: Group, unit: int = 1) -> Tensor:
    """Join the slices of all tensor ranks: `units` units of `unit` elements along `dim`."""
    if tp.n == 1:
        return x
    shares = [split(units, tp.n, rank) for rank in range(tp.n)]
    sizes = [unit * (last - first) for first, last in shares]
    x = x.transpose(0, dim)
    x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, max(sizes) - x.shape[0]))
    parts = tp.all_gather(x, "gather").split(max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes)]).transpose(0, dim)
