"""One compact GPT: exactly Llama 2/3, Mistral, Qwen2, Qwen3 and GPT-NeoX/Pythia, on flat rows of packed trees.

    hidden = model(batch)                    (T, D)
    logps = model.logps(hidden, batch)       (M,) log-prob of each scored token, fp32 at least
    scores = model.score(hidden, batch.last) (R, outputs) of a reward model, read at each response's last token

Letters: T tokens, M scored tokens, D width, V vocabulary, H query heads, G key/value heads, E head size, F MLP width.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from data.trees import TreeBatch
from kernels.attention import tree_attention
from kernels.logprob import linear_logprob
from kernels.rmsnorm import add_rms_norm, rms_norm
from kernels.rope import rope
from kernels.swiglu import swiglu

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
    rope_scaling: tuple[float, float, float, int] | None = None  # llama3: factor, low, high, original length
    windows: tuple[int, ...] = ()  # sliding window of each layer, 0 = none; () = none anywhere
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on every head of q and k (Qwen3)
    parallel_residual: bool = False  # x + attention(x) + mlp(x) (GPT-NeoX)
    tied: bool = False  # the head is the embedding
    outputs: int = 0  # numbers of a score head (a reward model), which then takes the place of the vocabulary; 0 = none
    max_position: int = 4096  # what the model was made for; longer rows are warned about, not refused

    @property
    def parameters(self) -> int:
        """Number of weights."""
        with torch.device("meta"):
            return sum(p.numel() for p in GPT(self).parameters())

    def window(self, layer: int) -> int:
        """Sliding window of a layer, 0 = none."""
        return self.windows[layer] if self.windows else 0

    def flops_per_token(self, context: float) -> float:
        """Forward and backward, matmuls only, for one token that sees `context` keys and is scored."""
        attention = self.width * self.head_size * (self.heads * 2 + self.kv_heads * 2)
        mlp = self.width * self.ffn * (3 if self.mlp == "swiglu" else 2)
        scores = 2 * context * self.heads * self.head_size
        return 6 * (self.layers * (attention + mlp + scores) + (self.outputs or self.vocab) * self.width)


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


class Block(nn.Module):
    """One layer: attention and MLP, one after the other or (GPT-NeoX) side by side."""

    def __init__(self, c: GPTConfig, layer: int):
        super().__init__()
        self.c, self.layer = c, layer
        self.norm1 = Norm(c.width, c.norm, c.norm_eps)
        self.norm2 = Norm(c.width, c.norm, c.norm_eps)
        self.q = nn.Linear(c.width, c.heads * c.head_size, bias=c.qkv_bias)
        self.k = nn.Linear(c.width, c.kv_heads * c.head_size, bias=c.qkv_bias)
        self.v = nn.Linear(c.width, c.kv_heads * c.head_size, bias=c.qkv_bias)
        self.out = nn.Linear(c.heads * c.head_size, c.width, bias=c.out_bias)
        if c.qk_norm:
            self.q_norm = Norm(c.head_size, "rms", c.norm_eps)
            self.k_norm = Norm(c.head_size, "rms", c.norm_eps)
        if c.mlp == "swiglu":
            self.gate = nn.Linear(c.width, c.ffn, bias=c.mlp_bias)
        self.up = nn.Linear(c.width, c.ffn, bias=c.mlp_bias)
        self.down = nn.Linear(c.ffn, c.width, bias=c.mlp_bias)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        """x (T, D) -> (T, D)."""
        c, tokens = self.c, x.shape[0]
        q = self.q(x).view(tokens, c.heads, c.head_size)
        k = self.k(x).view(tokens, c.kv_heads, c.head_size)
        v = self.v(x).view(tokens, c.kv_heads, c.head_size)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.out(attend(self.layer, rope(q, cos, sin), rope(k, cos, sin), v).reshape(tokens, -1))

    def mlp(self, x: Tensor) -> Tensor:
        """x (T, D) -> (T, D)."""
        if self.c.mlp == "swiglu":
            return self.down(swiglu(self.gate(x), self.up(x)))
        return self.down(F.gelu(self.up(x), approximate="tanh" if self.c.mlp == "gelu_tanh" else "none"))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        if self.c.parallel_residual:
            return x + self.attention(self.norm1(x), cos, sin, attend) + self.mlp(self.norm2(x))
        x, normed = self.norm2.after(x, self.attention(self.norm1(x), cos, sin, attend))
        return x + self.mlp(normed)


class GPT(nn.Module):
    """Embedding, blocks, final norm, head or score head. The weights are what __init__ left: load them."""

    def __init__(self, c: GPTConfig):
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.vocab, c.width)
        self.blocks = nn.ModuleList(Block(c, i) for i in range(c.layers))
        self.norm = Norm(c.width, c.norm, c.norm_eps)
        self.head = None if c.tied or c.outputs else nn.Linear(c.width, c.vocab, bias=False)
        if c.outputs:
            self.score_head = nn.Linear(c.width, c.outputs, bias=False)
        self.checkpoint_activations = False
        self._frequencies: Tensor | None = None

    @property
    def head_weight(self) -> Tensor:
        """(V, D), the embedding itself where the two are tied."""
        return self.embed.weight if self.head is None else self.head.weight

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

    def forward(self, batch: TreeBatch) -> Tensor:
        """Hidden states of a batch of trees before the final norm, (T, D)."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return tree_attention(q, k, v, batch.layout, self.c.window(layer))

        return self.run(batch.tokens, batch.positions, attend)

    def run(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Hidden states of T tokens at the given positions, with attention left to the caller, (T, D)."""
        x = self.embed(tokens)
        cos, sin = self.angles(positions)
        for block in self.blocks:
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, attend, use_reentrant=False)
            else:
                x = block(x, cos, sin, attend)
        return x

    def logps(self, hidden: Tensor, batch: TreeBatch, temperature: float = 1.0, entropy: bool = False) -> Tensor:
        """Log-prob of each scored token, (M,), fp32 at least. Only scored tokens reach the vocabulary."""
        rows = self.norm(hidden.index_select(0, batch.logit_index))
        return linear_logprob(rows, self.head_weight, batch.target, temperature, entropy)

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) -> (n, V), fp32 at least: for sampling and for tests, never in a training step."""
        z = F.linear(self.norm(hidden), self.head_weight)
        return z.to(torch.promote_types(z.dtype, torch.float32))

    def score(self, hidden: Tensor, index: Tensor) -> Tensor:
        """Scores read at some tokens of the flat row, index (n,) -> (n, outputs), fp32 at least."""
        z = F.linear(self.norm(hidden.index_select(0, index)), self.score_head.weight)
        return z.to(torch.promote_types(z.dtype, torch.float32))
