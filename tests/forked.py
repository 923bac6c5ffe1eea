"""Run ranks that may fail: forked processes with exit codes, signals, and the output of each in a
file.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from launch import serve_store, set_torchrun_environment, warm_up

STARTED: list["Ranks"] = []


def kill_all() -> None:
    """Kill every rank that is still running."""
    while STARTED:
        STARTED.pop().kill()


class Ranks:
    """Processes that run `body(rank)` each, as under torchrun; their output goes to
    LOGS/rank_N.txt.

    A body may patch whatever it likes before it starts: the fork keeps the change from this
    process. Another process holds the store, as torchrun's agent does.
    """

    def __init__(self, world: int, body: Callable[[int], None], logs: Path):
        warm_up()
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)
        fork = multiprocessing.get_context("fork")
        self.store, port = serve_store() if world > 1 else (None, 0)
        self.processes = [
            fork.Process(target=_run_rank, args=(rank, world, port, body, logs))
            for rank in range(world)
        ]
        STARTED.append(self)
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 240.0, ranks: list[int] | None = None) -> list[int | None]:
        """Return the exit codes of some ranks or of all, then kill the rest.

        A code is minus the number of the signal that ended the rank, and None where it was still
        running after `seconds`; such a rank prints its stack before it is killed.
        """
        deadline = time.monotonic() + seconds
        chosen = range(len(self.processes)) if ranks is None else ranks
        processes = [self.processes[rank] for rank in chosen]
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in processes]
        if None in codes:
            for process in processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGUSR2)
            time.sleep(0.5)
        self.kill()
        return codes

    def kill(self) -> None:
        """Kill the ranks that are still running, and the store."""
        for process in (*self.processes, self.store):
            if process:
                process.kill()
                process.join()

    def text(self, rank: int) -> str:
        """Return everything that a rank has printed, errors included."""
        return (self.logs / f"rank_{rank}.txt").read_text()


def _run_rank(rank: int, world: int, port: int, body: Callable[[int], None], logs: Path) -> None:
    """Call body(rank) with output sent to the log, default signal handlers and torchrun's
    variables.
    """
    with open(logs / f"rank_{rank}.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    set_torchrun_environment(rank, world, port)
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR2)
    body(rank)
