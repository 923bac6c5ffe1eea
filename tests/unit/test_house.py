"""Laws of the house: who may import whom, and how files, names and docstrings look.

Each law is one table or one pattern near its test. A law that a file breaks is mended in the file;
the tables of exceptions are short, and every entry says why.
"""

import ast
import functools
import importlib
import re
import subprocess
import tomllib
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# A module imports from its own row and from the rows above it, and imports make no circle.
LIBRARIES = [
    ["elsewhere", "flagfile", "sources", "cards"],
    ["commandline"],
    ["config", "losses", "architecture", "rotary", "layout", "disk", "hub", "lock", "kernels.*"],
    ["parallel", "faults", "data.*"],
    ["exchange", "routing"],
    ["layers", "mixers", "mlp", "moe", "model", "sharding"],
    ["optimizer", "master", "pipeline"],
    ["weights.*"],
    ["checkpoint", "background", "passes", "sampling.*"],
    ["footprint", "reporting", "identity"],
    ["plan"],
    ["runtime"],
    ["training", "reference", "teacher", "stages", "plots.*"],
]
# A program imports libraries, and no module imports a program. plan.py is a program too, but
# runtime.py asks it for advice when memory runs out.
PROGRAMS = [
    "train_*",
    "best_of_n",
    "constitution",
    "generate",
    "score",
    "hf",
    "plot",
    "demo",
    "real",
]
# These measure and check programs, so they import anything.
OBSERVERS = ["bench.*", "tests.*"]

LINES = 450
LONG_FILES = {  # files that may pass LINES lines, and why one file is still the better place
    "losses.py": "one subject, 45 short formulas that readers compare with one another",
    "bench/same_numbers.py": "one file, to run in checkouts from before it was written",
    "kernels/attention.py": "one operation: forward, dQ, dK/dV, their plain twin and the dispatch",
}


# ---- reading the sources -------------------------------------------------------------------------


@functools.cache
def sources() -> dict[str, Path]:
    """Return module name -> file of every Python file of the project, committed or not."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0 and listed.stdout:
        paths = [ROOT / name for name in listed.stdout.split()]
    else:  # a copy of the files without their history
        paths = [p for p in ROOT.rglob("*.py") if not re.search(r"/[.]|/shared/", str(p))]
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in sorted(paths)
        if path.exists() and path.name != "__init__.py"
    }


@functools.cache
def tree(path: Path) -> ast.Module:
    """Return the syntax tree of a file."""
    return ast.parse(path.read_text())


@functools.cache
def nodes(path: Path) -> list[ast.AST]:
    """Return every node of a file's syntax tree."""
    return list(ast.walk(tree(path)))


@functools.cache
def imports(path: Path) -> set[str]:
    """Return the modules of the project that a file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names & sources().keys()


def is_in(name: str, patterns: list[str]) -> bool:
    """Return True if a module matches one of some patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def code() -> dict[str, Path]:
    """Return module name -> file of everything but tests."""
    return {name: path for name, path in sources().items() if not name.startswith("tests.")}


def is_private(name: str) -> bool:
    """Return True for _name, False for name and __name__."""
    return name.startswith("_") and not name.startswith("__")


def place(path: Path, node: ast.AST | int) -> str:
    """Return "file:line" for a message."""
    line = node if isinstance(node, int) else node.lineno
    return f"{path.relative_to(ROOT)}:{line}"


# ---- imports -------------------------------------------------------------------------------------


def test_every_module_has_one_place_in_the_import_order():
    """A new file is a library, a program, a benchmark or a test, and exactly one of these."""
    for name in sources():
        rows = [row for row in [*LIBRARIES, PROGRAMS, OBSERVERS] if is_in(name, row)]
        assert len(rows) == 1, f"{name} is in {len(rows)} rows of LIBRARIES, PROGRAMS and OBSERVERS"


@pytest.mark.parametrize("module", [name for name in code() if not is_in(name, OBSERVERS)])
def test_imports_go_downward(module: str):
    """A library imports from its own row and from rows above it, a program from libraries only."""
    allowed: list[str] = []
    for row in LIBRARIES:
        allowed += row
        if is_in(module, row):
            break
    for target in sorted(imports(sources()[module])):
        assert is_in(target, allowed), f"{module} imports {target}"


def test_imports_make_no_circle():
    """Take away modules that import nothing left, or that nothing left imports: none remains."""
    left = {name: imports(path) for name, path in code().items()}
    while left:
        imported = set().union(*left.values())
        ends = [name for name in left if not left[name] & left.keys() or name not in imported]
        assert ends, f"a circle of imports runs through {sorted(left)}"
        for name in ends:
            del left[name]


def test_no_private_name_is_used_in_another_module():
    """A name with a leading underscore is not imported, nor reached as module._name.

    Tests may reach one through its module: some look at a kernel or a step that nobody calls.
    """
    wrong = []
    for path in sources().values():
        modules: set[str] = set()  # local names of project modules
        for node in nodes(path):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if f"{node.module}.{alias.name}" in sources():
                        modules.add(alias.asname or alias.name)
                    elif node.module in sources() and is_private(alias.name):
                        wrong.append(f"{place(path, node)} imports {alias.name}")
            elif isinstance(node, ast.Import):
                modules |= {a.asname or a.name for a in node.names if a.name in sources()}
        if path.is_relative_to(ROOT / "tests"):
            continue
        for node in nodes(path):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                owner = node.value
                if isinstance(owner, ast.Name) and owner.id in modules:
                    wrong.append(f"{place(path, node)} uses {owner.id}.{node.attr}")
    assert not wrong, "\n".join(wrong)


# ---- flags ---------------------------------------------------------------------------------------


def configs() -> list[tuple[str, str]]:
    """Return (module, class) of every dataclass that a program turns into flags."""
    pairs = []
    for name, path in code().items():
        if "config" not in imports(path):
            continue
        calls = [node for node in nodes(path) if isinstance(node, ast.Call)]
        parses = [call for call in calls if ast.unparse(call.func) == "parse"]
        pairs += [(name, ast.unparse(call.args[0])) for call in parses]
    return pairs


def reach(name: str) -> set[str]:
    """Return a module and everything that it imports, directly or through others."""
    seen: set[str] = set()
    pending = {name}
    while pending:
        name = pending.pop()
        seen.add(name)
        pending |= imports(sources()[name]) - seen
    return seen


@functools.cache
def fields_read(path: Path) -> set[str]:
    """Return every NAME in config.NAME, flags.NAME and self.config.NAME of a file."""
    names: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = node.value
            label = owner.id if isinstance(owner, ast.Name) else getattr(owner, "attr", "")
            if label in ("config", "flags"):
                names.add(node.attr)
    return names


@pytest.mark.parametrize(("module", "cls"), configs())
def test_every_flag_is_read(module: str, cls: str):
    """A program or a library under it reads its own flags; any module reads inherited ones."""
    config = getattr(importlib.import_module(module), cls)
    own = set(config.__annotations__)
    inherited = set(config.__dataclass_fields__) - own - {"config"}  # parse reads --config itself
    reached = set().union(*(fields_read(sources()[name]) for name in reach(module)))
    anywhere = set().union(*(fields_read(path) for path in code().values()))
    assert own <= reached, f"neither {module} nor a library under it reads {own - reached}"
    assert inherited <= anywhere, f"no code reads {inherited - anywhere}"


# ---- docstrings and names ------------------------------------------------------------------------

OPENERS = "What|Which|Of|Whether|How|By|Those|Where"  # no docstring opens with one of these


def test_public_functions_have_docstrings():
    """Public functions, methods and classes say what they do.

    Left out: main and Config, which the docstring at the top of the file describes; forward, which
    its class describes; properties and overloads.
    """
    wrong = []
    for path in code().values():
        classes = [node for node in tree(path).body if isinstance(node, ast.ClassDef)]
        classes = [node for node in classes if not node.name.startswith("_")]
        scopes = [tree(path).body, *(node.body for node in classes)]
        named = [
            *classes,
            *(n for scope in scopes for n in scope if isinstance(n, ast.FunctionDef)),
        ]
        for node in named:
            if node.name.startswith("_") or node.name in ("main", "forward", "Config"):
                continue
            decorators = " ".join(ast.unparse(decorator) for decorator in node.decorator_list)
            if re.search(r"\b(property|cached_property|overload)\b", decorators):
                continue
            if not ast.get_docstring(node):
                wrong.append(f"{place(path, node)} {node.name}")
    assert not wrong, "\n".join(wrong)


def test_docstrings_open_with_a_verb_or_a_noun():
    """No docstring opens with a question word or a preposition."""
    wrong = []
    for path in sources().values():
        for node in nodes(path):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if re.match(rf"({OPENERS})\b", text):
                    wrong.append(f"{place(path, getattr(node, 'lineno', 1))} {text[:50]!r}")
    assert not wrong, "\n".join(wrong)


def test_no_variable_is_named_found():
    """A name says what a value is, not where it came from."""
    wrong = [
        place(path, node)
        for path in sources().values()
        for node in nodes(path)
        if isinstance(node, ast.Name) and node.id == "found" and isinstance(node.ctx, ast.Store)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_conditional_expression_lies_inside_another():
    """`a if x else b if y else c` is written as statements."""
    wrong = []
    for path in sources().values():
        for node in nodes(path):
            if isinstance(node, ast.IfExp):
                inner = [child for child in ast.walk(node) if isinstance(child, ast.IfExp)]
                if len(inner) > 1:
                    wrong.append(place(path, node))
    assert not wrong, "\n".join(wrong)


# ---- files ---------------------------------------------------------------------------------------


def test_few_lines_are_long():
    """Fewer than one line in twenty of a source file passes 100 characters."""
    wrong = []
    for path in code().values():
        lines = path.read_text().splitlines()
        long = [number for number, line in enumerate(lines, 1) if len(line) > 100]
        if len(long) >= 0.05 * max(1, len(lines)):
            wrong.append(f"{place(path, long[0])}: {len(long)} of {len(lines)} lines are long")
    assert not wrong, "\n".join(wrong)


def test_files_are_short():
    """A source file passes LINES lines only where LONG_FILES says why, and not out of habit."""
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in code().values()
    }
    long = {name: size for name, size in sizes.items() if size > LINES}
    assert long.keys() <= LONG_FILES.keys(), f"split these, or say why not: {long}"
    assert long.keys() == LONG_FILES.keys(), f"short now: {LONG_FILES.keys() - long.keys()}"


def test_formatting_is_switched_off_only_with_a_reason():
    """Words stand beside every switch: `}  # one row of the table a line  # fmt: skip`."""
    wrong = []
    for path in sources().values():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            switch = re.search(r"#\s*fmt:\s*(skip|off)\b(.*)", line)
            if switch and not re.search(r"# (?!fmt:)\w+ \w+", line):
                wrong.append(place(path, number))
    assert not wrong, "\n".join(wrong)


def test_one_version_everywhere():
    """pyproject.toml, CITATION.cff and the newest entry of CHANGELOG.md name the same version."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    newest = re.search(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert (cited and cited[1], newest and newest[1]) == (version, version)


def test_every_reward_is_read_where_the_flag_says():
    """Whoever loads a --reward passes --reward-read on: a default would read another token."""
    calls = [
        (path.name, {keyword.arg for keyword in node.keywords})
        for path in sources().values()
        if path.parent == ROOT
        for node in nodes(path)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "load_reward"
    ]
    assert len(calls) >= 4
    assert not [name for name, keywords in calls if "read" not in keywords]
