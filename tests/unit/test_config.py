"""The command line: precedence, both spellings, help in groups, errors that name the fix."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config
from config import RunConfig, parse


@dataclass
class Flags:
    """One field of every kind."""

    config: str = ""  # file of flags
    batch_size: int = 8  # examples a step
    lr: float = 1e-3  # rate
    mode: Literal["red", "green", 3] = "red"  # a choice

    # switches: on or off
    share: bool = True  # on unless
    # refused
    loud: bool = False  # off unless asked for
    data: list[str] = field(default_factory=list)  # files


@dataclass
class Script(RunConfig):
    """The flags of a training script."""

    own: int = 3  # a flag of its own
    lr: float = 1e-4  # another default

    # rollout
    drawn: int = 4  # how many


def error_of(capsys, *argv: str) -> str:
    """Return what a bad command line prints; assert that it exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        parse(Flags, "doc", list(argv))
    assert stop.value.code == 2
    return capsys.readouterr().err


def help_of(capsys, cls: type, doc: str) -> str:
    """Return what --help prints; assert that it exits with status 0."""
    with pytest.raises(SystemExit) as stop:
        parse(cls, doc, ["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_default_then_file_then_flag(tmp_path: Path):
    """A flag wins over the file, the file over the default; both spellings are accepted."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"batch_size": 16, "lr": 0.5, "mode": 3, "share": False}))
    got = parse(Flags, None, ["--lr", "2", "--config", str(path), "--batch-size", "4", "--loud"])
    assert got == Flags(str(path), 4, 2.0, 3, False, True, [])
    words = ["--batch_size=5", "--no-share", "--data", "a", "b", "--mode", "green"]
    wanted = Flags(batch_size=5, share=False, data=["a", "b"], mode="green")
    assert parse(Flags, None, words) == wanted


def test_a_config_reads_back_what_it_wrote(tmp_path: Path):
    """OUT/config.json is itself a valid --config."""
    flags = Flags(batch_size=3, lr=1e-7, mode=3, share=False, data=["x y", "z"])
    (tmp_path / "c.json").write_text(config.to_json(flags))
    got = parse(Flags, None, ["--config", str(tmp_path / "c.json")])
    assert got == flags.__class__(**{**vars(flags), "config": str(tmp_path / "c.json")})


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--batch-sise", "4"], "unknown flag --batch-sise: did you mean --batch-size?"),
        (["--zzzz"], "--help lists them"),
        (["--batch-size", "4.5"], "must be a whole number, not '4.5'"),
        (["--batch-size"], "needs a value"),
        (["--lr", "fast"], "--lr must be a number, not 'fast'"),
        (["--mode", "gren"], "must be one of red, green, 3, not 'gren' (did you mean green?)"),
        (["stray"], "unexpected word 'stray'"),
        (["--loud=maybe"], "--loud must be true or false"),
        (["--config", "missing.json"], "missing.json: No such file"),
    ],
)
def test_bad_flags_are_refused_with_the_nearest_good_one(argv: list[str], named: str, capsys):
    """Status 2 and one line that says what would do."""
    assert named in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "is not JSON"),
        ("[]", "one JSON object"),
        ('{"lrr": 1}', "did you mean lr?"),
        ('{"lr": null}', "lr cannot be null"),
        ('{"batch_size": [1, 2]}', "takes one value"),
        ('{"lr": {}}', "cannot be"),
    ],
)
def test_bad_files_are_refused(text: str, named: str, tmp_path: Path, capsys):
    """The message names the file and the key."""
    (tmp_path / "c.json").write_text(text)
    error = error_of(capsys, "--config", str(tmp_path / "c.json"))
    assert named in error and "c.json" in error


def test_help_shows_every_flag_with_its_comment(capsys):
    """The docstring without its legend of letters, then each flag: values, meaning, default."""
    text = help_of(capsys, Flags, "It does this.\n\nLetters: B examples.\n\n    run it\n")
    assert text.startswith("It does this.\n\n    run it\n\nflags:\n")
    for line in (
        "  --batch-size N",
        "        examples a step (default 8)",
        "  --mode red|green|3",
        "switches: on or off",
        "  --no-share",
        "        on unless refused",
        "  --loud",
        "  --data TEXT [TEXT ...]",
    ):
        assert f"\n{line}\n" in text


def test_help_puts_flags_in_groups_by_the_comments_above_them(capsys):
    """A script's own flags are the algorithm's; one that it only changes stays in its group."""
    text = help_of(capsys, Script, "doc")
    groups = text.split("\n\n")[1:]
    heads = [group.splitlines()[0].partition(":")[0] for group in groups]
    assert heads == list(config.GROUPS)
    by_name = dict(zip(heads, groups))
    assert by_name["algorithm"].splitlines()[1:] == [
        "  --own N",
        "        a flag of its own (default 3)",
    ]
    assert "--drawn N" in by_name["rollout"]
    assert "another default (default 0.0001)" in by_name["optimisation"]
    assert "--tp N" in by_name["layout"] and "--out TEXT" in by_name["output"]


def test_every_shared_flag_has_a_meaning():
    """Every field of RunConfig has a comment, which is its --help, and a group."""
    written = config.written_fields(config.RolloutConfig)
    assert set(written) == set(config.RolloutConfig.__dataclass_fields__)
    assert all(len(field.meaning) > 10 and field.group for field in written.values())


@given(st.lists(st.text(max_size=12), max_size=6))
def test_any_words_are_parsed_or_refused(words: list[str]):
    """No command line ends in anything but a config, the help, or status 2."""
    argv = [word for word in words if word not in ("-h", "--help")]
    try:
        assert isinstance(parse(Flags, "", argv), Flags)
    except SystemExit as stop:
        assert stop.code == 2
