"""Text to token ids and back, with the tokenizer files of a Hugging Face folder.

Two sources. `tokenizer.model` is read by sentencepiece and preferred: it is the original; files
converted from it may split runs of spaces differently. `tokenizer.json` is read by the optional
package tokenizers. Both cut added and special tokens out of the text first (leftmost, then
longest), as Hugging Face does.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece

from data.settings import read_json, read_settings

# The files of a tokenizer; a model that is saved elsewhere takes them along.
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

# normalizer_spec (field 3) { add_dummy_prefix (field 3): false }. Protobuf merges a message that
# occurs twice, so these bytes behind a serialized sentencepiece model change this flag and no more.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """The tokenizer of a folder, made by load_tokenizer. It can be pickled and used after a fork.

    bos, eos, pad         ids or None
    bos_token, eos_token  their texts, "" for None
    stops                 ids that end an answer: eos and those of generation_config.json
    named                 texts of all tokens that the folder names, as chat templates read them
    special               {text: id} of every token that is never split inside a text
    control               the texts of those that decoding leaves out: markers, not words
    size                  largest id + 1 (the model's vocabulary may be padded beyond it)
    chat_template         jinja source in the folder, or None
    hash                  hex digest of everything that decides ids and templates
    ids_hash              the same without the chat template
    """

    def __init__(self, folder: Path):
        config, special_map, ids, more = read_settings(folder)
        self.sp: Any = None
        self.bare: Any = None  # sentencepiece without its dummy space
        self.fast: Any = None
        if (folder / "tokenizer.model").exists():
            source = (folder / "tokenizer.model").read_bytes()
            self._open_sentencepiece(folder / "tokenizer.model", source)
            self._check_twin(folder)
        elif (folder / "tokenizer.json").exists():
            source = (folder / "tokenizer.json").read_bytes()
            self._open_tokenizers(folder / "tokenizer.json", config)
        else:
            raise FileNotFoundError(
                f"{folder} has no tokenizer.model and no tokenizer.json: copy the model's "
                "tokenizer files there (from vocab.json and merges.txt, transformers' "
                "AutoTokenizer...save_pretrained makes a tokenizer.json)"
            )
        # legacy: sentencepiece's dummy space follows every special token, not only the start.
        self.legacy = bool(config.get("legacy", True))
        self.prefix = config.get("add_prefix_space") is not False

        names = special_map | config
        ends = {f"{name}_token": self._declared(name, names, ids) for name in ("bos", "eos", "pad")}
        added = _added_tokens(more, config, ends | names, self._piece)
        for key in ("bos_token", "eos_token"):
            if ends[key] and ends[key] not in added:
                raise ValueError(
                    f"{folder}: {key} {ends[key]!r} is not in the vocabulary: "
                    "fix tokenizer_config.json"
                )
        self.bos_token = ends["bos_token"] or ""
        self.eos_token = ends["eos_token"] or ""
        self.named = _named_texts(names | {name: text for name, text in ends.items() if text})
        self.bos, self.eos, self.pad = (
            added[text]["id"] if text in added else None for text in ends.values()
        )
        stops = ids.get("eos_token_id")
        self.stops = {self.eos, *(stops if isinstance(stops, list) else [stops])} - {None}

        if self.sp:
            self._add_to_sentencepiece(added, source)
        else:
            self._add_to_tokenizers(folder, added)
        self.chat_template = _chat_template(folder, config)
        decides = [added, ends, self.legacy, self.prefix]
        ids_json = json.dumps(decides, sort_keys=True)
        self.ids_hash = hashlib.sha256(source + ids_json.encode()).hexdigest()
        decides_json = json.dumps([*decides, self.named, self.chat_template], sort_keys=True)
        self.hash = hashlib.sha256(source + decides_json.encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Encode a text. Special tokens written in it get their ids; no bos or eos is added."""
        if self.fast:
            try:
                return self.fast.encode(text, add_special_tokens=False).ids
            except TypeError:  # sentencepiece raises UnicodeEncodeError, a ValueError
                raise ValueError(
                    "a text holds half of a surrogate pair, which is no character: fix the escape"
                ) from None
        ids: list[int] = []
        start = 0
        while match := self.pattern.search(text, start):
            token = self.added[match[0]]
            before = text[start : match.start()]
            if token.get("lstrip"):
                before = before.rstrip()
            ids += self._encode_plain(before, start)
            ids.append(token["id"])
            start = match.end()
            if token.get("rstrip"):
                start = len(text) - len(text[start:].lstrip())
        return ids + self._encode_plain(text[start:], start)

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Decode ids; with skip_special=False it undoes encode.

        Ids beyond the vocabulary (a model may be padded) are left out.
        """
        ids = [int(i) for i in ids]
        if self.fast:
            return self.fast.decode(ids, skip_special_tokens=skip_special)
        if skip_special:
            ids = [i for i in ids if i not in self.silent]
        text: list[str] = []
        for is_added, run in itertools.groupby(ids, key=self.texts.__contains__):
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
                f"{path} is not a sentencepiece model (a Git LFS pointer, or tiktoken's?): "
                "download the real file, or remove it so that tokenizer.json is read"
            ) from error

    def _check_twin(self, folder: Path) -> None:
        """Check that tokenizer.json numbers the pieces as tokenizer.model does.

        Transformers reads the one, plumb the other. ValueError names a piece that differs.
        """
        path = folder / "tokenizer.json"
        model = read_json(path).get("model") if path.exists() else None
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocab, list):  # unigram: [[piece, score], ...]
            vocab = {entry[0]: i for i, entry in enumerate(vocab) if entry}
        if not isinstance(vocab, dict):
            return
        for i in range(len(self.sp)):
            piece = self.sp.id_to_piece(i)
            if piece in vocab and vocab[piece] != i:
                raise ValueError(
                    f"{folder}: {piece!r} is token {i} in tokenizer.model and {vocab[piece]} in "
                    "tokenizer.json: remove the file that is not the model's own"
                )

    def _open_tokenizers(self, path: Path, config: dict) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise ImportError(
                f"{path} needs the package tokenizers: pip install tokenizers"
            ) from error
        try:
            text = _with_prefix_space(read_json(path), config, path)
            self.fast = tokenizers.Tokenizer.from_str(text)
        except ValueError:
            raise
        except Exception as error:  # the package raises bare Exception
            raise ValueError(
                f"{path} cannot be read as a tokenizer ({error}): download it again"
            ) from error
        self.fast.no_truncation()
        self.fast.no_padding()

    def _piece(self, text: str) -> int | None:
        """Return the id of a text in the model's own vocabulary, or None."""
        if self.fast:
            return self.fast.token_to_id(text)
        i = self.sp.piece_to_id(text)
        return i if self.sp.id_to_piece(i) == text else None

    def _declared(self, name: str, names: dict, ids: dict) -> str | None:
        """Return the text of bos, eos or pad, or None.

        It is named in the folder (null means none), or is the model's own, or has its id in
        config.json. The last counts only if the folder names none of the three: Qwen2 has a
        bos_token_id there and no bos.
        """
        if f"{name}_token" in names:
            return _text(names[f"{name}_token"])
        if self.sp and (i := getattr(self.sp, f"{name}_id")()) >= 0:
            return self.sp.id_to_piece(i)
        if {"bos_token", "eos_token", "pad_token"} & names.keys():
            return None
        i = ids.get(f"{name}_token_id")
        i = i[0] if isinstance(i, list) else i
        if i is None or (self.sp and not 0 <= i < len(self.sp)):
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
        self.control = {text for text, token in added.items() if token["special"]}
        self.size = max(len(self.sp), 1 + max(self.texts))
        patterns = []
        for text in sorted(added, key=len, reverse=True):
            pattern = re.escape(text)
            if added[text].get("single_word"):
                pattern = rf"(?<!\w){pattern}(?!\w)"
            patterns.append(pattern)
        self.pattern = re.compile("|".join(patterns))

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
                    f"{folder}: {text!r} is token {token['id']} in tokenizer_config.json or "
                    f"added_tokens.json but {self.fast.token_to_id(text)} in tokenizer.json: take "
                    "both files from the same model"
                )
        tokens = self.fast.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in tokens.items()}
        self.control = {token.content for token in tokens.values() if token.special}
        self.size = 1 + max(self.fast.get_vocab(with_added_tokens=True).values())

    def _encode_plain(self, text: str, start: int) -> list[int]:
        """Encode a text without special tokens that starts at character `start` of the whole."""
        dummy_space = self.prefix and (self.legacy or start == 0)
        return (self.sp if dummy_space else self.bare).encode(text)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer of a Hugging Face folder.

    FileNotFoundError: it has none. ValueError names a broken file.
    """
    return Tokenizer(Path(folder))


def _user_defined(model: bytes) -> list[int]:
    """Return the ids of the user-defined pieces of a serialized sentencepiece model.

    Its API does not tell them apart. Pieces are the leading fields of the file: 0x0a, length
    (varint), then text, 0x15 and 4 bytes of score, 0x18 and the type: 4 for user-defined.
    """
    ids = []
    piece = 0
    at = 0
    while model[at : at + 1] == b"\x0a":
        length = 0
        shift = 0
        while True:
            at += 1
            length |= (model[at] & 127) << shift
            shift += 7
            if model[at] < 128:
                break
        at += 1 + length  # after the piece
        if model[at - 2 : at] == b"\x18\x04" and model[at - 7] == 0x15:
            ids.append(piece)
        piece += 1
    return ids


# Classes of transformers that put no space in front of a text unless tokenizer_config.json says so,
# whatever tokenizer.json says.
NO_SPACE_CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer")


def _with_prefix_space(content: dict, config: dict, path: Path) -> str:
    """Return tokenizer.json as text, with the space in front of texts that its class puts there.

    ValueError: tokenizer_config.json and tokenizer.json say different things.
    """
    before = content.get("pre_tokenizer")
    inner = before.get("pretokenizers") if isinstance(before, dict) else None
    steps = inner if isinstance(inner, list) else [before]
    wanted = config.get("add_prefix_space")
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    for step in steps:
        if not isinstance(step, dict) or step.get("type") != "ByteLevel":
            continue
        given = step.get("add_prefix_space")
        if name in NO_SPACE_CLASSES:
            step["add_prefix_space"] = bool(wanted)
        elif wanted is not None and given is not None and bool(wanted) != given:
            raise ValueError(
                f"{path}: add_prefix_space is {given}, in tokenizer_config.json it is {wanted}: "
                "make them alike"
            )
    return json.dumps(content, ensure_ascii=False)


def _text(token: str | dict | None) -> str | None:
    return token["content"] if isinstance(token, dict) else token


def _added_tokens(
    more: dict, config: dict, names: dict, piece: Callable[[str], int | None]
) -> dict[str, dict]:
    """Return {text: {"id", "special", "lstrip", ...}} of the tokens that the folder adds or names.

    more: added_tokens.json. piece(text) is the id of a text in the model's own vocabulary. A named
    token without an id is left out.
    """
    added = {text: {"id": i, "special": False} for text, i in more.items()}
    for i, token in (config.get("added_tokens_decoder") or {}).items():
        added[token["content"]] = {"special": False} | token | {"id": int(i)}
    for token in _named_tokens(names):
        text = _text(token)
        flags = token if isinstance(token, dict) else {}
        i = added[text]["id"] if text in added else piece(text)
        if i is not None:
            added[text] = added.get(text, {}) | flags | {"id": i, "special": True}
    return added


def _named_tokens(names: dict) -> list[str | dict]:
    """Return the special tokens that tokenizer_config.json names, one by one or in lists."""
    tokens = [
        token
        for name, token in names.items()
        if name.endswith("_token") and isinstance(token, (str, dict))
    ]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = names.get(name) or []
        tokens += more.values() if isinstance(more, dict) else more
    return tokens


def _named_texts(names: dict) -> dict[str, str | list[str]]:
    """Return the texts of the tokens that a folder names, under the names that templates read."""
    named: dict[str, str | list[str]] = {}
    for name, token in names.items():
        if name.endswith("_token") and isinstance(token, (str, dict)):
            named[name] = _text(token) or ""
    extra = names.get("extra_special_tokens")
    if isinstance(extra, dict):  # {"image_token": "<image>"}
        named |= {name: _text(token) or "" for name, token in extra.items()}
    more = names.get("additional_special_tokens")
    if isinstance(more, list):
        named["additional_special_tokens"] = [_text(token) or "" for token in more]
    return named


def _chat_template(folder: Path, config: dict) -> str | None:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text ({error}): download it again") from None
    template = config.get("chat_template")
    if isinstance(template, list):  # one for tools, one for retrieval, a default for conversations
        template = {t["name"]: t["template"] for t in template}.get("default")
    return template
