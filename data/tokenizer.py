"""Text to token ids and back, read from the tokenizer files of a Hugging Face folder.

Two sources. `tokenizer.model` goes through sentencepiece and is preferred where it lies: it is the model itself, while
converted files may cut runs of spaces differently. `tokenizer.json` goes through the optional package tokenizers.
In both, added and special tokens are cut out of the text first (leftmost, then longest), as Hugging Face does.
"""

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import sentencepiece

# What makes up a tokenizer in a folder; a model written elsewhere takes these along.
TOKENIZER_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)

# Protobuf merges a message that occurs twice, so these bytes at the end of a serialized sentencepiece model say
# normalizer_spec (field 3) { add_dummy_prefix (field 3): false } and leave everything else as it was.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """A tokenizer as its folder describes it; made by load_tokenizer. It can be pickled and used after a fork.

    bos, eos, pad       ids or None; bos_token, eos_token their texts, "" where there is none
    stops               ids that end an answer: eos, and whatever generation_config.json adds
    special             {text: id} of every token that is recognised whole inside a text
    size                largest id + 1 (the model's vocabulary may be padded beyond it)
    chat_template       the folder's jinja source or None
    hash                hex digest of everything that decides ids and templates
    """

    def __init__(self, folder: Path):
        config = _json(folder / "tokenizer_config.json")
        ids = _json(folder / "config.json") | _json(folder / "generation_config.json")
        self.sp: Any = None
        self.bare: Any = None  # sentencepiece without its dummy space
        self.fast: Any = None
        if (folder / "tokenizer.model").exists():
            source = (folder / "tokenizer.model").read_bytes()
            self._open_sentencepiece(folder / "tokenizer.model", source)
        elif (folder / "tokenizer.json").exists():
            source = (folder / "tokenizer.json").read_bytes()
            self._open_tokenizers(folder / "tokenizer.json")
        else:
            raise FileNotFoundError(
                f"{folder} holds no tokenizer.model and no tokenizer.json: copy the model's tokenizer files there "
                "(from vocab.json and merges.txt, transformers' AutoTokenizer...save_pretrained makes a tokenizer.json)"
            )
        # legacy: sentencepiece's dummy space opens every stretch between special tokens, not only the text.
        self.legacy = bool(config.get("legacy", True))
        self.prefix = config.get("add_prefix_space") is not False

        names = _json(folder / "special_tokens_map.json") | config
        ends = {f"{name}_token": self._declared(name, names, ids) for name in ("bos", "eos", "pad")}
        added = _added_tokens(folder, config, ends | names, self._piece)
        for key in ("bos_token", "eos_token"):
            if ends[key] and ends[key] not in added:
                raise ValueError(
                    f"{folder}: {key} {ends[key]!r} is not in the vocabulary: mend tokenizer_config.json"
                )
        self.bos, self.eos, self.pad = (
            added[text]["id"] if text in added else None for text in ends.values()
        )
        self.bos_token, self.eos_token = ends["bos_token"] or "", ends["eos_token"] or ""
        stops = ids.get("eos_token_id")
        self.stops = {self.eos, *(stops if isinstance(stops, list) else [stops])} - {None}

        if self.sp:
            self._add_to_sentencepiece(added, source)
        else:
            self._add_to_tokenizers(folder, added)
        self.chat_template = _chat_template(folder, config)
        decided = [added, ends, self.legacy, self.prefix, self.chat_template]
        self.hash = hashlib.sha256(
            source + json.dumps(decided, sort_keys=True).encode()
        ).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Special tokens written in it are recognised; no bos or eos is added."""
        if self.fast:
            try:
                return self.fast.encode(text, add_special_tokens=False).ids
            except (
                TypeError
            ):  # as sentencepiece: a ValueError, since that is what a UnicodeEncodeError is
                raise ValueError(
                    "a text holds half of a surrogate pair, which is no character"
                ) from None
        ids, start = [], 0
        while match := self.pattern.search(text, start):
            token = self.added[match[0]]
            before = text[start : match.start()]
            ids += self._stretch(before.rstrip() if token.get("lstrip") else before, start) + [
                token["id"]
            ]
            start = match.end()
            if token.get("rstrip"):
                start = len(text) - len(text[start:].lstrip())
        return ids + self._stretch(text[start:], start)

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of ids. Without skip_special it undoes encode; ids beyond the vocabulary (padding rows) say nothing."""
        ids = [int(i) for i in ids]
        if self.fast:
            return self.fast.decode(ids, skip_special_tokens=skip_special)
        text = []
        for is_added, run in itertools.groupby(
            (i for i in ids if not skip_special or i not in self.silent),
            key=self.texts.__contains__,
        ):
            if is_added:
                text += [self.texts[i] for i in run]
            else:
                sp = self.sp if self.prefix and (self.legacy or not text) else self.bare
                text.append(sp.decode([i for i in run if 0 <= i < len(sp)]))
        return "".join(text)

    def _open_sentencepiece(self, path: Path, source: bytes) -> None:
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=source)
            self.bare = sentencepiece.SentencePieceProcessor(model_proto=source + NO_DUMMY_PREFIX)
        except RuntimeError as error:
            raise ValueError(
                f"{path} is not a sentencepiece model (a Git LFS pointer, or tiktoken's?): fetch the real file, or "
                "remove it so that tokenizer.json is read"
            ) from error

    def _open_tokenizers(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                f"{path} needs the package tokenizers: pip install tokenizers"
            ) from error
        try:
            self.fast = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception
            raise ValueError(
                f"{path} cannot be read as a tokenizer ({error}): fetch the file again"
            ) from error
        self.fast.no_truncation()
        self.fast.no_padding()

    def _piece(self, text: str) -> int | None:
        """Id of a text in the model's own vocabulary, or None."""
        if self.fast:
            return self.fast.token_to_id(text)
        i = self.sp.piece_to_id(text)
        return i if self.sp.id_to_piece(i) == text else None

    def _declared(self, name: str, names: dict, ids: dict) -> str | None:
        """Text of bos, eos or pad: named in the folder (null means none), else the model's own, else config.json's id.
        config.json is asked only where nothing is named at all: Qwen2 has a bos_token_id there and no bos."""
        if f"{name}_token" in names:
            return _text(names[f"{name}_token"])
        if self.sp and (i := getattr(self.sp, f"{name}_id")()) >= 0:
            return self.sp.id_to_piece(i)
        i = (
            None
            if {"bos_token", "eos_token", "pad_token"} & names.keys()
            else ids.get(f"{name}_token_id")
        )
        i = i[0] if isinstance(i, list) else i
        if i is None or self.sp and not 0 <= i < len(self.sp):
            return None
        return self.fast.id_to_token(i) if self.fast else self.sp.id_to_piece(i)

    def _add_to_sentencepiece(self, added: dict, source: bytes) -> None:
        for i in range(len(self.sp)):
            if self.sp.is_control(i) or self.sp.is_unknown(i):
                added.setdefault(self.sp.id_to_piece(i), {"id": i, "special": True})
        for i in _user_defined(source):
            added.setdefault(self.sp.id_to_piece(i), {"id": i, "special": False})
        self.added = added
        self.special = {text: token["id"] for text, token in added.items()}
        self.texts = {i: text for text, i in self.special.items()}
        self.silent = {token["id"] for token in added.values() if token["special"]}
        self.size = max(len(self.sp), 1 + max(self.texts))
        edge = {
            text: (r"(?<!\w)", r"(?!\w)") if added[text].get("single_word") else ("", "")
            for text in added
        }
        self.pattern = re.compile(
            "|".join(
                edge[text][0] + re.escape(text) + edge[text][1]
                for text in sorted(added, key=len, reverse=True)
            )
        )

    def _add_to_tokenizers(self, folder: Path, added: dict) -> None:
        from tokenizers import AddedToken

        for text, token in sorted(added.items(), key=lambda item: item[1]["id"]):
            flags = {
                flag: bool(token.get(flag))
                for flag in ("special", "lstrip", "rstrip", "single_word")
            }
            flags["normalized"] = bool(token.get("normalized", not flags["special"]))
            add = self.fast.add_special_tokens if flags["special"] else self.fast.add_tokens
            add([AddedToken(text, **flags)])
            if self.fast.token_to_id(text) != token["id"]:
                raise ValueError(
                    f"{folder}: {text!r} is token {token['id']} in tokenizer_config.json or added_tokens.json but "
                    f"{self.fast.token_to_id(text)} in tokenizer.json: take both files from the same model"
                )
        self.special = {
            token.content: i for i, token in self.fast.get_added_tokens_decoder().items()
        }
        self.size = 1 + max(self.fast.get_vocab(with_added_tokens=True).values())

    def _stretch(self, text: str, start: int) -> list[int]:
        """Ids of a text without special tokens that begins at character `start` of the whole."""
        return (self.sp if self.prefix and (self.legacy or start == 0) else self.bare).encode(text)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. FileNotFoundError where it has none, ValueError naming a broken file."""
    return Tokenizer(Path(folder))


def _user_defined(model: bytes) -> list[int]:
    """Ids of a serialized sentencepiece model's user-defined pieces, a type that its API does not tell. Pieces are the
    leading fields: 0x0a, length (varint), then text, 0x15 and 4 bytes of score, 0x18 and the type, 4 for these."""
    found, at, i = [], 0, 0
    while model[at : at + 1] == b"\x0a":
        length, shift = 0, 0
        while True:
            at += 1
            length |= (model[at] & 127) << shift
            shift += 7
            if model[at] < 128:
                break
        end = at + 1 + length
        if model[end - 2 : end] == b"\x18\x04" and model[end - 7] == 0x15:
            found.append(i)
        at, i = end, i + 1
    return found


def _json(path: Path) -> dict:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}): fetch the file again") from error


def _text(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _added_tokens(folder: Path, config: dict, names: dict, piece) -> dict[str, dict]:
    """{text: {"id", "special", "lstrip", "rstrip", "single_word", ...}} of what the folder adds or names.
    piece(text) is the id of a text in the model's own vocabulary; a named token that has no id is left out."""
    added = {
        text: {"id": i, "special": False} for text, i in _json(folder / "added_tokens.json").items()
    }
    for i, token in config.get("added_tokens_decoder", {}).items():
        added[token["content"]] = {"special": False} | token | {"id": int(i)}
    more = [names.get("additional_special_tokens") or [], names.get("extra_special_tokens") or []]
    lists = [list(m.values()) if isinstance(m, dict) else m for m in more]
    for token in [
        v for k, v in names.items() if k.endswith("_token") and isinstance(v, str | dict)
    ] + sum(lists, []):
        text, flags = _text(token), token if isinstance(token, dict) else {}
        i = added[text]["id"] if text in added else piece(text)
        if i is not None:
            added[text] = added.get(text, {}) | flags | {"id": i, "special": True}
    return added


def _chat_template(folder: Path, config: dict) -> str | None:
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(
        template, list
    ):  # several named ones, for tools or retrieval; the default is for conversations
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template
