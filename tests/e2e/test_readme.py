"""Law 10: every command of the README and the demo's page runs; what cannot run here parses."""

import functools
import importlib
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from forked import Ranks

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


def shortened(line: str) -> tuple[int, list[str]]:
    """Return ranks and words of a command, with training cut to three steps, sampling to 8 rows.

    "torchrun --nproc_per_node 2 train_sft.py --lr 1" -> (2, ["train_sft.py", "--lr", "1", ...])
    """
    start, *words = shlex.split(line)
    ranks = 1
    if start == "torchrun":
        assert words[0] == "--nproc_per_node"
        ranks, words = int(words[1]), words[2:]
    if "train_" in line:
        words += ["--max-steps", "3"]
    if "--prompts" in words:
        words += ["--prompts", "8"]
    if words[0] == "generate.py" and "--data" in words:
        words += ["--limit", "8"]
    return ranks, words


def run_as_main(words: list[str], folder: Path, rank: int) -> None:
    """Do what `python WORDS` does in a folder, as one of the ranks that torchrun starts."""
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    if words[0] == "-m":
        words = [words[1].replace(".", "/") + ".py", *words[2:]]
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def test_every_command_runs_as_written(tmp_path: Path):
    """The commands run one after another in a copy of the project and end with a picture."""
    pytest.importorskip("matplotlib")
    for name in ("data", "kernels", "plots", "sampling", "weights"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    assert len(COMMANDS) >= 20
    for i, line in enumerate(COMMANDS):
        count, words = shortened(line)
        body = functools.partial(run_as_main, words, tmp_path)
        ranks = Ranks(count, body, tmp_path / f"output_{i}")
        codes = ranks.wait()
        assert codes == [0] * count, f"{line}\n" + "".join(map(ranks.text, range(count)))
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
    scripts = {"SFT": "sft", "DPO": "dpo", "Length": "dpo", "SimPO": "dpo", "KTO": "kto"}
    scripts |= {"reward": "rm", "PPO": "ppo", "DAPO": "reinforce"}
    table = RECIPES.partition("| recipe |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) >= 12
    for recipe, _, rate, *_, flags, _ in rows:
        script = scripts[re.match(r"\w+", recipe.strip())[0]]
        module = importlib.import_module(f"train_{script}")
        for lr in re.findall(r"[0-9]e-[0-9]", rate):
            words = shlex.split(" ".join(re.findall(r"`(--[^`]*)`", flags)))
            check_ranges(parse(module.Config, "", [*words, "--lr", lr]))


def test_the_translated_grpo_script_parses():
    """The command that stands for TRL's GRPO script in docs/from_trl.md is one that runs."""
    page = (ROOT / "docs" / "from_trl.md").read_text()
    (command,) = re.findall(r"```sh\n(torchrun .*?)```", page, re.S)
    words = shlex.split(command.replace("\\\n", " "))
    module = importlib.import_module(words[3].removesuffix(".py"))
    check_ranges(parse(module.Config, "", words[4:]))


def test_scripts_and_losses_that_the_readme_names_exist():
    """Every file of the table of commands is there, and its list of losses is that of --loss."""
    for name in re.findall(r"^\| `([\w/]+\.py)", TEXT, re.M):
        assert (ROOT / name).exists()
    named = re.search(r"Losses of `train_dpo.py`: (.*?)\.\s+All", TEXT, re.S)[1]
    named = re.sub(r"\(.*?\)", "", named.replace("\n", " "))
    choices = train_dpo.Config.__dataclass_fields__["loss"].type.__args__
    assert {name.strip() for name in named.split(",")} == set(choices)
