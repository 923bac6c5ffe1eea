"""Law 10: every command of the README and the demo's page runs; what cannot run here parses."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_dpo
from commandline import check_ranges, parse
from data import prepare

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
DEMO = (ROOT / "docs" / "demo.md").read_text()  # makes the models that the README's commands name
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", DEMO + TEXT, re.S)
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith(("python", "torchrun"))]


def shortened(line: str) -> list[str]:
    """Return a command's words, with training cut to three steps and sampling to eight rows.

    "python train_sft.py --lr 1" -> [python, "train_sft.py", "--lr", "1", "--max-steps", "3"]
    """
    start, *words = shlex.split(line)
    launcher = ["-m", "torch.distributed.run"] if start == "torchrun" else []
    if "train_" in line:
        words += ["--max-steps", "3"]
    if "--prompts" in words:
        words += ["--prompts", "8"]
    if words[0] == "generate.py" and "--data" in words:
        words += ["--limit", "8"]
    return [sys.executable, *launcher, *words]


def test_every_command_runs_as_written(tmp_path: Path):
    """The commands run one after another in a copy of the project and end with a picture."""
    pytest.importorskip("matplotlib")
    for name in ("data", "kernels", "plots", "sampling", "weights"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    assert len(COMMANDS) >= 10
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for line in COMMANDS:
        done = subprocess.run(
            shortened(line), cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "runs" / "curves.png").stat().st_size > 10_000


def test_make_targets_exist():
    """Every `make NAME` of the README is a target of the Makefile."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    named = re.findall(r"^make (\w+)", "\n".join(LINES), re.M)
    assert named and set(named) <= set(targets)


def test_recipes_parse():
    """Every command of the recipes names flags that exist, values that fit, known data sets."""
    commands = re.findall(r"^python (.*)$", RECIPES, re.M)
    assert len(commands) >= 7
    for words in map(shlex.split, commands):
        if words[0].startswith("train_"):
            module = importlib.import_module(words[0].removesuffix(".py"))
            config = parse(module.Config, "", words[1:])
            check_ranges(config)
        elif words[0] == "data/prepare.py":
            assert words[1] in prepare.SETS
        else:
            assert (ROOT / words[0]).exists()
    assert (config.beta, config.lr, config.batch_size) == (0.01, 5e-7, 128)  # of Zephyr's DPO


def test_published_settings_parse():
    """The flags in the table of published settings exist, and their values fit."""
    scripts = {"SFT": "sft", "DPO": "dpo", "SimPO": "dpo", "KTO": "kto", "reward": "rm"}
    scripts |= {"PPO": "ppo", "DAPO": "reinforce"}
    rows = [line.split("|")[1:-1] for line in RECIPES.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 12
    for recipe, _, rate, *_, flags, _ in rows:
        script = scripts[re.match(r"\w+", recipe.strip())[0]]
        module = importlib.import_module(f"train_{script}")
        for lr in re.findall(r"[0-9]e-[0-9]", rate):
            words = shlex.split(" ".join(re.findall(r"`(--[^`]*)`", flags)))
            check_ranges(parse(module.Config, "", [*words, "--lr", lr]))


def test_scripts_and_losses_that_the_readme_names_exist():
    """Every file of the table of commands is there, and its list of losses is that of --loss."""
    for name in re.findall(r"^\| `([\w/]+\.py)", TEXT, re.M):
        assert (ROOT / name).exists()
    named = re.search(r"Losses of `train_dpo.py`: (.*?); with", TEXT, re.S)[1]
    named = re.sub(r"\(.*?\)", "", named.replace("\n", " "))
    choices = train_dpo.Config.__dataclass_fields__["loss"].type.__args__
    assert {name.strip() for name in named.split(",")} == set(choices)
