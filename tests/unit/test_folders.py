"""Published folders: no silent choice in config.json and weights, one truth in the tokenizer files.

Keys that a family's own code never reads are idle or refused; two keys that differ are refused.
"""

import json
import shutil
from pathlib import Path

import fuzz_folders
import pytest
import torch
from safetensors.torch import load_file, save_file

import hf
from data.templates import Template
from data.tokenizer import load_tokenizer
from weights.config_json import ARCHITECTURES, model_config, read_config, score_names
from weights.folder import load_model, save_model

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 100,
}


def config(family: str, **more) -> dict:
    """Return a config.json of a family."""
    heads = {"num_key_value_heads": 2} if family == "mistral" else {}
    architectures = [ARCHITECTURES[family]]
    return {"model_type": family, "architectures": architectures, **SIZES, **heads, **more}


def read(family: str, **more):
    return model_config(config(family, **more), family)


IDLE = {  # keys of published folders that change nothing
    "SmolLM2": (
        "llama",
        {"is_llama_config": True, "rope_interleaved": False, "rope_scaling": None},
    ),
    "SmolLM2 of the web": ("llama", {"transformers.js_config": {"dtype": "q4"}}),
    "unsloth": ("llama", {"unsloth_fixed": True, "unsloth_version": "2025.1.1"}),
    "unsloth qwen2": ("qwen2", {"unsloth_fixed": True, "max_window_layers": 21}),
    "Pythia": ("gpt_neox", {"rotary_pct": 0.25, "rotary_emb_base": 10000}),
    "Pythia, saved again": (
        "gpt_neox",
        {
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000.0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000,
                "partial_rotary_factor": 0.25,
            },
        },
    ),
    "GPT-NeoX-20B": ("gpt_neox", {"attention_probs_dropout_prob": 0, "hidden_dropout_prob": 0}),
    "Falcon3": ("llama", {"activation": "swiglu", "head_dim": 8, "attention_bias": False}),
    "DeepSeek-7B": ("llama", {"aux_loss_alpha": 0.001, "seq_aux": True, "n_routed_experts": None}),
    "Vicuna": ("llama", {"max_sequence_length": 2048, "pad_token_id": 0}),
    "Dolly": ("gpt_neox", {"custom_pipelines": {"text-generation": {"impl": "x"}}}),
    "attention_bias": ("mistral", {"attention_bias": False}),
    "attention_bias of qwen2": ("qwen2", {"attention_bias": False}),
    "pretraining_tp": ("llama", {"pretraining_tp": 1}),
    "switched off": ("llama", {"sliding_window": 4096, "use_sliding_window": False}),
    "no window": ("llama", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "whole rotation": ("llama", {"partial_rotary_factor": 1.0}),
    "as many heads": ("gpt_neox", {"num_key_value_heads": 4, "head_dim": 8}),
    "null": ("qwen3", {"some_option": None}),
}


@pytest.mark.parametrize("name", IDLE)
def test_keys_that_change_nothing_are_idle(name: str):
    family, more = IDLE[name]
    assert read(family, **more) == read(family)


REFUSED = {  # keys that another family's code reads, and that would change the arithmetic
    "window in llama": ("llama", {"sliding_window": 7}, "sliding_window = 7 is not read"),
    "layer types": (
        "mistral",
        {"layer_types": ["sliding_attention", "full_attention"]},
        "layer_types = .* is not read",
    ),
    "half rotation": ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "half rotation, new": (
        "qwen3",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
        "partial_rotary_factor = 0.5",
    ),
    "another base": ("qwen2", {"rotary_emb_base": 5e5}, "rotary_emb_base = .* is not read"),
    "rotary_pct": ("mistral", {"rotary_pct": 0.25}, "rotary_pct = 0.25 is not read"),
    "grouped gpt_neox": ("gpt_neox", {"num_key_value_heads": 2}, "num_key_value_heads = 2"),
    "head size": ("gpt_neox", {"head_dim": 16}, "head_dim = 16 is not read"),
    "bias": ("mistral", {"attention_bias": True}, "attention_bias = True is not read"),
    "mlp bias": ("qwen3", {"mlp_bias": True}, "mlp_bias = True is not read"),
    "eps": ("llama", {"layer_norm_eps": 1e-3}, "layer_norm_eps = 0.001 is not read"),
    "parallel": ("llama", {"use_parallel_residual": True}, "use_parallel_residual = True"),
    "interleaved": (
        "llama",
        {"rope_interleaved": True},
        "rope_interleaved = True is not supported",
    ),
    "experts": ("llama", {"n_routed_experts": 64}, "does not know the option n_routed_experts"),
    "two thetas": (
        "llama",
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "rope_theta = .* say different things",
    ),
    "two names": ("gpt_neox", {"rotary_emb_base": 1e4, "rope_theta": 5e5}, "say different things"),
    "two shares": (
        "gpt_neox",
        {"rotary_pct": 0.25, "partial_rotary_factor": 0.5},
        "say different things",
    ),
    "two kinds": (
        "llama",
        {"rope_scaling": {"rope_type": "default", "type": "linear"}},
        "say different things",
    ),
    "old and new": (
        "llama",
        {
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        "say different things",
    ),
    "sliding without window": (
        "qwen3",
        {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True},
        "layer_types names sliding layers",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_keys_that_say_something_else_are_refused_by_name(name: str):
    family, more, complaint = REFUSED[name]
    with pytest.raises(ValueError, match=complaint):
        read(family, **more)


def test_scores_have_one_count():
    """num_labels and id2label of a reward model may not differ."""
    raw = config("llama", id2label={"0": "reward"}, num_labels=2)
    raw["architectures"] = ["LlamaForSequenceClassification"]
    with pytest.raises(ValueError, match="num_labels = 2 and id2label of 1 say different things"):
        score_names(raw)


@pytest.mark.parametrize("name", ["gelu_fast", "gelu_new", "gelu_pytorch_tanh"])
def test_names_of_one_activation(name: str):
    """All three are 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))."""
    activations = pytest.importorskip("transformers").activations
    assert read("gpt_neox", hidden_act=name).mlp == "gelu_tanh"
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    wanted = torch.nn.functional.gelu(x, approximate="tanh")
    assert (activations.ACT2FN[name](x) - wanted).abs().max() < 1e-7


# ---- weights -------------------------------------------------------------------------------------


@pytest.fixture
def folder(toy: Path, tmp_path: Path) -> Path:
    """Return a copy of the toy model's folder."""
    return shutil.copytree(toy / "model", tmp_path / "model")


def change_config(folder: Path, **values) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | values))


def test_a_tied_head_that_differs_is_refused(folder: Path):
    """A head on disk beside tie_word_embeddings must be the embedding; a copy of it may stay."""
    weights = load_file(folder / "model.safetensors")
    change_config(folder, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="lm_head.weight differs from model.embed_tokens.weight"):
        load_model(folder, torch.float32)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    load_model(folder, torch.float32)


def test_a_single_file_beside_an_index_of_shards_is_refused(folder: Path):
    """They may be two models; an index that lists the single file itself is that file's own."""
    weights = load_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "model.safetensors")}))
    load_model(folder, torch.float32)
    shutil.copyfile(folder / "model.safetensors", folder / "model-1.safetensors")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weights, "model-1.safetensors")}))
    with pytest.raises(ValueError, match="may be two models: remove the older ones"):
        load_model(folder, torch.float32)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("base_dtype", ["none", "int8"])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float, base_dtype: str):
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][1, 2] = value
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="layers.1.mlp.up_proj.weight has values that are not fin"):
        load_model(folder, torch.float32, base_dtype=base_dtype)
    with pytest.raises(ValueError, match="up_proj"):
        hf.describe(str(folder))


def test_values_beyond_the_dtype_are_refused(folder: Path, tmp_path: Path):
    """A float64 weight of 1e300 is finite on disk and infinite in fp32."""
    model = load_model(folder, torch.float64)
    with torch.no_grad():
        model.head.weight[0, 0] = 1e300
    save_model(model, tmp_path / "large", folder)
    load_model(tmp_path / "large", torch.float64)
    with pytest.raises(ValueError, match="not finite in torch.float32"):
        load_model(tmp_path / "large", torch.float32)


def test_a_folder_without_weights_says_so(folder: Path, tmp_path: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no model.safetensors: give a folder"):
        load_model(folder, torch.float32)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="only pytorch_model.bin: load it in transformers"):
        load_model(folder, torch.float32)
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        read_config(tmp_path / "nowhere")


# ---- the tokenizer -------------------------------------------------------------------------------


TEXT = "Ada  lives\n\tin </s> the <s>forest, 12 é"


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"legacy": False}, {"add_prefix_space": False}], ids=str)
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_final_is_tokenised_by_transformers_as_here(
    family: str, settings: dict, real_model: Path, tmp_path: Path
):
    """A bare tokenizer.model, of Llama 2, under every family."""
    transformers = pytest.importorskip("transformers")
    start = tmp_path / "tokenizer"
    start.mkdir()
    shutil.copyfile(real_model / "tokenizer.model", start / "tokenizer.model")
    if settings:
        (start / "tokenizer_config.json").write_text(json.dumps(settings))
    final = save_with(family, start, tmp_path / "final")
    theirs = transformers.AutoTokenizer.from_pretrained(final)
    mine = load_tokenizer(final)
    assert mine.encode(TEXT) == load_tokenizer(start).encode(TEXT)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == mine.encode(TEXT)
    assert (theirs.bos_token, theirs.eos_token) == (mine.bos_token, mine.eos_token)


@pytest.mark.slow
@pytest.mark.parametrize("family", ARCHITECTURES)
def test_final_of_a_tokenizer_json_is_tokenised_as_here(family: str, toy: Path, tmp_path: Path):
    """A tokenizer.json beside tokenizer.model that no Qwen has made, under every family."""
    transformers = pytest.importorskip("transformers")
    final = save_with(family, toy / "world" / "tokenizer", tmp_path / "final")
    theirs = transformers.AutoTokenizer.from_pretrained(final)
    assert theirs(TEXT, add_special_tokens=False)["input_ids"] == load_tokenizer(final).encode(TEXT)


def save_with(family: str, tokenizer: Path, folder: Path) -> Path:
    """Save a tiny model of a family with a tokenizer and return its folder."""
    flags = hf.New(family=family, width=16, layers=1, heads=2, ffn=8, tokenizer=str(tokenizer))
    save_model(hf.new_model(flags), folder, tokenizer)
    return folder


@pytest.mark.parametrize("name", ["plain", "chatml"])
def test_final_names_the_end_that_was_trained(name: str, toy: Path, tmp_path: Path):
    """generation_config.json has the end of every template, plain included."""
    template = Template(name, load_tokenizer(toy / "model"))
    flags = hf.New(width=16, layers=1, heads=2, ffn=8, tokenizer=str(toy / "model"))
    save_model(hf.new_model(flags), tmp_path / "final", toy / "model", template)
    ends = json.loads((tmp_path / "final" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == sorted(template.stop_ids) and template.end in ends
    again = Template(name, load_tokenizer(tmp_path / "final"))
    assert again.stop_ids == template.stop_ids


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("tokenizer_config.json", [1], "must hold one JSON object"),
        ("tokenizer_config.json", {"eos_token": 5}, "eos_token is 5, not a token"),
        ("tokenizer_config.json", {"eos_token": {"content": 5}}, "eos_token is .* not a token"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder is"),
        ("tokenizer_config.json", {"chat_template": [{"name": "a"}]}, "chat_template is"),
        ("tokenizer_config.json", {"legacy": "yes"}, "legacy is 'yes', not true or false"),
        ("special_tokens_map.json", {"bos_token": []}, "bos_token is .., not a token"),
        ("special_tokens_map.json", {"additional_special_tokens": [1]}, "not a list of tokens"),
        ("added_tokens.json", {"<a>": "5"}, "<a> is '5', not a token id"),
        ("generation_config.json", {"eos_token_id": "3"}, "eos_token_id is '3', not a token id"),
        ("tokenizer_config.json", "\\ud800", "is not valid JSON"),
    ],
)
def test_settings_of_the_wrong_kind_name_their_file(
    file: str, content, complaint: str, folder: Path
):
    text = '{"eos_token": "\\ud800"}' if isinstance(content, str) else json.dumps(content)
    (folder / file).write_text(text)
    with pytest.raises(ValueError, match=complaint) as caught:
        load_tokenizer(folder)
    assert str(folder / file) in str(caught.value)


def test_files_that_number_a_token_differently_are_refused(folder: Path):
    """tokenizer.json against tokenizer.model, added_tokens.json against tokenizer_config.json."""
    content = json.loads((folder / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    one, other = list(vocab)[20:22]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="in tokenizer.model and .* in tokenizer.json: remove"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text(whole)
    raw = json.loads((folder / "tokenizer_config.json").read_text())
    raw["added_tokens_decoder"] = {"7": {"content": "<a>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(raw))
    (folder / "added_tokens.json").write_text(json.dumps({"<a>": 8}))
    with pytest.raises(ValueError, match="'<a>' is token 8, tokenizer_config.json says otherwise"):
        load_tokenizer(folder)


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [True, False, None])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("name", ["Qwen2Tokenizer", "GPT2TokenizerFast", "PreTrainedTokenizerFast"])
def test_add_prefix_space_is_obeyed(name: str, given: bool, wanted: bool | None, tmp_path: Path):
    """As by transformers, or refused where tokenizer.json says otherwise."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[])
    tok = tokenizers.Tokenizer(model)
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=given)
    tok.add_special_tokens(["</s>"])
    tok.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": "</s>", "tokenizer_class": name, "add_prefix_space": wanted}
    if wanted is None:
        del config["add_prefix_space"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    if name == "PreTrainedTokenizerFast" and wanted not in (None, given):
        with pytest.raises(ValueError, match="add_prefix_space is .* make them alike"):
            load_tokenizer(tmp_path)
        return
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("hi") == theirs("hi")["input_ids"]


@pytest.mark.slow
def test_mutated_folders_open_or_say_what_is_wrong(tmp_path: Path):
    """A short part of tests/fuzz_folders.py: no traceback, and every error names a file."""
    counts = fuzz_folders.run(tmp_path, 120, 5)
    assert counts["refused"] > 40 and counts["opened"] > 10
