"""Laws of the scripts: the same structure and flags in each; and what no file may contain."""

import ast
import importlib
import subprocess
from pathlib import Path

import pytest

import commandline
from config import RunConfig

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.py"))

# What main of every script calls, in this order.
STRUCTURE = [
    "parse", "start", "plan_steps", "describe", "make_optimizer", "begin", "remaining",
    "examples", "pipeline", "backward", "learning_rate", "step", "check_update", "report_step",
    "evaluation_due", "report_evaluation", "is_best", "save_model", "save_or_stop", "finish",
]  # read across, like a sentence  # fmt: skip
UNORDERED = {"learning_rate", "examples"}  # before or after their neighbours as an algorithm needs


def calls(function: ast.AST) -> list[str]:
    """Return the names of the functions and methods that a function calls, in source order."""
    nodes = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    nodes.sort(key=lambda node: (node.end_lineno, node.end_col_offset))
    return [ast.unparse(node.func).rpartition(".")[2] for node in nodes]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_have_the_same_structure(script: str):
    """Docstring with the commands, Config, the algorithm, main with the same calls in one order.

    So a diff of two scripts explains the difference between two algorithms.
    """
    text = (ROOT / script).read_text()
    tree = ast.parse(text)
    doc = ast.get_docstring(tree)
    assert f"\n    python {script} --" in doc or f"python {script} --" in doc
    assert "torchrun --nproc_per_node 8" in doc and "\nWatch " in doc
    rulers = [line.strip() for line in text.splitlines() if line.strip().startswith("# ---- ")]
    names = [ruler.strip("#- ") for ruler in rulers]
    assert [name.partition(" and ")[0] for name in names] == [
        "the algorithm",
        "data",
        "model",
        "the loop",
    ]
    defined = {node.name: node for node in tree.body if hasattr(node, "name")}
    assert "Config" in defined and list(defined)[-1] == "main"
    called = iter(calls(defined["main"]))
    for name in STRUCTURE:
        if name in UNORDERED:
            assert name in calls(defined["main"]), f"main does not call {name}"
        else:
            assert name in called, f"main does not call {name}, or not after what goes before it"
    assert len(text.splitlines()) <= 300


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_flag_in_its_group(script: str, capsys):
    """--help opens with what the script does, then lists flags in groups, without a legend."""
    module = importlib.import_module(script[:-3])
    with pytest.raises(SystemExit, match="^0$"):
        module.main(["--help"])
    text = capsys.readouterr().out
    assert text.startswith(module.__doc__.strip().splitlines()[0])
    assert "Letters:" not in text
    assert max(map(len, text.splitlines())) <= 100
    heads = [line for line in text.splitlines() if line.startswith(commandline.GROUPS)]
    groups = [name for name in commandline.GROUPS if any(line.startswith(name) for line in heads)]
    assert set(groups) >= set(commandline.GROUPS) - {"rollout", "algorithm"}
    for name in RunConfig.__dataclass_fields__:
        flag = name.replace("_", "-")
        assert f"\n  --{flag} " in text or f"\n  --{flag}\n" in text or f"\n  --no-{flag}\n" in text
    written = commandline.written_fields(module.Config)
    assert all(len(written[name].meaning) > 10 for name in module.Config.__dataclass_fields__)


def test_no_unfinished_marks():
    """Committed files carry no marks of unfinished work."""
    marks = ["TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error"]
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for path in listed.stdout.split():
        if path.endswith((".py", ".md", "Makefile", "run")):
            text = (ROOT / path).read_text()
            assert not any(mark in text for mark in marks), path


def test_weights_cannot_run_code():
    """Nothing is unpickled, anywhere in the project."""
    for path in ROOT.rglob("*.py"):
        name = str(path.relative_to(ROOT))
        if name.startswith((".", "shared/", "tests/", "bench/")):
            continue
        assert not imports_of_anything(path) & {"pickle", "cloudpickle", "dill"}, name
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert called != "torch.load", f"{name}: torch.load"
            assert keywords.get("allow_pickle", "False") == "False", f"{name}: allow_pickle"
            if called == "np.load":
                assert "mmap_mode" in keywords, f"{name}: np.load without mmap_mode"


def imports_of_anything(path: Path) -> set[str]:
    """Return the top-level names of all modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names
