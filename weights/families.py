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
# Families with a key for the biases of attention and of the MLP.
ATTENTION_BIAS = ("llama", "qwen3", "smollm3")
MLP_BIAS = ("llama", "smollm3")


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
