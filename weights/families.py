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
THETA = {"smollm3": 2e6}
QWEN, MODERN = ("qwen2", "qwen3"), ("llama", "mistral", "qwen2", "qwen3", "smollm3")
# Optional keys that change the arithmetic -> the families whose own code reads them.
READ_BY = {
    "num_key_value_heads": MODERN,
    "head_dim": MODERN,
    "rms_norm_eps": MODERN,
    "layer_norm_eps": ("gpt_neox",),
    "attention_bias": ("llama", "qwen3", "smollm3", "gpt_neox"),
    "mlp_bias": ("llama", "smollm3"),
    "sliding_window": ("mistral", "smollm3", *QWEN),
    "use_sliding_window": ("smollm3", *QWEN),
    "layer_types": ("smollm3", *QWEN),
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


READERS: dict[str, Callable[[Take, Fields], Fields]] = {"smollm3": smollm3}
