"""The command line: precedence, both spellings, and refusals that name what would do."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config
from config import parse


@dataclass
class Flags:
    """One field of every kind."""

    config: str = ""  # file of flags
    batch_size: int = 8  # examples a step
    lr: float = 1e-3  # rate
    mode: Literal["red", "green", 3] = "red"  # a choice
    share: bool = True  # on unless refused
    loud: bool = False  # off unless asked for
    data: list[str] = field(default_factory=list)  # files


def refused(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(Flags, "doc", list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_default_then_file_then_flag(tmp_path: Path):
    """A flag wins over the file, the file over the default; both spellings are taken."""
    (tmp_path / "c.json").write_text(
        json.dumps({"batch_size": 16, "lr": 0.5, "mode": 3, "share": False})
    )
    got = parse(
        Flags,
        None,
        ["--lr", "2", "--config", str(tmp_path / "c.json"), "--batch-size", "4", "--loud"],
    )
    assert got == Flags(str(tmp_path / "c.json"), 4, 2.0, 3, False, True, [])
    assert parse(
        Flags, None, ["--batch_size=5", "--no-share", "--data", "a", "b", "--mode", "green"]
    ) == Flags(batch_size=5, share=False, data=["a", "b"], mode="green")


def test_a_config_reads_back_what_it_wrote(tmp_path: Path):
    """OUT/config.json is itself a valid --config."""
    flags = Flags(batch_size=3, lr=1e-7, mode=3, share=False, data=["x y", "z"])
    (tmp_path / "c.json").write_text(config.to_json(flags))
    got = parse(Flags, None, ["--config", str(tmp_path / "c.json")])
    assert got == flags.__class__(**{**vars(flags), "config": str(tmp_path / "c.json")})


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--batch-sise", "4"], "did you mean batch-size?"),
        (["--zzzz"], "--help lists them"),
        (["--batch-size", "4.5"], "needs a whole number, not '4.5'"),
        (["--batch-size"], "needs a value"),
        (["--lr", "fast"], "needs a number"),
        (["--mode", "gren"], "did you mean green?"),
        (["stray"], "unexpected word 'stray'"),
        (["--loud=maybe"], "true or false"),
        (["--config", "missing.json"], "missing.json: No such file"),
    ],
)
def test_bad_flags_are_refused_with_the_nearest_good_one(argv: list[str], named: str, capsys):
    """Status 2 and one line that says what would do."""
    assert named in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "named"),
    [("{", "is not JSON"), ("[]", "one JSON object"), ('{"lrr": 1}', "did you mean lr?"),
     ('{"lr": null}', "lr cannot be null"), ('{"batch_size": [1, 2]}', "takes one value"), ('{"lr": {}}', "cannot be")],
)  # fmt: skip
def test_bad_files_are_refused(text: str, named: str, tmp_path: Path, capsys):
    """The message names the file and the key."""
    (tmp_path / "c.json").write_text(text)
    error = refused(capsys, "--config", str(tmp_path / "c.json"))
    assert named in error and "c.json" in error


def test_help_shows_every_flag_with_its_comment(capsys):
    """--help is the docstring, then a line of meaning for every field."""
    with pytest.raises(SystemExit) as stop:
        parse(Flags, "What it does.", ["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("What it does.")
    for words in (
        "--batch-size N",
        "examples a step [8]",
        "--no-share",
        "--loud",
        "red|green|3",
        "--data TEXT",
    ):
        assert words in text


def test_every_shared_flag_has_a_meaning():
    """Every field of RunConfig carries a comment: it is its --help."""
    meanings = config.comments(config.RunConfig)
    assert set(meanings) == set(config.RunConfig.__dataclass_fields__)
    assert all(len(text) > 10 for text in meanings.values())


@given(st.lists(st.text(max_size=12), max_size=6))
def test_any_words_are_parsed_or_refused(words: list[str]):
    """No command line ends in anything but a config, the help, or status 2."""
    try:
        assert isinstance(
            parse(Flags, "", [word for word in words if word not in ("-h", "--help")]), Flags
        )
    except SystemExit as stop:
        assert stop.code == 2
