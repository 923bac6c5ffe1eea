"""docs/add_an_algorithm.md is true: its three blocks, put where it says, make an algorithm of under 100 lines."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add_an_algorithm.md").read_text()
BLOCKS = {
    name: body for name, body in re.findall(r"^```\w+ (\S+\.py)\n(.*?)^```$", PAGE, re.M | re.S)
}


def patched(text: str, patch: str) -> str:
    """A text after a unified diff. AssertionError: a hunk whose old lines are not there, or not there once."""
    for hunk in re.split(r"^@@.*@@.*\n", patch, flags=re.M)[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, (
            f"the page's patch no longer fits train_sft.py; not there once:\n{old}"
        )
        text = text.replace(old, new)
    return text


def run(*words: str, cwd: Path) -> str:
    """What a command prints."""
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_the_page_makes_an_algorithm(toy: Path, tmp_path: Path):
    """Blocks applied to a copy of the project: the new test and the laws pass, the script runs, few lines changed."""
    assert list(BLOCKS) == ["losses.py", "train_orpo.py", "tests/test_orpo.py"]
    loss, patch, test = BLOCKS.values()
    changed = [line for line in patch.splitlines()[2:] if line[0] in "+-"]
    assert len(loss.splitlines()) + len(changed) + len(test.splitlines()) < 100

    for name in ("data", "kernels", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*ROOT.glob("*.py"), ROOT / "pyproject.toml"):
        shutil.copy(path, tmp_path)
    with open(tmp_path / "losses.py", "a") as file:
        file.write("\n\n" + loss)
    (tmp_path / "train_orpo.py").write_text(patched((tmp_path / "train_sft.py").read_text(), patch))
    (tmp_path / "tests" / "test_orpo.py").write_text(test)

    laws = "orpo or downward or flag_is_read or sections or blocks"
    shown = run(
        "-m", "pytest", "tests/test_orpo.py", "tests/test_laws.py", "-k", laws, cwd=tmp_path
    )
    assert re.search(r"^\d+ passed", shown, re.M) and "failed" not in shown
    words = (
        "--model",
        str(toy / "model"),
        "--data",
        str(toy / "world" / "preferences.jsonl"),
        "--out",
        "out",
    )
    held = (
        "--eval-data",
        str(toy / "world" / "preferences_test.jsonl"),
        "--max-steps",
        "3",
        "--batch-size",
        "4",
    )
    assert "3 steps done" in run("train_orpo.py", *words, *held, cwd=tmp_path)
