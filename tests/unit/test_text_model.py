"""The text model of a folder that reads images: transformers' whole model computes the same."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import dataset_of
from published import transformers_model
from safetensors.torch import load_file, save_file

import hf
from data.tokenizer import TOKENIZER_FILES, load_tokenizer
from data.trees import make_batch
from weights import text_model
from weights.families import TIED
from weights.folder import load_model, save_model

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


def give_tokenizer(toy: Path, folder: Path) -> None:
    """Copy the toy world's tokenizer into a folder."""
    for name in TOKENIZER_FILES:
        if (toy / "model" / name).is_file():
            shutil.copyfile(toy / "model" / name, folder / name)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3", "mistral", "ministral3"])
@pytest.mark.parametrize("published", [True, False])
def test_the_text_model_computes_what_the_whole_does(
    kind: str, published: bool, toy: Path, tmp_path: Path
):
    """Logits of a text within 1e-5 of transformers' whole model, for both ways in which the weights
    have been named; transformers reads the text model too."""
    theirs = whole_model(kind, tmp_path / "whole")
    give_tokenizer(toy, tmp_path / "whole")
    if not published:
        rename(tmp_path / "whole", as_in_memory)
    names = set(load_file(tmp_path / "whole" / "model.safetensors"))
    assert any(name.startswith("model." if not published else "vision_tower.") for name in names)
    left = text_model.extract(tmp_path / "whole", tmp_path / "text")
    model = load_model(tmp_path / "text", torch.float32)
    batch = make_batch(dataset_of([(PROMPT[:1], [PROMPT[1:]])]), [0])
    ours = model.logits(model(batch), torch.arange(len(PROMPT)))
    ids = torch.tensor([PROMPT])
    wanted = theirs(input_ids=ids).logits[0]
    assert (ours - wanted).abs().max() < 1e-5
    copied = load_file(tmp_path / "text" / "model.safetensors")
    assert left == len(names) - len(copied) > 5
    assert model.c.tied == (kind == "gemma3")
    alone = transformers_model(tmp_path / "text")(input_ids=ids).logits[0]
    assert (alone - wanted).abs().max() < 1e-5


def small_folder(toy: Path, folder: Path, family: str = "gemma3_text", tied: bool = True) -> Path:
    """Write a folder with a small text model inside a model that reads images."""
    flags = {"width": 32, "layers": 2, "heads": 2, "vocab": 640, "ffn": 48, "sliding_window": 5}
    save_model(hf.new_model(hf.New(**flags, family=family, tied=tied)), folder)
    give_tokenizer(toy, folder)
    rename(folder, lambda name: f"language_model.{name}")
    text = json.loads((folder / "config.json").read_text())
    whole = {"gemma3_text": "gemma3", "mistral": "mistral3"}[family]
    write_config(folder, {"model_type": whole, "text_config": text})
    change_weights(folder, lambda weights: weights | {"vision_tower.x": torch.ones(2)})
    return folder


def write_config(folder: Path, raw: dict) -> None:
    (folder / "config.json").write_text(json.dumps(raw))


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def change_weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


REFUSED = {
    "only gemma3 and mistral3": lambda raw: {**raw, "model_type": "llama"},
    "text_config is of type None": lambda raw: {**raw, "text_config": None},
    "text_config is of type 'qwen2'": lambda raw: {**raw, "text_config": {"model_type": "qwen2"}},
    "quantization_config": lambda raw: {**raw, "quantization_config": {"quant_method": "fp8"}},
    "logit_scale": lambda raw: {**raw, "text_config": {**raw["text_config"], "logit_scale": 2.0}},
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_config_that_is_not_known_is_refused(words: str, toy: Path, tmp_path: Path):
    """The error names it, and nothing is written."""
    folder = small_folder(toy, tmp_path / "whole")
    write_config(folder, REFUSED[words](config_of(folder)))
    with pytest.raises(ValueError, match=words):
        text_model.extract(folder, tmp_path / "text")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def test_weights_that_are_missing_or_unknown_are_refused(toy: Path, tmp_path: Path):
    """One that is nowhere, one of another kind of tower, the head of a model that ties nothing, and
    a folder without a tokenizer: before anything is written."""
    norm, head = "language_model.model.norm.weight", "language_model.lm_head.weight"
    embedding = "language_model.model.embed_tokens.weight"
    for name, family, change, words in (
        ("norm", "gemma3_text", lambda w: w.pop(norm), "no weight model.norm.weight"),
        (
            "tower",
            "gemma3_text",
            lambda w: w.update({"audio.x": w[norm].clone()}),
            "audio.x is not known",
        ),
        ("head", "mistral", lambda w: w.pop(head), "no weight lm_head.weight"),
        ("embedding", "mistral", lambda w: w.pop(embedding), "no weight model.embed_tokens.weight"),
        ("twice", "mistral", lambda w: w.update({"lm_head.weight": w[head] + 1}), "two names"),
    ):
        folder = small_folder(toy, tmp_path / name, family, tied=family != "mistral")
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=words):
            text_model.extract(folder, tmp_path / "text")
    folder = small_folder(toy, tmp_path / "tokenizer")
    for name in TOKENIZER_FILES:
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        text_model.extract(folder, tmp_path / "text")
    assert not (tmp_path / "text").exists()


@pytest.mark.parametrize("equal", [True, False])
def test_a_stored_head_is_tied_only_if_it_is_the_embedding(equal: bool, toy: Path, tmp_path: Path):
    """As in transformers: a copy of the embedding is dropped, another head is kept as its own."""
    folder = small_folder(toy, tmp_path / "whole")
    embedding = load_file(folder / "model.safetensors")["language_model.model.embed_tokens.weight"]
    head = {"language_model.lm_head.weight": embedding.clone() if equal else -embedding}
    change_weights(folder, lambda weights: weights | head)
    text_model.extract(folder, tmp_path / "text")
    assert config_of(tmp_path / "text")["tie_word_embeddings"] is equal
    model = load_model(tmp_path / "text", torch.float32)
    assert torch.equal(model.output.weight, embedding if equal else -embedding)


def test_the_whole_decides_the_ends_and_the_template(toy: Path, tmp_path: Path):
    """Token ids of the whole model win over text_config's; a template that a processor kept in
    chat_template.json is there for the tokenizer."""
    folder = small_folder(toy, tmp_path / "whole")
    raw = config_of(folder)
    raw["text_config"] |= {"eos_token_id": 1, "tie_word_embeddings": None}  # null: as if left out
    write_config(folder, {**raw, "eos_token_id": [1, 2], "torch_dtype": "float32"})
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    text_model.extract(folder, tmp_path / "text")
    assert config_of(tmp_path / "text")["eos_token_id"] == [1, 2]
    assert load_tokenizer(tmp_path / "text").chat_template == "{{ messages }}"


def test_the_index_says_which_file_holds_a_weight(toy: Path, tmp_path: Path):
    """A second copy in another file is not read."""
    folder = small_folder(toy, tmp_path / "whole")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "a.safetensors")
    more = {"language_model.model.layers.0.mlp.up_proj.weight": torch.zeros(48, 32)}
    stale = {"language_model.model.norm.weight": torch.full((32,), 9.0)}
    save_file(more | stale, folder / "b.safetensors")
    weight_map = dict.fromkeys(weights, "a.safetensors") | dict.fromkeys(more, "b.safetensors")
    index = {"weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    text_model.extract(folder, tmp_path / "text")
    copied = load_file(tmp_path / "text" / "model.safetensors")
    assert torch.equal(copied["model.norm.weight"], weights["language_model.model.norm.weight"])
    assert not copied["model.layers.0.mlp.up_proj.weight"].any()


def test_keys_that_gemma_leaves_out_are_those_of_transformers():
    """As in the text_config of Gemma 3 4B."""
    theirs = pytest.importorskip("transformers").Gemma3TextConfig()
    for key, value in text_model.DEFAULTS["gemma3_text"].items():
        assert value == getattr(theirs, key)
    assert theirs.tie_word_embeddings and "gemma3_text" in TIED


def test_the_command_and_the_error_that_names_it(toy: Path, tmp_path: Path, capsys):
    folder = small_folder(toy, tmp_path / "whole")
    with pytest.raises(SystemExit, match="hf.py text DIR --out NEW"):
        hf.main(["check", str(folder)])
    hf.main(["text", str(folder), "--out", str(tmp_path / "text")])
    said = capsys.readouterr().out
    assert "left out 1 weight(s) that read images" in said and "gemma3_text" in said
    with pytest.raises(SystemExit, match="exists: choose another --out"):
        hf.main(["text", str(folder), "--out", str(tmp_path / "text")])
