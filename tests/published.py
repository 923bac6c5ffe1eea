"""config.json of published models, their keys as published and their sizes shrunk.

folder = published_folder("SmolLM3-3B", path)      random weights, as transformers writes them
theirs = transformers_model(folder)                the same model in transformers
"""

import json
from pathlib import Path

import torch

SHRUNK = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "attention_dropout": 0.0,
    "use_cache": True,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}

# published model: its config.json where it differs from SHRUNK
ROUTED = {
    "hidden_act": "silu",
    "output_router_logits": False,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
GLM4 = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "attention_bias": True,
    "head_dim": 16,
    "hidden_act": "silu",
    "moe_intermediate_size": 24,
    "n_group": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 2,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "topk_group": 1,
}
GEMMA2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "attention_bias": False,
    "attn_logit_softcapping": 2.0,  # shrunk, as random weights give small scores
    "cache_implementation": "hybrid",
    "eos_token_id": [1, 107],
    "final_logit_softcapping": 3.0,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0,
    "sliding_window": 7,
}
PUBLISHED = {
    "Qwen3-30B-A3B": {
        **ROUTED,
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 16,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
        "num_experts": 6,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "Mixtral-8x7B-Instruct-v0.1": {
        **ROUTED,
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 5,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
    },
    "Qwen1.5-MoE-A2.7B-Chat": {
        **ROUTED,
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        "decoder_sparse_step": 2,
        "max_window_layers": 21,
        "moe_intermediate_size": 16,
        "norm_topk_prob": False,
        "num_experts": 6,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "shared_expert_intermediate_size": 40,
        "sliding_window": 32768,
        "use_sliding_window": False,
    },
    "OLMoE-1B-7B-0924-Instruct": {
        **ROUTED,
        "architectures": ["OlmoeForCausalLM"],
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "norm_topk_prob": False,
        "num_experts": 6,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
    },
    "GLM-4.5-Air": {
        **GLM4,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
    },
    "GLM-4.5": {
        **GLM4,
        "first_k_dense_replace": 3,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
    },
    "SmolLM3-3B": {
        "architectures": ["SmolLM3ForCausalLM"],
        "model_type": "smollm3",
        "attention_bias": False,
        "hidden_act": "silu",
        "layer_types": ["full_attention"] * 4,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0],
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000.0,
        "sliding_window": None,
        "use_sliding_window": False,
    },
    "OLMo-2-1124-7B": {
        "architectures": ["Olmo2ForCausalLM"],
        "model_type": "olmo2",
        "attention_bias": False,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000,
        "tie_word_embeddings": False,
    },
    "Olmo-3-7B": {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "attention_bias": False,
        "hidden_act": "silu",
        "layer_types": [*["sliding_attention"] * 3, "full_attention"],
        "rms_norm_eps": 1e-06,
        "rope_scaling": {**YARN, "attention_factor": 1.2079441541679836, "beta_fast": 32}
        | {"beta_slow": 1},
        "rope_theta": 500000,
        "sliding_window": 7,
        "tie_word_embeddings": False,
    },
    "Nemotron-Mini-4B-Instruct": {
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        "attention_bias": False,
        "head_dim": 16,
        "hidden_act": "relu2",
        "mlp_bias": False,
        "layer_norm_eps": 1e-05,
        "norm_eps": 1e-05,
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    },
    "granite-3.1-2b-instruct": {
        "architectures": ["GraniteForCausalLM"],
        "model_type": "granite",
        "attention_bias": False,
        "attention_dropout": 0.1,
        "attention_multiplier": 0.25,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "logits_scaling": 8.0,
        "mlp_bias": False,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "tie_word_embeddings": True,
    },
    "stablelm-2-1_6b": {
        "architectures": ["StableLmForCausalLM"],
        "model_type": "stablelm",
        "hidden_act": "silu",
        "hidden_dropout": 0.0,
        "layer_norm_eps": 1e-05,
        "num_key_value_heads": 4,
        "partial_rotary_factor": 0.25,
        "qk_layernorm": False,
        "rope_scaling": None,
        "rope_theta": 10000,
        "tie_word_embeddings": False,
        "use_parallel_residual": False,
        "use_qkv_bias": True,
    },
    "Phi-3-mini-4k-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "hidden_act": "silu",
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 64,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 7,
        "tie_word_embeddings": False,
    },
    "Phi-4-mini-instruct": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        "embd_pdrop": 0.0,
        "full_attn_mod": 1,
        "hidden_act": "silu",
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [1.0, 4.0, 9.0],
            "short_factor": [1.0, 1.5, 2.0],
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
    },
    "gemma-1.1-7b-it": {
        "architectures": ["GemmaForCausalLM"],
        "model_type": "gemma",
        "attention_bias": False,
        "head_dim": 16,
        "hidden_act": "gelu",
        "hidden_activation": "gelu_pytorch_tanh",
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 10000.0,
    },
    "gemma-2-2b-it": {
        **GEMMA2,
        "head_dim": 16,
        "num_hidden_layers": 5,
        "query_pre_attn_scalar": 16,
    },
    "gemma-2-27b-it": {
        **GEMMA2,
        "_attn_implementation": "eager",
        "head_dim": 8,
        "query_pre_attn_scalar": 9,
        "sliding_window_size": 7,
    },
    "gemma-3-1b-it": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "eos_token_id": [1, 106],
        "final_logit_softcapping": None,
        "head_dim": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 16,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 7,
        "sliding_window_pattern": 3,
    },
    "gemma-3-4b-it, its text model": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 8,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 4,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "rope_theta": 1000000,
        "sliding_window": 7,
        "sliding_window_pattern": 2,
    },
    "Ministral-3-3B, its text model": {
        "architectures": ["Ministral3ForCausalLM"],
        "model_type": "ministral3",
        "head_dim": 8,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_parameters": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 16.0,
            "llama_4_scaling_beta": 0.1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 16,
            "rope_theta": 10000.0,
            "rope_type": "yarn",
            "type": "yarn",
        },
        "sliding_window": None,
        "tie_word_embeddings": True,
    },
    "Gemma 2 without windows": {
        **GEMMA2,
        "head_dim": 16,
        "layer_types": ["full_attention"] * 4,
        "query_pre_attn_scalar": 16,
    },
    "Qwen3 with YaRN": {  # as the model's page says for long texts
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "attention_bias": False,
        "head_dim": 16,
        "hidden_act": "silu",
        "max_window_layers": 28,
        "rms_norm_eps": 1e-06,
        "rope_scaling": YARN,
        "rope_theta": 1000.0,
        "sliding_window": None,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
    "Llama with dynamic rope": {  # rows of at most max_position_embeddings
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"type": "dynamic", "factor": 4.0},
        "rope_theta": 100.0,
        "tie_word_embeddings": False,
    },
    "Llama with linear rope": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"type": "linear", "factor": 4.0},
        "rope_theta": 100.0,
        "tie_word_embeddings": False,
    },
}


def published_config(name: str) -> dict:
    """Return the shrunk config.json of a published model."""
    own = PUBLISHED[name]
    return {**SHRUNK, **own}


def published_folder(name: str, folder: Path) -> Path:
    """Write a folder with a published config.json and random weights of transformers' own class.

    The weights are large enough for two models to give different outputs.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(published_config(name))
    (folder / "config.json").write_text(text)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for path, p in model.named_parameters():
        if p.dim() == 1:  # norms and biases, which start as ones and zeros
            p.data += 0.3 * torch.randn_like(p) if "norm" in path else 0.1 * torch.randn_like(p)
    for path, buffer in model.named_buffers():
        if path.endswith("e_score_correction_bias"):  # zeros at first; large enough to be seen
            buffer += 0.2 * torch.randn_like(buffer)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(text)  # transformers writes the keys of its own version
    return folder


def transformers_model(folder: Path):
    """Load a folder in transformers. AssertionError: a weight is missing, or not its own."""
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    keys = ("missing_keys", "unexpected_keys", "mismatched_keys")
    assert not any(report[key] for key in keys), report
    return model.eval()
