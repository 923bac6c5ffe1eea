"""Find out, after a failure, which rank failed first or does not answer."""

import contextlib
import threading
import time
import traceback

import torch.distributed as dist

from parallel import Mesh

# Functions of plumb in which a rank waits for others, by file. Errors of a backend surface there.
WAITING = ("parallel.py", "pipeline.py", "optimizer.py")


def is_about_others(error: BaseException) -> bool:
    """Return True if an error only says that communication failed, and not why.

    Backends raise plain RuntimeErrors with words of their own, so the place counts: inside
    torch.distributed, or where this rank waits for a collective.
    """
    if isinstance(error, dist.DistError) or "gloo/" in str(error):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    if any("torch/distributed/" in frame.filename for frame in frames):
        return True
    if not frames or not isinstance(error, RuntimeError):
        return False
    return frames[-1].filename.endswith(WAITING)


def last_words(mesh: Mesh, words: str, patience: float) -> dict[int, str]:
    """Publish why this rank failed; return what every rank that failed so far has published.

    A dict rank -> "time words", in which this rank is missing if rank 0, which may hold the store,
    does not answer. Messages go through the store, since torchrun's store outlives broken groups.
    patience: seconds to wait for the other ranks' messages.
    """
    messages: dict[int, str] = {}
    deadline = time.monotonic() + patience

    def exchange() -> None:
        mesh.store.set(f"last words {mesh.rank}", f"{time.time()} {words}")
        while True:
            for rank in range(mesh.world):
                if rank not in messages and mesh.store.check([f"last words {rank}"]):
                    messages[rank] = mesh.store.get(f"last words {rank}").decode()
            if len(messages) == mesh.world or time.monotonic() >= deadline:
                return
            time.sleep(0.05)

    def try_exchange() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone
            exchange()

    # In a thread: without torchrun rank 0 holds the store, and calls to a hung store never return.
    thread = threading.Thread(target=try_exchange, daemon=True)
    thread.start()
    thread.join(patience + 1)
    return dict(messages)


def said_by(rank: int, world: int, words: str, messages: dict[int, str]) -> str:
    """Return who says a reason that this rank and perhaps others have: "" if a lower rank does.

    "rank 1", "ranks 0, 2" or "every rank".
    """
    alike = {other for other, text in messages.items() if text.partition(" ")[2] == words} | {rank}
    if min(alike) < rank:
        return ""
    if len(alike) == 1:
        return f"rank {rank}"
    return "every rank" if len(alike) == world else f"ranks {', '.join(map(str, sorted(alike)))}"


def who_failed_first(rank: int, world: int, messages: dict[int, str]) -> str:
    """Return which rank failed first, with its reason, or which one does not answer."""
    if rank not in messages:
        return "rank 0 does not answer: it is dead or hung, or the network to its node is"
    silent = [str(other) for other in range(world) if other not in messages]
    if silent:
        return f"rank {', '.join(silent)} does not answer: dead, or hung"
    first = min(messages, key=lambda other: float(messages[other].split()[0]))
    return f"rank {first} failed first: {messages[first].partition(' ')[2]}"
