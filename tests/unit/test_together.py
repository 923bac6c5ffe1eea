"""Work side by side: order, how much at once, errors, and an exit that waits for nothing."""

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sampling import together
from sampling.together import start

ROOT = Path(__file__).parents[2]


def test_results_come_in_order_and_no_more_run_at_once(monkeypatch):
    monkeypatch.setattr(together, "AT_ONCE", 4)
    now, most, lock = 0, 0, threading.Lock()

    def work(x: int) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002 * (x % 3))
        with lock:
            now -= 1
        return x * x

    assert together.together(work, range(40)) == [x * x for x in range(40)]
    assert most == 4
    assert together.together(work, []) == []
    assert together.together(lambda x: None, "abc") == [None] * 3


def test_an_error_is_raised_and_ends_the_rest(monkeypatch):
    """Requests under way end first; those that wait never begin."""
    monkeypatch.setattr(together, "AT_ONCE", 2)
    begun = []

    def work(x: int) -> int:
        begun.append(x)
        time.sleep(0.01)
        if x == 1:
            raise OSError("no")
        return x

    with pytest.raises(OSError, match="no"):
        together.together(work, range(100))
    assert len(begun) < 6
    with pytest.raises(KeyError):
        start(lambda: {}["a"]).result(5)


def test_an_exit_waits_for_nothing():
    """Neither for a request nor for those behind it: a stopped run must end within its grace."""
    code = """
import threading, time
from sampling.together import start, together
start(lambda: together(time.sleep, [60] * 3))
time.sleep(0.2)
"""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50, cwd=ROOT)
    assert time.monotonic() - began < 30
