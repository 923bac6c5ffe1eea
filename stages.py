"""Stages of a demo: command lines on all cores, each stage once the one it needs is done.

    stages = [Stage("world", "", ["-m data.toyworld make --out runs/toy"], Path("runs/world.log")),
              Stage("sft", "world", ["train_sft.py ...", "generate.py ..."], Path("runs/sft.log"))]
    for done in run_stages(stages):
        print(done.line(result_of(done.stage)))

On a terminal the lines at the bottom show what is running: a bar, the loss, the algorithm's own
numbers, the time left.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from data.rows import read_rows
from disk import write_text

ROOT = Path(__file__).parent
POLL_SECONDS = 0.2
TAIL_BYTES = 4000  # of a log, enough for its last line of progress
LOG_LINES = 15  # shown of the log of a command that failed
BAR = 20  # characters


class Stage(NamedTuple):
    """A part of a demo: command lines that run one after another, on one core."""

    name: str
    needs: str  # name of the stage that must be finished before; "" for none
    lines: list[str]  # what follows `python` on the command line
    log: Path  # file to which their output is appended


class Done(NamedTuple):
    """A finished stage, the number-th of `total`."""

    stage: Stage
    seconds: float
    number: int
    total: int

    def line(self, result: str) -> str:
        """Return the line that reports it: "3 of 9  sft, seed 0  41 s  RESULT"."""
        place = f"{self.number:>{len(str(self.total))}} of {self.total}"
        return f"{place}  {self.stage.name:<22}{self.seconds:>5.0f} s  {result}"


@dataclass
class Running:
    """A stage whose command `at` is running."""

    stage: Stage
    process: subprocess.Popen
    log_start: int  # where the command's output begins in the log
    at: int = 0
    started: float = field(default_factory=time.monotonic)


def run_stages(stages: list[Stage], workers: int = 0) -> Iterator[Done]:
    """Run all stages and yield each as it ends. workers: how many at once; 0: one a core.

    A stage that an earlier call finished, with the same command lines, is not run again.
    SystemExit: a command failed; the message has the end of its log. Whatever is still running is
    stopped on every way out. ValueError: a stage needs one that is not there.
    """
    names = {stage.name for stage in stages}
    if lost := [stage for stage in stages if stage.needs and stage.needs not in names]:
        raise ValueError(f"stage {lost[0].name} needs {lost[0].needs}, which is none of the stages")
    pending = list(stages)
    running: list[Running] = []
    finished: set[str] = set()
    screen = Screen()
    begun = time.monotonic()
    try:
        while pending or running:
            for stage in [s for s in pending if not s.needs or s.needs in finished]:
                seconds = finished_before(stage)
                if seconds is None:
                    if len(running) == (workers or os.cpu_count() or 1):
                        break
                    stage.log.parent.mkdir(parents=True, exist_ok=True)
                    running.append(Running(stage, *_start(stage, 0)))
                pending.remove(stage)
                if seconds is not None:
                    finished.add(stage.name)
                    yield Done(stage, seconds, len(finished), len(stages))
            for run in [run for run in running if run.process.poll() is not None]:
                if run.process.returncode:
                    raise SystemExit(_failure(run))
                run.at += 1
                if run.at < len(run.stage.lines):
                    run.process, run.log_start = _start(run.stage, run.at)
                    continue
                running.remove(run)
                finished.add(run.stage.name)
                seconds = time.monotonic() - run.started
                _remember(run.stage, seconds)
                screen.clear()
                yield Done(run.stage, seconds, len(finished), len(stages))
            screen.show(running, len(finished), len(stages), time.monotonic() - begun)
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        screen.clear()
        for run in running:
            run.process.terminate()
        for run in running:
            run.process.wait()


def output_of(line: str) -> subprocess.CompletedProcess:
    """Run `python line` on one core and return what it printed."""
    command = [sys.executable, *line.split()]
    return subprocess.run(command, cwd=ROOT, env=_environment(), capture_output=True, text=True)


def file_name(name: str) -> str:
    """Return the name of a table row in file names, "ppo truth" -> "ppo_truth"."""
    return name.replace(" ", "_")


def side_by_side(home: Path, names: list[str], n: int) -> str:
    """Return the answers of some models, each in HOME/NAME.jsonl, to the first n prompts."""
    rows = {name: list(read_rows(home / f"{file_name(name)}.jsonl")) for name in names}
    width = 2 + max(map(len, names))
    lines = []
    for i in range(n):
        prompt = rows[names[0]][i]["prompt"]
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        lines.append(f"\n{text}")
        lines += [f"  {name + ':':<{width}}{rows[name][i]['response'].strip()}" for name in names]
    return "\n".join(lines)


def write_commands(stages: list[Stage], file: Path) -> None:
    """Write the command lines of all stages as a shell script, and say where they are."""
    lines = [f"python {shlex.join(line.split())}" for stage in stages for line in stage.lines]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "\n".join(lines) + "\n")
    print(f"writing to {file.parent}/; the {len(lines)} commands are in {file}", flush=True)


def _environment() -> dict[str, str]:
    """Return the environment of a command: one thread, output at once."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _start(stage: Stage, at: int) -> tuple[subprocess.Popen, int]:
    """Start a command of a stage; return the process and the size of the log before it."""
    with open(stage.log, "a") as log:
        start = log.tell()
        command = [sys.executable, *stage.lines[at].split()]
        process = subprocess.Popen(command, cwd=ROOT, env=_environment(), stdout=log, stderr=log)
    return process, start


def _failure(run: Running) -> str:
    """Return the message of a command that failed, with the end of its log."""
    tail = "\n".join(run.stage.log.read_text(errors="replace").splitlines()[-LOG_LINES:])
    return (
        f"python {run.stage.lines[run.at]}\n"
        f"failed ({run.process.returncode}); the end of {run.stage.log}:\n{tail}"
    )


# ---- stages that are finished ------------------------------------------------------------------


def _remember(stage: Stage, seconds: float) -> None:
    """Write beside its log that a stage is finished, for `finished_before`."""
    record = {"seconds": seconds, "lines": stage.lines}
    write_text(stage.log.with_suffix(".done"), json.dumps(record, indent=1))


def finished_before(stage: Stage) -> float | None:
    """Return the seconds that a stage took in an earlier call; None if it has to run."""
    try:
        record = json.loads(stage.log.with_suffix(".done").read_text())
    except (OSError, ValueError):
        return None
    return record["seconds"] if record["lines"] == stage.lines else None


# ---- what is running ---------------------------------------------------------------------------


class Screen:
    """The lines at the bottom of a terminal; nothing is shown elsewhere."""

    def __init__(self) -> None:
        self.height = 0  # lines that are shown now
        self.live = sys.stdout.isatty()

    def show(self, running: list[Running], done: int, total: int, seconds: float) -> None:
        """Replace the lines by those of the stages that run now."""
        if not self.live:
            return
        width = shutil.get_terminal_size().columns - 1
        lines = [f"{done} of {total} stages done, {seconds // 60:.0f}:{seconds % 60:02.0f} min"]
        lines += [status(run) for run in running]
        self.clear()
        print("\n".join(line[:width] for line in lines), flush=True)
        self.height = len(lines)

    def clear(self) -> None:
        """Remove the lines."""
        if self.height:
            print(f"\x1b[{self.height}A\x1b[J", end="", flush=True)
        self.height = 0


def status(run: Running) -> str:
    """Return a line on the command that a stage runs: its last line of progress with a bar."""
    script = run.stage.lines[run.at].split()
    name = script[1] if script[0] == "-m" else script[0]
    text = f"  {run.stage.name:<22}{name:<20}"
    with open(run.stage.log, "rb") as log:
        log.seek(max(run.log_start, log.seek(0, os.SEEK_END) - TAIL_BYTES))
        tail = log.read().decode(errors="replace")
    steps = re.findall(r"^step (\d+)/(\d+): (.*)$", tail, re.MULTILINE)
    if not steps:
        return text
    step, total, numbers = steps[-1]
    full = BAR * int(step) // int(total)
    return f"{text}{'█' * full}{'░' * (BAR - full)} {step}/{total}  {numbers}"
