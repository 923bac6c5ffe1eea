"""A GGUF file -> a Hugging Face folder, by the optional package gguf.

    convert("model.Q4_1.gguf", "model")     config.json, weights, tokenizer, chat template, ends

Quantised tensors become the fp32 numbers that they stand for. llama.cpp keeps the rows of a llama's
q and k in another order (pairs of a rotation side by side), which is put back. The tokenizer is
made from the file's metadata: byte-level BPE becomes a tokenizer.json, and the file names the rule
by which it splits text before merging; sentencepiece becomes a tokenizer.model. What this module
does not know is refused by name.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from disk import new_folder
from rotary import Llama3, frequencies
from weights.config_json import ARCHITECTURES
from weights.files import write_weights

FAMILIES = ("llama", "qwen2", "qwen3")
# Types of tensors, whose blocks the package gguf turns into numbers.
TYPES = "F32 F16 BF16 F64 Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q4_K Q5_K Q6_K".split()
MODULES = {  # in a file -> in a folder, both inside a block
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

# How byte-level BPE tokenizers split text, by the name in tokenizer.ggml.pre.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
SPLITS: dict[str, str] = {  # "": GPT-2's own; else a regular expression
    "gpt-2": "",
    "smollm": "digits",
    "llama-bpe": LLAMA3_SPLIT,
    "qwen2": QWEN2_SPLIT,
}
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type


def convert(file: str | Path, out: str | Path) -> None:
    """Write the folder of a GGUF file; whole, or not at all.

    ImportError names the pip install; ValueError names what is not known: an architecture, a type
    of tensor, a tensor, a tokenizer.
    """
    reader = _open(file)
    facts = {name: field.contents() for name, field in reader.fields.items()}
    raw = _config(facts, {tensor.name for tensor in reader.tensors}, file)
    factors = [tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    if factors:
        raw["rope_scaling"] = _scaling(raw, _numbers(factors[0], file), file)
    with new_folder(out) as folder:
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        _write_tokenizer(folder, facts, file)
        write_weights(folder, _weights(reader, raw, file))


def _open(file: str | Path) -> Any:
    """Open a GGUF file."""
    try:
        import gguf
    except ImportError:
        raise ImportError("GGUF files are read by the package gguf: pip install gguf") from None
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist")
    try:
        return gguf.GGUFReader(file)
    except Exception as error:  # the package raises what struct and numpy happen to raise
        raise ValueError(f"{file} is no GGUF file, or damaged ({error})") from None


# ---- config.json ---------------------------------------------------------------------------------


def _config(facts: dict[str, Any], names: set[str], file: str | Path) -> dict[str, Any]:
    """Return config.json."""
    family = facts.get("general.architecture")
    if family not in FAMILIES:
        raise ValueError(
            f"{file}: architecture {family!r} is not known, only {', '.join(FAMILIES)}"
        )

    def fact(name: str, default: Any = None) -> Any:
        value = facts.get(f"{family}.{name}", default)
        if value is None:
            raise ValueError(f"{file} lacks {family}.{name}")
        return value

    kind = facts.get(f"{family}.rope.scaling.type", "none")
    if kind != "none":
        raise ValueError(f"{file}: rope scaling {kind!r} is not known")
    if f"{family}.expert_count" in facts:
        raise ValueError(f"{file}: mixtures of experts are not known")
    width, heads = fact("embedding_length"), fact("attention.head_count")
    size = facts.get(f"{family}.attention.key_length", width // heads)
    rotated = facts.get(f"{family}.rope.dimension_count", size)
    if rotated != size:
        raise ValueError(f"{file}: {rotated} of {size} components rotate: only all are known")
    raw = {
        "architectures": [ARCHITECTURES[family]],
        "model_type": family,
        "hidden_size": width,
        "num_hidden_layers": fact("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fact("attention.head_count_kv", heads),
        "head_dim": size,
        "intermediate_size": fact("feed_forward_length"),
        "vocab_size": len(facts.get("tokenizer.ggml.tokens") or ()),
        "max_position_embeddings": fact("context_length"),
        "rms_norm_eps": round(fact("attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": fact("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in names,
        "hidden_act": "silu",
        "dtype": "float32",
    }
    if family == "llama":
        raw["attention_bias"] = "blk.0.attn_q.bias" in names
    ids = {
        f"{name}_token_id": facts.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return raw | {name: token for name, token in ids.items() if token is not None}


def _scaling(raw: dict[str, Any], factors: np.ndarray, file: str | Path) -> dict[str, Any]:
    """Return the rope scaling of Llama 3 whose factors a file keeps as a tensor.

    ValueError: they are those of another scaling.
    """
    for factor in (8.0, 32.0):
        plain = frequencies(raw["rope_theta"], raw["head_dim"])
        scaling = Llama3(factor, 1.0, 4.0, 8192)
        stretched = frequencies(raw["rope_theta"], raw["head_dim"], scaling)
        if np.allclose((plain / stretched).numpy(), factors, rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
    raise ValueError(f"{file}: rope_freqs.weight is no scaling of Llama 3.1 or 3.2")


# ---- weights -------------------------------------------------------------------------------------


def _weights(reader: Any, raw: dict[str, Any], file: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the folder, fp32 tensor) of every tensor of a file."""
    heads = {"attn_q": raw["num_attention_heads"], "attn_k": raw["num_key_value_heads"]}
    for tensor in reader.tensors:
        words = tensor.name.split(".")
        if tensor.name == "rope_freqs.weight":
            continue
        if words[0] == "blk" and len(words) == 4 and words[2] in MODULES:
            name = f"model.layers.{words[1]}.{MODULES[words[2]]}.{words[3]}"
        elif len(words) == 2 and words[0] in OUTER:
            name = f"{OUTER[words[0]]}.{words[1]}"
        else:
            raise ValueError(f"{file}: the tensor {tensor.name} is not known")
        values = _numbers(tensor, file)
        if raw["model_type"] == "llama" and len(words) == 4 and words[2] in heads:
            values = unpermuted(values, heads[words[2]])
        yield name, torch.from_numpy(np.ascontiguousarray(values))


def _numbers(tensor: Any, file: str | Path) -> np.ndarray:
    """Return the fp32 numbers of a tensor, in the shape that torch gives it."""
    from gguf.quants import dequantize

    kind = tensor.tensor_type.name
    if kind not in TYPES:
        raise ValueError(f"{file}: {tensor.name} is {kind}: known are {', '.join(TYPES)}")
    shape = [int(n) for n in reversed(tensor.shape)]
    return dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)


def unpermuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the rows of q or k back into Hugging Face's order: halves of a head, not pairs.

    A head of four rows [a0, b0, a1, b1] -> [a0, a1, b0, b1].
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


# ---- the tokenizer -------------------------------------------------------------------------------


def _write_tokenizer(folder: Path, facts: dict[str, Any], file: str | Path) -> None:
    """Write the tokenizer, the chat template and generation_config.json."""
    kind = facts.get("tokenizer.ggml.model")
    tokens = facts.get("tokenizer.ggml.tokens") or []
    types = facts.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    settings: dict[str, Any] = {"clean_up_tokenization_spaces": False}
    if kind == "gpt2":
        text = json.dumps(_byte_level(facts, tokens, types, file), ensure_ascii=False, indent=1)
        (folder / "tokenizer.json").write_text(text)
        settings |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        settings["add_prefix_space"] = False
    elif kind == "llama":
        (folder / "tokenizer.model").write_bytes(_sentencepiece(facts, tokens, types))
        settings |= {"tokenizer_class": "LlamaTokenizer", "legacy": False}
        settings["add_prefix_space"] = bool(facts.get("tokenizer.ggml.add_space_prefix", True))
    else:
        raise ValueError(f"{file}: a tokenizer of kind {kind!r} is not known, only gpt2 and llama")
    ids: dict[str, int] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = facts.get(f"tokenizer.ggml.{key}_token_id")
        if token is None:
            continue
        if not 0 <= token < len(tokens):
            raise ValueError(f"{file}: {key}_token_id {token} is beyond the {len(tokens)} tokens")
        settings[f"{name}_token"] = tokens[token]
        ids[f"{name}_token_id"] = token
    ids.pop("unk_token_id", None)
    for name in ("bos", "eos"):
        default = kind == "llama" and name == "bos"
        settings[f"add_{name}_token"] = bool(facts.get(f"tokenizer.ggml.add_{name}_token", default))
    settings["added_tokens_decoder"] = {
        str(i): _added(token, types[i] == CONTROL)
        for i, token in enumerate(tokens)
        if types[i] in (CONTROL, USER_DEFINED)
    }
    if template := facts.get("tokenizer.chat_template"):
        settings["chat_template"] = template
    text = json.dumps(settings, ensure_ascii=False, indent=2)
    (folder / "tokenizer_config.json").write_text(text + "\n")
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")


def _added(token: str, special: bool) -> dict[str, Any]:
    """Return an entry of a token that is cut out of the text before anything else."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"content": token, **flags, "special": special}


def _byte_level(
    facts: dict[str, Any], tokens: list[str], types: list[int], file: str | Path
) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level BPE tokenizer."""
    split = facts.get("tokenizer.ggml.pre", "gpt-2")
    if split not in SPLITS:
        raise ValueError(
            f"{file}: text is split by the rule {split!r}, known are {', '.join(SPLITS)}: take the "
            "tokenizer files of the model that it was made from"
        )
    bytes_rule = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    rules: list[dict[str, Any]] = [{**bytes_rule, "use_regex": True}]
    if SPLITS[split] == "digits":
        rules.insert(0, {"type": "Digits", "individual_digits": True})
    elif SPLITS[split]:
        pattern = {"Regex": SPLITS[split]}
        rules = [
            {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False},
            {**bytes_rule, "use_regex": False},
        ]
    added = [
        {"id": i, **_added(token, types[i] == CONTROL)}
        for i, token in enumerate(tokens)
        if types[i] in (CONTROL, USER_DEFINED)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"} if split == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": rules},
        "post_processor": {**bytes_rule, "use_regex": True},
        "decoder": {**bytes_rule, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": split == "llama-bpe",
            "vocab": {token: i for i, token in enumerate(tokens) if types[i] != UNUSED},
            "merges": [merge.split(" ") for merge in facts.get("tokenizer.ggml.merges") or []],
        },
    }


def _sentencepiece(facts: dict[str, Any], tokens: list[str], types: list[int]) -> bytes:
    """Return the tokenizer.model of a sentencepiece BPE tokenizer: a protobuf, written by hand.

    ModelProto: 1 pieces {1 text, 2 score, 3 type}, 2 trainer {3 model type, 35 byte fallback, 40 to
    43 the ids of unk, bos, eos, pad}, 3 normaliser {1 name, 3 dummy prefix, 4 drop extra spaces,
    5 write spaces as ▁}.
    """
    scores = facts.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    model = b""
    for token, score, kind in zip(tokens, scores, types, strict=True):
        piece = _field(1, token.encode()) + bytes([2 << 3 | 5]) + struct.pack("<f", score)
        model += _field(1, piece + _number(3, kind))
    trainer = _number(3, 2) + _number(35, int(BYTE in types))
    for field, key in ((40, "unknown"), (41, "bos"), (42, "eos"), (43, "padding")):
        token = facts.get(f"tokenizer.ggml.{key}_token_id")
        trainer += _number(field, 2**64 - 1 if token is None else token)  # -1: there is none
    dummy = int(facts.get("tokenizer.ggml.add_space_prefix", True))
    spaces = int(facts.get("tokenizer.ggml.remove_extra_whitespaces", False))
    normaliser = _field(1, b"identity") + _number(3, dummy) + _number(4, spaces) + _number(5, 1)
    return model + _field(2, trainer) + _field(3, normaliser)


def _varint(value: int) -> bytes:
    """Return a protobuf varint: seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _field(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value
