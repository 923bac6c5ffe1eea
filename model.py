"""One compact GPT: exactly Llama 2/3, Mistral, Qwen2, Qwen3 and GPT-NeoX/Pythia, on flat rows of packed trees.

    hidden = model(batch)                    (T, D); with --tp or --cp this rank's rows of it, only ever handed back:
    logps = model.logps(hidden, batch)       (M,) log-prob of each scored token, fp32 at least
    scores = model.score(hidden, batch, batch.last)   (R, outputs) of a reward model, at each response's last token

With more than one rank, a model holds its rank's slices (`shard`) of its stage's weights, under the names they have
in the whole model.

Letters: T tokens, M scored tokens, D width, V vocabulary, H query heads, G key/value heads, E head size, F MLP width.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.trees import TreeBatch
from kernels.attention import tree_attention
from kernels.logprob import linear_logprob, merge_partials
from kernels.rmsnorm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu
from parallel import Mesh, assemble, enter, exit, gather_rows, split

# What a layer asks for: (layer, q (T, H, E), k (T, G, E), v (T, G, E)) -> (T, H, E). Training attends over the trees of
# the batch; generation puts a KV cache here.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GPTConfig:
    """Everything that decides the arithmetic. hf.py fills it from a config.json."""

    family: str  # llama, mistral, qwen2, qwen3 or gpt_neox: the names of the weights on disk
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    norm: str = "rms"  # rms, or layer (with bias)
    norm_eps: float = 1e-5
    mlp: str = "swiglu"  # swiglu, gelu, gelu_tanh
    rope_theta: float = 10000.0
    rope_size: int = 0  # rotated components of a head; 0 = all
    rope_scaling: tuple[float, float, float, int] | None = (
        None  # llama3: factor, low, high, original length
    )
    windows: tuple[int, ...] = ()  # sliding window of each layer, 0 = none; () = none anywhere
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on every head of q and k (Qwen3)
    parallel_residual: bool = False  # x + attention(x) + mlp(x) (GPT-NeoX)
    tied: bool = False  # the head is the embedding
    outputs: int = 0  # numbers of a score head (a reward model), which then takes the place of the vocabulary; 0 = none
    max_position: int = (
        4096  # what the model was made for; longer rows are warned about, not refused
    )

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(math.prod(shape) for shape in shapes(self).values())

    def window(self, layer: int) -> int:
        """Sliding window of a layer, 0 = none."""
        return self.windows[layer] if self.windows else 0

    def flops_per_token(self, context: float) -> float:
        """Forward and backward, matmuls only, for one token that sees `context` keys and is scored."""
        attention = self.width * self.head_size * (self.heads * 2 + self.kv_heads * 2)
        mlp = self.width * self.ffn * (3 if self.mlp == "swiglu" else 2)
        scores = 2 * context * self.heads * self.head_size
        return 6 * (
            self.layers * (attention + mlp + scores) + (self.outputs or self.vocab) * self.width
        )


def rope_frequencies(c: GPTConfig) -> Tensor:
    """Radians a position for each pair of components, (R/2,) fp32; with Llama 3.1's stretching where asked for.

    Computed in fp32 step by step as transformers does, so that the angles are the same to the last bit.
    """
    size = c.rope_size or c.head_size
    frequency = 1.0 / (c.rope_theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size))
    if c.rope_scaling is None:
        return frequency
    factor, low, high, original = c.rope_scaling
    # Long waves are stretched by `factor`, short ones kept, those between blended (Llama 3.1 model card).
    wavelength = 2 * math.pi / frequency
    blend = (original / wavelength - low) / (high - low)
    blended = (1 - blend) * frequency / factor + blend * frequency
    stretched = torch.where(wavelength > original / low, frequency / factor, frequency)
    middle = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(middle, blended, stretched)


class Norm(nn.Module):
    """RMSNorm, or LayerNorm with a bias; over the last dimension."""

    def __init__(self, size: int, kind: str, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return rms_norm(x, self.weight, self.eps)
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)

    def after(self, x: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
        """(x + more, its norm)."""
        if self.bias is None:
            return add_rms_norm(x, more, self.weight, self.eps)
        x = x + more
        return x, self(x)


def shard(c: GPTConfig, name: str, mesh: Mesh) -> tuple[int, int, int] | None:
    """(dimension, first, last + 1): the slice of a weight that a tensor rank holds; None: it holds all of it.

    Heads, MLP and vocabulary are shared out as evenly as they go; nothing is padded.
    """
    part, kind = name.split(".")[-2:]

    def of(total: int, size: int) -> tuple[int, int]:
        low, high = split(total, mesh.tp, mesh.tp_rank)
        return low * size, high * size

    match part:
        case "embed" | "head":
            return 0, *of(c.vocab, 1)
        case "q":
            return 0, *of(c.kv_heads, c.heads // c.kv_heads * c.head_size)
        case "k" | "v":
            return 0, *of(c.kv_heads, c.head_size)
        case "gate" | "up":
            return 0, *of(c.ffn, 1)
        case "out" if kind == "weight":
            return 1, *of(c.kv_heads, c.heads // c.kv_heads * c.head_size)
        case "down" if kind == "weight":
            return 1, *of(c.ffn, 1)
    return None


@functools.cache
def shapes(c: GPTConfig) -> dict[str, tuple[int, ...]]:
    """name of every weight of the whole model -> its shape."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GPT(c).named_parameters()}


class Block(nn.Module):
    """One layer: attention and MLP, one after the other or (GPT-NeoX) side by side.

    With tensor parallel every rank has its share of the heads and of the MLP: columns of q, k, v, gate and up, rows of
    out and down.
    """

    def __init__(self, c: GPTConfig, layer: int, mesh: Mesh):
        super().__init__()
        self.c, self.layer, self.tp = c, layer, mesh.group("tp")
        first, last = split(c.kv_heads, mesh.tp, mesh.tp_rank)
        low, high = split(c.ffn, mesh.tp, mesh.tp_rank)
        kv_heads, ffn = last - first, high - low
        heads = kv_heads * (c.heads // c.kv_heads)
        self.norm1 = Norm(c.width, c.norm, c.norm_eps)
        self.norm2 = Norm(c.width, c.norm, c.norm_eps)
        self.q = nn.Linear(c.width, heads * c.head_size, bias=c.qkv_bias)
        self.k = nn.Linear(c.width, kv_heads * c.head_size, bias=c.qkv_bias)
        self.v = nn.Linear(c.width, kv_heads * c.head_size, bias=c.qkv_bias)
        self.out = nn.Linear(heads * c.head_size, c.width, bias=c.out_bias)
        if c.qk_norm:
            self.q_norm = Norm(c.head_size, "rms", c.norm_eps)
            self.k_norm = Norm(c.head_size, "rms", c.norm_eps)
        if c.mlp == "swiglu":
            self.gate = nn.Linear(c.width, ffn, bias=c.mlp_bias)
        self.up = nn.Linear(c.width, ffn, bias=c.mlp_bias)
        self.down = nn.Linear(ffn, c.width, bias=c.mlp_bias)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x (T / tp, D) -> (T / tp, D); in between (T, H, E) with this rank's heads."""
        tokens, size = len(cos), self.c.head_size
        x = enter(x, tokens, self.tp)  # (T, D)
        # No -1 in this view: a rank without examples runs on zero tokens, of which no size can be told.
        q, k, v = (
            p(x).view(tokens, p.out_features // size, size) for p in (self.q, self.k, self.v)
        )
        if self.c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        y = attend(self.layer, rope(q, cos, sin), rope(k, cos, sin), v)
        return self.leave(self.out, y.reshape(tokens, self.out.in_features))

    def mlp(self, x: Tensor, tokens: int) -> Tensor:
        """x (T / tp, D) -> (T / tp, D)."""
        x = enter(x, tokens, self.tp)
        if self.c.mlp == "swiglu":
            return self.leave(self.down, swiglu(self.gate(x), self.up(x)))
        y = F.gelu(self.up(x), approximate="tanh" if self.c.mlp == "gelu_tanh" else "none")
        return self.leave(self.down, y)

    def leave(self, linear: nn.Linear, y: Tensor) -> Tensor:
        """A matmul over this rank's rows of the matrix, summed over the tensor ranks; the bias is added once."""
        if self.tp.n == 1:
            return linear(y)
        y = exit(F.linear(y, linear.weight), self.tp)
        return y if linear.bias is None else y + linear.bias

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        if self.c.parallel_residual:
            return (
                x
                + self.attention(self.norm1(x), cos, sin, attend)
                + self.mlp(self.norm2(x), len(cos))
            )
        x, normed = self.norm2.after(x, self.attention(self.norm1(x), cos, sin, attend))
        return x + self.mlp(normed, len(cos))


class GPT(nn.Module):
    """Embedding, blocks, final norm, head or score head. The weights are what __init__ left: load them.

    ValueError: more tensor ranks than key/value heads, or more stages than layers.
    """

    hf_config: dict[
        str, Any
    ]  # the config.json that belongs to it; whoever makes the weights puts it here

    def __init__(self, c: GPTConfig, mesh: Mesh = Mesh()):  # noqa: B008 - a mesh of one never changes
        super().__init__()
        if c.kv_heads < mesh.tp:
            raise ValueError(
                f"--tp {mesh.tp}: the model has {c.kv_heads} key/value heads, take at most that many ranks"
            )
        if c.layers < mesh.pp:
            raise ValueError(
                f"--pp {mesh.pp}: the model has {c.layers} layers, that many stages at most"
            )
        self.c, self.mesh, self.tp = c, mesh, mesh.group("tp")
        self.first_token, end = split(c.vocab, mesh.tp, mesh.tp_rank)
        first, last = split(c.layers, mesh.pp, mesh.pp_rank)
        head = mesh.last_stage and not c.outputs
        self.embed = (
            nn.Embedding(end - self.first_token, c.width) if first == 0 or head and c.tied else None
        )
        self.blocks = nn.ModuleDict({str(i): Block(c, i, mesh) for i in range(first, last)})
        self.norm = Norm(c.width, c.norm, c.norm_eps) if mesh.last_stage else None
        self.head = (
            nn.Linear(c.width, end - self.first_token, bias=False) if head and not c.tied else None
        )
        if c.outputs and mesh.last_stage:
            self.score_head = nn.Linear(c.width, c.outputs, bias=False)
        self.checkpoint_activations = False
        self.coming: dict[
            str, list
        ] = {}  # parts of the model whose new weights may still be on their way
        self._frequencies: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def kv_heads(self) -> int:
        """Key/value heads of this rank."""
        first, last = split(self.c.kv_heads, self.mesh.tp, self.mesh.tp_rank)
        return last - first

    @property
    def heads(self) -> int:
        """Query heads of this rank."""
        return self.kv_heads * (self.c.heads // self.c.kv_heads)

    @property
    def head_weight(self) -> Tensor:
        """(V / tp, D), the embedding itself where the two are tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def replicas(self, name: str) -> str:
        """Which ranks hold the same piece of a weight, as the name of their group.

        What every tensor rank holds whole (norms, biases after a sum, the score head) saw only that rank's rows of the
        flat row, or its heads: gradients have to be added up over tp as well.
        """
        if name == "embed.weight" and self.c.tied and not self.c.outputs and self.mesh.pp > 1:
            return "ends dp cp"
        return "dp cp" if self.mesh.tp == 1 or shard(self.c, name, self.mesh) else "dp cp tp"

    def wait(self, part: str | None = None) -> None:
        """Waits for new weights that are still on their way from other ranks: a part of the model's, or all."""
        for name in [part] if part else list(self.coming):
            for bucket in self.coming.pop(name, ()):
                bucket.arrive()

    def init_weights(self, seed: int, std: float = 0.02) -> None:
        """Normal(0, std) matrices, those that write to the residual stream smaller by √(2 layers) (GPT-2); norms 1."""
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() < 2:
                nn.init.constant_(p, 1.0 if name.endswith("weight") else 0.0)
                continue
            small = name.endswith(("out.weight", "down.weight"))
            scale = std / math.sqrt(2 * self.c.layers) if small else std
            p.data.copy_(torch.randn(p.shape, generator=generator) * scale)

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every rotation, (T, R/2) each; computed in fp32 as transformers does."""
        if self._frequencies is None or self._frequencies.device != positions.device:
            self._frequencies = rope_frequencies(self.c).to(positions.device)
        angle = positions.float()[:, None] * self._frequencies
        return angle.cos(), angle.sin()

    def forward(self, batch: TreeBatch, x: Tensor | None = None) -> Tensor:
        """Hidden states of a batch of trees before the final norm, (T, D): this rank's rows of them under tp and cp.

        With pipeline stages those after this rank's blocks; x: those that the stage before gave.
        """
        if self.mesh.cp == 1:

            def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return tree_attention(q, k, v, batch.layout, self.c.window(layer))

            return self.run(batch.tokens, batch.positions, attend, x)
        # Context parallel: queries are this rank's rows, keys and values those of all ranks.
        shares = batch.shares(self.mesh.cp)
        rows, cp = shares[self.mesh.cp_rank], self.mesh.group("cp")
        layout = batch.share_layout(cp.n, cp.place)

        def attend_share(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            k, v = gather_rows(k, shares, cp), gather_rows(v, shares, cp)
            return tree_attention(q, k, v, layout, self.c.window(layer))

        return self.run(batch.tokens[rows], batch.positions[rows], attend_share, x)

    def hidden_shape(self, batch: TreeBatch) -> tuple[int, int]:
        """Of the hidden states that this rank has of a batch."""
        rows = (
            len(batch.tokens)
            if self.mesh.cp == 1
            else len(batch.shares(self.mesh.cp)[self.mesh.cp_rank])
        )
        return -(-rows // self.mesh.tp), self.c.width

    def run(
        self, tokens: Tensor, positions: Tensor, attend: Attend, x: Tensor | None = None
    ) -> Tensor:
        """Hidden states of T tokens at the given positions, with attention left to the caller, (T / tp, D).

        attend sees q, k, v of all T tokens and of this rank's heads.
        """
        if self.mesh.pp_rank == 0:
            self.wait("embed")
            x = self.embed_tokens(tokens)
        cos, sin = self.angles(positions)
        for name, block in self.blocks.items():
            self.wait(f"blocks.{name}")
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend)
        return x

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """(T,) -> (T / tp, D): each tensor rank looks up its part of the vocabulary, the sum is the embedding."""
        if self.tp.n == 1:
            return self.embed(tokens)
        own = tokens - self.first_token
        inside = (own >= 0) & (own < self.embed.num_embeddings)
        return exit(self.embed(torch.where(inside, own, 0)) * inside[:, None], self.tp)

    @overload
    def logps(
        self,
        hidden: Tensor,
        batch: TreeBatch,
        temperature: float = 1.0,
        entropy: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def logps(
        self, hidden: Tensor, batch: TreeBatch, temperature: float = 1.0, *, entropy: Literal[True]
    ) -> tuple[Tensor, Tensor]: ...

    def logps(
        self, hidden: Tensor, batch: TreeBatch, temperature: float = 1.0, entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-prob of each scored token, (M,), fp32 at least; with `entropy` also that of each distribution, (M,).

        Only scored tokens reach the vocabulary. Every rank gets all M of them.
        """
        self.wait()
        index, target, cp = batch.logit_index, batch.target, self.mesh.group("cp")
        if cp.n > 1:
            rows = batch.shares(cp.n)[cp.place]
            places, index = _within(rows, index)
            target = target[places]
            normed = enter(self.norm(hidden), len(rows), self.tp).index_select(0, index)
        elif self.tp.n > 1:
            normed = enter(self.norm(hidden), len(batch.tokens), self.tp).index_select(0, index)
        else:
            normed = self.norm(hidden.index_select(0, index))
        result = linear_logprob(
            normed, self.head_weight, target, temperature, entropy, self.first_token,
            self._merge if self.tp.n > 1 else None,
        )  # fmt: skip
        if cp.n == 1:
            return result
        total = len(batch.target)
        if isinstance(result, tuple):
            return assemble(result[0], places, total, cp), assemble(result[1], places, total, cp)
        return assemble(result, places, total, cp)

    def _merge(self, partials: Tensor) -> Tensor:
        """Vocab-parallel log-probs: one all-gather of a few floats a token."""
        return merge_partials(
            self.tp.all_gather(partials, "logps").view(self.tp.n, *partials.shape)
        )

    def logits(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Of the tokens at places index (n,) of the flat row, (n, V), fp32 at least; for sampling, not for training."""
        self.wait()
        if self.tp.n == 1:
            z = F.linear(self.norm(hidden.index_select(0, index)), self.head_weight)
        else:
            hidden = enter(self.norm(hidden), self.tp.n * len(hidden), self.tp)
            z = F.linear(hidden.index_select(0, index), self.head_weight)
            z = self.whole(z, 1, self.c.vocab)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    @torch.no_grad()
    def whole(self, x: Tensor, dim: int, total: int, unit: int = 1) -> Tensor:
        """Slices of all tensor ranks side by side again: `total` units of `unit` along `dim`."""
        if self.tp.n == 1:
            return x
        parts = [split(total, self.tp.n, i) for i in range(self.tp.n)]
        sizes = [unit * (high - low) for low, high in parts]
        x = x.transpose(0, dim)
        x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, max(sizes) - x.shape[0]))
        parts = self.tp.all_gather(x, "gather").split(max(sizes))
        return torch.cat([part[:size] for part, size in zip(parts, sizes)]).transpose(0, dim)

    def score(self, hidden: Tensor, batch: TreeBatch, index: Tensor) -> Tensor:
        """Scores read at some tokens of the flat row, index (n,) -> (n, outputs), fp32 at least, on every rank."""
        self.wait()
        places, group = None, self.mesh.group("cp tp")
        total = len(index)
        if group.n > 1:  # every token is on one rank, which scores it
            rows = torch.arange(len(batch.tokens), device=index.device)
            rows = rows if self.mesh.cp == 1 else batch.shares(self.mesh.cp)[self.mesh.cp_rank]
            rows = rows[self.mesh.tp_rank * hidden.shape[0] :][: hidden.shape[0]]
            places, index = _within(rows, index)
        z = F.linear(self.norm(hidden.index_select(0, index)), self.score_head.weight)
        z = z.to(torch.promote_types(z.dtype, torch.float32))
        return z if places is None else assemble(z, places, total, group)


def _within(rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Which entries of `index` are among `rows` (ascending), and where there."""
    at = torch.searchsorted(rows, index)
    at = at.clamp(max=max(0, len(rows) - 1))
    inside = rows[at] == index if len(rows) else torch.zeros_like(index, dtype=torch.bool)
    places = inside.nonzero()[:, 0]
    return places, at[places]
