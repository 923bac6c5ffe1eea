"""Several ranks in a test: forked processes with torchrun's environment around them, gone when the test goes on.

launch(4, train_dpo.main, ["--tp", "2", ...])       what each rank returned; RankFailed with every rank's traceback
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

LAST_WORDS = 10.0  # seconds that the other ranks have to fail as well once one has


class RankFailed(AssertionError):
    """Some rank raised, died or hung; `ranks` holds what each of them said."""

    def __init__(self, ranks: dict[int, str]):
        super().__init__(
            "".join(f"\n--- rank {rank}: {said}" for rank, said in sorted(ranks.items()))
        )
        self.ranks = ranks


def launch(world: int, work: Callable[..., Any], *args: Any, limit: float = 120.0) -> list[Any]:
    """Runs work(*args) in `world` forked processes as torchrun would, and returns what each of them returned.

    Like torchrun's agent, this process holds the store, on a port of the system's choice. Raises RankFailed when a rank
    raises, dies, or is not done after `limit` seconds; whatever happens, no process is left.
    """
    warm = torch.nn.Parameter(torch.ones(2))
    warm.grad = torch.ones(2)
    torch.optim.AdamW(
        [warm], fused=True
    ).step()  # imports for seconds at its first step: here, not in every fork
    fork = multiprocessing.get_context("fork")
    pipes = [fork.Pipe() for _ in range(world)]
    ranks = [
        fork.Process(target=_rank, args=(rank, world, pipes, work, args)) for rank in range(world)
    ]
    store = None
    try:
        for process in ranks:
            process.start()
        for _, theirs in pipes:
            theirs.close()  # so that a rank that dies ends its pipe
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for ours, _ in pipes:
            ours.send(store.port)
        answers = _collect([ours for ours, _ in pipes], limit)
    finally:
        for process in ranks:
            if process.pid:
                process.kill()
                process.join()
        for ours, _ in pipes:
            ours.close()
        store = None  # its thread ends here: a store that is freed in a later fork takes that process along
    if bad := {rank: said for rank, (good, said) in answers.items() if not good}:
        raise RankFailed(bad)
    return [answers[rank][1] for rank in range(world)]


def _rank(
    rank: int, world: int, pipes: list[tuple[Connection, Connection]], work: Callable, args: tuple
) -> None:
    for ours, theirs in pipes:
        ours.close()
        if theirs is not pipes[rank][1]:
            theirs.close()
    pipe = pipes[rank][1]
    port = pipe.recv()
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
    }  # fmt: skip
    torch.set_num_threads(1)  # the parent's pool of threads does not live through a fork
    try:
        answer = (True, work(*args))
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while others still talk to it
            dist.destroy_process_group()
    except BaseException:
        answer = (False, traceback.format_exc())
    pipe.send(answer)
    pipe.close()
    os._exit(0)  # nothing of the test session that was forked may run at the end


def _collect(pipes: list[Connection], limit: float) -> dict[int, tuple[bool, Any]]:
    """rank -> (whether it went well, what it returned or said)."""
    answers: dict[int, tuple[bool, Any]] = {}
    until = time.monotonic() + limit
    while len(answers) < len(pipes):
        waiting = {pipe: rank for rank, pipe in enumerate(pipes) if rank not in answers}
        for pipe in wait(list(waiting), max(0.0, until - time.monotonic())):
            try:
                answers[waiting[pipe]] = pipe.recv()
            except EOFError:
                answers[waiting[pipe]] = (False, "died without a word")
            if not answers[waiting[pipe]][0]:
                until = min(until, time.monotonic() + LAST_WORDS)
        if time.monotonic() >= until:
            return answers | {
                r: (False, "did not answer") for r in range(len(pipes)) if r not in answers
            }
    return answers


def weights_in(folder: Path) -> dict[str, Tensor]:
    """Every weight of a Hugging Face folder, from however many files."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        part = load_file(path)
        assert not found.keys() & part.keys(), "a weight is in two files"
        found |= part
    return found
