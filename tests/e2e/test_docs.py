"""The documents are true: quoted lines are in the code, named metrics and flags exist, links lead somewhere."""

import ast
import json
import re
from pathlib import Path

import pytest

import losses
from config import RunConfig

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = ["sft", "dpo", "kto", "rm", "reinforce", "ppo", "steerlm"]  # one an algorithm


def source_of(path: Path, name: str) -> str:
    """Source of a function, a class or Class.method in a file."""
    text = path.read_text()
    body = ast.parse(text).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        assert found, f"{path.name} has no {name}"
        node, body = found[0], found[0].body
    return ast.get_source_segment(text, node)


def quotes(text: str) -> list[tuple[str, str, list[str]]]:
    """(file, function, lines) of every ```python block; the first line of each says where it is from."""
    found = []
    for block in re.findall(r"^ *```python\n(.*?)^ *```$", text, re.M | re.S):
        head, *lines = [line.strip() for line in block.splitlines() if line.strip()]
        where = re.fullmatch(r"# (\S+\.py): (\S+)", head)
        assert where and lines, f"a block must begin with '# file.py: function': {head}"
        found.append((where[1], where[2], lines))
    return found


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.stem)
def test_quoted_lines_are_in_the_code_in_this_order(page: Path):
    """Every line of a quote, word for word."""
    for file, name, lines in quotes(page.read_text()):
        code = [line.strip() for line in source_of(ROOT / file, name).splitlines()]
        for line in lines:
            assert line in code, f"{page.name}: {file}, {name} no longer has: {line}"
            code = code[code.index(line) + 1 :]


@pytest.mark.parametrize("page", PAGES)
def test_metrics_and_flags_of_a_page_exist(page: str):
    """Every page quotes code, says what each metric should do, and names only what its script has."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    script = next(name for name in (f"train_{page}.py",) if (ROOT / name).exists())
    assert quotes(text) and script in text
    code = "".join(
        (ROOT / name).read_text() for name in (script, "losses.py", "runtime.py", "rollout.py")
    )
    table = text.split("## What each metric should do")[1].split("##")[0]
    metrics = re.findall(r"^\| `([^`]+)`", table, re.M)
    assert len(metrics) >= 3
    for name in metrics:
        assert re.search(rf'["/]{name.split("/")[-1]}["`:]', code), f"{page}: no metric {name}"
    module = __import__(script[:-3])
    known = {name.replace("_", "-") for name in module.Config.__dataclass_fields__} | {
        "attributes",
        "prompt",
        "model",
    }
    assert set(re.findall(r"--([a-z][a-z0-9-]+)", text)) <= known | {"help"}


def test_the_family_is_complete():
    """docs/dpo.md has every loss of --loss; docs/rm.md and docs/kto.md theirs."""
    for page, names in (
        ("dpo", losses.DPO_LOSSES),
        ("rm", losses.REWARD_MODEL_LOSSES),
        ("kto", losses.KTO_LOSSES[1:]),
    ):
        text = re.sub(r"\s+", " ", (ROOT / "docs" / f"{page}.md").read_text())
        assert all(re.search(rf"\b{name}\b", text) for name in names)


def test_flags_of_the_other_pages_exist():
    """data.md and performance.md name flags of every script, of bench/ or of data/prepare.py."""
    known = {name.replace("_", "-") for name in RunConfig.__dataclass_fields__}
    known |= {f"no-{name}" for name in known} | {"tokenizer"}
    for page in ("data", "performance"):
        assert (
            set(re.findall(r"`[^`\n]*--([a-z-]+)", (ROOT / "docs" / f"{page}.md").read_text()))
            <= known
        )


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.stem)
def test_links_lead_somewhere(page: Path):
    """Relative links are files; files named in backticks exist."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for name in re.findall(r"`((?:[a-z_]+/)?[a-z_]+\.py)`", text):
        assert (ROOT / name).exists(), name


def test_the_harness_task_of_evaluate_md(toy: Path):
    """The keys that its templates name are in the rows it is for, and it reads the split it says."""
    page = (ROOT / "docs" / "evaluate.md").read_text()
    task = re.search(r"```yaml\n(.*?)```", page, re.S)[1]
    rows = toy / "world" / Path(re.search(r"test: (\S+\.jsonl)", task)[1]).name
    named = [word for part in re.findall(r"{{(.*?)}}", task) for word in re.findall(r"\w+", part)]
    assert named == ["prompt", "chosen", "rejected"]
    assert set(named) <= set(json.loads(rows.read_text().splitlines()[0]))
    assert re.search(r"^task: (\w+)$", task, re.M)[1] in re.search(r"--tasks (\w+)", page)[1]
