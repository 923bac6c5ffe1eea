import json
from pathlib import Path
from typing import Any

from architecture import GPTConfig

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
}  # a reward model's says ForSequenceClassification instead


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


def model_config(raw: dict, family: str) -> GPTConfig:
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
    raw = read_json(path)
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
        return model_config(raw, family), raw
    except ValueError as error:
        raise ValueError(f"{folder}/{error}") from None
    except (
        TypeError,
        AttributeError,
    ) as error:  # a list where a word should be, a word where an object should be
        raise ValueError(
            f"{path} holds a value of the wrong kind ({error}): fetch it again"
        ) from None


def read_json(path: Path) -> dict:
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


def with_scores(raw: dict, names: tuple[str, ...]) -> dict:
    """config.json of a reward model with named outputs, made from a language model's."""
    return {
        **raw,
        "architectures": [_classifier(raw["model_type"])],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "regression",
    }
