"""The toy world's tokenizer: trained on its own text, written as a Hugging Face folder."""

import json
import random
from pathlib import Path
from typing import Any

import sentencepiece

from data.toy.answers import answer
from data.toy.scoring import Score
from data.toy.village import sample_prompt

VOCABULARY = 640
CHAT_SYMBOLS = ("<|user|>", "<|assistant|>", "<|attr|>")
ATTRIBUTE_SYMBOLS = tuple(
    f"{name}:{value}"
    for name in Score(False, False, False, 0, 0, 0, 0).attributes
    for value in range(5)
)
NAMES = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(folder: Path, rng: random.Random) -> None:
    """Train a byte-pair tokenizer on noisy answers and write it as a Hugging Face folder.

    Text is taken as it is: not normalised, no space put in front. So an answer has the same ids
    after a prompt, after a symbol and on its own. tokenizer.json repeats tokenizer.model for
    libraries that read nothing else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _train(folder / "tokenizer.model", rng)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = {model.id_to_piece(i): i for i in range(len(model))}
    config = {
        **NAMES,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": CHAT_SYMBOLS,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (("tokenizer_config", config), ("tokenizer", _tokenizer_json(ids))):
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


def _train(path: Path, rng: random.Random) -> None:
    """Write a sentencepiece model of prompts and noisy answers."""
    prompts = [sample_prompt(rng, "train") for _ in range(4000)]
    corpus = [text for prompt in prompts for text in (prompt.text, answer(prompt, rng))]
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(corpus),
            model_writer=file,
            model_type="bpe",
            vocab_size=VOCABULARY,
            pad_id=0,
            unk_id=1,
            bos_id=2,
            eos_id=3,
            user_defined_symbols=[*CHAT_SYMBOLS, *ATTRIBUTE_SYMBOLS],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            character_coverage=1.0,
            num_threads=1,
            minloglevel=2,
        )


def _tokenizer_json(ids: dict[str, int]) -> dict[str, Any]:
    """Return tokenizer.json for the pieces of a sentencepiece model, {piece: id}."""
    symbols = (*NAMES.values(), *CHAT_SYMBOLS, *ATTRIBUTE_SYMBOLS)
    learned = [piece for piece in ids if piece not in symbols]  # in the order of merging
    merges = []
    for piece in learned:
        halves = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        merges += [pair for pair in halves if set(pair) <= set(learned)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": ids[text], "content": text, "special": ":" not in text, **flags} for text in symbols
    ]
    to_spaces = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    from_spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": from_spaces,
        "decoder": {"type": "Sequence", "decoders": [to_spaces, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": merges,
            "unk_token": "<unk>",
            "fuse_unk": True,
        },
    }
