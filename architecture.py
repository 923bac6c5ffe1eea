"""The sizes and options that decide a model's arithmetic, whatever family it comes from."""

from dataclasses import dataclass

from rotary import Scaling


@dataclass(frozen=True)
class GPTConfig:
    """Options that decide the arithmetic. weights/config_json.py fills it from a config.json."""

    family: str  # model_type of config.json: decides the weights' names on disk
    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    ffn: int
    norm: str = "rms"  # rms, layer (with bias); stored less 1: rms1p (Gemma), layer1p (Nemotron)
    norm_eps: float = 1e-5
    mlp: str = (
        "swiglu"  # swiglu, geglu (tanh); without a gate gelu, gelu_tanh, relu2 (squared ReLU)
    )
    rope_theta: float = 10000.0
    rope_size: int = 0  # rotated components of a head; 0 = all
    rope_scaling: Scaling | None = None  # of rotary.py
    # base of the layers with a window, whose rope is never stretched; 0 = all layers have one rope
    local_theta: float = 0.0
    # (beta, n): q at position p is multiplied by 1 + beta · ln(1 + ⌊p / n⌋) (Ministral 3)
    query_growth: tuple[float, int] | None = None
    unrotated: tuple[int, ...] = ()  # layers without rotary positions (SmolLM3)
    windows: tuple[int, ...] = ()  # sliding window of each layer, 0 = none; () = none anywhere
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    # RMSNorm on q and k: head (each head by itself, Qwen3), whole (all heads together, OLMo 2)
    qk_norm: str = ""
    # x + f(norm(x)): before; x + norm(f(x)): after (OLMo 2); x + norm(f(norm(x))): both (Gemma)
    norms: str = "before"
    # mixtures of experts (moe.py): experts of a layer, how many of them a token takes
    experts: int = 0
    active: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0  # of an MLP beside the experts that every token takes (Qwen2-MoE); 0 = none
    shared_gated: bool = True  # a gate of its own weights that MLP's output; not in GLM-4.5
    # scores of the experts: softmax; sigmoid, with a correction for the choice alone (GLM-4.5)
    router: str = "softmax"
    normalised: bool = False  # the weights of a token's experts are divided by their sum
    routed_scale: float = 1.0  # of these weights
    dense_layers: tuple[int, ...] = ()  # layers with an MLP in place of experts
    parallel_residual: bool = False  # x + attention(x) + mlp(x) (GPT-NeoX)
    embedding_scale: float = 1.0  # of what the embedding gives (Granite, as the next three)
    residual_scale: float = 1.0  # of what attention and MLP add to the residual stream
    attention_scale: float = 0.0  # of q · k; 0 = 1 / √head_size
    logit_scale: float = 1.0
    score_cap: float = 0.0  # soft caps of attention's scores and of the logits (Gemma 2); 0 = none
    logit_cap: float = 0.0
    tied: bool = False  # the output head is the embedding
    outputs: int = 0  # numbers of a reward model's score head, which replaces the head; 0 = none
    longest: int = 0  # beyond this many positions the rope is another one: refused; 0 = no limit
    max_position: int = 4096  # longest row the model was made for; longer ones are warned about

    def window(self, layer: int) -> int:
        """Return the sliding window of a layer, 0 = none."""
        return self.windows[layer] if self.windows else 0

    def rope(self, layer: int) -> str:
        """Name the rotary positions of a layer: main, local (of its window) or none."""
        if layer in self.unrotated:
            return "none"
        return "local" if self.local_theta and self.window(layer) else "main"

    def sparse(self, layer: int) -> bool:
        """Return whether a layer has experts."""
        return bool(self.experts) and layer not in self.dense_layers

    def mlp_width(self, layer: int) -> int:
        """Return the hidden width that a token meets in a layer: of its experts, all together."""
        return self.active * self.expert_ffn + self.shared_ffn if self.sparse(layer) else self.ffn

    @property
    def gated(self) -> bool:
        """Return whether the MLP has a gate: three matrices, not two."""
        return self.mlp in ("swiglu", "geglu")

    def flops_per_token(self, context: float) -> float:
        """Count matmul FLOPs, forward and backward, of a scored token that sees `context` keys."""
        attention = self.width * self.head_size * (self.heads * 2 + self.kv_heads * 2)
        scores = 2 * context * self.heads * self.head_size
        widths = sum(self.mlp_width(layer) for layer in range(self.layers))
        mlps = self.width * widths * (3 if self.gated else 2)
        head = (self.outputs or self.vocab) * self.width
        return 6 * (self.layers * (attention + scores) + mlps + head)
