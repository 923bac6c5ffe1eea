"""Keys of config.json that only some families have, read one family at a time.

A reader takes its family's own keys and returns fields of GPTConfig; `fields` are those read so
far. Keys that it leaves behind are refused by name. Defaults are those of transformers.
"""

from collections.abc import Callable
from typing import Any

Take = Callable[..., Any]  # take(key, default=None): the value of a key, which counts as read
Fields = dict[str, Any]

# Families whose output head is the embedding where config.json does not say.
TIED = ("smollm3",)
# Base of the rotary frequencies where config.json does not say; 10000 for the others.
THETA = {"smollm3": 2e6, "olmo3": 5e5}
EPS = {"olmo2": 1e-5, "olmo3": 1e-5}  # of the norms; 1e-6 for the others
WINDOW = {"mistral": 4096, "olmo3": 4096}  # sliding window; none for the others
# Families whose layers with a window have rotary positions of their own -> their default base.
LOCAL_ROPE = {"olmo3": 5e5}
QWEN, OLMO = ("qwen2", "qwen3"), ("olmo2", "olmo3")
MODERN = ("llama", "mistral", *QWEN, "smollm3", *OLMO)
# Optional keys that change the arithmetic -> the families whose own code reads them.
READ_BY = {
    "num_key_value_heads": MODERN,
    "head_dim": MODERN,
    "rms_norm_eps": MODERN,
    "layer_norm_eps": ("gpt_neox",),
    "attention_bias": ("llama", "qwen3", "smollm3", "gpt_neox", *OLMO),
    "mlp_bias": ("llama", "smollm3"),
    "sliding_window": ("mistral", "smollm3", "olmo3", *QWEN),
    "use_sliding_window": ("smollm3", *QWEN),
    "layer_types": ("smollm3", "olmo3", *QWEN),
    "rotary_pct": ("gpt_neox",),
    "rotary_emb_base": ("gpt_neox",),
    "partial_rotary_factor": ("gpt_neox",),
    "use_parallel_residual": ("gpt_neox",),
}


def smollm3(take: Take, fields: Fields) -> Fields:
    """Read which layers have no rotary positions (arXiv 2501.18795): every fourth by default."""
    take("pretraining_tp")  # says how it was trained; its class ignores it
    layers, interval = fields["layers"], take("no_rope_layer_interval", 4)
    rotated = take("no_rope_layers") or [(i + 1) % interval != 0 for i in range(layers)]
    if len(rotated) != layers:
        raise ValueError(
            f"config.json: no_rope_layers names {len(rotated)} layers, "
            f"num_hidden_layers is {layers}"
        )
    return {"unrotated": tuple(i for i, on in enumerate(rotated) if not on)}


def olmo(take: Take, fields: Fields) -> Fields:
    """Say what OLMo 2 and 3 do (arXiv 2501.00656): norms after, and over all heads of q and k."""
    return {"post_norm": True, "qk_norm": "whole"}


READERS: dict[str, Callable[[Take, Fields], Fields]] = {
    "smollm3": smollm3,
    "olmo2": olmo,
    "olmo3": olmo,
}
