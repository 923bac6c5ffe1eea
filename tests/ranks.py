"""Many ranks on one machine, forked from the test: 0.1 s instead of torchrun's 12."""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Ranks:
    """Processes that run `body(rank)` each, with torchrun's variables set; what they print goes to LOGS/rank_N.txt.

    A body patches what it likes before it starts: the fork keeps it from this process.
    """

    def __init__(self, world: int, body: Callable[[int], None], logs: Path):
        w = torch.nn.Parameter(torch.ones(4))
        w.grad = torch.ones(4)
        torch.optim.AdamW([w], fused=True).step()  # imports what an optimizer imports once, not in every rank
        self.logs, port = logs, free_port()
        logs.mkdir(parents=True, exist_ok=True)
        fork = multiprocessing.get_context("fork")
        self.processes = [fork.Process(target=_work, args=(r, world, port, body, logs)) for r in range(world)]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 120.0, ranks: list[int] | None = None) -> list[int | None]:
        """Exit codes (minus the signal that ended a rank), of some ranks or of all; then kills those that are left."""
        until = time.monotonic() + seconds
        wanted = [self.processes[r] for r in (range(len(self.processes)) if ranks is None else ranks)]
        for process in wanted:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in wanted]
        for process in self.processes:
            if process.is_alive():
                process.kill()
                process.join()
        return codes

    def text(self, rank: int) -> str:
        """What a rank has printed, errors included."""
        return (self.logs / f"rank_{rank}.txt").read_text()


def _work(rank: int, world: int, port: int, body: Callable[[int], None], logs: Path) -> None:
    with open(logs / f"rank_{rank}.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ["WORLD_SIZE"] = str(world)
    torch.set_num_threads(1)
    body(rank)


def launch(world: int, body: Callable[[int], None], logs: Path, seconds: float = 120.0) -> Ranks:
    """Runs `body(rank)` on every rank and asserts that all end well."""
    ranks = Ranks(world, body, logs)
    codes = ranks.wait(seconds)
    assert not any(codes), f"{codes}\n" + "\n".join(f"rank {r}:\n{ranks.text(r)}" for r in range(world))
    return ranks
