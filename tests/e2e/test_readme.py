"""Law 10: the README is true: its commands run in order, and what it shows but cannot run here at least parses."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import train_dpo
import train_sft
from config import parse
from data import prepare

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", TEXT, re.S)
COMMANDS = [
    line
    for block in BLOCKS
    for line in block.splitlines()
    if line.startswith(("python", "torchrun"))
]


def test_every_command_runs_as_written(tmp_path: Path):
    """Line by line in a copy of the project; training is cut to three steps, sampling to eight rows or prompts."""
    pytest.importorskip("matplotlib")
    for name in ("data", "kernels"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    assert len(COMMANDS) >= 10
    for line in COMMANDS:
        start, *words = shlex.split(line)
        words = [
            sys.executable,
            *(["-m", "torch.distributed.run"] if start == "torchrun" else []),
            *words,
        ]
        if "train_" in line:
            words += ["--max-steps", "3"]
        if "train_rejection" in line:
            words += ["--prompts", "8"]
        if words[1] == "generate.py" and "--data" in words:
            words += ["--limit", "8"]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, cwd=tmp_path, env=one_thread, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "runs" / "curves.png").stat().st_size > 10_000


def test_make_targets_exist():
    """`make demo` and `make test` are targets of the Makefile."""
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
    wanted = re.findall(r"^make (\w+)", "\n".join(BLOCKS), re.M)
    assert wanted and set(wanted) <= set(targets)


def test_the_recipe_parses():
    """The Zephyr commands name flags that exist, with values that fit; its data set is one that prepare.py knows."""
    lines = [
        shlex.split(line)[1:]
        for line in re.search(r"```text\n(.*?)```", TEXT, re.S)[1].splitlines()
    ]
    config = parse(train_dpo.Config, "", lines[1][1:])
    assert (config.beta, config.lr, config.batch_size, config.template) == (
        0.01,
        5e-7,
        128,
        "zephyr",
    )
    assert lines[0][0] == "data/prepare.py" and lines[0][1] in prepare.SETS


def test_scripts_and_losses_that_the_readme_names_exist():
    """Every file in the table is there, and the list of losses is the list of losses."""
    for name in re.findall(r"^\| `([\w/]+\.py)", TEXT, re.M):
        assert (ROOT / name).exists()
    named = re.search(r"Losses of `train_dpo.py`: (.*?); with", TEXT, re.S)[1]
    named = re.sub(r"\(.*?\)", "", named.replace("\n", " "))
    choices = train_dpo.Config.__dataclass_fields__["loss"].type.__args__
    assert {name.strip() for name in named.split(",")} == set(choices)
    assert train_sft.Config().lr == 2e-5
