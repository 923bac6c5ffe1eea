"""docs/add_an_algorithm.md works: its three blocks make an algorithm, in fewer than 80 lines."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "add_an_algorithm.md").read_text()
BLOCKS = dict(re.findall(r"^```\w+ (\S+\.py)\n(.*?)^```$", PAGE, re.M | re.S))


def patched(text: str, patch: str) -> str:
    """Return a text after a unified diff. AssertionError: the old lines of a hunk are not there."""
    for hunk in re.split(r"^@@.*@@.*\n", patch, flags=re.M)[1:]:
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if line[0] in " -")
        new = "".join(line[1:] for line in lines if line[0] in " +")
        assert text.count(old) == 1, f"not once in train_sft.py, correct the page's patch:\n{old}"
        text = text.replace(old, new)
    return text


def run(*words: str, cwd: Path) -> str:
    """Return what a Python command prints. AssertionError: it fails."""
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, f"{words}\n{done.stdout}{done.stderr}"
    return done.stdout


def copy_project(folder: Path) -> None:
    """Copy the Python files of the project and what the tests read."""
    skipped = shutil.ignore_patterns(
        ".*", "__pycache__", "shared", "out", "*.md", "*.jsonl", "results"
    )
    shutil.copytree(ROOT, folder, ignore=skipped, dirs_exist_ok=True)


def test_the_page_makes_an_algorithm(toy: Path, tmp_path: Path):
    """In a copy of the project with its blocks, the new test and the laws pass, the script runs."""
    assert list(BLOCKS) == ["losses.py", "train_orpo.py", "tests/e2e/test_orpo.py"]
    loss, patch, test = BLOCKS.values()
    added = [line for line in patch.splitlines()[2:] if line[0] == "+"]
    removed = [line for line in patch.splitlines()[2:] if line[0] == "-"]
    lines = [*loss.splitlines(), *added, *test.splitlines()]
    assert len(lines) < 80 and len(removed) < 30
    assert max(map(len, lines)) <= 101  # a diff has one more column

    copy_project(tmp_path)
    with open(tmp_path / "losses.py", "a") as file:
        file.write("\n\n" + loss)
    script = patched((tmp_path / "train_sft.py").read_text(), patch)
    (tmp_path / "train_orpo.py").write_text(script)
    (tmp_path / "tests" / "e2e" / "test_orpo.py").write_text(test)

    pytest = ["-m", "pytest", "-p", "no:cacheprovider"]
    shown = run(*pytest, "tests/e2e/test_orpo.py", cwd=tmp_path)
    assert re.search(r"^7 passed", shown, re.M), shown
    laws = ["tests/unit/test_laws.py", "tests/unit/test_house.py"]
    shown = run(*pytest, *laws, "-vv", "-k", "orpo or circle", cwd=tmp_path)
    for law in ("imports_go_downward", "every_flag_is_read", "same_structure", "help_shows"):
        assert re.search(rf"test_\w*{law}\w*\[train_orpo\S*\] PASSED", shown), shown

    data = ["--data", str(toy / "world" / "preferences.jsonl")]
    data += ["--eval-data", str(toy / "world" / "preferences_test.jsonl")]
    flags = ["--model", str(toy / "model"), "--out", "out", "--max-steps", "3", "--batch-size", "4"]
    assert "3 steps done" in run("train_orpo.py", *flags, *data, cwd=tmp_path)
