"""The valid range of every number of every program: declared with its field, shown, and checked."""

import dataclasses
import importlib
import json
import math
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

import commandline
from commandline import Range

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.stem for path in ROOT.glob("train_*.py"))
PROGRAMS = {name: "Config" for name in [*SCRIPTS, "best_of_n"]}
PROGRAMS |= {
    "generate": "Flags",
    "constitution": "Flags",
    "score": "Flags",
    "hf": "New",
    "plan": "Plan",
}


def flags_of(program: str) -> type:
    return getattr(importlib.import_module(program), PROGRAMS[program])


def numbers_of(cls: type) -> dict[str, type]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if hints[f.name] in (int, float)}


NUMBERS = [(program, name) for program in PROGRAMS for name in numbers_of(flags_of(program))]


def edges(valid: Range, kind: type) -> tuple[list, list]:
    """Return values just inside and just outside of a range."""
    inside, outside = [], []
    for end, open_end, sign in ((valid.low, valid.above, -1), (valid.high, valid.below, 1)):
        if not math.isfinite(end):
            continue
        if kind is int:
            ends = [(int(end), int(end) + sign)]
            inside += [a for a, _ in ends]
            outside += [b for _, b in ends]
            continue
        near_in = math.nextafter(end, -sign * math.inf)
        near_out = math.nextafter(end, sign * math.inf)
        inside.append(near_in)
        (outside if open_end else inside).append(end)
        outside.append(near_out)
    outside = [value for value in outside if not (valid.zero and value == 0)]
    if kind is float:
        outside += [math.inf, -math.inf, math.nan]
    return inside, outside


def parsed(cls: type, name: str, value) -> object:
    text = repr(value) if isinstance(value, float) else str(value)
    return getattr(commandline.parse(cls, "", [f"--{name.replace('_', '-')}={text}"]), name)


@pytest.mark.slow
@pytest.mark.parametrize(("program", "name"), NUMBERS)
def test_every_number_is_checked_at_the_ends_of_its_range(program: str, name: str, capsys):
    """Taken just inside; just outside refused by one line with the range; the default is inside."""
    cls = flags_of(program)
    kind, valid = numbers_of(cls)[name], commandline.ranges(cls)[name]
    default = next(f.default for f in dataclasses.fields(cls) if f.name == name)
    assert default in valid
    inside, outside = edges(valid, kind)
    assert outside
    for value in inside:
        assert parsed(cls, name, value) == value
    flag = name.replace("_", "-")
    for value in outside:
        with pytest.raises(SystemExit) as stopped:
            parsed(cls, name, value)
        assert stopped.value.code == 2
        message = capsys.readouterr().err
        assert message.startswith("error: --") and f"must be {valid}, not" in message, message
        assert message.count("\n") == 1
        broken = dataclasses.replace(cls(), **{name: value})  # made by a program, not parsed
        with pytest.raises(ValueError, match=f"--{flag} must be"):
            commandline.check_ranges(broken)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_shows_every_range(program: str):
    cls = flags_of(program)
    text = " ".join(commandline.help_text(cls, "").split())
    for name, valid in commandline.ranges(cls).items():
        section = text.partition(f"--{name.replace('_', '-')} ")[2]
        assert str(valid) in section[:400], name


def test_a_config_file_is_checked_too(tmp_path: Path, capsys):
    """JSON numbers outside a range, and words in their place."""
    cls = flags_of("train_dpo")
    for value, complaint in ((-1, "lr must be at least 0, not -1"), ("much", "must be a number")):
        (tmp_path / "c.json").write_text(json.dumps({"lr": value}))
        with pytest.raises(SystemExit):
            commandline.parse(cls, "", ["--config", str(tmp_path / "c.json")])
        assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "flags"),
    [
        ("train_dpo", "--lr -1"),
        ("train_dpo", "--label-smoothing 2"),
        ("train_dpo", "--eps 0"),
        ("train_dpo", "--beta2 1"),
        ("train_dpo", "--clip -1"),
        ("train_dpo", "--lora -4"),
        ("train_dpo", "--max-tokens 0"),
        ("train_ppo", "--lam 5"),
        ("train_ppo", "--gamma 1.5"),
        ("train_ppo", "--ppo-epochs 0"),
        ("train_ppo", "--timeout-minutes -1"),
        ("train_reinforce", "--temperature 0"),
        ("train_reinforce", "--group-size 0"),
        ("train_reinforce", "--seed -1"),
        ("train_distill", "--on-policy 2"),
        ("generate", "--top-p 0"),
        ("generate", "--temperature -1"),
    ],
)
def test_senseless_values_are_refused(program: str, flags: str, capsys):
    with pytest.raises(SystemExit):
        commandline.parse(flags_of(program), "", flags.split())
    assert "must be" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("data.toyworld", "make --out never --sft -1"),
        ("data.toyworld", "make --out never --seed -1"),
        ("demo", "--out never --seeds 0 -1"),
        ("demo", "--out never --seeds 1 1"),
    ],
)
def test_programs_without_a_config_check_their_numbers_too(program: str, words: str, monkeypatch):
    """Status 2 and one line that names the flag, before anything is written."""
    monkeypatch.setattr(sys, "argv", [program, *words.split()])
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(program).main()
    assert caught.value.code == 2
    assert not Path("never").exists()
