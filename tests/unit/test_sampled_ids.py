"""Best of n and iterated DPO learn the ids that were drawn, whatever template and tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import best_of_n
from data.dataset import Dataset, Prompts, load_dataset
from data.rows import write_rows
from data.templates import LLAMA3_TOKENS, Template
from data.tokenizer import load_tokenizer
from sampling.rollout import Rollout, trees
from sampling.sampler import Sample

MARKERS = ("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", *LLAMA3_TOKENS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Return a sentencepiece and a byte-level tokenizer, both with the markers of all templates."""
    root = tmp_path_factory.mktemp("tokenizers")
    byte_level = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=["<s>", "</s>", *MARKERS],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    text = Path(__file__).read_text().splitlines()
    byte_level.train_from_iterator(text, trainer)
    (root / "bytes").mkdir()
    (root / "bytes" / "tokenizer.json").write_text(byte_level.to_str())
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    (root / "bytes" / "tokenizer_config.json").write_text(json.dumps(names))
    return {"bytes": root / "bytes", "pieces": root / "pieces"}


@pytest.fixture(scope="module")
def pieces(toy: Path, folders: dict[str, Path]) -> Path:
    """Return the toy world's sentencepiece tokenizer with the markers added to it."""
    folder = folders["pieces"]
    folder.mkdir()
    source = toy / "world" / "tokenizer"
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    size = load_tokenizer(source).size
    added = {marker: size + i for i, marker in enumerate(MARKERS)}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    config = json.loads((folder / "tokenizer_config.json").read_text() or "{}")
    config["additional_special_tokens"] = list(MARKERS)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def drawn(template: Template, n: int, group: int) -> Rollout:
    """Return a rollout of random ids: many begin with a space, none is the tokenizer's own way."""
    rng = np.random.default_rng(5)
    tokenizer = template.tokenizer
    silent = set(tokenizer.special.values()) | template.stop_ids
    ordinary = [i for i in range(tokenizer.size) if i not in silent]
    samples = []
    for _ in range(n * group):
        ids = [int(i) for i in rng.choice(ordinary, rng.integers(2, 9))]
        samples.append(Sample([*ids, template.end], [0.0] * (len(ids) + 1), [], True))
    prompts = [f"Say {i}." for i in range(n)]
    encoded = [template.prompt(prompt) for prompt in prompts]
    texts = [tokenizer.decode(s.tokens) for s in samples]
    return Rollout(
        Prompts([{}] * n, prompts, encoded),
        samples,
        texts,
        rng.normal(0, 1, n * group),
        np.ones(n * group, bool),
        trees(encoded, samples),
        {},
    )


def sequences(data: Dataset) -> list[tuple[list[int], list[list[int]], list[int]]]:
    """Return (prompt ids, ids of each response, marks of the tree) of every tree."""
    result = []
    for i in range(len(data)):
        start, end = data.tree_start[i], data.tree_start[i + 1]
        prompt = data.tokens[start : start + data.prompt_len[i]].tolist()
        sizes = data.response_len[data.response_start[i] : data.response_start[i + 1]]
        edges = start + data.prompt_len[i] + np.cumsum([0, *sizes])
        responses = [data.tokens[a:b].tolist() for a, b in zip(edges, edges[1:])]
        result.append((prompt, responses, data.scored[start + data.prompt_len[i] : end].tolist()))
    return result


@pytest.mark.parametrize("tokenizer", ["pieces", "bytes"])
@pytest.mark.parametrize("name", ["plain", "chatml", "llama3"])
def test_the_drawn_ids_are_learned(
    name: str, tokenizer: str, folders: dict[str, Path], pieces: Path, tmp_path: Path
):
    """kept.jsonl as SFT data and pairs.jsonl as preferences and labels: the very ids, all scored.

    Another template, and a text that somebody edited, are tokenised again.
    """
    template = Template(name, load_tokenizer(folders[tokenizer]))
    samples = drawn(template, 12, 3)
    config = best_of_n.Config(group_size=3)
    kept, pairs = best_of_n.select(samples, config, template.fingerprint)
    assert len(kept) == len(pairs) == 12
    assert any(row["response"] != row["response"].strip() for row in kept)
    order = [sorted(range(3 * i, 3 * i + 3), key=lambda k: -samples.rewards[k]) for i in range(12)]
    best = [samples.samples[ranked[0]].tokens for ranked in order]
    worst = [samples.samples[ranked[-1]].tokens for ranked in order]

    def load(rows: list[dict], kind: str, with_template: Template = template) -> list:
        file = write_rows(tmp_path / "rows.jsonl", rows)
        data = load_dataset([file], kind, with_template, cache=tmp_path / "cache")
        return sequences(data)

    for kind, rows in (("sft", kept), ("preference", pairs), ("label", pairs)):
        for i, (prompt, responses, scored) in enumerate(load(rows, kind)):
            assert prompt == samples.prompts.ids[i]
            assert responses == ([best[i]] if kind == "sft" else [best[i], worst[i]])
            assert all(scored)
    # What was learned before: the text, tokenised again.
    texts = [{"prompt": row["prompt"], "response": row["response"].strip()} for row in kept]
    assert sum(one[1] == [ids] for one, ids in zip(load(texts, "sft"), best)) <= 6
    bare = [{"prompt": row["prompt"], "response": row["response"]} for row in kept]
    other = Template("chatml" if name == "plain" else "plain", load_tokenizer(folders[tokenizer]))
    assert load(kept, "sft", other) == load(bare, "sft", other)
    edited = [{**row, "response": "Edited."} for row in kept]
    wanted = [{"prompt": row["prompt"], "response": "Edited."} for row in kept]
    assert load(edited, "sft") == load(wanted, "sft")


def test_ids_that_are_none_are_bad_rows(folders: dict[str, Path], tmp_path: Path):
    """A row whose ids are no list of token ids is named, with its file and line."""
    template = Template("plain", load_tokenizer(folders["bytes"]))
    row = {"prompt": "a", "response": "b", "tokenizer": template.fingerprint}
    for ids in ([], "5", [5, -1], [5, True], [5.0]):
        file = write_rows(tmp_path / "rows.jsonl", [{**row, "response_ids": ids}])
        with pytest.raises(ValueError, match=r"rows.jsonl:1: `response_ids` must be a list of"):
            load_dataset([file], "sft", template, cache=tmp_path / "cache", log=lambda line: None)


def test_the_fingerprint_is_that_of_ids_and_not_of_files(folders: dict[str, Path]):
    """A chat template kept in the folder, or named by a flag, gives the same one."""
    folder = folders["bytes"]
    named = Template("chatml", load_tokenizer(folder))
    tokenizer = load_tokenizer(folder)
    tokenizer.chat_template = named.source
    assert Template("auto", tokenizer).fingerprint == named.fingerprint
    assert Template("plain", load_tokenizer(folder)).fingerprint != named.fingerprint
