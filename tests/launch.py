"""Run a function on several ranks in a test: forked processes, with the environment that torchrun
gives its own.

    launch(4, train_dpo.main, ["--tp", "2", ...])       a list of what each rank returned

A rank that raises, dies or hangs fails the test with the traceback of every rank, and no process is
left behind. forked.py starts ranks that are meant to fail.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

GRACE_SECONDS = 10.0  # time for the other ranks to fail as well, once one has


class RankFailed(AssertionError):
    """A rank raised, died or hung; `ranks` maps the rank to its traceback."""

    def __init__(self, ranks: dict[int, str]):
        report = "".join(f"\n--- rank {rank}: {text}" for rank, text in sorted(ranks.items()))
        super().__init__(report)
        self.ranks = ranks


def launch(world: int, work: Callable[..., Any], *args: Any, limit: float = 120.0) -> list[Any]:
    """Run work(*args) in `world` forked processes and return a list of their results, by rank.

    As under torchrun, another process holds the store, on a port that the system chooses. Raises
    RankFailed when a rank raises, dies, or has not finished after `limit` seconds; in every case no
    process is left.
    """
    warm_up()
    fork = multiprocessing.get_context("fork")
    store, port = serve_store()  # first: it would hold the pipes open
    pipes = [fork.Pipe() for _ in range(world)]
    ranks = [
        fork.Process(target=_run_rank, args=(rank, world, port, pipes, work, args))
        for rank in range(world)
    ]
    try:
        for process in ranks:
            process.start()
        for _, theirs in pipes:
            theirs.close()  # the rank holds the only other end: its death closes the pipe
        answers = _collect([ours for ours, _ in pipes], limit)
    finally:
        for process in (*ranks, store):
            if process.pid:
                process.kill()
                process.join()
        for ours, _ in pipes:
            ours.close()
    failed = {rank: text for rank, (succeeded, text) in answers.items() if not succeeded}
    if failed:
        raise RankFailed(failed)
    return [answers[rank][1] for rank in range(world)]


def warm_up() -> None:
    """Take one AdamW step, whose imports last seconds, so that forked processes inherit them."""
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    torch.optim.AdamW([weight], fused=True).step()


def serve_store() -> tuple[BaseProcess, int]:
    """Open the store at which the ranks meet; return the process that holds it, and its port.

    It has a process of its own because it has a thread: a rank that this process forked while the
    thread was looking up a host name would inherit the lock of that look-up, and never connect.
    """
    fork = multiprocessing.get_context("fork")
    ours, theirs = fork.Pipe()
    process = fork.Process(target=_hold_store, args=(theirs, os.getpid()))
    process.start()
    return process, ours.recv()


def _hold_store(pipe: Connection, parent: int) -> None:
    """Send the port of a new store, and hold it for as long as the parent lives."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipe.send(store.port)
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def set_torchrun_environment(rank: int, world: int, port: int) -> None:
    """Set the variables that torchrun sets for a rank on a single machine."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def _run_rank(
    rank: int,
    world: int,
    port: int,
    pipes: list[tuple[Connection, Connection]],
    work: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    """Call work(*args) as one rank, and send (True, result) or (False, traceback) to the parent."""
    for ours, theirs in pipes:
        ours.close()
        if theirs is not pipes[rank][1]:
            theirs.close()
    pipe = pipes[rank][1]
    set_torchrun_environment(rank, world, port)
    torch.set_num_threads(1)  # the parent's thread pool does not survive a fork
    try:
        answer = (True, work(*args))
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while others still talk to it
            dist.destroy_process_group()
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    os._exit(0)  # skips the clean-up of the test session that was forked


def _collect(pipes: list[Connection], limit: float) -> dict[int, tuple[bool, Any]]:
    """Wait for the ranks and return rank -> (True, result) or (False, traceback)."""
    answers: dict[int, tuple[bool, Any]] = {}
    deadline = time.monotonic() + limit
    while len(answers) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        for pipe in wait(list(waiting), max(0.0, deadline - time.monotonic())):
            rank = waiting[pipe]
            try:
                answers[rank] = pipe.recv()
            except EOFError:
                answers[rank] = (False, "died without a traceback")
            if not answers[rank][0]:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() >= deadline:
            silent = [rank for rank in range(len(pipes)) if rank not in answers]
            return answers | {rank: (False, "did not answer") for rank in silent}
    return answers


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Return every weight of a Hugging Face folder, by name, from however many files."""
    weights: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not weights.keys() & part.keys(), "a weight is in two files"
        weights |= part
    return weights
