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
import math
from pathlib import Path
from typing import Any

from architecture import GPTConfig
from weights import families
from weights.options import Options, agreed, translate
from weights.ropes import read_rope

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "granite": "GraniteForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "gpt_neox": "GPTNeoXForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}  # a reward model has ForSequenceClassification instead

IMAGE_TYPES = ("gemma3", "mistral3")  # models around a text model: weights/text_model.py

# ---- the keys that are known ---------------------------------------------------------------------

# Keys that do not change the arithmetic, or that other keys switch on.
IDLE_KEYS = set(
    "_name_or_path architectures model_type torch_dtype dtype transformers_version use_cache "
    "bos_token_id eos_token_id pad_token_id initializer_range max_position_embeddings id2label "
    "label2id unk_token_id problem_type return_dict output_attentions output_hidden_states "
    "chunk_size_feed_forward classifier_dropout is_encoder_decoder is_decoder max_window_layers "
    "_attn_implementation_autoset _attn_implementation attn_implementation "
    # of published folders: SmolLM2, unsloth, Vicuna, Dolly, Falcon3, and DeepSeek's dense models
    "is_llama_config transformers.js_config unsloth_fixed unsloth_version max_sequence_length "
    "custom_pipelines activation gradient_checkpointing aux_loss_alpha seq_aux moe_layer_freq "
    "first_k_dense_replace norm_topk_prob scoring_func ep_size "
    "reward_standard".split()  # of score.py --standardize
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
# Types of values. null is allowed for all of them and means the same as a missing key.
WHOLE_NUMBERS = set(
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "intermediate_size vocab_size max_position_embeddings sliding_window max_window_layers "
    "num_labels original_max_position_embeddings no_rope_layer_interval "
    "num_experts num_local_experts num_experts_per_tok moe_intermediate_size decoder_sparse_step "
    "shared_expert_intermediate_size n_routed_experts n_shared_experts n_group topk_group "
    "sliding_window_pattern _sliding_window_pattern sliding_window_size".split()
)
NUMBERS = set(
    "query_pre_attn_scalar rope_local_base_freq norm_eps embedding_multiplier "
    "residual_multiplier attention_multiplier logits_scaling "
    "rope_theta rotary_emb_base rotary_pct partial_rotary_factor layer_norm_eps rms_norm_eps "
    "factor low_freq_factor high_freq_factor attention_factor beta_fast beta_slow mscale "
    "mscale_all_dim llama_4_scaling_beta routed_scaling_factor attn_logit_softcapping "
    "final_logit_softcapping".split()
)
SWITCHES = set(
    "use_parallel_residual attention_bias mlp_bias use_sliding_window tie_word_embeddings "
    "truncate use_qkv_bias qk_layernorm use_qk_norm norm_topk_prob".split()
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
        if key in ("rope_parameters", "rope_scaling", "full_attention", "sliding_attention"):
            _check_types(dict(value))


# ---- config.json -> GPTConfig, one concern at a time ---------------------------------------------


def model_config(raw: dict, family: str) -> GPTConfig:
    """Build the GPTConfig of a config.json that is read already.

    ValueError names the key that is missing, of the wrong type or not supported.
    """
    _check_types(raw)
    options = Options(raw)
    _drop_unread(options, family)
    sizes = _sizes(options, family)
    rope = read_rope(options, family, raw)
    reader = families.READERS.get(family)
    own = reader(options.take, sizes) if reader else {}
    fields = {
        **sizes,
        **_norm_and_mlp(options, family),
        **_biases(options, family),
        "rope_theta": rope.theta,
        "rope_size": int(sizes["head_size"] * rope.share),
        "rope_scaling": rope.scaling,
        "local_theta": rope.local_theta,
        "longest": rope.longest,
        "query_growth": rope.query_growth,
        "windows": _windows(options, family, sizes["layers"], own.get("unrotated", ())),
        "tied": options.take("tie_word_embeddings", family in families.TIED),
        "max_position": options.peek("max_position_embeddings", 2048),
        "outputs": len(score_names(raw)),
        **own,
    }
    _check_rest(options, raw, family)
    factors = getattr(rope.scaling, "factors", None)
    if factors and len(factors) != fields["rope_size"] // 2:
        raise ValueError(
            f"config.json: {len(factors)} values in short_factor, the heads have "
            f"{fields['rope_size'] // 2} rotated pairs"
        )
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


def _drop_unread(options: Options, family: str) -> None:
    """Drop keys that this family's own code never reads. ValueError: one of them asks for more."""
    left = options.left
    heads, width = left.get("num_attention_heads"), left.get("hidden_size")
    switched_off = left.get("use_sliding_window") is False
    eps = left.get(families.EPS_KEY.get(family, "rms_norm_eps")) or families.EPS.get(family, 1e-6)
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
        **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps"), lambda value: value == eps),
    }
    for key, readers in families.READ_BY.items():
        value = left.get(key)
        if family in readers or key not in left:
            continue
        if value is not None and not (key in harmless and harmless[key](value)):
            raise ValueError(
                f"config.json: {key} = {value!r} is not read by the code of {family} models, and "
                "would change the arithmetic: remove it if the model was trained without it"
            )
    for key, readers in families.READ_BY.items():
        if family not in readers:
            left.pop(key, None)


def _sizes(options: Options, family: str) -> dict[str, int]:
    """Read widths and counts."""
    width = options.require("hidden_size")
    layers = options.require("num_hidden_layers")
    heads = options.require("num_attention_heads")
    kv_heads = options.take("num_key_value_heads", families.KV_HEADS.get(family))
    head_size = options.take("head_dim", families.HEAD_SIZE.get(family))
    return {
        "vocab": options.require("vocab_size"),
        "width": width,
        "layers": layers,
        "heads": heads,
        "kv_heads": kv_heads or heads,
        "head_size": head_size or width // heads,
        "ffn": options.require("intermediate_size"),
    }


def _norm_and_mlp(options: Options, family: str) -> dict[str, Any]:
    """Read the kinds of norm and MLP, and how a block adds them up."""
    if family == "gpt_neox":
        tanh = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh")  # one formula under three names
        gelus = {"gelu": "gelu", **dict.fromkeys(tanh, "gelu_tanh")}
        return {
            "norm": "layer",
            "norm_eps": options.take("layer_norm_eps", 1e-5),
            "mlp": translate("hidden_act", options.take("hidden_act", "gelu"), gelus),
            "parallel_residual": options.take("use_parallel_residual", True),
        }
    if family == "nemotron":
        return {
            "norm": "layer1p",
            "norm_eps": options.take("norm_eps", 1e-5),
            "mlp": translate("hidden_act", options.take("hidden_act", "relu2"), {"relu2": "relu2"}),
        }
    norm, eps = ("layer", "layer_norm_eps") if family == "stablelm" else ("rms", "rms_norm_eps")
    activations = {"silu": "swiglu", "swish": "swiglu"}
    return {
        "norm": norm,
        "norm_eps": options.take(eps, families.EPS.get(family, 1e-6)),
        "mlp": translate("hidden_act", options.take("hidden_act", "silu"), activations),
        "qk_norm": "head" if family in ("qwen3", "qwen3_moe") else "",
    }


def _biases(options: Options, family: str) -> dict[str, bool]:
    """Read which linears have a bias."""
    if family == "gpt_neox":
        attention = options.take("attention_bias", True)
        return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": True}
    attention = options.take("attention_bias", False) or False
    mlp = options.take("mlp_bias", False) or False
    return {
        "qkv_bias": attention or family == "qwen2",
        "out_bias": attention and family != "glm4_moe",
        "mlp_bias": mlp,
    }


def _windows(
    options: Options, family: str, layers: int, unrotated: tuple[int, ...]
) -> tuple[int, ...]:
    """Read the sliding window of every layer, 0 = none; () if no layer may have one."""
    window = options.take("sliding_window", families.WINDOW.get(family)) or 0
    if family == "gemma2":  # its code reads the first of two names
        agreed(
            {"sliding_window": window, "sliding_window_size": options.take("sliding_window_size")}
        )
    first = 0  # first layer with a window, where layer_types does not say
    if family in ("qwen2", "qwen3", "qwen2_moe", "smollm3"):
        if not options.take("use_sliding_window", False):
            window = 0
        first = options.peek("max_window_layers", 28)
    full = min(first, layers) if window else layers
    types = ["full_attention"] * full + ["sliding_attention"] * (layers - full)
    if family == "gemma3_text":
        patterns = [options.take(f"{mark}sliding_window_pattern") for mark in ("", "_")]
        every = next(filter(None, patterns), 6)
        types = ["sliding_attention"] * layers
        types[every - 1 :: every] = ["full_attention"] * (layers // every)
    if family == "gemma2":
        types = ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]
    if family == "olmo3":
        types = ["full_attention" if i % 4 == 3 else "sliding_attention" for i in range(layers)]
    if family == "smollm3" and window:
        types = ["sliding_attention" if i in unrotated else "full_attention" for i in range(layers)]
    types = options.take("layer_types", types) or types
    if len(types) != layers:
        raise ValueError(
            f"config.json: layer_types names {len(types)} layers, num_hidden_layers is {layers}"
        )
    if "sliding_attention" in types and not window:
        raise ValueError("config.json: layer_types names sliding layers, sliding_window is null")
    of_type = {"sliding_attention": window, "full_attention": 0}
    windows = tuple(translate("layer_types", kind, of_type) for kind in types)
    return windows if window else ()


def _check_rest(options: Options, raw: dict, family: str) -> None:
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
    if family in IMAGE_TYPES:
        raise ValueError(
            f"config.json: a {family} model reads images: hf.py text DIR --out NEW takes its text "
            "model out"
        )
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
    name = {"gemma3_text": "Gemma3TextForCausalLM"}.get(family, ARCHITECTURES[family])
    return name.replace("CausalLM", "SequenceClassification")


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


def reward_standard(raw: dict) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation by which a reward model's outputs are standardised.

    raw: its config.json, where score.py --standardize leaves them; 0 and 1 otherwise. ValueError:
    they do not fit its outputs.
    """
    n = len(score_names(raw))
    stored = raw.get("reward_standard") or {"mean": [0.0] * n, "std": [1.0] * n}
    columns = [stored.get(key) if isinstance(stored, dict) else None for key in ("mean", "std")]
    good = all(
        isinstance(column, list)
        and len(column) == n
        and all(type(x) in (int, float) and math.isfinite(x) for x in column)
        for column in columns
    )
    if not good or min(columns[1], default=1) <= 0:
        raise ValueError(
            f"config.json: reward_standard must have a mean and a std above 0 for each of {n} "
            "outputs: run score.py --standardize again, or remove it"
        )
    return columns[0], columns[1]


def with_scores(raw: dict, names: tuple[str, ...]) -> dict:
    """Turn the config.json of a language model into that of a reward model with named outputs."""
    return {
        **raw,
        "architectures": [_classifier(raw["model_type"])],
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
        "problem_type": "regression",
    }
