"""Keys of config.json that only some families have, read one family at a time.

A reader takes its family's own keys and returns fields of GPTConfig; `fields` are those read so
far. Keys that it leaves behind are refused by name. Defaults are those of transformers.
"""

from collections.abc import Callable
from typing import Any

from weights.options import agreed

Take = Callable[..., Any]  # take(key, default=None): the value of a key, which counts as read
Fields = dict[str, Any]

GEMMA = ("gemma", "gemma2", "gemma3_text")
# Families whose output head is the embedding where config.json does not say.
TIED = ("smollm3", *GEMMA)
# Base of the rotary frequencies where config.json does not say; 10000 for the others.
THETA = {"mixtral": 1e6, "smollm3": 2e6, "olmo3": 5e5, "gemma3_text": 1e6}
# What holds where config.json does not say. Epsilon of the norms; 1e-6 for the others.
SMALL_EPS = (
    *("olmo2", "olmo3", "nemotron", "stablelm", "phi3", "ministral3", "gpt_neox"),
    *("mixtral", "olmoe", "glm4_moe"),
)
EPS = dict.fromkeys(SMALL_EPS, 1e-5)
# Key of that epsilon; rms_norm_eps for the others.
EPS_KEY = {"gpt_neox": "layer_norm_eps", "stablelm": "layer_norm_eps", "nemotron": "norm_eps"}
# Key/value heads; as many as query heads for the others.
KV_HEADS = {
    **{"mistral": 8, "smollm3": 4, "gemma2": 4, "gemma3_text": 4, "ministral3": 8},
    **{"gemma": 16, "mixtral": 8, "qwen2_moe": 16, "qwen3_moe": 4, "glm4_moe": 8},
}
# Size of a head; width / heads for the others.
HEAD_SIZE = {"qwen3": 128, **dict.fromkeys(GEMMA, 256), "ministral3": 128}
# Sliding window; none for the others.
WINDOW = dict.fromkeys(("mistral", "olmo3", "gemma2", "gemma3_text"), 4096)
# Families whose heads are rotated in part -> the share where config.json does not say.
SHARE = {"gpt_neox": 0.25, "nemotron": 0.5, "stablelm": 0.25, "phi3": 1.0, "glm4_moe": 0.5}
# Families whose layers with a window have rotary positions of their own -> their default base.
LOCAL_ROPE = {"olmo3": 5e5, "gemma3_text": 1e4}
QWEN, OLMO = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), ("olmo2", "olmo3")
DENSE = ("llama", "mistral", "smollm3", *OLMO, "granite", "phi3", *GEMMA, "ministral3")
RMS = (*DENSE, *QWEN, "mixtral", "olmoe", "glm4_moe")
# Optional keys that change the arithmetic -> the families whose own code reads them.
READ_BY = {
    "num_key_value_heads": (*RMS, "nemotron", "stablelm"),
    "head_dim": (*RMS, "nemotron"),
    "rms_norm_eps": RMS,
    "layer_norm_eps": ("gpt_neox", "stablelm"),
    "norm_eps": ("nemotron",),
    "attention_bias": (
        "llama",
        "qwen3",
        "qwen3_moe",
        "olmoe",
        "smollm3",
        "gpt_neox",
        *OLMO,
        "nemotron",
        "granite",
        "glm4_moe",
        *GEMMA,
    ),
    "mlp_bias": ("llama", "smollm3", "nemotron", "granite"),
    "sliding_window": (
        *("mistral", "mixtral", "smollm3", "olmo3", "phi3", "gemma2", "gemma3_text", "ministral3"),
        *QWEN,
    ),
    "use_sliding_window": ("smollm3", *QWEN),
    "layer_types": ("smollm3", "olmo3", "gemma2", "gemma3_text", "qwen2", "qwen3", "qwen2_moe"),
    "rotary_pct": ("gpt_neox",),
    "rotary_emb_base": ("gpt_neox",),
    "partial_rotary_factor": tuple(SHARE),
    "use_parallel_residual": ("gpt_neox", "stablelm"),
}


# Keys of a new folder of a family besides the usual ones.
NEW: dict[str, Fields] = {
    "gpt_neox": {"hidden_act": "gelu", "rotary_pct": 0.25},
    "nemotron": {"hidden_act": "relu2"},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        }
    },
    "gemma": {"hidden_act": "gelu_pytorch_tanh"},
    "gemma2": {"hidden_activation": "gelu_pytorch_tanh"},
    "gemma3_text": {"hidden_activation": "gelu_pytorch_tanh"},
    "glm4_moe": {
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "routed_scaling_factor": 2.5,
    },
    "granite": {
        "attention_multiplier": 0.125,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "logits_scaling": 8.0,
    },
}


# Families of mixtures of experts.
SPARSE = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe")


def expert_keys(family: str, experts: int, active: int, ffn: int) -> Fields:
    """Return the keys of a new folder of a family of SPARSE."""
    keys = {"num_experts_per_tok": active}
    if family == "mixtral":
        return {**keys, "num_local_experts": experts, "intermediate_size": ffn}
    if family == "glm4_moe":  # sizes are small, so the first layer is sparse as well
        keys |= {"n_routed_experts": experts, "n_shared_experts": 1, "first_k_dense_replace": 0}
        return {**keys, "moe_intermediate_size": ffn, "num_nextn_predict_layers": 0}
    keys |= {"num_experts": experts, "norm_topk_prob": family == "qwen3_moe"}
    if family == "olmoe":
        return {**keys, "intermediate_size": ffn}
    shared = {"shared_expert_intermediate_size": ffn} if family == "qwen2_moe" else {}
    return {**keys, "moe_intermediate_size": ffn, **shared}


def reads(family: str, key: str) -> bool:
    """Return whether a family's own code reads a key."""
    return family in READ_BY.get(key, (family,))


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
    return {"norms": "after", "qk_norm": "whole"}


def granite(take: Take, fields: Fields) -> Fields:
    """Read the multipliers of Granite 3 (as those of μP, arXiv 2203.03466)."""
    take("attention_dropout")  # 0.1 in some folders: an option of training, and plumb has none
    return {
        "embedding_scale": take("embedding_multiplier") or 1.0,
        "residual_scale": take("residual_multiplier") or 1.0,
        "attention_scale": take("attention_multiplier") or 1.0,
        "logit_scale": 1.0 / (take("logits_scaling") or 1.0),
    }


def stablelm(take: Take, fields: Fields) -> Fields:
    """Read the biases of StableLM 2. ValueError: the norms or the order of blocks of the 12B."""
    for key in ("qk_layernorm", "use_parallel_residual"):
        if take(key):
            raise ValueError(f"config.json: {key} = true is not supported for stablelm models")
    if take("rotary_scaling_factor", 1.0) not in (1, None):
        raise ValueError("config.json: rotary_scaling_factor is supported at 1 only")
    return {"qkv_bias": take("use_qkv_bias") or False}


def phi3(take: Take, fields: Fields) -> Fields:
    """Take keys of Phi-3 and Phi-4 that change nothing. ValueError: one that does."""
    expected = {"embd_pdrop": 0, "resid_pdrop": 0, "full_attn_mod": 1, "lm_head_bias": False}
    expected |= {"mlp_bias": False, "interpolate_factor": 1, "attention_bias": False}
    for key, value in expected.items():
        if (have := take(key, value)) not in (value, None):
            raise ValueError(f"config.json: {key} = {have!r} is not supported, only {value!r}")
    take("auto_map")  # code of its own, from before transformers knew the family
    return {}


# The key of its activation that a Gemma's code reads, and the values: the first means tanh by gelu.
GEMMA_ACT = ("hidden_act", ("gelu_pytorch_tanh", "gelu"))
GEMMA2_ACT = ("hidden_activation", ("gelu_pytorch_tanh",))


def gemma(take: Take, fields: Fields, read: tuple[str, tuple[str, ...]] = GEMMA_ACT) -> Fields:
    """Read Gemma 1 (arXiv 2403.08295): 1 + w in its norms, GeGLU, embeddings multiplied by √D."""
    if take("use_bidirectional_attention"):
        raise ValueError("config.json: use_bidirectional_attention is not supported")
    acts = {key: take(key) for key in ("hidden_act", "hidden_activation")}
    key, known = read
    if acts[key] not in (None, *known):
        raise ValueError(f"config.json: {key} is supported at {' and '.join(known)} only")
    if acts["hidden_activation"] not in (None, "gelu_pytorch_tanh"):  # older code reads it first
        raise ValueError("config.json: hidden_activation is supported at gelu_pytorch_tanh only")
    take("cache_implementation")
    return {"norm": "rms1p", "mlp": "geglu", "embedding_scale": fields["width"] ** 0.5}


def gemma2(take: Take, fields: Fields) -> Fields:
    """Read the scale and the soft caps of Gemma 2 (arXiv 2408.00118); null is no cap."""
    return {
        **gemma(take, fields, GEMMA2_ACT),
        "norms": "both",
        "attention_scale": (take("query_pre_attn_scalar") or 256) ** -0.5,
        "score_cap": take("attn_logit_softcapping", 50.0) or 0.0,
        "logit_cap": take("final_logit_softcapping", 30.0) or 0.0,
    }


def gemma3(take: Take, fields: Fields) -> Fields:
    """Read Gemma 3 (arXiv 2503.19786): norms of q and k. ValueError: caps, which it has not."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if take(key):
            raise ValueError(f"config.json: {key} is not supported for gemma3_text models")
    own = gemma2(take, fields)
    return {**own, "qk_norm": "head", "score_cap": 0.0, "logit_cap": 0.0}


def experts(take: Take, fields: Fields) -> Fields:
    """Read what mixtures of experts have in common. ValueError: a token takes more than there are.

    How they were balanced in training (router_aux_loss_coef, output_router_logits) is an option of
    training, which plumb's own flags set.
    """
    for key in ("router_aux_loss_coef", "output_router_logits"):
        take(key)
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    number = agreed({key: take(key) for key in names})
    active = take("num_experts_per_tok")
    if not number or not active:
        raise ValueError("config.json: the number of experts or num_experts_per_tok is missing")
    if active > number:
        raise ValueError(
            f"config.json: num_experts_per_tok = {active} is more than the {number} experts"
        )
    return {"experts": number, "active": active}


def mixtral(take: Take, fields: Fields) -> Fields:
    """Read Mixtral (arXiv 2401.04088): every MLP is a mixture."""
    if take("router_jitter_noise", 0.0) not in (0, None):
        raise ValueError("config.json: router_jitter_noise is supported at 0 only")
    return {**experts(take, fields), "expert_ffn": fields["ffn"], "normalised": True}


def olmoe(take: Take, fields: Fields) -> Fields:
    """Read OLMoE (arXiv 2409.02060): every MLP is a mixture, one norm over all heads of q, of k."""
    if take("clip_qkv") is not None:
        raise ValueError("config.json: clip_qkv is supported at null only")
    normalised = take("norm_topk_prob") or False
    own = {"expert_ffn": fields["ffn"], "normalised": normalised, "qk_norm": "whole"}
    return {**experts(take, fields), **own}


def qwen_moe(take: Take, fields: Fields) -> Fields:
    """Read Qwen2-MoE and Qwen3-MoE (arXiv 2407.10671, 2505.09388): some layers may be dense."""
    step, listed = take("decoder_sparse_step") or 1, take("mlp_only_layers") or []
    layers = range(fields["layers"])
    own = {
        "expert_ffn": take("moe_intermediate_size"),
        "shared_ffn": take("shared_expert_intermediate_size") or 0,
        "normalised": take("norm_topk_prob") or False,
        "dense_layers": tuple(i for i in layers if i in listed or (i + 1) % step),
    }
    if not own["expert_ffn"]:
        raise ValueError("config.json: moe_intermediate_size is missing")
    return {**experts(take, fields), **own}


def qwen2_moe(take: Take, fields: Fields) -> Fields:
    """Read what Qwen2-MoE has besides: biases of q, k and v, a shared expert."""
    bias = take("qkv_bias", True)
    own = qwen_moe(take, fields)
    if not own["shared_ffn"]:
        raise ValueError("config.json: shared_expert_intermediate_size is missing")
    return {**own, "qkv_bias": True if bias is None else bias}


def qwen3_moe(take: Take, fields: Fields) -> Fields:
    """Read what Qwen3-MoE has besides. ValueError: a sliding window, which no published one has."""
    if take("use_sliding_window"):
        raise ValueError("config.json: use_sliding_window is not supported for qwen3_moe models")
    if take("shared_expert_intermediate_size"):
        raise ValueError(
            "config.json: shared_expert_intermediate_size is not read by the code of qwen3_moe "
            "models: remove it"
        )
    take("sliding_window")
    return qwen_moe(take, fields)


def glm4_moe(take: Take, fields: Fields) -> Fields:
    """Read GLM-4.5 (arXiv 2508.06471): sigmoid scores, a shared MLP, dense layers at first.

    ValueError: experts in groups, of which a token takes some only; no published one has any.
    """
    for key in ("n_group", "topk_group"):
        if take(key, 1) != 1:
            raise ValueError(f"config.json: {key} is supported at 1 only")
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):  # weights/folder.py leaves them out
        ahead = take(key) or 0
        if type(ahead) is not int or not 0 <= ahead <= 100:
            raise ValueError(f"config.json: {key} = {ahead!r} is no whole number from 0 to 100")
    own = experts(take, fields)
    width, shared = take("moe_intermediate_size"), take("n_shared_experts", 1)
    if not width:
        raise ValueError("config.json: moe_intermediate_size is missing")
    dense = take("first_k_dense_replace", 1) or 0
    return {
        **own,
        "router": "sigmoid",
        "expert_ffn": width,
        "shared_ffn": width * (shared or 0),
        "shared_gated": False,
        "normalised": take("norm_topk_prob", True),
        "routed_scale": float(take("routed_scaling_factor") or 1.0),
        "dense_layers": tuple(range(min(dense, fields["layers"]))),
        "qk_norm": "head" if take("use_qk_norm", False) else "",
    }


READERS: dict[str, Callable[[Take, Fields], Fields]] = {
    "smollm3": smollm3,
    "olmo2": olmo,
    "olmo3": olmo,
    "granite": granite,
    "stablelm": stablelm,
    "phi3": phi3,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "mixtral": mixtral,
    "olmoe": olmoe,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "glm4_moe": glm4_moe,
}
