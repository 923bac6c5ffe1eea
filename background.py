"""Checkpoints that are written while training goes on, for --async-save.

    writer = Writer(stop)
    writer.save(out, state, optimizer, keep, run)     copies the state; a thread writes the copy
    writer.wait()                                     until the checkpoint is whole

    loop      step 120 | copy | step 121 | step 122 | step 123 | ...
    thread                    | check, write, hash ... | rank 0: commit |

Files and their safety are those of checkpoint.py: the folder is hidden until it is whole. Threads
call no collective, which would get between those of training: each leaves what it has written in
the store at which the ranks have met, where rank 0's thread finds it.

One checkpoint is written at a time: `save` waits for the one before. Where one fails the run is
asked to stop, as by a signal; all ranks leave after the same step and say why.
"""

import json
import threading
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

import checkpoint
import lock
from checkpoint import Snapshot, State, Written
from kernels.device import copies_done
from optimizer import AdamW
from parallel import Mesh

POLL_SECONDS = 0.02  # between two looks of rank 0 for what the others have written


class Stopping(Protocol):
    """The part of a run's stop request that a failed checkpoint sets."""

    reason: str


class _Job:
    """A checkpoint that is being written, as this rank sees it."""

    def __init__(self, partial: Path, token: str, values: dict[str, Any], keep: int, mesh: Mesh):
        self.partial, self.values, self.keep, self.mesh = partial, values, keep, mesh
        self.keys = [f"checkpoint {token} of rank {rank}" for rank in range(mesh.world)]
        self.written = Written({}, [])  # by this rank
        self.error: tuple[str, str] | None = None  # on rank 0: kind and words
        self.thread: threading.Thread | None = None

    def write(self, snapshot: Snapshot) -> None:
        """Write this rank's file, unless its state is not finite, and say so in the store."""
        try:
            broken = checkpoint.not_finite(snapshot)
            if broken:
                self.written = Written({}, [], broken=broken)
            else:
                self.written = checkpoint.write_rank(self.partial, snapshot, self.mesh)
        except Exception as error:
            self.written = Written({}, [], f"{type(error).__name__}: {error}")
        if self.mesh.world > 1:
            self.mesh.store.set(self.keys[self.mesh.rank], json.dumps(self.written))

    def answers(self) -> list[Written]:
        """Return what every rank has written, once all have."""
        if self.mesh.world == 1:
            return [self.written]
        store = self.mesh.store
        while not store.check(self.keys):
            time.sleep(POLL_SECONDS)
        answers = [Written(*json.loads(store.get(key))) for key in self.keys]
        for key in self.keys:
            store.delete_key(key)
        return answers

    def commit(self) -> None:
        """On rank 0: make the checkpoint of all ranks' files, or keep the reason why not."""
        try:
            answers = self.answers()
            broken = next(filter(None, (written.broken for written in answers)), "")
            if broken:
                self.error = "broken", broken
                return
            lock.check()
            checkpoint.commit(self.partial, self.values, answers, self.keep)
        except ValueError as error:  # another run has taken OUT
            self.error = "taken", str(error)
        except OSError as error:
            self.error = "disk", str(error)
        except Exception as error:
            self.error = "disk", f"{type(error).__name__}: {error}"


class Writer:
    """Writes the checkpoints of a run in a thread. Every rank has one and calls it alike.

    stop: its reason is set where a checkpoint could not be written.
    """

    def __init__(self, stop: Stopping):
        self.stop = stop
        self.job: _Job | None = None  # the newest, until `wait`
        self.host: dict[str, Tensor] = {}  # buffers for copies of the state

    def save(
        self,
        out: str | Path,
        state: State,
        optimizer: AdamW | tuple[AdamW, ...],
        keep: int,
        run: dict[str, Any] | None = None,
    ) -> None:
        """Copy the state and begin to write OUT/step_N, as checkpoint.save does. Collective.

        Waits for the checkpoint before, and raises its error.
        """
        global _newest
        self.wait()
        out, model = Path(out), checkpoint.first_model(optimizer)
        mesh, partial = model.mesh, checkpoint.partial_folder(out, state.step)
        try:
            token = mesh.ask(lambda: _begin(partial))
        except OSError as error:
            raise OSError(checkpoint.unwritten_words(error, state.step, out, mesh)) from None
        job = _Job(partial, token, checkpoint.state_values(state, run), keep, mesh)
        snapshot = checkpoint.collect(optimizer, self.host)
        wait_for_copies = copies_done(model.device)

        def work() -> None:
            wait_for_copies()
            job.write(snapshot)
            if mesh.main:
                job.commit()
            if job.error:
                self.stop.reason = self.stop.reason or "a checkpoint that could not be written"

        # Of several ranks one may wait for another that is dead: that must not keep it alive.
        job.thread = threading.Thread(target=work, name="checkpoint", daemon=mesh.world > 1)
        self.job = _newest = job
        job.thread.start()

    def wait(self) -> None:
        """Wait until the newest checkpoint is whole. Collective.

        OSError or ValueError, the same on every rank: why there is none.
        """
        job, self.job = self.job, None
        if job is None:
            return
        mesh, out, step = job.mesh, job.partial.parent, job.values["step"]
        if not mesh.main:
            job.thread.join()
        mesh.everyone(None)  # a dead rank ends it; after it rank 0's thread waits for nobody
        error = mesh.ask(lambda: _join(job))
        if error is None:
            return
        kind, words = error
        if kind == "broken":
            raise ValueError(checkpoint.not_finite_words(words, step, out, mesh))
        if kind == "taken":
            raise ValueError(words)
        raise OSError(checkpoint.unwritten_words(words, step, out, mesh))


_newest: _Job | None = None  # of this process


def settle(patience: float | None) -> None:
    """Let the checkpoint that is being written end, where the run has failed.

    patience: most seconds to wait; None waits for it.
    """
    if _newest is not None:
        _newest.thread.join(patience)


def _begin(partial: Path) -> str:
    """Make the hidden folder; return a name for what the ranks write into the store.

    It is drawn: after a restart the store may still hold what dead processes have written.
    """
    checkpoint.begin(partial)
    return uuid.uuid4().hex


def _join(job: _Job) -> tuple[str, str] | None:
    """Wait for rank 0's thread; return the error that it met."""
    job.thread.join()
    return job.error
