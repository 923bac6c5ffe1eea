"""One run an output folder: real processes, real signals, and machines that share no record locks.

Seen to fail: without lock.take in runtime.py; without the wait for a sign of life; with a lock that
ends when a forked child does.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import lock
import train_sft

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import lock
lock.BEAT, lock.PATIENCE = 0.1, 1.0
machine = sys.argv[3]
if machine:  # another machine, over a file system without record locks
    lock._boot = lambda: machine
    lock.fcntl.lockf = lambda *flags: None
try:
    lock.take(sys.argv[2])
except ValueError as error:
    sys.exit(str(error))
print("held", flush=True)
sys.stdin.readline()
try:
    lock.check()
except ValueError as error:
    sys.exit(str(error))
lock.release()
"""


class Holder:
    """A process that takes the lock of a folder and keeps it until it is told to let go."""

    def __init__(self, out: Path, machine: str = ""):
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(ROOT), str(out), machine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def holds(self) -> bool:
        """Wait until the process holds the lock, or has ended without it."""
        return any(line == "held\n" for line in iter(self.process.stdout.readline, ""))

    def end(self) -> tuple[int, str]:
        """Let go; return the exit status and the error."""
        error = self.process.communicate("\n")[1]
        return self.process.returncode, error

    def signal(self, number: int) -> None:
        """Send a signal; wait for a death."""
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.communicate()


@pytest.fixture
def holders():
    """Return a function that starts holders; none stays."""
    started: list[Holder] = []

    def start(*words) -> Holder:
        started.append(Holder(*words))
        return started[-1]

    yield start
    for holder in started:
        if holder.process.poll() is None:
            holder.process.kill()
            holder.process.communicate()


def test_a_second_process_is_refused_and_told_who_holds_the_folder(tmp_path: Path, holders):
    """Host and pid are named; once the first lets go, or is killed, the folder is free."""
    first = holders(tmp_path)
    assert first.holds()
    second = holders(tmp_path)
    assert not second.holds()
    status, error = second.end()
    assert status == 1 and f"{tmp_path} is in use by process {first.process.pid} on " in error
    assert first.end() == (0, "")
    third = holders(tmp_path)
    assert third.holds()
    third.signal(signal.SIGKILL)
    began = time.monotonic()
    assert holders(tmp_path).holds() and time.monotonic() - began < 20


def test_only_one_of_many_starters_gets_the_folder(tmp_path: Path, holders):
    """Eight processes at once: one holds the lock, seven name it."""
    started = [holders(tmp_path) for _ in range(8)]
    assert sum(holder.holds() for holder in started) == 1


def test_a_forked_child_neither_keeps_nor_ends_the_lock(tmp_path: Path):
    """A child that lives longer than its parent holds nothing; one that ends frees nothing."""
    code = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import lock
lock.take({str(tmp_path)!r})
if not os.fork():
    lock.release()
    os._exit(0)
os.wait()
if not os.fork():
    os.close(1)
    time.sleep(30)
    os._exit(0)
print("held", flush=True)
time.sleep(30)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert parent.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match=f"in use by process {parent.pid} on "):
            lock.take(tmp_path)
        parent.kill()
        parent.wait()
        lock.take(tmp_path)
        lock.release()
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
        parent.stdout.close()
        parent.wait()


def test_a_holder_on_another_machine_is_recognised_by_its_signs_of_life(tmp_path: Path, holders):
    """Without common record locks: refused while the number changes, taken once it stops."""
    far = holders(tmp_path, "far")
    assert far.holds()
    near = holders(tmp_path, "near")
    assert not near.holds()
    assert f"in use by process {far.process.pid} on " in near.end()[1]
    far.signal(signal.SIGSTOP)
    late = holders(tmp_path, "near")
    assert late.holds()
    far.signal(signal.SIGCONT)  # the sleeper wakes up, and must not write any more
    status, error = far.end()
    assert status == 1 and f"was taken over by process {late.process.pid} on " in error
    assert late.end() == (0, "")


def test_a_folder_that_another_machine_let_go_is_free_at_once(tmp_path: Path, holders):
    """A run that ended well costs the next one no wait."""
    far = holders(tmp_path, "far")
    assert far.holds() and far.end() == (0, "")
    assert json.loads((tmp_path / "lock.json").read_text()) == {"free": True}
    near = holders(tmp_path)
    assert near.holds() and "waiting" not in near.end()[1]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b'{"pid": 1}'])
def test_a_damaged_lock_file_is_watched_and_then_taken(content: bytes, tmp_path: Path, holders):
    """Unreadable content may be another machine's: it is given time, and stops nobody for good."""
    (tmp_path / "lock.json").write_bytes(content)
    assert holders(tmp_path).holds()


def test_a_requeued_job_leaves_a_running_one_alone(toy: Path, tmp_path: Path):
    """Two runs of a script on one OUT: the second is refused and changes no file of the first."""
    words = ["--model", toy / "model", "--data", toy / "world" / "sft.jsonl", "--out", tmp_path]
    words += "--batch-size 4 --epochs 999 --save-every 5 --resume auto".split()
    command = [sys.executable, str(ROOT / "train_sft.py"), *map(str, words)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        while not (tmp_path / "step_5").exists():
            assert first.poll() is None, first.stdout.read()
            time.sleep(0.01)
        config = (tmp_path / "config.json").read_text()
        second = subprocess.run([*command, "--lr", "1"], capture_output=True, text=True)
        assert second.returncode == 1
        assert f"{tmp_path} is in use by process {first.pid} on " in second.stderr
        assert (tmp_path / "config.json").read_text() == config
    finally:
        first.terminate()
        said = first.communicate()[0].decode()
    assert first.returncode == 0 and "stopped by SIGTERM" in said


def test_a_run_without_out_gets_a_folder_of_its_own(toy, tmp_path, monkeypatch):
    """It is named after script and time; --resume does not guess which one is meant."""
    monkeypatch.chdir(tmp_path)
    words = f"--model {toy / 'model'} --data {toy / 'world/sft.jsonl'} --max-steps 1".split()
    train_sft.main(words)
    (out,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(r"train_sft-\d{8}-\d{6}", out.name)
    assert (out / "final" / "config.json").exists() and (out / "environment.json").exists()
    with pytest.raises(ValueError, match="--resume needs --out"):
        train_sft.main([*words, "--resume", "auto"])
