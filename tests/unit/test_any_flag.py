"""Any command line and any file of flags: a config whose fields have their types, or one line."""

import contextlib
import io
import json
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import json_values, lines, quick, texts

import config
import train_dpo
import train_kto
import train_sft

CONFIGS = [train_sft.Config, train_dpo.Config, train_kto.Config]


def spell(negation: str, name: str, dashes: bool) -> str:
    """Return a flag: ("no-", "max_steps", True) -> "--no-max-steps"."""
    return "--" + negation + (name.replace("_", "-") if dashes else name)


flag_names = st.sampled_from([name for cls in CONFIGS for name in cls.__dataclass_fields__])
negations = st.sampled_from(["", "", "no-", "no_"])
spelled = st.builds(spell, negations, flag_names, st.booleans())
words = st.text(max_size=8)
words |= st.sampled_from(["1", "-1", "0.5", "1e-7", "nan", "auto", "true", "9" * 5000, "--", "--="])
argvs = st.lists(spelled | words | st.builds("{}={}".format, spelled, words), max_size=6)
argvs = argvs.map(lambda argv: [word for word in argv if word not in ("-h", "--help")])


def parse(cls: type, argv: list[str]):
    """Return (config or None, text on standard error)."""
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            return config.parse(cls, "", argv), errors.getvalue()
        except SystemExit as stop:
            assert stop.code == 2
            return None, errors.getvalue()


def fits(value, hint) -> bool:
    """Return True if a value has the type of its field."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(isinstance(word, str) for word in value)
    return type(value) is hint


@settings(quick, max_examples=300)
@given(st.sampled_from(CONFIGS), argvs)
def test_any_command_line_is_taken_or_rejected_in_one_line(cls: type, argv: list[str]):
    """A config whose every field has its type, or status 2 with one line."""
    flags, errors = parse(cls, argv)
    if flags is None:
        breaks = sum(word.count("\n") for word in argv)  # in words that the line quotes
        assert errors.startswith("error: ") and errors.count("\n") <= 1 + breaks
    else:
        assert not errors
        assert all(fits(getattr(flags, name), hint) for name, hint in get_type_hints(cls).items())


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--shuffle"], True),
        (["--no-shuffle"], False),
        (["--shuffle=false"], False),
        (["--no-shuffle=true"], False),
        (["--no_shuffle=false"], True),
    ],
)
def test_a_negated_flag_means_its_opposite(argv: list[str], value: bool):
    """--no-shuffle=true cannot switch shuffling on."""
    assert parse(train_sft.Config, argv)[0].shuffle is value


def values(hint) -> st.SearchStrategy:
    """Return a strategy for values of a field's type."""
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    text = st.text(min_size=1, max_size=6).filter(lambda t: not t.startswith("-"))
    kinds = {int: st.integers(), float: st.floats(), bool: st.booleans(), str: text}
    return kinds.get(hint, st.lists(text, min_size=1))


@quick
@given(st.sampled_from(CONFIGS), st.data())
def test_what_is_written_is_read_back(tmp_path: Path, cls: type, data):
    """Values of all flags make the same config as words and as the file that to_json writes."""
    hints = {name: hint for name, hint in get_type_hints(cls).items() if name != "config"}
    expected = cls(**{name: data.draw(values(hint)) for name, hint in hints.items()})
    argv = []
    for name, value in vars(expected).items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif name != "config":
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    path = tmp_path / "config.json"
    path.write_text(config.to_json(expected))
    from_file, errors = parse(cls, ["--config", str(path)])
    assert from_file, errors
    from_file.config = ""
    from_words, errors = parse(cls, argv)
    assert from_words, errors
    # By repr: NaN does not equal itself.
    assert repr(from_file) == repr(expected) == repr(from_words)


any_flags = st.dictionaries(flag_names | texts, json_values, max_size=3)


@quick
@given(any_flags.map(json.dumps).map(str.encode) | lines)
@example(b"[" * 100_000)
def test_any_config_file_is_taken_or_rejected_by_name(tmp_path: Path, content: bytes):
    """Unknown flags, values that do not fit, or no JSON at all: one line names the file."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    flags, errors = parse(train_dpo.Config, ["--config", str(path)])
    if flags is None:
        assert errors.startswith("error: ") and "config.json" in errors
        return
    for value in json.loads(content).values():  # a flag has no place for anything else
        items = value if isinstance(value, list) else [value]
        assert all(isinstance(item, (str, int, float)) for item in items)
