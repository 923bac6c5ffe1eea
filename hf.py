"""Hugging Face folder <-> model: one table row a weight, used in both directions.

    python hf.py check DIR        reads the folder as a training script would, and says what it holds
    python hf.py new --out DIR --family llama --width 96 --layers 2 --heads 4 --tokenizer DIR
                                  a new folder of random weights, for tests, benchmarks and training from scratch

An architecture, an option or a weight that plumb does not know is refused by name: what is not computed exactly must
not be computed silently. Weights are read from safetensors only, which cannot run code.
"""

import hashlib
import json
import math
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from config import parse
from data.templates import Template
from data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from model import GPT, GPTConfig, shapes, shard
from parallel import Mesh, split

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}  # a reward model's says ForSequenceClassification instead
SHARD_BYTES = 5 << 30  # of one weight file, as transformers splits them

# ---- the table: every weight, ours | theirs --------------------------------------------------------------------------


class Row(NamedTuple):
    """One weight under both names, {i} the layer. `part`: which of q, k, v it is inside a fused tensor of theirs.
    `shape`: of the whole tensor on disk, once the table is that of a model."""

    ours: str
    theirs: str
    part: str = ""
    shape: tuple[int, ...] = ()


LLAMA = [
    Row("embed.weight", "model.embed_tokens.weight"),
    Row("blocks.{i}.norm1.weight", "model.layers.{i}.input_layernorm.weight"),
    Row("blocks.{i}.q.*", "model.layers.{i}.self_attn.q_proj.*"),
    Row("blocks.{i}.k.*", "model.layers.{i}.self_attn.k_proj.*"),
    Row("blocks.{i}.v.*", "model.layers.{i}.self_attn.v_proj.*"),
    Row("blocks.{i}.q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
    Row("blocks.{i}.k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
    Row("blocks.{i}.out.*", "model.layers.{i}.self_attn.o_proj.*"),
    Row("blocks.{i}.norm2.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    Row("blocks.{i}.gate.*", "model.layers.{i}.mlp.gate_proj.*"),
    Row("blocks.{i}.up.*", "model.layers.{i}.mlp.up_proj.*"),
    Row("blocks.{i}.down.*", "model.layers.{i}.mlp.down_proj.*"),
    Row("norm.weight", "model.norm.weight"),
    Row("head.weight", "lm_head.weight"),
    Row("score_head.weight", "score.weight"),
]
GPT_NEOX = [
    Row("embed.weight", "gpt_neox.embed_in.weight"),
    Row("blocks.{i}.norm1.*", "gpt_neox.layers.{i}.input_layernorm.*"),
    Row("blocks.{i}.q.*", "gpt_neox.layers.{i}.attention.query_key_value.*", "q"),
    Row("blocks.{i}.k.*", "gpt_neox.layers.{i}.attention.query_key_value.*", "k"),
    Row("blocks.{i}.v.*", "gpt_neox.layers.{i}.attention.query_key_value.*", "v"),
    Row("blocks.{i}.out.*", "gpt_neox.layers.{i}.attention.dense.*"),
    Row("blocks.{i}.norm2.*", "gpt_neox.layers.{i}.post_attention_layernorm.*"),
    Row("blocks.{i}.up.*", "gpt_neox.layers.{i}.mlp.dense_h_to_4h.*"),
    Row("blocks.{i}.down.*", "gpt_neox.layers.{i}.mlp.dense_4h_to_h.*"),
    Row("norm.*", "gpt_neox.final_layer_norm.*"),
    Row("head.weight", "embed_out.weight"),
    Row("score_head.weight", "score.weight"),
]
# Buffers that old folders carry along: they are computed here, or masks.
NOT_WEIGHTS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


def weight_table(c: GPTConfig) -> dict[str, Row]:
    """our name of every weight the model has -> its row with the layer and the shape filled in."""
    table = {}
    rows = {row.ours: row for row in (GPT_NEOX if c.family == "gpt_neox" else LLAMA)}
    for name, shape in shapes(c).items():
        words = name.split(".")
        layer = words[1] if words[0] == "blocks" else ""
        generic = ".".join(["blocks", "{i}", *words[2:]]) if layer else name
        row = rows.get(generic) or rows[generic.rpartition(".")[0] + ".*"]
        theirs = row.theirs.replace("{i}", layer).replace("*", words[-1])
        table[name] = Row(name, theirs, row.part, (3 * shape[0], *shape[1:]) if row.part else shape)
    return table


# ---- config.json -----------------------------------------------------------------------------------------------------

# Keys without a say in the arithmetic.
IDLE_KEYS = set(
    "_name_or_path architectures model_type torch_dtype dtype transformers_version use_cache bos_token_id eos_token_id "
    "pad_token_id initializer_range max_position_embeddings id2label label2id problem_type return_dict "
    "output_attentions output_hidden_states chunk_size_feed_forward classifier_dropout is_encoder_decoder is_decoder "
    "max_window_layers _attn_implementation_autoset attn_implementation".split()
)
# Keys that change the arithmetic when they are anything else.
ONLY = {
    "attention_dropout": (0, 0.0, None),
    "hidden_dropout": (0, 0.0, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "use_mrope": (False, None),
}
# What kind of value a key takes, where null says no more than leaving it out.
SIZES = set(
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size "
    "max_position_embeddings sliding_window max_window_layers num_labels original_max_position_embeddings".split()
)
NUMBERS = set(
    "rope_theta rotary_emb_base rotary_pct partial_rotary_factor layer_norm_eps rms_norm_eps factor low_freq_factor "
    "high_freq_factor".split()
)
SWITCHES = set(
    "use_parallel_residual attention_bias mlp_bias use_sliding_window tie_word_embeddings".split()
)
MOST = {
    "num_hidden_layers": 1000,
    "num_labels": 10_000,
}  # of other sizes 2**24; absurd ones would only eat memory


def _check_kinds(raw: dict) -> None:
    """ValueError for the first value of config.json that cannot be what its key says."""
    for key, value in raw.items():
        most = MOST.get(key, 1 << 24)
        if value is None:
            continue
        if key in SIZES and not (
            type(value) is int and (value > 0 or key == "sliding_window") and value <= most
        ):
            raise ValueError(f"config.json: {key} = {value!r} is no whole number from 1 to {most}")
        if key in NUMBERS and not (type(value) in (int, float) and 0 < value < 1e18):
            raise ValueError(f"config.json: {key} = {value!r} is no number above 0")
        if key in SWITCHES and type(value) is not bool:
            raise ValueError(f"config.json: {key} = {value!r} is neither true nor false")
        if key in ("rope_parameters", "rope_scaling"):
            _check_kinds(dict(value))


def _take(raw: dict, family: str) -> GPTConfig:
    _check_kinds(raw)
    known = dict(raw)

    def get(key, *default):
        if known.get(key) is None and not default:
            raise ValueError(f"config.json has no {key}")
        return known.pop(key, *default)

    width, layers, heads = get("hidden_size"), get("num_hidden_layers"), get("num_attention_heads")
    kv_heads = get("num_key_value_heads", 8 if family == "mistral" else None) or heads
    head_size = get("head_dim", 128 if family == "qwen3" else None) or width // heads
    theta, scaling, rope_share = _rope(get, get("rope_theta", None), family)
    bias: dict[str, Any] = {"qkv_bias": False, "out_bias": False, "mlp_bias": False}
    if family == "gpt_neox":
        own = {
            "norm": "layer",
            "norm_eps": get("layer_norm_eps", 1e-5),
            "mlp": _one_of(
                "hidden_act", get("hidden_act", "gelu"), {"gelu": "gelu", "gelu_new": "gelu_tanh"}
            ),
            "parallel_residual": get("use_parallel_residual", True),
        }
        bias = {"mlp_bias": True, "qkv_bias": get("attention_bias", True)}
        bias["out_bias"] = bias["qkv_bias"]
    else:
        own = {
            "norm_eps": get("rms_norm_eps", 1e-6),
            "mlp": _one_of("hidden_act", get("hidden_act", "silu"), {"silu": "swiglu"}),
            "qk_norm": family == "qwen3",
        }
        if family in ("llama", "qwen3"):
            bias["qkv_bias"] = bias["out_bias"] = get("attention_bias", False)
        if family == "llama":
            bias["mlp_bias"] = get("mlp_bias", False)
        if family == "qwen2":
            bias["qkv_bias"] = True
    window = get("sliding_window", 4096 if family == "mistral" else None) or 0
    if family in ("qwen2", "qwen3"):
        window = window if get("use_sliding_window", False) else 0
        from_layer = known.get("max_window_layers", 28)
        types = [
            "sliding_attention" if i >= from_layer else "full_attention" for i in range(layers)
        ]
    else:
        types = ["sliding_attention"] * layers
    types = get("layer_types", types) or types
    if len(types) != layers:
        raise ValueError(
            f"config.json: layer_types names {len(types)} layers, num_hidden_layers is {layers}"
        )
    for kind in types:
        _one_of("layer_types", kind, {"sliding_attention": 1, "full_attention": 1})
    config = GPTConfig(
        family=family,
        vocab=get("vocab_size"),
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_size=head_size,
        ffn=get("intermediate_size"),
        rope_theta=theta,
        rope_size=int(head_size * rope_share),
        rope_scaling=scaling,
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in types)
        if window
        else (),
        tied=get("tie_word_embeddings", False),
        max_position=known.get("max_position_embeddings", 2048),
        outputs=len(score_names(raw)),
        **own,
        **bias,
    )
    for key, values in ONLY.items():
        if known.pop(key, values[0]) not in values:
            raise ValueError(f"config.json: plumb has no {key} = {raw[key]!r}: only {values[0]!r}")
    if unknown := sorted(set(known) - IDLE_KEYS):
        raise ValueError(
            f"config.json: plumb does not know the option {unknown[0]} = {raw[unknown[0]]!r} of this {family} model; "
            "if it does not change the arithmetic, remove it from the file"
        )
    if rope_share > 1 or config.rope_size % 2:
        raise ValueError(
            f"config.json: an odd number of rotated components a head ({config.rope_size}) cannot be"
        )
    if heads % kv_heads:
        raise ValueError(
            f"config.json: {heads} attention heads are no multiple of {kv_heads} key/value heads"
        )
    return config


def _rope(get, theta: float | None, family: str) -> tuple[float, tuple | None, float]:
    """(theta, llama3 scaling, share of a head that turns), from the old keys or transformers 5's rope_parameters."""
    new = get("rope_parameters", None)
    rope = dict(new or get("rope_scaling", None) or {})
    get("rope_scaling", None)
    theta = rope.pop("rope_theta", None) or get("rotary_emb_base", None) or theta or 10000.0
    share = get("partial_rotary_factor", None) or get("rotary_pct", None)
    share = (
        rope.pop("partial_rotary_factor", None) or share or (0.25 if family == "gpt_neox" else 1.0)
    )
    kind = rope.pop("rope_type", None) or rope.get("type") or "default"
    rope.pop("type", None)
    _one_of("rope_type", kind, {"default": 1, "llama3": 1})
    llama3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    keys = llama3 if kind == "llama3" else ()
    if missing := [key for key in keys if key not in rope]:
        raise ValueError(f"config.json: rope_type {kind} needs {missing[0]}")
    if unknown := sorted(set(rope) - set(keys)):
        raise ValueError(f"config.json: plumb does not know {unknown[0]} for rope_type {kind}")
    return float(theta), tuple(rope[key] for key in keys) or None, share


def _one_of(key: str, value, known: dict):
    if value not in known:
        raise ValueError(
            f"config.json: plumb does not know {key} = {value!r}: only {', '.join(map(str, known))}"
        )
    return known[value]


def read_config(folder: str | Path) -> tuple[GPTConfig, dict]:
    """config.json of a folder, understood and raw. FileNotFoundError, or ValueError naming what plumb does not know."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: --model takes a Hugging Face folder (hf.py new makes one)"
        )
    raw = _json(path)
    try:
        family = raw.get("model_type")
        if family not in ARCHITECTURES:
            known = ", ".join(ARCHITECTURES)
            raise ValueError(
                f"config.json: plumb does not know model_type {family!r}: only {known}"
            )
        classes = (ARCHITECTURES[family], _classifier(family))
        for architecture in raw.get("architectures") or []:
            if architecture not in classes:
                raise ValueError(
                    f"config.json: plumb does not know {architecture}, only {' and '.join(classes)}"
                )
        return _take(raw, family), raw
    except ValueError as error:
        raise ValueError(f"{folder}/{error}") from None
    except (
        TypeError,
        AttributeError,
    ) as error:  # a list where a word should be, a word where an object should be
        raise ValueError(
            f"{path} holds a value of the wrong kind ({error}): fetch it again"
        ) from None


def _json(path: Path) -> dict:
    """The JSON object in a file. ValueError names the file that holds none."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold one JSON object")
    return value


def _classifier(family: str) -> str:
    """The architecture of a reward model, as transformers names it."""
    return ARCHITECTURES[family].replace("CausalLM", "SequenceClassification")


def score_names(raw: dict) -> tuple[str, ...]:
    """What each output of a reward model's score head is called, () for a language model; from a raw config.json."""
    if (raw.get("architectures") or [""])[0] != _classifier(raw["model_type"]):
        return ()
    labels = raw.get("id2label") or {
        i: f"LABEL_{i}" for i in range(raw.get("num_labels", 2))
    }  # transformers' default
    return tuple(name for _, name in sorted((int(i), name) for i, name in labels.items()))


def _with_scores(raw: dict, names: tuple[str, ...]) -> dict:
    """config.json of a reward model with named outputs, made from a language model's."""
    return {
        **raw,
        "architectures": [_classifier(raw["model_type"])],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "regression",
    }


# ---- weights ---------------------------------------------------------------------------------------------------------


def weight_files(folder: str | Path) -> dict[str, Path]:
    """their name of every weight -> the safetensors file that holds it; single file or sharded index."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        listed = _json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(
            isinstance(f, str) and f == Path(f).name for f in listed.values()
        ):
            raise ValueError(
                f"{index} must hold a weight_map from names to files in the same folder: fetch it again"
            )
        files = {name: folder / file for name, file in listed.items()}
        for path in set(files.values()):
            with _open(path) as file:
                lacks = {name for name in files if files[name] == path} - set(file.keys())
            if lacks:
                raise ValueError(
                    f"{path} lacks {min(lacks)}, which {index.name} says it holds: fetch both again"
                )
    elif single.is_file():
        with _open(single) as file:
            files = dict.fromkeys(file.keys(), single)
    else:
        other = next(folder.glob("*.bin"), None)
        raise FileNotFoundError(
            f"{folder} has no model.safetensors"
            + (
                f", only {other.name}: load it in transformers and save_pretrained() again"
                if other
                else ""
            )
        )
    return {name: file for name, file in files.items() if not name.endswith(NOT_WEIGHTS)}


def _open(path: Path):
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing: the folder is incomplete, fetch it again"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None
    for name in file.keys():  # noqa: SIM118 - no dict
        kind = file.get_slice(name).get_dtype()
        if kind not in ("F64", "F32", "F16", "BF16") and not name.endswith(NOT_WEIGHTS):
            raise ValueError(
                f"{path}: {name} is {kind}: plumb reads F64, F32, F16 and BF16, nothing quantized"
            )
    return file


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over config.json and every weight file: two folders with the same one hold the same model."""
    digest = hashlib.sha256()
    for path in (Path(folder) / "config.json", *sorted(set(weight_files(folder).values()))):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_model(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    scores: tuple[str, ...] | None = None,
    mesh: Mesh = Mesh(),  # noqa: B008 - a mesh of one never changes
) -> GPT:
    """Reads a Hugging Face folder into a model of the given type on the given device, one weight at a time: of the
    stage and the slices that are this rank's, so that no rank ever holds the whole model.

    scores: None loads a language model; () a reward model with whatever outputs it has; names a reward model with just
    these, whose score head starts at zero where the folder is a language model's (so every first score is 0).
    The model keeps the raw config.json as `hf_config`, for save_model. ValueError names a weight that is missing, too
    many or of the wrong shape, or says that the folder holds another kind of model.
    """
    c, raw = read_config(folder)
    have = score_names(raw)
    if have and scores is None:
        raise ValueError(
            f"{folder} is a reward model (of {', '.join(have)}): a language model is needed here"
        )
    if scores == () and not have:
        raise ValueError(
            f"{folder} is a language model: a reward model is needed here; train_rm.py makes one of it"
        )
    if have and scores and scores != have and (len(have), len(scores)) != (1, 1):
        raise ValueError(
            f"{folder} scores {', '.join(have)}, not {', '.join(scores)}: give the model it was made from"
        )
    files = weight_files(folder)
    fresh = bool(scores) and not have
    if fresh:
        raw = _with_scores(raw, scores)
        c = _take(raw, c.family)
        files = {
            name: file
            for name, file in files.items()
            if name not in ("lm_head.weight", "embed_out.weight")
        }
    table = weight_table(c)
    if fresh:
        del table["score_head.weight"]
    if missing := [row.theirs for row in table.values() if row.theirs not in files]:
        raise ValueError(f"{folder}: the weight {missing[0]} is missing ({len(missing)} in all)")
    spare = set(files) - {row.theirs for row in table.values()}
    if c.tied:
        spare -= {"lm_head.weight", "embed_out.weight"}
    if spare:
        raise ValueError(
            f"{folder}: plumb does not know the weight {min(spare)} ({len(spare)} in all)"
        )
    with torch.device("meta"):
        model = GPT(c, mesh)
    handles = {path: _open(path) for path in sorted(set(files.values()))}
    weights = {}
    for name, p in model.named_parameters():
        if fresh and name == "score_head.weight":
            weights[name] = torch.zeros(p.shape, dtype=dtype, device=device)
            continue
        row = table[name]
        stored, cut = handles[files[row.theirs]].get_slice(row.theirs), shard(c, name, mesh)
        if tuple(stored.get_shape()) != row.shape:
            raise ValueError(
                f"{folder}: {row.theirs} is {tuple(stored.get_shape())}, but config.json makes it {row.shape}"
            )
        # Of a weight that is shared out only this rank's slice is ever read.
        if cut is None:
            tensor = stored[:]
        elif cut[0] == 0:
            tensor = stored[3 * cut[1] : 3 * cut[2]] if row.part else stored[cut[1] : cut[2]]
        else:
            tensor = stored[:, cut[1] : cut[2]]
        tensor = _unfuse(tensor, row.part, c) if row.part else tensor
        weights[name] = tensor.to(device=device, dtype=dtype, copy=True)
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(True)
    model.hf_config = raw
    return model


def _unfuse(fused: Tensor, part: str, c: GPTConfig) -> Tensor:
    """q, k or v out of GPT-NeoX's query_key_value, or some heads of it: rows lie as (head, q|k|v, head size)."""
    rows = fused.view(-1, 3, c.head_size, *fused.shape[1:])
    return rows[:, "qkv".index(part)].flatten(0, 1)


def _fuse(parts: list[Tensor], c: GPTConfig) -> Tensor:
    rows = [p.view(c.heads, c.head_size, *p.shape[1:]) for p in parts]
    return torch.stack(rows, 1).reshape(3 * c.heads * c.head_size, *parts[0].shape[1:])


def to_theirs(model: GPT, names: list[str] | None = None, keep: bool = True) -> dict[str, Tensor]:
    """The weights under Hugging Face's names (all of this rank's stage, or some), whole, on the CPU.

    Every tensor rank calls it, slices are gathered one weight at a time; those with keep=False get nothing for it.
    """
    model.wait()
    weights, fused = {}, {}
    here, c = dict(model.named_parameters()), model.c
    for name, row in weight_table(c).items():
        if name not in here or names is not None and row.theirs not in names:
            continue
        tensor, cut = here[name].detach(), shard(c, name, model.mesh)
        if cut:
            total = shapes(c)[name][cut[0]]
            units = c.kv_heads if name.split(".")[-2] in ("q", "k", "v", "out") else total
            tensor = model.whole(tensor, cut[0], units, total // units)
        if not keep:
            continue
        if row.part:
            fused.setdefault(row.theirs, {})[row.part] = tensor.cpu().contiguous()
        else:
            weights[row.theirs] = tensor.cpu().contiguous()
    weights.update({name: _fuse([parts[p] for p in "qkv"], c) for name, parts in fused.items()})
    return weights


def save_model(
    model: GPT,
    folder: str | Path,
    tokenizer_from: str | Path | None = None,
    template: Template | None = None,
) -> None:
    """Writes a Hugging Face folder that transformers and vLLM load as it is; atomically: whole, or not at all.

    tokenizer_from: the folder whose tokenizer files and generation_config.json go along. template: the chat template
    that the model was trained with, so that whoever serves the folder uses it too, and stops where it stops.
    Every rank calls it, and writes its share of the files. OSError, the same on every rank: what to do.
    """
    folder = Path(folder)
    partial, mesh = folder.with_name(f".{folder.name}.partial"), model.mesh

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write_rest() -> None:
        _write_index(model, partial)
        raw = dict(model.hf_config)
        raw["dtype" if "dtype" in raw else "torch_dtype"] = str(model.dtype).removeprefix("torch.")
        padding = (
            _padding(load_tokenizer(tokenizer_from), template)
            if model.c.outputs and tokenizer_from
            else None
        )
        if padding:
            raw["pad_token_id"] = padding[0]
        (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        for name in (*TOKENIZER_FILES, "generation_config.json") if tokenizer_from else ():
            if (Path(tokenizer_from) / name).is_file():
                shutil.copyfile(Path(tokenizer_from) / name, partial / name)
        if padding:
            path = partial / "tokenizer_config.json"
            settings = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(
                json.dumps({**settings, "pad_token": padding[1]}, indent=2, ensure_ascii=False)
                + "\n"
            )
        if template and not template.plain:
            (partial / "chat_template.jinja").write_text(template.source)
            path = partial / "generation_config.json"
            generation = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(
                json.dumps({**generation, "eos_token_id": sorted(template.stop_ids)}, indent=2)
                + "\n"
            )
        for file in partial.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())

    def commit() -> None:
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    try:
        mesh.ask(begin)
        problem = next(filter(None, mesh.everyone(_write_weights(model, partial))), None)
        if problem:
            raise OSError(problem)
        mesh.ask(write_rest)
    except OSError as error:
        if mesh.main:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"could not write {folder} ({error}): free space on the disk; the old one is untouched"
        ) from None
    mesh.ask(commit)


def _weight_plan(model: GPT) -> list[tuple[int, list[str], str]]:
    """(stage, names, file) of every weight file, the same on every rank: whole weights, no more than SHARD_BYTES."""
    c, stages = model.c, model.mesh.pp
    files: list[tuple[int, list[str]]] = []
    size = 0
    for name, row in weight_table(c).items():
        if files and row.theirs in files[-1][1]:
            continue
        words = name.split(".")
        stage = 0 if words[0] == "embed" else stages - 1
        if words[0] == "blocks":
            stage = next(i for i in range(stages) if int(words[1]) < split(c.layers, stages, i)[1])
        nbytes = math.prod(row.shape) * model.dtype.itemsize
        if not files or files[-1][0] != stage or size + nbytes > SHARD_BYTES:
            files.append((stage, []))
            size = 0
        files[-1][1].append(row.theirs)
        size += nbytes
    if len(files) == 1:
        return [(0, files[0][1], "model.safetensors")]
    return [
        (s, names, f"model-{i + 1:05d}-of-{len(files):05d}.safetensors")
        for i, (s, names) in enumerate(files)
    ]


def _write_weights(model: GPT, folder: Path) -> str:
    """Writes this rank's share of the files. Returns what went wrong, "" if nothing."""
    mesh, problem = model.mesh, ""
    for i, (stage, names, file) in enumerate(_weight_plan(model)):
        # A file is gathered by the tensor ranks of one replica, and written by one of them.
        replica, writer = i % (mesh.dp * mesh.cp), i // (mesh.dp * mesh.cp) % mesh.tp
        if (stage, replica) != (mesh.pp_rank, mesh.dp_rank * mesh.cp + mesh.cp_rank):
            continue
        weights = to_theirs(model, names, keep=writer == mesh.tp_rank)
        try:
            if writer == mesh.tp_rank and not problem:
                save_file(
                    {name: weights[name] for name in names},
                    folder / file,
                    metadata={"format": "pt"},
                )
        except (OSError, SafetensorError) as error:
            problem = f"rank {mesh.rank}: {error}" if mesh.world > 1 else str(error)
    return problem


def _write_index(model: GPT, folder: Path) -> None:
    """The table of which weight is in which file, where there are several."""
    plan = _weight_plan(model)
    if len(plan) == 1:
        return
    sizes = {
        row.theirs: math.prod(row.shape) * model.dtype.itemsize
        for row in weight_table(model.c).values()
    }
    weight_map = {name: file for _, names, file in plan for name in names}
    text = json.dumps(
        {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, indent=2
    )
    (folder / "model.safetensors.index.json").write_text(text)


def _padding(tokenizer: Tokenizer, template: Template | None) -> tuple[int, str] | None:
    """(id, text) of a padding token that ends no answer, None if the vocabulary has none.

    transformers reads a score at the last token that is not padding: padding with the end token, as is common, would
    move it to the token before the end.
    """
    ends = tokenizer.stops | (template.stop_ids if template else set())
    ids = {text: i for text, i in tokenizer.special.items() if i not in ends}
    own = [text for text, i in ids.items() if i == tokenizer.pad]
    named = [text for text in ids if "pad" in text.lower()]
    rest = [text for text in ids if "unk" in text.lower() or ids[text] == tokenizer.bos]
    return next(((ids[text], text) for text in own + named + rest), None)


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass
class New:
    """Flags of `hf.py new`."""

    out: str = ""  # the folder to make
    family: Literal["llama", "mistral", "qwen2", "qwen3", "gpt_neox"] = "llama"  # architecture
    tokenizer: str = ""  # folder whose tokenizer goes along
    vocab: int = 0  # rows of the embedding; 0 = what the tokenizer needs
    width: int = 256  # of the residual stream
    layers: int = 4  # blocks
    heads: int = 4  # query heads
    kv_heads: int = 0  # key/value heads; 0 = as many as query heads
    head_size: int = 0  # 0 = width / heads
    ffn: int = 0  # MLP width; 0 = 8/3 of the width (4 for gpt_neox), rounded up to a multiple of 16
    max_position: int = 2048  # longest row the model is meant for
    sliding_window: int = 0  # mistral only: tokens a token looks back; 0 = all
    rope_theta: float = 10000.0  # base of the rotary frequencies; larger for long contexts
    tied: bool = (
        False  # one matrix for embedding and head: saves parameters where the vocabulary is large
    )
    std: float = 0.02  # of the random weights; 1/sqrt(width) is a good choice for small models
    seed: int = 0  # of the random weights
    dtype: Literal["bf16", "fp32", "fp64"] = "fp32"  # of the weights in the file


def new_model(flags: New) -> GPT:
    """A model of random weights from sizes alone; ready for save_model."""
    tokenizer = load_tokenizer(flags.tokenizer) if flags.tokenizer else None
    if not (flags.vocab or tokenizer):
        raise ValueError("hf.py new needs --vocab N or --tokenizer DIR")
    if not flags.head_size and flags.width % flags.heads:
        raise ValueError(
            f"--width {flags.width} is no multiple of --heads {flags.heads}: or give --head-size"
        )
    if flags.sliding_window and flags.family != "mistral":
        raise ValueError("--sliding-window is for --family mistral")
    if tokenizer and flags.vocab and flags.vocab < tokenizer.size:
        raise ValueError(
            f"--vocab {flags.vocab} is too small for the tokenizer: it has {tokenizer.size} ids"
        )
    neox = flags.family == "gpt_neox"
    ffn = flags.ffn or (4 * flags.width if neox else -(-flags.width * 8 // 48) * 16)
    raw = {
        "architectures": [ARCHITECTURES[flags.family]],
        "model_type": flags.family,
        "vocab_size": flags.vocab or tokenizer.size,
        "hidden_size": flags.width,
        "intermediate_size": ffn,
        "num_hidden_layers": flags.layers,
        "num_attention_heads": flags.heads,
        "max_position_embeddings": flags.max_position,
        "tie_word_embeddings": flags.tied,
        "hidden_act": "gelu" if neox else "silu",
        "bos_token_id": tokenizer.bos if tokenizer else None,
        "eos_token_id": tokenizer.eos if tokenizer else None,
    }
    if neox:
        raw |= {"rotary_pct": 0.25, "rotary_emb_base": flags.rope_theta, "layer_norm_eps": 1e-5}
        if flags.kv_heads or flags.head_size:
            raise ValueError("--kv-heads and --head-size are not for gpt_neox: it has neither")
    else:
        raw |= {
            "num_key_value_heads": flags.kv_heads or flags.heads,
            "rope_theta": flags.rope_theta,
        }
        raw |= {"rms_norm_eps": 1e-6, "head_dim": flags.head_size or flags.width // flags.heads}
    if flags.family == "mistral":
        raw["sliding_window"] = flags.sliding_window or None
    model = GPT(_take(raw, flags.family)).to(DTYPES[flags.dtype])
    model.init_weights(flags.seed, flags.std)
    model.hf_config = raw
    return model


def describe(folder: str) -> str:
    """What a folder holds, in a few lines; raises what loading it would raise."""
    names = score_names(read_config(folder)[1])
    model = load_model(folder, torch.float32, scores=() if names else None)
    c = model.c
    kept = {str(path.name) for path in weight_files(folder).values()}
    tokenizer = load_tokenizer(folder)
    if tokenizer.size > c.vocab:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.size} ids, the embedding only {c.vocab}: not a pair"
        )
    head = f"scores {', '.join(names)}" if names else f"{'tied' if c.tied else 'own'} head"
    return "\n".join([
        f"{folder}: {c.family}, {c.parameters / 1e6:,.1f}M parameters in {len(kept)} file(s)",
        f"  {c.layers} layers, width {c.width}, {c.heads} heads of {c.head_size} ({c.kv_heads} key/value), MLP {c.ffn}",
        f"  vocabulary {c.vocab}, {head}, made for {c.max_position} positions"
        + (f", sliding window {max(c.windows)}" if c.windows else ""),
        f"  tokenizer of {tokenizer.size} ids, bos {tokenizer.bos_token!r}, eos {tokenizer.eos_token!r}, "
        + ("with a chat template" if tokenizer.chat_template else "no chat template (--template auto is plain)"),
    ])  # fmt: skip


def main(argv: list[str]) -> None:
    try:
        if argv[:1] == ["new"]:
            flags = parse(New, __doc__, argv[1:])
            if not flags.out:
                raise ValueError("hf.py new needs --out DIR")
            save_model(new_model(flags), flags.out, flags.tokenizer or None)
            argv = ["check", flags.out] if flags.tokenizer else []
        if argv[:1] == ["check"] and len(argv) == 2:
            print(describe(argv[1]))
        elif argv:
            print(__doc__)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:] or ["--help"])
