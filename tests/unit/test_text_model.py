"""The text model of a folder that reads images: transformers' whole model computes the same."""

import json
from pathlib import Path

import pytest
import torch
from conftest import dataset_of
from safetensors.torch import load_file, save_file

import hf
from data.trees import make_batch
from weights import text_model
from weights.folder import load_model

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
ROPE = {"factor": 8.0, "rope_type": "linear"}
PROMPT = [5, 6, 7, 8, 9, 11, 12, 13]


def whole_model(kind: str, folder: Path):
    """Write a small random model that reads images, as transformers does, and return it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gemma3":
        text = {**TEXT, "query_pre_attn_scalar": 16, "rope_scaling": ROPE, "sliding_window": 5}
        config = transformers.Gemma3Config(
            text_config={**text, "model_type": "gemma3_text"},
            vision_config={**VISION, "model_type": "siglip_vision_model"},
            mm_tokens_per_image=1,
            image_token_index=99,
        )
        model = transformers.Gemma3ForConditionalGeneration(config)
    else:
        text = {**TEXT, "model_type": kind, "rope_theta": 1e6, "tie_word_embeddings": False}
        config = transformers.Mistral3Config(
            text_config=text,
            vision_config={**VISION, "model_type": "pixtral"},
            image_token_index=99,
            tie_word_embeddings=False,
        )
        model = transformers.Mistral3ForConditionalGeneration(config)
    model.save_pretrained(folder)
    return model.eval()


def rename(folder: Path, change) -> None:
    """Rename the weights of a folder, which lie in one file."""
    path = folder / "model.safetensors"
    weights = {change(name): tensor for name, tensor in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})


def as_in_memory(name: str) -> str:
    """Return the name that transformers has given a weight since 4.52."""
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    name = name.replace("language_model.model.", "language_model.", 1)
    return name if name.startswith(("lm_head", "model.")) else f"model.{name}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "mistral", "ministral3"])
@pytest.mark.parametrize("published", [True, False])
def test_the_text_model_computes_what_the_whole_does(kind: str, published: bool, tmp_path: Path):
    """Logits of a text within 1e-5, for both ways in which the weights have been named."""
    theirs = whole_model(kind, tmp_path / "whole")
    if not published:
        rename(tmp_path / "whole", as_in_memory)
    names = set(load_file(tmp_path / "whole" / "model.safetensors"))
    assert any(name.startswith("model." if not published else "vision_tower.") for name in names)
    left = text_model.extract(tmp_path / "whole", tmp_path / "text")
    model = load_model(tmp_path / "text", torch.float32)
    batch = make_batch(dataset_of([(PROMPT[:1], [PROMPT[1:]])]), [0])
    ours = model.logits(model(batch), torch.arange(len(PROMPT)))
    wanted = theirs(input_ids=torch.tensor([PROMPT])).logits[0]
    assert (ours - wanted).abs().max() < 1e-5
    copied = load_file(tmp_path / "text" / "model.safetensors")
    assert left == len(names) - len(copied) > 5
    assert model.c.tied == (kind == "gemma3")


def small_folder(folder: Path, **changes) -> Path:
    """Write a folder with the config.json of a whole model and two weights."""
    folder.mkdir()
    raw = {"model_type": "gemma3", "text_config": {**TEXT, "model_type": "gemma3_text"}, **changes}
    (folder / "config.json").write_text(json.dumps(raw))
    weights = {"language_model.model.norm.weight": torch.ones(32), "vision_tower.x": torch.ones(2)}
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "weight", "words"),
    [
        ({"model_type": "llama"}, "", "no text model|only gemma3 and mistral3"),
        ({"text_config": None}, "", "text_config"),
        ({"text_config": {"model_type": "qwen2"}}, "", "qwen2"),
        ({}, "audio_tower.x", "audio_tower.x is not known"),
    ],
)
def test_what_is_not_known_is_refused(changes, weight, words, tmp_path: Path):
    """By name, and nothing is written."""
    folder = small_folder(tmp_path / "whole", **changes)
    if weight:
        rename(folder, lambda name: weight if name.startswith("vision") else name)
    with pytest.raises(ValueError, match=words):
        text_model.extract(folder, tmp_path / "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def test_a_missing_head_is_not_replaced_by_the_embedding(tmp_path: Path):
    """A Mistral ties nothing unless its config.json says so: a folder that lost its head is refused
    when it is loaded."""
    text = {**TEXT, "model_type": "mistral"}
    folder = small_folder(tmp_path / "whole", model_type="mistral3", text_config=text)
    text_model.extract(folder, tmp_path / "text")
    assert not json.loads((tmp_path / "text" / "config.json").read_text())["tie_word_embeddings"]


def test_keys_that_gemma_leaves_out_are_those_of_transformers(tmp_path: Path):
    """As in the text_config of Gemma 3 4B."""
    transformers = pytest.importorskip("transformers")
    few = {"hidden_size": 32, "num_hidden_layers": 2, "model_type": "gemma3_text"}
    folder = small_folder(tmp_path / "whole", text_config=few)
    text_model.extract(folder, tmp_path / "text")
    raw = json.loads((tmp_path / "text" / "config.json").read_text())
    theirs = transformers.Gemma3TextConfig()
    for key in text_model.DEFAULTS["gemma3_text"]:
        assert raw[key] == getattr(theirs, key)
    assert raw["tie_word_embeddings"] is theirs.tie_word_embeddings is True


def test_the_command_and_the_error_that_names_it(tmp_path: Path, capsys):
    folder = small_folder(tmp_path / "whole")
    with pytest.raises(SystemExit, match="hf.py text DIR --out NEW"):
        hf.main(["check", str(folder)])
    with pytest.raises(SystemExit, match="lacks|no weight|missing"):  # of two weights only
        hf.main(["text", str(folder), "--out", str(tmp_path / "text")])
    assert "left out 1 weight(s) that read images" in capsys.readouterr().out
