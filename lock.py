"""One run an output folder: OUT/lock.json names the host and process that write there.

    lock.take("out")       ValueError names the run that holds the folder
    lock.check()           ValueError: another run has taken it, for example while this one slept
    lock.release()         at the end; a killed process need not

On one machine the system's record lock on the file decides: it ends with the process, however that
dies. File systems shared by several machines may not pass such locks on, so the holder also writes
a new number into the file every BEAT seconds. Who finds a lock of another machine watches it for
PATIENCE seconds: while the number changes the folder is in use; if it stands still the holder is
dead. No clocks are compared. Machines are told apart by the id that the kernel draws at boot.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

BEAT = 5.0  # seconds between two numbers
PATIENCE = 30.0  # seconds without a new number after which a holder on another machine is dead
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class _Lock:
    """A lock that this process holds, and the thread that writes its numbers."""

    def __init__(self, path: Path, handle: int):
        self.path, self.handle, self.pid = path, handle, os.getpid()
        self.holder = {
            "host": socket.gethostname(),
            "pid": self.pid,
            "boot": _boot(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "run": uuid.uuid4().hex,
        }
        self.lost = ""  # who has taken it
        self.ended = threading.Event()
        self.write(0)
        self.thread = threading.Thread(target=self.beat, daemon=True)
        self.thread.start()

    def write(self, number: int | None) -> None:
        """Write the holder and a number; None says that nobody holds the lock."""
        values = {"free": True} if number is None else {**self.holder, "beat": number}
        text = json.dumps(values).encode()
        os.pwrite(self.handle, text, 0)
        os.ftruncate(self.handle, len(text))

    def mine(self) -> bool:
        """Return whether the file still names this run; remember who has taken it."""
        content = os.pread(self.handle, 4096, 0)
        holder = _read(content)
        if holder.get("run") != self.holder["run"]:
            self.lost = _name(holder)
        return not self.lost

    def beat(self) -> None:
        """Write a new number every BEAT seconds until the lock ends or is lost."""
        number = 0
        while not self.ended.wait(BEAT):
            number += 1
            with contextlib.suppress(OSError):  # a disk that is full or away for a while
                if not self.mine():
                    return
                self.write(number)


_held: _Lock | None = None


def take(out: str | Path) -> None:
    """Take the lock of a folder, which exists. ValueError names the run that holds it."""
    global _held
    release()
    path = Path(out) / "lock.json"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644))
    except FileExistsError:
        _watch(path)
    handle = os.open(path, os.O_RDWR)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            holder = _read(os.pread(handle, 4096, 0))
            os.close(handle)
            raise ValueError(_in_use(path, holder)) from None
    _held = _Lock(path, handle)


def check() -> None:
    """Raise ValueError where another run has taken this process's folder."""
    if _held and _held.pid == os.getpid() and not _held.mine():
        raise ValueError(
            f"{_held.path.parent} was taken over by {_held.lost}: this run stops and writes nothing"
        )


def release() -> None:
    """Give the lock back, if this process holds one."""
    global _held
    lock, _held = _held, None
    if lock is None or lock.pid != os.getpid():  # a forked child inherits the variable, no lock
        return
    lock.ended.set()
    lock.thread.join()
    with contextlib.suppress(OSError):
        if lock.mine():
            lock.write(None)
    os.close(lock.handle)


def _watch(path: Path) -> None:
    """Return once the holder on another machine is known to be dead. ValueError: it is alive."""
    before = path.read_bytes()
    holder = _read(before)
    if "free" in holder or holder.get("boot") == _boot():
        return  # the record lock decides
    print(
        f"{path} names {_name(holder)}, on another machine: waiting {PATIENCE:g} s for a sign "
        "of life",
        flush=True,
    )
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(min(1.0, PATIENCE / 10))
        content = path.read_bytes()
        if content != before and "free" not in _read(content):
            raise ValueError(_in_use(path, _read(content)))


def _read(content: bytes) -> dict[str, Any]:
    """Return what a lock file says, {} if it says nothing."""
    try:
        holder = json.loads(content)
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _name(holder: dict[str, Any]) -> str:
    """Return words for the holder of a lock."""
    if "pid" not in holder:
        return "a process that has not written its name"
    return f"process {holder['pid']} on {holder.get('host')} (since {holder.get('since')})"


def _in_use(path: Path, holder: dict[str, Any]) -> str:
    return (
        f"{path.parent} is in use by {_name(holder)}: wait for its end, stop it, or choose "
        "another --out"
    )


def _boot() -> str:
    """Return an id of this machine since it was started; its name where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
