"""Law 10: every command of the README runs as written; what cannot run here at least parses."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_dpo
from commandline import parse
from data import prepare

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
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
    for name in ("data", "kernels", "sampling", "weights"):
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


def test_the_recipe_parses():
    """The Zephyr commands name flags that exist, values that fit and a data set of prepare.py."""
    recipe = re.search(r"```text\n(python.*?)```", TEXT, re.S)[1]
    prepared, trained = [shlex.split(line)[1:] for line in recipe.splitlines()]
    config = parse(train_dpo.Config, "", trained[1:])
    assert (config.beta, config.lr) == (0.01, 5e-7)
    assert (config.batch_size, config.template) == (128, "zephyr")
    assert prepared[0] == "data/prepare.py" and prepared[1] in prepare.SETS


def test_scripts_and_losses_that_the_readme_names_exist():
    """Every file of the table of commands is there, and its list of losses is that of --loss."""
    for name in re.findall(r"^\| `([\w/]+\.py)", TEXT, re.M):
        assert (ROOT / name).exists()
    named = re.search(r"Losses of `train_dpo.py`: (.*?); with", TEXT, re.S)[1]
    named = re.sub(r"\(.*?\)", "", named.replace("\n", " "))
    choices = train_dpo.Config.__dataclass_fields__["loss"].type.__args__
    assert {name.strip() for name in named.split(",")} == set(choices)
