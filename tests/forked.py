"""Ranks that may fail: forked processes with exit codes, signals and what each of them printed."""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist

STARTED: list["Ranks"] = []


def kill_all() -> None:
    """Ends every rank that is left."""
    while STARTED:
        STARTED.pop().kill()


class Ranks:
    """Processes that run `body(rank)` each, with torchrun's variables set; what they print goes to LOGS/rank_N.txt.

    A body patches what it likes before it starts: the fork keeps it from this process. This process holds the store, as
    torchrun's agent does.
    """

    def __init__(self, world: int, body: Callable[[int], None], logs: Path):
        w = torch.nn.Parameter(torch.ones(4))
        w.grad = torch.ones(4)
        torch.optim.AdamW(
            [w], fused=True
        ).step()  # imports what an optimizer imports once, not in every rank
        self.logs, self.store = logs, None
        logs.mkdir(parents=True, exist_ok=True)
        fork = multiprocessing.get_context("fork")
        pipes = [fork.Pipe() for _ in range(world)]
        self.processes = [
            fork.Process(target=_work, args=(r, world, pipes[r][1], body, logs))
            for r in range(world)
        ]
        STARTED.append(self)
        for process in self.processes:
            process.start()
        if (
            world > 1
        ):  # after the forks: a store's thread does not come along, and they would wait for it
            self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for ours, _ in pipes:
            ours.send(self.store.port if self.store else 0)

    def wait(self, seconds: float = 60.0, ranks: list[int] | None = None) -> list[int | None]:
        """Exit codes (minus the signal that ended a rank), of some ranks or of all; then kills those that are left,
        which say first where they were.
        """
        until = time.monotonic() + seconds
        wanted = [
            self.processes[r] for r in (range(len(self.processes)) if ranks is None else ranks)
        ]
        for process in wanted:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in wanted]
        if None in codes:
            for process in filter(multiprocessing.Process.is_alive, wanted):
                os.kill(process.pid, signal.SIGUSR2)
            time.sleep(0.5)
        self.kill()
        return codes

    def kill(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.store = None

    def text(self, rank: int) -> str:
        """What a rank has printed, errors included."""
        return (self.logs / f"rank_{rank}.txt").read_text()


def _work(rank: int, world: int, port: Connection, body: Callable[[int], None], logs: Path) -> None:
    with open(logs / f"rank_{rank}.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port.recv())
    )
    os.environ.update(
        WORLD_SIZE=str(world), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0"
    )
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGUSR2)
    body(rank)
