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

import torch
from torch import Tensor

from data.tokenizer import TOKENIZER_FILES, load_tokenizer
from disk import new_folder
from weights.config_json import ARCHITECTURES, IMAGE_TYPES, model_config, read_json
from weights.families import TIED
from weights.files import open_weights, weight_files, write_weights
from weights.table import weight_table

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
# Keys of the whole that hold for its text model too, whatever text_config says.
SHARED = "torch_dtype dtype bos_token_id eos_token_id pad_token_id quantization_config".split()
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


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
    kept: dict[str, str] = {}  # name alone -> name in the source
    for name in files:
        alone = _name_alone(name, source)
        if alone in kept:
            raise ValueError(f"{source}: {kept[alone]} and {name} are one weight under two names")
        if alone:
            kept[alone] = name
    left_out = len(files) - len(kept)
    config = _config(raw, source)
    if HEAD in kept and EMBEDDING in kept:  # as transformers does: tied only if it is the embedding
        one, other = (_tensor(files, kept[name]) for name in (HEAD, EMBEDDING))
        config["tie_word_embeddings"] &= torch.equal(one, other)
        if config["tie_word_embeddings"]:
            del kept[HEAD]
    _check(config, set(kept), source)
    with new_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        _copy_tokenizer(source, folder)
        write_weights(folder, _weights(files, kept))
    return left_out


def _config(raw: dict[str, Any], source: Path) -> dict[str, Any]:
    """Return the config.json of the text model alone."""
    text = raw.get("text_config")
    family = text.get("model_type") if isinstance(text, dict) else None
    if not isinstance(text, dict) or family not in DEFAULTS:
        known = ", ".join(DEFAULTS)
        raise ValueError(f"{source}/config.json: text_config is of type {family!r}: only {known}")
    ties = [each.get("tie_word_embeddings") for each in (text, raw)]
    given = [tied for tied in ties if tied is not None]
    return {
        **DEFAULTS[family],
        **text,
        **{key: raw[key] for key in SHARED if raw.get(key) is not None},
        "architectures": [ARCHITECTURES[family]],
        "tie_word_embeddings": any(given) if given else family in TIED,
    }


def _check(config: dict[str, Any], names: set[str], source: Path) -> None:
    """Raise what loading the text model would raise, before anything large is copied."""
    c = model_config(config, config["model_type"])
    wanted = {stored.name for stored in weight_table(c).values()}
    if wanted != names:
        name = min(wanted ^ names)
        raise ValueError(f"{source}: {'no weight' if name in wanted else 'unknown weight'} {name}")
    load_tokenizer(source)


def _copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the tokenizer, the ends and the chat template, which a processor may have kept."""
    for name in (*TOKENIZER_FILES, "generation_config.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    kept_apart = source / "chat_template.json"
    if kept_apart.is_file() and not load_tokenizer(source).chat_template:
        template = read_json(kept_apart).get("chat_template")
        if isinstance(template, str):
            (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _name_alone(name: str, source: Path) -> str:
    """Return the name that a weight has in the text model alone, "" if it reads images."""
    if name.startswith(IMAGES):
        return ""
    for prefix, alone in PLACES.items():
        if name.startswith(prefix):
            return alone + name.removeprefix(prefix)
    raise ValueError(f"{source}: the weight {name} is not known")


def _tensor(files: dict[str, Path], name: str) -> Tensor:
    """Read a weight."""
    return open_weights(files[name]).get_tensor(name)


def _weights(files: dict[str, Path], kept: dict[str, str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name alone, tensor) of the text model's weights, file by file."""
    handles = {path: open_weights(path) for path in sorted(set(files.values()))}
    for alone, name in sorted(kept.items(), key=lambda names: (files[names[1]], names[0])):
        yield alone, handles[files[name]].get_tensor(name)
