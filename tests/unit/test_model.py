"""Every family has the logits of transformers, both ways; a tree equals its branches run alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FAMILIES, dataset_of, tiny_transformers
from safetensors.torch import load_file, save_file

import hf
from data.trees import make_batch, pack
from kernels.attention import tree_attention
from model import GPT, parameter_count
from weights import config_json
from weights.config_json import ARCHITECTURES
from weights.folder import load_model, save_model


def logits_of(model: GPT, ids: list[int]) -> torch.Tensor:
    """Return the logits of one sequence: a batch of one tree, all prompt but for the last token."""
    batch = make_batch(dataset_of([(ids[:-1], [ids[-1:]])]), [0])
    return model.logits(model(batch), torch.arange(len(batch.tokens)))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers_both_ways(family: str, tied: bool, tmp_path: Path, monkeypatch):
    """A transformers folder gives the same logits here; saved here, sharded or not, also there."""
    from transformers import AutoModelForCausalLM

    theirs = tiny_transformers(family, tied)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB" if tied else "5GB")
    ours = load_model(tmp_path / "theirs", torch.float32)
    ids = torch.randint(0, 90, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        wanted = theirs(torch.tensor([ids])).logits[0]
        assert (logits_of(ours, ids) - wanted).abs().max() < 1e-4
        assert wanted.std() > 0.1  # or the comparison would prove nothing

        if not tied:
            monkeypatch.setattr("weights.folder.SHARD_BYTES", 20_000)
        save_model(ours, tmp_path / "ours")
        assert (tmp_path / "ours" / "model.safetensors.index.json").exists() != tied
        again, report = AutoModelForCausalLM.from_pretrained(
            tmp_path / "ours", output_loading_info=True
        )
        assert not any(
            report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")
        )
        assert (again(torch.tensor([ids])).logits[0] - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_new_folders_load_in_transformers(family: str, tmp_path: Path):
    """transformers loads a folder of `hf.py new` without missing weights, to the same logits."""
    from transformers import AutoModelForCausalLM

    sizes = {"vocab": 100, "width": 32, "layers": 2, "heads": 4}
    if family != "gpt_neox":
        sizes["kv_heads"] = 2
    model = hf.new_model(hf.New(family=family, std=0.2, tied=family == "qwen2", **sizes))
    save_model(model, tmp_path / "new")
    theirs, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "new", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = list(range(5, 30))
    with torch.no_grad():
        assert (logits_of(model, ids) - theirs(torch.tensor([ids])).logits[0]).abs().max() < 1e-4


LLAMA_31_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
QWEN2_WINDOW = {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 24}
QWEN3_WINDOW = {"sliding_window": None, "use_sliding_window": False, "max_window_layers": 28}


# name: (keys, (width, MLP, layers, heads, key/value heads, vocabulary), parameters)
PUBLISHED = {
    "Llama-2-7B": (
        {"model_type": "llama", "pretraining_tp": 1, "rope_scaling": None},
        (4096, 11008, 32, 32, 32, 32000),
        6738415616,
    ),
    "Llama-3.1-8B": (
        {
            "model_type": "llama",
            "rope_theta": 5e5,
            "rope_scaling": LLAMA_31_ROPE,
            "mlp_bias": False,
        },
        (4096, 14336, 32, 32, 8, 128256),
        8030261248,
    ),
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", "sliding_window": 4096, "rope_theta": 1e4},
        (4096, 14336, 32, 32, 8, 32000),
        7241732096,
    ),
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", "use_mrope": False, "rope_theta": 1e6, "tie_word_embeddings": True}
        | QWEN2_WINDOW,
        (896, 4864, 24, 14, 2, 151936),
        494032768,
    ),
    "Qwen3-0.6B": (
        {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1e6, "tie_word_embeddings": True}
        | {"attention_bias": False}
        | QWEN3_WINDOW,
        (1024, 3072, 28, 16, 8, 151936),
        596049920,
    ),
    "Pythia-70M": (
        {"model_type": "gpt_neox", "hidden_act": "gelu", "layer_norm_eps": 1e-5}
        | {"rotary_pct": 0.25, "rotary_emb_base": 10000, "use_parallel_residual": True},
        (512, 2048, 6, 8, 8, 50304),
        70426624,
    ),
}


@pytest.mark.parametrize(("published", "sizes", "parameters"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_configs_give_the_published_parameter_count(
    published: dict, sizes: tuple, parameters: int, tmp_path: Path
):
    """The keys of well-known folders, as published before transformers 5, are all understood."""
    names = [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    ]
    raw = {**dict(zip(names, sizes)), "torch_dtype": "bfloat16", "use_cache": True, **published}
    if raw["model_type"] == "gpt_neox":
        del raw["num_key_value_heads"]
    else:
        raw |= {"hidden_act": "silu", "rms_norm_eps": 1e-5, "attention_dropout": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config, _ = config_json.read_config(tmp_path)
    assert parameter_count(config) == parameters
    assert config.windows == ((4096,) * 32 if raw["model_type"] == "mistral" else ())
    assert config.rope_theta == published.get("rope_theta", 1e4)
    assert config.rope_scaling == ((8.0, 1.0, 4.0, 8192) if "llama3" in str(raw) else None)
    assert config.rope_size == (16 if raw["model_type"] == "gpt_neox" else config.head_size)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "bloom"}, "bloom"),
        ({"architectures": ["LlamaForTokenClassification"]}, "LlamaForTokenClassification"),
        ({"hidden_act": "relu"}, "relu"),
        ({"logit_scale": 2.0}, "logit_scale"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "beta_fast": 32}},
            "beta_fast",
        ),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_unknown_options_are_refused_by_name(change: dict, named: str, tmp_path: Path):
    """An option that would change the arithmetic and is not computed is refused by name."""
    tiny_transformers("llama", False).save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **change}))
    with pytest.raises(ValueError, match=named):
        config_json.read_config(tmp_path)


def test_wrong_weights_are_refused_by_name(tmp_path: Path):
    """Missing, unknown, misshapen and damaged weights each get a message that names them."""
    tiny_transformers("llama", False).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    for weights, message in (
        ({k: v for k, v in good.items() if k != name}, f"{name} is missing"),
        (
            {**good, "model.layers.1.adapter": torch.ones(1)},
            "does not know the weight model.layers.1.adapter",
        ),
        ({**good, name: torch.ones(3, 3)}, rf"{name} is \(3, 3\)"),
    ):
        save_file(weights, file)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path, torch.float32)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load_model(tmp_path, torch.float32)
    file.unlink()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="only pytorch_model.bin"):
        load_model(tmp_path, torch.float32)


@pytest.mark.parametrize("family", ["llama3", "mistral_window", "gpt_neox"])
def test_a_tree_equals_its_branches_run_alone(family: str, tmp_path: Path):
    """Law 2: log-probs and gradients of trees equal those of each (prompt, response) in float64."""
    tiny_transformers(family, False).save_pretrained(tmp_path)
    model = load_model(tmp_path, torch.float64)
    trees = [(5, [3, 4]), (1, [1, 6, 2]), (9, [7])]
    rng = np.random.default_rng(0)
    trees = [
        (rng.integers(0, 90, p).tolist(), [rng.integers(0, 90, n).tolist() for n in ns])
        for p, ns in trees
    ]
    weights = torch.linspace(0.5, 2, 6, dtype=torch.float64)

    def gradients(total: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(total, list(model.parameters()))]
        )

    batch = make_batch(dataset_of(trees), [0, 1, 2])
    sums = batch.sum_by_response(model.logps(model(batch), batch))
    alone = []
    for prompt, responses in trees:
        for response in responses:
            logp = logits_of(model, prompt + response).log_softmax(-1)
            at = torch.arange(len(prompt), len(prompt) + len(response))
            alone.append(logp[at - 1, torch.tensor(response)].sum())
    alone = torch.stack(alone)
    assert (sums - alone).abs().max() < 1e-12
    difference = gradients((sums * weights).sum()) - gradients((alone * weights).sum())
    assert difference.abs().max() < 1e-12

    unshared = make_batch(dataset_of(trees), [2, 0, 1], share_prompts=False)
    other = unshared.sum_by_response(model.logps(model(unshared), unshared))
    assert (other - alone[[5, 0, 1, 2, 3, 4]]).abs().max() < 1e-12


@pytest.mark.parametrize("window", [0, 1, 4])
def test_attention_follows_the_definition_of_the_mask(window: int):
    """Query i sees key j iff j <= i < kv_end[j] and position[i] - position[j] < window, if any.

    Outputs and gradients in float64; in bf16 the output is the exact one, rounded once.
    """
    torch.manual_seed(0)
    trees = [(3, [2, 1, 5]), (1, [4]), (6, [3, 3])]
    batch = make_batch(dataset_of([([0] * p, [[0] * n for n in ns]) for p, ns in trees]), [0, 1, 2])
    q, k, v = (torch.randn(len(batch.tokens), heads, 8).bfloat16() for heads in (4, 2, 2))
    halves = tree_attention(q, k, v, batch.layout, window)
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    seen = torch.zeros(len(q), len(q), dtype=torch.bool)
    for i in range(len(q)):
        for j in range(len(q)):
            near = not window or batch.positions[i] - batch.positions[j] < window
            seen[i, j] = j <= i < batch.kv_end[j] and near
    k2, v2 = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    scores = torch.einsum("ihe,jhe->hij", q, k2) / 8**0.5
    wanted = torch.einsum("hij,jhe->ihe", scores.masked_fill(~seen, float("-inf")).softmax(-1), v2)
    ours = tree_attention(q, k, v, batch.layout, window)
    assert (ours - wanted).abs().max() < 1e-12
    slopes = torch.randn(ours.shape, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), slopes) for x in (ours, wanted))):
        assert (a - b).abs().max() < 1e-12
    assert halves.dtype == torch.bfloat16
    assert (halves == wanted.bfloat16()).float().mean() > 0.99  # fp32 on the way may break a tie


def test_packing_places_every_item_once_within_the_budget():
    """First-fit-decreasing: a partition, no bin above the budget, as many bins for every rank."""
    rng = np.random.default_rng(0)
    for ranks in (1, 2, 3):
        for _ in range(50):
            lengths = rng.integers(1, 40, rng.integers(ranks, 60))
            bins = pack(lengths, 64, ranks)
            assert sorted(i for items in bins for i in items) == list(range(len(lengths)))
            assert all(lengths[items].sum() <= 64 for items in bins) and len(bins) % ranks == 0
    assert len(pack(np.array([30, 30, 34, 34]), 64)) == 2
    with pytest.raises(ValueError, match="raise --max-tokens to 65"):
        pack(np.array([65]), 64)
