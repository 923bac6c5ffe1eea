"""Ranks agree before the first step, and a rank that does not is named with what it has instead.

Two nodes are two working folders: the same relative paths lead to different files.
Seen to fail: without compare_ranks in runtime.py; with a comparison of rank 1's files only; with
a test of the backend's words instead of the place where an error came up.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from forked import Ranks, kill_all

import faults
import identity
import runtime
import train_dpo
from parallel import Group


@pytest.fixture(autouse=True)
def nobody_stays():
    """Kill ranks that a failed test has left behind."""
    yield
    kill_all()


def run(toy: Path, home: Path, change: Callable[[int], list[str]], world: int = 2) -> Ranks:
    """Start DPO, each rank in a node folder of its own, after change(rank), which adds flags."""
    for rank in range(world):
        node = home / f"node_{rank}"
        node.mkdir()
        shutil.copytree(toy / "model", node / "model")
        shutil.copyfile(toy / "world" / "preferences.jsonl", node / "rows.jsonl")

    def body(rank: int) -> None:
        os.chdir(home / f"node_{rank}")
        os.environ["LOCAL_RANK"] = "0"
        runtime.PATIENCE = 3.0
        words = ["--model", "model", "--data", "rows.jsonl", "--out", str(home / "out")]
        words += "--device cpu --batch-size 8 --max-steps 1".split()
        more = change(rank)
        runtime.run(lambda: train_dpo.main([*words, *more]))

    return Ranks(world, body, home / "said")


def append(path: str, text: str) -> list[str]:
    with open(path, "a") as file:
        file.write(text)
    return []


def flip(path: str) -> list[str]:
    content = bytearray(Path(path).read_bytes())
    content[-1] ^= 1
    Path(path).write_bytes(content)
    return []


def other_packages() -> list[str]:
    versions = {**identity.package_versions(), "torch": "9.9"}
    identity.package_versions = lambda: versions
    return []


def other_code() -> list[str]:
    identity.code_hash = lambda: "another"
    return []


CHANGES = {
    "rank 1 has --lr 0.5 (rank 0: 5e-07)": lambda: ["--lr", "0.5"],
    "rank 1 has --tp 2 (rank 0: 1)": lambda: ["--tp", "2"],
    "rank 1 has other files of --data than rank 0": lambda: append("rows.jsonl", "\n"),
    "rank 1 has other files of --model than rank 0": lambda: flip("model/model.safetensors"),
    "rank 1 has torch 9.9 (rank 0: ": other_packages,
    "rank 1 has another code than rank 0": other_code,
}


@pytest.mark.parametrize("said", CHANGES)
def test_a_rank_that_differs_is_named_with_what_differs(said: str, toy: Path, tmp_path: Path):
    """Every rank ends before the first step with the same message, and OUT is not touched."""
    ranks = run(toy, tmp_path, lambda rank: CHANGES[said]() if rank == 1 else [])
    assert ranks.wait() == [1, 1]
    assert f"error on every rank: the ranks do not agree: {said}" in ranks.text(0)
    assert not ranks.text(1)
    assert not (tmp_path / "out").exists()


def test_ranks_that_agree_start(toy: Path, tmp_path: Path):
    """The same content under another folder is the same run; --cache may be a local disk."""
    ranks = run(toy, tmp_path, lambda rank: ["--cache", f"cache_{rank}"])
    assert ranks.wait() == [0, 0], ranks.text(0) + ranks.text(1)


def test_every_rank_that_differs_is_named(toy: Path, tmp_path: Path):
    """Two of three ranks are wrong: both are in one message."""
    lrs = ["1", "2", "3"]
    ranks = run(toy, tmp_path, lambda rank: ["--lr", lrs[rank]], world=3)
    assert ranks.wait() == [1, 1, 1]
    assert "rank 1 has --lr 2.0 (rank 0: 1.0); rank 2 has --lr 3.0 (rank 0: 1.0)" in ranks.text(0)


# ---- errors of a backend -------------------------------------------------------------------------

WORDS = [
    "Application timeout caused pair closure",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer",
    "NCCL Error 6: remote process exited or there was a network error",
    "wait timeout after 3000ms, keys: /default_pg/0//cpu//3/1",
]


@pytest.mark.parametrize("words", WORDS)
def test_an_error_of_any_backend_is_about_others(words: str, monkeypatch):
    """It is recognised by its place: a collective, or torch.distributed. Others are one's own."""

    def fail(*values, **options):
        raise RuntimeError(words)

    monkeypatch.setattr(dist, "all_reduce", fail)
    group = Group((0, 1), 0, None)
    import torch

    with pytest.raises(RuntimeError) as caught:
        group.all_reduce(torch.zeros(1), "sum")
    caught.value.__traceback__ = caught.tb.tb_next  # as if C++ had raised it
    frames = caught.value.__traceback__
    while frames.tb_next.tb_next:
        frames = frames.tb_next
    frames.tb_next = None  # without the frame of `fail`, which is Python here
    assert faults.is_about_others(caught.value)
    for own in (RuntimeError("shape mismatch"), ValueError("bad"), KeyError("x")):
        with pytest.raises(type(own)) as caught:
            raise own
        assert not faults.is_about_others(caught.value)


def test_a_rank_that_never_comes_is_waited_for_and_named(tmp_path: Path, monkeypatch):
    """Nobody at the address: one line that names it, not a traceback of the store."""
    import parallel

    monkeypatch.setattr(parallel, "START_MINUTES", 0.02)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(OSError, match="rank 1 of 2 did not meet the others at 127.0.0.1:1 within"):
        parallel.join("cpu", 0.01)


def test_a_wrong_flag_is_said_once(tmp_path: Path):
    """Both ranks end with status 2; one of them prints the line."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    texts = []
    for rank in "01":
        done = subprocess.run(
            [sys.executable, "train_sft.py", "--lr", "-1"],
            cwd=Path(__file__).parents[2],
            env={**environment, "RANK": rank, "WORLD_SIZE": "2"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        texts.append(done.stderr)
    assert texts == ["error: --lr must be at least 0, not -1\n", ""]


@pytest.mark.parametrize("words", ["--data nowhere.jsonl", "--ref nowhere", "--resume nowhere"])
def test_what_every_rank_fails_of_is_said_once(words: str, toy: Path, tmp_path: Path):
    """All ranks end with status 1, and the first prints the line."""
    ranks = run(toy, tmp_path, lambda rank: words.split(), world=3)
    assert ranks.wait() == [1, 1, 1]
    said = [[line for line in ranks.text(r).split("\n") if "error" in line] for r in range(3)]
    assert len(said[0]) == 1 and said[0][0].startswith("error on every rank: ")
    assert "no such" in said[0][0] and not said[1] and not said[2]


def test_the_lowest_rank_says_what_several_fail_of():
    """Others with the same reason are silent; who fails of something else speaks for itself."""
    messages = {0: "1.5 other", 1: "1.6 why", 2: "1.7 why"}
    said = [faults.said_by(rank, 3, words, messages) for rank, words in ((0, "other"), (1, "why"))]
    assert said == ["rank 0", "ranks 1, 2"]
    assert faults.said_by(2, 3, "why", messages) == ""
    assert faults.said_by(1, 3, "why", {}) == "rank 1"  # the store is gone
    assert faults.said_by(0, 2, "a b", {0: "1 a b", 1: "2 a b"}) == "every rank"
