"""config.json of a Hugging Face folder, read into a GPTConfig.

Every key must be known. A key that changes the arithmetic is either computed exactly or refused by
name, because a model that is computed wrongly would train without a complaint; so are two keys that
say different things. A key of another family, which this family's own code in transformers never
reads (READ_BY), may only say what is done anyway. Keys that change nothing (IDLE_KEYS) and nulls
are ignored. Optional keys have transformers' defaults.

    {"model_type": "llama", "hidden_size": 64, ...}   -> GPTConfig(family="llama", width=64, ...)
    {..., "logit_scale": 2.0}                          -> ValueError: unknown option logit_scale
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from architecture import GPTConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}  # a reward model has ForSequenceClassification instead

# ---- the keys that are known ---------------------------------------------------------------------

# Keys that do not change the arithmetic, or that other keys switch on.
IDLE_KEYS = set(
    "_name_or_path architectures model_type torch_dtype dtype transformers_version use_cache "
    "bos_token_id eos_token_id pad_token_id initializer_range max_position_embeddings id2label "
    "label2id problem_type return_dict output_attentions output_hidden_states "
    "chunk_size_feed_forward classifier_dropout is_encoder_decoder is_decoder max_window_layers "
    "_attn_implementation_autoset attn_implementation "
    # of published folders: SmolLM2, unsloth, Vicuna, Dolly, Falcon3, and DeepSeek's dense models
    "is_llama_config transformers.js_config unsloth_fixed unsloth_version max_sequence_length "
    "custom_pipelines activation gradient_checkpointing aux_loss_alpha seq_aux moe_layer_freq "
    "first_k_dense_replace norm_topk_prob scoring_func ep_size".split()
)
# Keys that change the arithmetic unless they have one of these values.
SUPPORTED_VALUES = {
    "attention_dropout": (0, 0.0, None),
    "hidden_dropout": (0, 0.0, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "use_mrope": (False, None),
    "rope_interleaved": (False, None),
    "attention_probs_dropout_prob": (0, 0.0, None),
    "hidden_dropout_prob": (0, 0.0, None),
}
QWEN, MODERN = ("qwen2", "qwen3"), ("llama", "mistral", "qwen2", "qwen3")
# Optional keys that change the arithmetic -> the families whose own code reads them.
READ_BY = {
    "num_key_value_heads": MODERN,
    "head_dim": MODERN,
    "rms_norm_eps": MODERN,
    "layer_norm_eps": ("gpt_neox",),
    "attention_bias": ("llama", "qwen3", "gpt_neox"),
    "mlp_bias": ("llama",),
    "sliding_window": ("mistral", *QWEN),
    "use_sliding_window": QWEN,
    "layer_types": QWEN,
    "rotary_pct": ("gpt_neox",),
    "rotary_emb_base": ("gpt_neox",),
    "partial_rotary_factor": ("gpt_neox",),
    "use_parallel_residual": ("gpt_neox",),
}
# Types of values. null is allowed for all of them and means the same as a missing key.
WHOLE_NUMBERS = set(
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "intermediate_size vocab_size max_position_embeddings sliding_window max_window_layers "
    "num_labels original_max_position_embeddings".split()
)
NUMBERS = set(
    "rope_theta rotary_emb_base rotary_pct partial_rotary_factor layer_norm_eps rms_norm_eps "
    "factor low_freq_factor high_freq_factor".split()
)
SWITCHES = set(
    "use_parallel_residual attention_bias mlp_bias use_sliding_window tie_word_embeddings".split()
)
# Upper bounds of whole numbers, 2**24 for the others: a damaged file must not eat all memory.
LARGEST = {"num_hidden_layers": 1000, "num_labels": 10_000}


def _check_types(raw: dict) -> None:
    """Raise ValueError for the first value whose type or range does not fit its key."""
    for key, value in raw.items():
        if value is None:
            continue
        if key in WHOLE_NUMBERS:
            largest = LARGEST.get(key, 1 << 24)
            in_range = type(value) is int and value <= largest
            if not in_range or (value < 1 and key != "sliding_window"):
                raise ValueError(
                    f"config.json: {key} = {value!r} is no whole number from 1 to {largest}"
                )
        if key in NUMBERS and not (type(value) in (int, float) and 0 < value < 1e18):
            raise ValueError(f"config.json: {key} = {value!r} is no number above 0")
        if key in SWITCHES and type(value) is not bool:
            raise ValueError(f"config.json: {key} = {value!r} is neither true nor false")
        if key in ("rope_parameters", "rope_scaling"):
            _check_types(dict(value))


class _Options:
    """The keys of a config.json that have not been read yet."""

    def __init__(self, raw: dict):
        self.left = dict(raw)

    def require(self, key: str) -> Any:
        """Take the value of a key. ValueError: it is missing or null."""
        if self.left.get(key) is None:
            raise ValueError(f"config.json has no {key}")
        return self.left.pop(key)

    def take(self, key: str, default: Any = None) -> Any:
        """Take the value of a key, or the default if the key is missing. null stays None."""
        return self.left.pop(key, default)

    def peek(self, key: str, default: Any) -> Any:
        """Return the value of a key that is one of IDLE_KEYS, and leave it there."""
        return self.left.get(key, default)


def _translate(key: str, value: Any, known: dict) -> Any:
    """Return the entry of `known` for a value. ValueError: there is none."""
    if value not in known:
        raise ValueError(
            f"config.json: plumb does not know {key} = {value!r}: only {', '.join(known)}"
        )
    return known[value]


# ---- config.json -> GPTConfig, one concern at a time ---------------------------------------------


def model_config(raw: dict, family: str) -> GPTConfig:
    """Build the GPTConfig of a config.json that is read already.

    ValueError names the key that is missing, of the wrong type or not supported.
    """
    _check_types(raw)
    options = _Options(raw)
    _drop_unread(options, family)
    sizes = _sizes(options, family)
    rope = _rope(options, family)
    fields = {
        **sizes,
        **_norm_and_mlp(options, family),
        **_biases(options, family),
        "rope_theta": rope.theta,
        "rope_size": int(sizes["head_size"] * rope.share),
        "rope_scaling": rope.scaling,
        "windows": _windows(options, family, sizes["layers"]),
        "tied": options.take("tie_word_embeddings", False),
        "max_position": options.peek("max_position_embeddings", 2048),
        "outputs": len(score_names(raw)),
    }
    _check_rest(options, raw, family)
    if rope.share > 1 or fields["rope_size"] % 2:
        raise ValueError(
            f"config.json: {fields['rope_size']} rotated components a head must be an even number, "
            f"at most the head's size of {sizes['head_size']}"
        )
    if sizes["heads"] % sizes["kv_heads"]:
        raise ValueError(
            f"config.json: {sizes['heads']} attention heads are no multiple of "
            f"{sizes['kv_heads']} key/value heads"
        )
    return GPTConfig(family=family, **fields)


def _drop_unread(options: _Options, family: str) -> None:
    """Drop keys that this family's own code never reads. ValueError: one of them asks for more."""
    left = options.left
    heads, width = left.get("num_attention_heads"), left.get("hidden_size")
    switched_off = left.get("use_sliding_window") is False
    harmless = {  # values that say what is done anyway
        "num_key_value_heads": lambda value: value == heads,
        "head_dim": lambda value: bool(heads and width) and value * heads == width,
        "sliding_window": lambda value: value == 0 or switched_off,
        "use_sliding_window": lambda value: not value or not left.get("sliding_window"),
        "layer_types": lambda value: set(value) == {"full_attention"},
        "rotary_pct": lambda value: value == 1,
        "partial_rotary_factor": lambda value: value == 1,
        "use_parallel_residual": lambda value: value is False,
        "attention_bias": lambda value: value is False,
        "mlp_bias": lambda value: value is False,
    }
    for key, families in READ_BY.items():
        value = left.get(key)
        if family in families or key not in left:
            continue
        if value is not None and not (key in harmless and harmless[key](value)):
            raise ValueError(
                f"config.json: {key} = {value!r} is not read by the code of {family} models, and "
                "would change the arithmetic: remove it if the model was trained without it"
            )
    for key, families in READ_BY.items():
        if family not in families:
            left.pop(key, None)


def _agreed(values: dict[str, Any]) -> Any:
    """Return the one value that some keys give, None if all are null. ValueError: they differ."""
    given = {key: value for key, value in values.items() if value is not None}
    if len(set(given.values())) > 1:
        words = " and ".join(f"{key} = {value!r}" for key, value in given.items())
        raise ValueError(f"config.json: {words} say different things: remove the wrong one")
    return next(iter(given.values()), None)


def _sizes(options: _Options, family: str) -> dict[str, int]:
    """Read widths and counts."""
    width = options.require("hidden_size")
    layers = options.require("num_hidden_layers")
    heads = options.require("num_attention_heads")
    kv_heads = options.take("num_key_value_heads", 8 if family == "mistral" else None)
    head_size = options.take("head_dim", 128 if family == "qwen3" else None)
    return {
        "vocab": options.require("vocab_size"),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads or heads,
        "head_size": head_size or width // heads,
        "ffn": options.require("intermediate_size"),
    }


class _Rope(NamedTuple):
    """Options of the rotary positions."""

    theta: float
    scaling: tuple | None  # llama3: factor, low and high frequency factor, original length
    share: float  # part of every head that is rotated


LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def _rope(options: _Options, family: str) -> _Rope:
    """Read the rotary options: rope_parameters of transformers 5, or the older separate keys."""
    new = dict(options.take("rope_parameters") or {})
    old = dict(options.take("rope_scaling") or {})
    for name in old.keys() & new.keys():
        _agreed({f"rope_scaling.{name}": old[name], f"rope_parameters.{name}": new[name]})
    rope = old | new
    theta = _agreed(
        {
            "rope_parameters.rope_theta": rope.pop("rope_theta", None),
            "rope_theta": options.take("rope_theta"),
            "rotary_emb_base": options.take("rotary_emb_base"),
        }
    )
    share = _agreed(
        {
            "rope_parameters.partial_rotary_factor": rope.pop("partial_rotary_factor", None),
            "partial_rotary_factor": options.take("partial_rotary_factor"),
            "rotary_pct": options.take("rotary_pct"),
        }
    )
    if family != "gpt_neox" and share not in (None, 1):
        raise ValueError(
            f"config.json: partial_rotary_factor = {share} is not read by the code of {family} "
            "models: remove it if the model was trained without it"
        )
    share = share or (0.25 if family == "gpt_neox" else 1.0)
    theta = theta or 10000.0
    kind = _agreed({"rope_type": rope.pop("rope_type", None), "type": rope.pop("type", None)})
    kind = kind or "default"
    keys = _translate("rope_type", kind, {"default": (), "llama3": LLAMA3})
    if missing := [key for key in keys if key not in rope]:
        raise ValueError(f"config.json: rope_type {kind} needs {missing[0]}")
    if unknown := sorted(set(rope) - set(keys)):
        raise ValueError(f"config.json: plumb does not know {unknown[0]} for rope_type {kind}")
    return _Rope(float(theta), tuple(rope[key] for key in keys) or None, share)


def _norm_and_mlp(options: _Options, family: str) -> dict[str, Any]:
    """Read the kinds of norm and MLP, and how a block adds them up."""
    if family == "gpt_neox":
        tanh = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # one formula under three names
        gelus = {"gelu": "gelu", **dict.fromkeys(tanh, "gelu_tanh")}
        return {
            "norm": "layer",
            "norm_eps": options.take("layer_norm_eps", 1e-5),
            "mlp": _translate("hidden_act", options.take("hidden_act", "gelu"), gelus),
            "parallel_residual": options.take("use_parallel_residual", True),
        }
    return {
        "norm_eps": options.take("rms_norm_eps", 1e-6),
        "mlp": _translate(
            "hidden_act", options.take("hidden_act", "silu"), {"silu": "swiglu", "swish": "swiglu"}
        ),
        "qk_norm": family == "qwen3",
    }


def _biases(options: _Options, family: str) -> dict[str, bool]:
    """Read which linears have a bias."""
    if family == "gpt_neox":
        attention = options.take("attention_bias", True)
        return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": True}
    if family == "llama":
        attention = options.take("attention_bias", False)
        mlp = options.take("mlp_bias", False)
        return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": mlp}
    if family == "qwen3":
        attention = options.take("attention_bias", False)
        return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": False}
    return {"qkv_bias": family == "qwen2", "out_bias": False, "mlp_bias": False}


def _windows(options: _Options, family: str, layers: int) -> tuple[int, ...]:
    """Read the sliding window of every layer, 0 = none; () if no layer may have one."""
    window = options.take("sliding_window", 4096 if family == "mistral" else None) or 0
    first = 0  # first layer with a window, where layer_types does not say
    if family in ("qwen2", "qwen3"):
        if not options.take("use_sliding_window", False):
            window = 0
        first = options.peek("max_window_layers", 28)
    full = min(first, layers) if window else layers
    types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    types = options.take("layer_types", types) or types
    if len(types) != layers:
        raise ValueError(
            f"config.json: layer_types names {len(types)} layers, num_hidden_layers is {layers}"
        )
    if "sliding_attention" in types and not window:
        raise ValueError("config.json: layer_types names sliding layers, sliding_window is null")
    of_type = {"sliding_attention": window, "full_attention": 0}
    windows = tuple(_translate("layer_types", kind, of_type) for kind in types)
    return windows if window else ()


def _check_rest(options: _Options, raw: dict, family: str) -> None:
    """Raise ValueError for the first unread key that may change the arithmetic."""
    for key, values in SUPPORTED_VALUES.items():
        if options.take(key, values[0]) not in values:
            raise ValueError(
                f"config.json: {key} = {raw[key]!r} is not supported: only {values[0]!r}"
            )
    said = {key for key, value in options.left.items() if value is not None}
    if unknown := sorted(said - IDLE_KEYS):
        raise ValueError(
            f"config.json: plumb does not know the option {unknown[0]} = {raw[unknown[0]]!r} of "
            f"this {family} model; if it does not change the arithmetic, remove it from the file"
        )


# ---- the file ------------------------------------------------------------------------------------


def read_config(folder: str | Path) -> tuple[GPTConfig, dict]:
    """Return the config.json of a folder, as a GPTConfig and raw.

    FileNotFoundError: there is none. ValueError names what plumb does not know.
    """
    path = Path(folder) / "config.json"
    if (Path(folder) / "adapter_config.json").is_file() and not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds only an adapter: give its base as --model and this folder as "
            "--adapter, or merge the two: hf.py merge BASE ADAPTER --out DIR"
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: --model takes a Hugging Face folder (hf.py new makes one)"
        )
    raw = read_json(path)
    try:
        return model_config(raw, _family(raw)), raw
    except ValueError as error:
        raise ValueError(f"{folder}/{error}") from None
    except (TypeError, AttributeError) as error:  # such as a list for a word
        raise ValueError(
            f"{path} holds a value of the wrong kind ({error}): fetch it again"
        ) from None


def read_json(path: Path) -> dict:
    """Return the JSON object in a file. ValueError: the file holds none."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold one JSON object")
    return value


def _family(raw: dict) -> str:
    """Return the model_type. ValueError: plumb does not know it, or not the class of model."""
    family = raw.get("model_type")
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"config.json: plumb does not know model_type {family!r}: only {known}")
    classes = (ARCHITECTURES[family], _classifier(family))
    for architecture in raw.get("architectures") or []:
        if architecture not in classes:
            raise ValueError(
                f"config.json: plumb does not know {architecture}, only {' and '.join(classes)}"
            )
    return family


# ---- reward models -------------------------------------------------------------------------------


def _classifier(family: str) -> str:
    """Return the architecture of a reward model, as transformers names it."""
    return ARCHITECTURES[family].replace("CausalLM", "SequenceClassification")


def score_names(raw: dict) -> tuple[str, ...]:
    """Return the names of a reward model's outputs; () for a language model.

    raw: its config.json.
    """
    if (raw.get("architectures") or [""])[0] != _classifier(raw["model_type"]):
        return ()
    unnamed = {i: f"LABEL_{i}" for i in range(raw.get("num_labels", 2))}  # as in transformers
    labels = raw.get("id2label") or unnamed
    if raw.get("num_labels") is not None and raw["num_labels"] != len(labels):
        raise ValueError(
            f"config.json: num_labels = {raw['num_labels']} and id2label of {len(labels)} say "
            "different things: remove the wrong one"
        )
    return tuple(name for _, name in sorted((int(i), name) for i, name in labels.items()))


def with_scores(raw: dict, names: tuple[str, ...]) -> dict:
    """Turn the config.json of a language model into that of a reward model with named outputs."""
    return {
        **raw,
        "architectures": [_classifier(raw["model_type"])],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "regression",
    }
