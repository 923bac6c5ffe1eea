"""Laws of the house: imports go downward, every flag is read, scripts share their sections, the README is true."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from config import RunConfig

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.py"))
LAYERS = [  # a file imports only from lines above its own; on its own line only what is named there before it
    ["config", "losses", "kernels.device", "kernels.tiles", "kernels.rmsnorm", "kernels.rope", "kernels.swiglu",
     "kernels.attention", "kernels.logprob"],
    ["parallel", "data.tokenizer", "data.templates", "data.formats", "data.attributes", "data.dataset", "data.trees",
     "data.mismatched", "data.toyworld", "data.prepare"],
    ["model"],
    ["hf", "plan", "checkpoint", "generate", "score", "rewards"],
    ["rollout", "runtime"],
]  # fmt: skip


def imports(path: Path) -> set[str]:
    """Project modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if (ROOT / (name.replace(".", "/") + ".py")).exists()}


def test_imports_go_downward():
    """A library imports what lies below it; a script imports libraries, never a script; nobody imports a script."""
    order = [name for layer in LAYERS for name in layer]
    files = [*ROOT.glob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("data/*.py")]
    for path in files:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name == "__init__.py":
            continue
        below = order[: order.index(name)] if name in order else order
        assert imports(path) <= set(below), f"{name} imports {imports(path) - set(below)}"
    known = set(order) | {name[:-3] for name in SCRIPTS} | {"demo", "plot", "data.__init__", "kernels.__init__"}
    assert {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in files} == known


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script: str):
    """Every field that a script's Config has is read in the script or in what all scripts share."""
    shared = "".join((ROOT / name).read_text() for name in ("runtime.py", "config.py", "rollout.py"))
    text = (ROOT / script).read_text() + shared
    config = importlib.import_module(script[:-3]).Config
    read = set(re.findall(r"\b(?:config|flags)\.(\w+)", text)) | {"config"}
    assert set(config.__dataclass_fields__) <= read, set(config.__dataclass_fields__) - read


def test_train_scripts_have_the_same_sections_in_the_same_order():
    """So that a diff of two scripts is the difference of two algorithms."""

    def sections(script: str) -> list[str]:
        text = (ROOT / script).read_text()
        return [name.split(" and ")[0] for name in re.findall(r"^ *# ---- ([a-z ]+) -+$", text, re.M)]

    assert sections("train_dpo.py") == ["the algorithm", "data", "model", "the loop"]
    for script in SCRIPTS:
        assert sections(script) == sections("train_dpo.py")
        assert len((ROOT / script).read_text().splitlines()) <= 300


def test_no_unfinished_marks():
    """What is committed is finished."""
    marks = "|".join(("TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error"))
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for path in listed.stdout.split():
        if path.endswith((".py", ".md", "Makefile", "run")):
            text = (ROOT / path).read_text()
            assert not re.search(rf"\b({marks})\b", text), path


def test_weights_cannot_run_code():
    """Nothing is unpickled: no torch.load, no pickle, anywhere in the project."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("kernels/*.py")]:
        assert not re.search(r"torch\.load|\bpickle\b|np\.load\((?!.*mmap_mode)|allow_pickle=True", path.read_text())


def test_shared_flags_are_those_of_every_script():
    """--help of each script runs and names every shared flag."""
    for script in SCRIPTS:
        command = [sys.executable, str(ROOT / script), "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        for name in RunConfig.__dataclass_fields__:
            assert name.replace("_", "-") in done.stdout
