"""The text model of a folder whose model reads images besides: Gemma 3 from 4B on, Mistral Small 3.

    extract("gemma-3-4b-it", "gemma-3-4b-text")     config.json, weights, tokenizer, chat template

The weights are copied bit by bit under the names that the text model has alone; those that read
images are left out. On texts both models compute the same. What this module does not know is
refused by name.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from data.tokenizer import TOKENIZER_FILES
from disk import new_folder
from weights.config_json import ARCHITECTURES, IMAGE_TYPES, read_json
from weights.families import TIED
from weights.files import open_weights, weight_files, write_weights

# Where its weights lie, as published and as transformers names them since 4.52 -> alone.
PLACES = {
    "language_model.model.": "model.",
    "model.language_model.": "model.",
    "language_model.lm_head.": "lm_head.",
    "lm_head.": "lm_head.",
}
IMAGES = tuple(
    f"{at}{part}." for at in ("", "model.") for part in ("vision_tower", "multi_modal_projector")
)
# What transformers takes for keys that a text_config leaves out, as that of Gemma 3 4B does.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma3_text": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
    },
    "mistral": {},
    "ministral3": {},
}
# Keys of the whole that hold for its text model too.
SHARED = "torch_dtype dtype bos_token_id eos_token_id pad_token_id quantization_config".split()


def extract(source: str | Path, out: str | Path) -> int:
    """Write the folder of the text model, whole or not at all; return how many weights were left.

    ValueError: the folder's model reads no images, or something in it is not known.
    """
    source = Path(source)
    raw = read_json(source / "config.json")
    if raw.get("model_type") not in IMAGE_TYPES:
        raise ValueError(
            f"{source}: the model_type is {raw.get('model_type')!r}: only "
            f"{' and '.join(IMAGE_TYPES)} have a text model to take out"
        )
    files = weight_files(source)
    names = {name: _name_alone(name, source) for name in files}
    kept = {name: alone for name, alone in names.items() if alone}
    config = _config(raw, "lm_head.weight" in kept.values(), source)
    with new_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        for name in (*TOKENIZER_FILES, "chat_template.json", "generation_config.json"):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        write_weights(folder, _weights(files, kept))
    return len(names) - len(kept)


def _config(raw: dict[str, Any], has_head: bool, source: Path) -> dict[str, Any]:
    """Return the config.json of the text model alone."""
    text = raw.get("text_config")
    family = text.get("model_type") if isinstance(text, dict) else None
    if not isinstance(text, dict) or family not in DEFAULTS:
        known = ", ".join(DEFAULTS)
        raise ValueError(f"{source}/config.json: text_config is of type {family!r}: only {known}")
    shared = {key: raw[key] for key in SHARED if raw.get(key) is not None}
    given = [each["tie_word_embeddings"] for each in (text, raw) if "tie_word_embeddings" in each]
    tied = any(given) if given else family in TIED
    config = {**DEFAULTS[family], **shared, **text}
    return {
        **config,
        "architectures": [ARCHITECTURES[family]],
        "tie_word_embeddings": tied and not has_head,
    }


def _name_alone(name: str, source: Path) -> str:
    """Return the name that a weight has in the text model alone, "" if it reads images."""
    if name.startswith(IMAGES):
        return ""
    for prefix, alone in PLACES.items():
        if name.startswith(prefix):
            return alone + name.removeprefix(prefix)
    raise ValueError(f"{source}: the weight {name} is not known")


def _weights(files: dict[str, Path], kept: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name alone, tensor) of the text model's weights, file by file."""
    for path in sorted(set(files.values())):
        handle = open_weights(path)
        for name in handle.keys():  # noqa: SIM118 - no dict
            if name in kept:
                yield kept[name], handle.get_tensor(name)
