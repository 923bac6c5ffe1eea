"""A short part of the soak tests; CONTRIBUTING.md has the commands of the long ones."""

import random
import shutil
from pathlib import Path

import pytest
import soak
from forked import kill_all
from safetensors.torch import load_file, save_file


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Return a folder with the inputs of the soak tests."""
    folder = tmp_path_factory.mktemp("soak")
    soak.make_inputs(folder)
    return folder


@pytest.fixture(autouse=True)
def nobody_stays():
    """Kill ranks that a failed test has left behind."""
    yield
    kill_all()


@pytest.mark.parametrize(("name", "world", "layout"), [("dpo", 1, ""), ("reinforce", 2, "--tp 2")])
def test_kills_at_random_times_change_nothing(name: str, world: int, layout: str, home: Path):
    """Killed three times and resumed, a run has the metrics, samples and weights of a whole one."""
    struck = soak.kill_run(name, world, layout, 3, 24, home, random.Random(3))
    assert struck.total() >= 2


def test_damaged_files_change_nothing(home: Path):
    """A run resumes over each kind of damage to a checkpoint or the cache as if it were whole."""
    soak.main(["damage", "--runs", "6", "--steps", "24", "--seed", "2"])


def test_a_run_that_differs_is_seen(home: Path, tmp_path: Path):
    """Two runs with different seeds differ, whatever the soak test compares."""
    words = soak.words_of("reinforce", home, tmp_path / "a", 4, "")
    soak.finish("reinforce", 1, words, tmp_path / "logs")
    words = soak.words_of("reinforce", home, tmp_path / "b", 4, "--seed 7")
    soak.finish("reinforce", 1, words, tmp_path / "logs")
    assert soak.difference(tmp_path / "a", tmp_path / "b")
    assert not soak.difference(tmp_path / "a", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "c")  # one weight differs, every row is the same
    file = tmp_path / "c" / "final" / "model.safetensors"
    weights = load_file(file)
    weights["model.norm.weight"][3] += 1e-6
    save_file(weights, file)
    assert "1 of" in soak.difference(tmp_path / "a", tmp_path / "c")
