"""The pages of docs/ are true: quoted lines are in the code, metrics, flags and links exist."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest

import hf
import losses
import train_dpo
from config import RunConfig
from data.dataset import load_dataset
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import make_batch
from weights.folder import save_model

ROOT = Path(__file__).parents[2]
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = ["sft", "dpo", "kto", "rm", "reinforce", "ppo", "steerlm"]  # one an algorithm
# Flags of other commands that the pages of algorithms name.
OTHER_FLAGS = {"reward-read", "attributes", "attribute-dropout", "prompt", "model", "help"}


def source_of(path: Path, name: str) -> str:
    """Return the source of a function, a class or Class.method of a file."""
    text = path.read_text()
    body = ast.parse(text).body
    for part in name.split("."):
        matches = [node for node in body if getattr(node, "name", None) == part]
        assert matches, f"{path.name} has no {name}"
        node = matches[0]
        body = node.body
    return ast.get_source_segment(text, node)


def quotes(text: str) -> list[tuple[str, str, list[str]]]:
    """Return (file, function, lines) of every python block, whose first line says where it is from.

    "```python\\n# losses.py: dpo\\nx = 1\\n```" gives [("losses.py", "dpo", ["x = 1"])].
    """
    blocks = []
    for block in re.findall(r"^ *```python\n(.*?)^ *```$", text, re.M | re.S):
        head, *lines = [line.strip() for line in block.splitlines() if line.strip()]
        origin = re.fullmatch(r"# (\S+\.py): (\S+)", head)
        assert origin and lines, f"a block must begin with '# file.py: function': {head}"
        blocks.append((origin[1], origin[2], lines))
    return blocks


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.stem)
def test_quoted_lines_are_in_the_code_in_this_order(page: Path):
    """Every line of a quote is a line of the function that it names, word for word."""
    for file, name, lines in quotes(page.read_text()):
        code = [line.strip() for line in source_of(ROOT / file, name).splitlines()]
        for line in lines:
            assert line in code, f"{page.name}: {file}, {name} no longer has: {line}"
            code = code[code.index(line) + 1 :]


@pytest.mark.parametrize("page", PAGES)
def test_metrics_and_flags_of_a_page_exist(page: str):
    """Each algorithm's page quotes code, says what each metric should do, and names real flags."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    script = ROOT / f"train_{page}.py"
    assert quotes(text) and script.name in text
    libraries = ["losses.py", "runtime.py", "reporting.py"]
    libraries += ["sampling/rollout.py", "sampling/updates.py"]
    code = "".join(path.read_text() for path in (script, *(ROOT / name for name in libraries)))
    table = text.split("## What each metric should do")[1].split("##")[0]
    metrics = re.findall(r"^\| `([^`]+)`", table, re.M)
    assert len(metrics) >= 3
    for name in metrics:
        assert re.search(rf'["/]{name.split("/")[-1]}["`:]', code), f"{page}: no metric {name}"
    config = importlib.import_module(script.stem).Config
    flags = {name.replace("_", "-") for name in config.__dataclass_fields__}
    assert set(re.findall(r"--([a-z][a-z0-9-]+)", text)) <= flags | OTHER_FLAGS


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("dpo", losses.DPO_LOSSES),
        ("rm", losses.REWARD_MODEL_LOSSES),
        ("kto", losses.KTO_LOSSES[1:]),
    ],
)
def test_a_page_names_every_loss(page: str, names: tuple[str, ...]):
    """Every choice of --loss is on the page of its script."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert all(re.search(rf"\b{name}\b", text) for name in names)


@pytest.mark.parametrize("page", ["data", "performance"])
def test_flags_of_the_other_pages_exist(page: str):
    """data.md and performance.md name flags that every script has, two of bench/, or two more."""
    flags = {name.replace("_", "-") for name in RunConfig.__dataclass_fields__}
    flags |= {f"no-{name}" for name in flags}
    flags |= {"tokenizer", "algorithm", "loss", "reward", "trl-dtype"}
    text = (ROOT / "docs" / f"{page}.md").read_text()
    assert set(re.findall(r"`[^`\n]*--([a-z-]+)", text)) <= flags


@pytest.mark.parametrize(
    "page", [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda path: path.stem
)
def test_links_lead_somewhere(page: Path):
    """Relative links are files or folders; Python files named in backticks exist."""
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    for name in re.findall(r"`((?:[a-z0-9_]+/)*[a-z0-9_]+\.py)`", text):
        assert (ROOT / name).exists(), name


def test_the_file_tree_is_the_tree():
    """docs/architecture.md lists every Python file outside tests/ and no other."""
    page = (ROOT / "docs" / "architecture.md").read_text()
    tree = re.search(r"```text\n(.*?)```", page, re.S)[1]
    listed, folders = set(), {""}
    folder = ""
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S*)", line).groups()
        if name.endswith("/"):
            folder = name
            folders.add(folder)
        elif name:
            listed.add((folder if indent else "") + name)
    folders -= {"tests/"}
    files = {f"{folder}{path.name}" for folder in folders for path in (ROOT / folder).glob("*.py")}
    assert listed == {name for name in files if not name.endswith("__init__.py")}


def test_the_example_of_architecture_md(tmp_path: Path, toy: Path, train):
    """The page's row gives the page's arrays, log-probs, losses and gradient norm."""
    page = (ROOT / "docs" / "architecture.md").read_text()

    def numbers(name: str) -> list[float]:
        line = re.search(rf"^    {name}  (.*)$", page, re.M)[1]
        return [float(word) for word in re.findall(r"-?\d+(?:\.\d+)?", line)]

    rows = tmp_path / "rows.jsonl"
    rows.write_text(re.search(r'^    ({"prompt": .*})$', page, re.M)[1] + "\n")
    tokenizer = str(toy / "world" / "tokenizer")
    sizes = {"width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "ffn": 64, "std": 0.2}
    model = hf.new_model(hf.New(**sizes, tokenizer=tokenizer))
    save_model(model, tmp_path / "model", tokenizer)

    template = Template("plain", load_tokenizer(tokenizer))
    data = load_dataset(rows, "preference", template, cache=tmp_path / "cache")
    batch = make_batch(data, [0])
    for name in ("tokens", "positions", "kv_end", "logit_index", "target", "response"):
        assert getattr(batch, name).tolist() == numbers(name), name
    texts = ["prompt", "chosen", "rejected"]
    assert [id for name in texts for id in numbers(name)] == numbers("tokens")
    logps = model.logps(model(batch), batch)
    assert logps.tolist() == pytest.approx(numbers("logps"), abs=2e-3)
    assert batch.sum_by_response(logps).tolist() == pytest.approx(numbers("sums"), abs=5e-3)

    flags = {"data": rows, "model": tmp_path / "model", "template": "plain", "batch_size": 1}
    flags |= {"lr": 1e-3, "warmup": 0.0, "schedule": "constant", "epochs": 2}
    steps = [row for row in train(train_dpo, tmp_path / "out", **flags) if "loss" in row]
    assert steps[0]["loss"] == pytest.approx(numbers("loss")[0], abs=1e-4)
    assert steps[0]["grad_norm"] == pytest.approx(numbers("grad_norm")[0], rel=1e-3)
    assert steps[1]["loss"] == pytest.approx(numbers("next loss")[0], abs=2e-3)


def test_the_harness_task_of_evaluate_md(toy: Path):
    """The keys in the task's templates are in the rows that it reads, and its command names it."""
    page = (ROOT / "docs" / "evaluate.md").read_text()
    task = re.search(r"```yaml\n(.*?)```", page, re.S)[1]
    rows = toy / "world" / Path(re.search(r"test: (\S+\.jsonl)", task)[1]).name
    named = [word for part in re.findall(r"{{(.*?)}}", task) for word in re.findall(r"\w+", part)]
    assert named == ["prompt", "chosen", "rejected"]
    assert set(named) <= set(json.loads(rows.read_text().splitlines()[0]))
    assert re.search(r"^task: (\w+)$", task, re.M)[1] in re.search(r"--tasks (\w+)", page)[1]


def test_the_example_of_contributing_md(monkeypatch):
    """The law that CONTRIBUTING.md shows holds, and fails where the page says when c and r swap."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    block = re.search(r"```python\n(.*?)```", page, re.S)[1]
    scope: dict = {}
    exec(block, scope)
    law = scope["test_dpo_loss_is_equation_7"]
    cases = law.pytestmark[0].args[1]
    for case in cases:
        law(*case)
    right = losses.sigmoid
    monkeypatch.setattr(losses, "sigmoid", lambda c, r, beta: right(r, c, beta))
    law(*cases[0])
    for case in cases[1:]:
        with pytest.raises(AssertionError):
            law(*case)
