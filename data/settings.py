"""The JSON files beside a tokenizer: read, checked, and found to agree with one another.

    tokenizer_config.json     names of special tokens, added tokens, the chat template
    special_tokens_map.json   names again, in older folders; tokenizer_config.json comes first
    added_tokens.json         ids of added tokens, in older folders
    config.json, generation_config.json    ids of bos, eos and pad

A value of the wrong kind is an error that names its file: what it meant cannot be guessed.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

HALF = re.compile(r"\\u[dD][89a-fA-F]")  # an escape that may be half of a surrogate pair
LISTS_OF_TOKENS = ("additional_special_tokens", "extra_special_tokens")


class Settings(NamedTuple):
    """The content of the files, {} for one that is not there."""

    config: dict[str, Any]  # tokenizer_config.json
    special_map: dict[str, Any]  # special_tokens_map.json
    ids: dict[str, Any]  # of config.json and generation_config.json, which comes first
    added: dict[str, int]  # added_tokens.json


def read_settings(folder: Path) -> Settings:
    """Return the settings of a tokenizer's folder. ValueError names the file that is wrong."""
    config = read_json(folder / "tokenizer_config.json")
    special_map = read_json(folder / "special_tokens_map.json")
    added = read_json(folder / "added_tokens.json")
    model = read_json(folder / "config.json")
    generation = read_json(folder / "generation_config.json")
    _check(folder / "tokenizer_config.json", config, _config_problem)
    _check(folder / "special_tokens_map.json", special_map, _token_problem)
    _check(folder / "added_tokens.json", added, lambda key, i: "" if _is_id(i) else "a token id")
    for name, content in (("config.json", model), ("generation_config.json", generation)):
        _check(folder / name, content, _id_problem)
    _check_ids(folder, config, added)
    return Settings(config, special_map, model | generation, added)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, {} if there is none. ValueError: it holds no object."""
    if not path.exists():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
        if HALF.search(text):
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object: download it again")
    return content


def _check(path: Path, content: dict, problem: Callable[[str, Any], str]) -> None:
    """Raise ValueError for the first key whose value is not what `problem` says it should be."""
    for key, value in content.items():
        if wanted := problem(key, value):
            shown = ascii(value)[:60]
            raise ValueError(f"{path}: {key} is {shown}, not {wanted}: download it again")


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_token(value: Any) -> bool:
    """Return whether a value is a token: its text, or an object with its text as `content`."""
    text = value.get("content") if isinstance(value, dict) else value
    return isinstance(text, str) and text != ""


def _token_problem(key: str, value: Any) -> str:
    """Return what the value of a special token should be, "" if it is that or no token's."""
    if value is None:
        return ""
    if key in LISTS_OF_TOKENS:
        tokens = list(value.values()) if isinstance(value, dict) else value
        good = isinstance(tokens, list) and all(map(_is_token, tokens))
        return "" if good else "a list of tokens"
    if key.endswith("_token") and not key.startswith("add_") and type(value) is not bool:
        return "" if _is_token(value) or value == "" else "a token"
    return ""


def _config_problem(key: str, value: Any) -> str:
    """Return what a value of tokenizer_config.json should be, "" if it is that."""
    if value is None:
        return ""
    if key == "added_tokens_decoder":
        good = isinstance(value, dict) and all(
            i.isascii() and i.isdigit() and _is_id(int(i)) and isinstance(token, dict)
            for i, token in value.items()
            if len(i) < 11
        )
        good = good and all(len(i) < 11 and _is_token(token) for i, token in value.items())
        return "" if good else "an object of ids and tokens"
    if key == "chat_template":
        named = isinstance(value, list) and all(
            isinstance(one, dict)
            and isinstance(one.get("name"), str)
            and isinstance(one.get("template"), str)
            for one in value
        )
        return "" if named or isinstance(value, str) else "a template or a list of named ones"
    if key in ("legacy", "add_prefix_space"):
        return "" if isinstance(value, bool) else "true or false"
    if key == "tokenizer_class":
        return "" if isinstance(value, str) else "a name"
    return _token_problem(key, value)


def _id_problem(key: str, value: Any) -> str:
    """Return what the id of bos, eos or pad should be, "" if it is that or another key's."""
    if key not in ("bos_token_id", "eos_token_id", "pad_token_id") or value is None:
        return ""
    ids = value if isinstance(value, list) else [value]
    # Some folders have -1 for a token that they do not have.
    good = all(_is_id(i) or (type(i) is int and i == -1) for i in ids)
    return "" if good else "a token id or a list of them"


def _check_ids(folder: Path, config: dict, added: dict) -> None:
    """Raise ValueError where two files give an added token another id, or an id another token."""
    decoder = config.get("added_tokens_decoder") or {}
    ids = {token["content"]: int(i) for i, token in decoder.items()}
    texts = {i: text for text, i in ids.items()}
    for text, i in added.items():
        if ids.get(text, i) != i or texts.get(i, text) != text:
            raise ValueError(
                f"{folder}: added_tokens.json says that {text!r} is token {i}, "
                "tokenizer_config.json says otherwise: correct the wrong one"
            )
