"""The command line: precedence, both spellings, help in groups, errors that name the fix."""

import dataclasses
import importlib
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

import commandline
import config
import elsewhere
import train_dpo
from commandline import parse
from config import RunConfig


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
    (tmp_path / "c.json").write_text(commandline.to_json(flags))
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


def test_flags_of_other_systems_get_a_hint():
    """Every hint names flags that some script has; each script gives those that it has itself."""
    scripts = [path.stem for path in Path(__file__).parents[2].glob("train_*.py")]
    known = {
        f.name
        for script in scripts
        for f in dataclasses.fields(importlib.import_module(script).Config)
    }
    several = {name: hints for name, hints in elsewhere.FLAGS.items() if isinstance(hints, tuple)}
    assert set(several) == {"beta"}  # a flag of some scripts, and another one elsewhere
    hints = [(name, hint) for name, hints in several.items() for hint in hints]
    for theirs, hint in [*hints, *elsewhere.FLAGS.items()]:
        if isinstance(hint, tuple):
            continue
        assert theirs not in known or theirs in several, f"--{theirs} is a flag here"
        named = {flag.replace("-", "_") for flag in re.findall(r"--([a-z0-9-]+)", hint)}
        assert named <= known, (theirs, named - known)
        assert hint.startswith("--") or not hint.startswith("-")
    for name, value in elsewhere.VALUES:
        assert name in known
        hints = [get_type_hints(importlib.import_module(script).Config) for script in scripts]
        assert any(name in hint and value not in get_args(hint[name]) for hint in hints), value


@pytest.mark.parametrize(
    ("script", "words", "named"),
    [
        ("train_dpo", "--learning_rate 1e-6", "unknown flag --learning_rate: here it is --lr"),
        ("train_dpo", "--use_peft", "here it is --lora 16"),
        ("train_dpo", "--report_to wandb", "here it is --wandb PROJECT or --tensorboard"),
        ("train_dpo", "--gradient-accumulation-steps 8", "leave it out: --batch-size counts"),
        ("train_dpo", "--rpo_alpha 1", "here it is --sft-weight"),
        ("train_dpo", "--loss orpo", "docs/add_an_algorithm.md adds ORPO"),
        ("train_dpo", "--loss dpo", "DPO's loss is sigmoid"),
        ("train_dpo", "--dtype bfloat16", "not 'bfloat16' (bf16)"),
        ("train_sft", "--num_generations 8", "unknown flag --num_generations; --help lists them"),
        ("train_reinforce", "--num_generations 8", "here it is --group-size"),
        ("train_ppo", "--init_kl_coef 0.1", "here it is --kl"),
        ("train_reinforce", "--beta 0.04", "here it is --kl"),
        ("train_distill", "--beta 0.5", "here it is --mix, the share of jsd"),
    ],
)
def test_hints_at_flags_of_other_systems(script: str, words: str, named: str, capsys):
    """A script hints at its own flags only."""
    with pytest.raises(SystemExit):
        importlib.import_module(script).main(words.split())
    assert named in capsys.readouterr().err


def test_yaml_files_of_flags(tmp_path: Path, monkeypatch, capsys):
    """The same flags as JSON; without the package the error names it."""
    yaml = pytest.importorskip("yaml")
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump({"batch_size": 3, "lr": 1e-7, "data": ["x y", "z"]}))
    got = parse(Flags, None, ["--config", str(file)])
    assert (got.batch_size, got.lr, got.data) == (3, 1e-7, ["x y", "z"])
    file.write_text("batch_size: [1")
    assert "c.yaml is not YAML" in error_of(capsys, "--config", str(file))
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "pip install pyyaml" in error_of(capsys, "--config", str(file))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--eval-every 5", "--eval-every has nothing to evaluate: add --eval-data"),
        ("--samples 5", "--samples answers prompts of --eval-data: add that"),
        ("--lora-alpha 8", "--lora-alpha is for --lora or --adapter"),
        ("--rslora", "--rslora is for --lora or --adapter"),
    ],
)
def test_flags_without_effect_are_refused(words: str, named: str):
    with pytest.raises(ValueError, match=named):
        train_dpo.main(["--model", "m", "--data", "d", "--device", "cpu", *words.split()])


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
    assert heads == list(commandline.GROUPS)
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
    written = commandline.written_fields(config.RolloutConfig)
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
