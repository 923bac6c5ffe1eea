"""Any command line and any --config file is a config, or an error in one line. Never a crash."""

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from strategies import json_values, lines, quick, texts

import commandline
import train_dpo
import train_kto
import train_sft

CONFIGS = [train_sft.Config, train_dpo.Config, train_kto.Config]
flag_names = st.sampled_from([name for cls in CONFIGS for name in cls.__dataclass_fields__])


def spell(no: str, name: str, dashes: bool) -> str:
    return f"--{no}{name.replace('_', '-') if dashes else name}"


spelled = st.builds(spell, st.sampled_from(["", "", "no-", "no_"]), flag_names, st.booleans())
words = st.text(max_size=8)
words |= st.sampled_from(["1", "-1", "0.5", "1e-7", "nan", "auto", "true", "9" * 5000, "--", "--="])
argvs = st.lists(spelled | words | st.builds("{}={}".format, spelled, words), max_size=6)
argvs = argvs.map(lambda argv: [word for word in argv if word not in ("-h", "--help")])


def parsed(cls: type, argv: list[str]):
    """Return (config or None, the text on standard error)."""
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        try:
            return commandline.parse(cls, "", argv), stderr.getvalue()
        except SystemExit as stop:
            assert stop.code == 2
            return None, stderr.getvalue()


def fits(value, hint) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is list:
        return isinstance(value, list) and all(isinstance(v, str) for v in value)
    return type(value) is hint


@settings(quick, max_examples=300)
@given(st.sampled_from(CONFIGS), argvs)
def test_any_command_line_is_taken_or_refused_in_one_line(cls: type, argv: list[str]):
    """A config whose fields have their types, or status 2 with one line."""
    flags, stderr = parsed(cls, argv)
    if flags is None:
        line_feeds = sum(word.count("\n") for word in argv)
        assert stderr.startswith("error: ") and stderr.count("\n") <= 1 + line_feeds
    else:
        assert not stderr
        for name, hint in get_type_hints(cls).items():
            assert fits(getattr(flags, name), hint)


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
    assert parsed(train_sft.Config, argv)[0].shuffle is value


def values(hint, valid: commandline.Range | None = None) -> st.SearchStrategy:
    if valid and hint is int:
        return st.integers(int(valid.low), int(valid.high))
    if valid:
        low, high = (None if math.isinf(end) else end for end in (valid.low, valid.high))
        inside = st.floats(low, high, exclude_min=valid.above, exclude_max=valid.below)
        return inside.filter(math.isfinite)
    if get_origin(hint) is Literal:
        return st.sampled_from(get_args(hint))
    text = st.text(min_size=1, max_size=6).filter(lambda t: not t.startswith("-"))
    kinds = {int: st.integers(), float: st.floats(), bool: st.booleans(), str: text}
    return kinds.get(hint, st.lists(text, min_size=1))


@pytest.mark.slow
@quick
@given(st.sampled_from(CONFIGS), st.data())
def test_written_configs_are_read_back(tmp_path: Path, cls: type, data):
    """Random values of all flags, given as flags or in to_json's file, make the same config."""
    hints = {name: hint for name, hint in get_type_hints(cls).items() if name != "config"}
    ranges = commandline.ranges(cls)
    drawn = {name: data.draw(values(hint, ranges.get(name))) for name, hint in hints.items()}
    wanted = cls(**drawn)
    argv = []
    for name, value in vars(wanted).items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        elif name != "config":
            argv += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    path = tmp_path / "config.json"
    path.write_text(commandline.to_json(wanted))
    by_file, stderr = parsed(cls, ["--config", str(path)])
    assert by_file, stderr
    by_file.config = ""
    by_flags, stderr = parsed(cls, argv)
    assert repr(by_file) == repr(by_flags) == repr(wanted)


any_config = st.dictionaries(flag_names | texts, json_values, max_size=3)


@quick
@given(any_config.map(json.dumps).map(str.encode) | lines)
@example(b"[" * 100_000)
def test_any_config_file_is_taken_or_refused_by_name(tmp_path: Path, content: bytes):
    """Unknown flags, wrong values, no JSON: the error is one line with the name of the file."""
    path = tmp_path / "config.json"
    path.write_bytes(content)
    flags, stderr = parsed(train_dpo.Config, ["--config", str(path)])
    if flags is None:
        assert stderr.startswith("error: ") and "config.json" in stderr
        return
    for value in json.loads(content).values():
        items = value if isinstance(value, list) else [value]
        assert all(isinstance(item, (str, int, float)) for item in items)
