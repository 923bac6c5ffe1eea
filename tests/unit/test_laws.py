"""Laws of the project: imports go downward, every flag is read, scripts have the same structure."""

import ast
import importlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import config
from config import RunConfig

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(path.name for path in ROOT.glob("train_*.py"))
# A module imports only from its own line and those before it; a package counts as one module.
# Other top-level files are scripts and commands: they import these, and nobody imports them.
LAYERS = [
    ["config", "losses", "architecture", "layout", "kernels"],
    ["parallel", "data"],
    ["layers", "mixers", "model"],
    ["optimizer", "pipeline"],
    ["weights"],
    ["checkpoint", "passes", "sampling"],
    ["plan", "reporting"],
    ["runtime"],
    ["training", "reference"],
]
LIBRARIES = [name for layer in LAYERS for name in layer]


def modules() -> dict[str, Path]:
    """Return the project's modules, tests and bench left out: name -> file."""
    files = [*ROOT.glob("*.py")]
    for package in LIBRARIES:
        files += (ROOT / package).glob("*.py")
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in names.items()}


def imports(path: Path) -> set[str]:
    """Return the modules of the project that a file imports, anywhere in it."""
    known, names = modules(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            of = {f"{node.module}.{alias.name}" for alias in node.names} & known.keys()
            names |= of or {node.module}
    return names & known.keys()


def layer(module: str) -> int:
    """Return the number of a module's layer; scripts and commands are above all others."""
    top = module.partition(".")[0]
    return next((i for i, names in enumerate(LAYERS) if top in names), len(LAYERS))


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_downward(module: str):
    """No module imports from a layer above its own, nor a script or command."""
    for name in imports(modules()[module]):
        assert layer(name) <= layer(module), f"{module} imports {name} from a layer above it"
        assert layer(name) < len(LAYERS), f"{module} imports {name}, which is a script or command"


def test_imports_have_no_circle():
    """Modules can be put in an order in which each imports only earlier ones."""
    left = {name: imports(path) - {name} for name, path in modules().items()}
    while free := {name for name in left if not left[name] & left.keys()}:
        for name in free:
            del left[name]
    assert not left, f"in a circle, or above one: {sorted(left)}"


def test_every_layer_exists():
    """The list of layers names modules and packages that are there."""
    assert set(LIBRARIES) <= {name.partition(".")[0] for name in modules()}


def reads(module: str) -> Iterator[str]:
    """Yield every NAME of `config.NAME` and `flags.NAME` in a module and in all that it imports."""
    known, seen, pending = modules(), set(), {module}
    while pending:
        path = known[pending.pop()]
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(
                    ast.Name("config" | "flags") | ast.Attribute(attr="config"), name
                ):
                    yield name
        pending |= {name for name in imports(path) if known[name] not in seen}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script: str):
    """The script or a library below it reads every field of the script's Config."""
    fields = set(importlib.import_module(script[:-3]).Config.__dataclass_fields__)
    unread = fields - set(reads(script[:-3])) - {"config"}  # parse reads --config itself
    assert not unread, unread


# What main of every script calls, in this order.
STRUCTURE = [
    "parse", "start", "plan_steps", "describe", "make_optimizer", "begin", "remaining",
    "examples", "pipeline", "backward", "learning_rate", "step", "check_update", "report_step",
    "evaluation_due", "report_evaluation", "is_best", "save_model", "save_or_stop", "finish",
]  # fmt: skip
UNORDERED = {"learning_rate", "examples"}  # before or after their neighbours as an algorithm needs


def calls(function: ast.AST) -> list[str]:
    """Return the names of the functions and methods that a function calls, in source order."""
    found = [node for node in ast.walk(function) if isinstance(node, ast.Call)]
    found.sort(key=lambda node: (node.end_lineno, node.end_col_offset))
    return [node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
            for node in found if isinstance(node.func, ast.Attribute | ast.Name)]  # fmt: skip


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
    heads = [line for line in text.splitlines() if line.startswith(config.GROUPS)]
    groups = [name for name in config.GROUPS if any(line.startswith(name) for line in heads)]
    assert set(groups) >= set(config.GROUPS) - {"rollout", "algorithm"}
    for name, hint in RunConfig.__dataclass_fields__.items():
        flag = name.replace("_", "-")
        assert f"\n  --{flag} " in text or f"\n  --{flag}\n" in text or f"\n  --no-{flag}\n" in text
    written = config.written_fields(module.Config)
    assert all(len(written[name].meaning) > 10 for name in module.Config.__dataclass_fields__)


def test_no_unfinished_marks():
    """What is committed is finished."""
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
    for module, path in modules().items():
        assert not imports_of_anything(path) & {"pickle", "cloudpickle", "dill"}, module
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            assert called != "torch.load", f"{module}: torch.load"
            assert (
                "allow_pickle" not in keywords or ast.unparse(keywords["allow_pickle"]) == "False"
            )
            assert called != "np.load" or "mmap_mode" in keywords, (
                f"{module}: np.load without mmap_mode"
            )


def imports_of_anything(path: Path) -> set[str]:
    """Return the top-level names of all modules that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
    return names
