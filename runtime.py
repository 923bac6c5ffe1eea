"""Plain functions that a training script calls: set-up, learning rate, logging, when to save, stop signals.

Nothing here calls back into a script.
"""

import contextlib
import ctypes
import json
import math
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import parallel
import plan
from config import RunConfig, to_json
from data.dataset import Dataset, load_dataset
from data.templates import Template
from data.tokenizer import Tokenizer
from model import GPT, parameter_count
from parallel import Mesh
from reporting import _wandb
from sampling.sampler import generate
from weights.folder import DTYPES

_running: RunConfig | None = (
    None  # what this process was asked to do, for advice when memory runs out
)
ECHO_SECONDS = 3.0  # within this the same signal may come twice
PATIENCE = 10.0  # seconds that a rank which lost the others waits for their last words
NONFINITE_LIMIT = 5  # steps in a row with a NaN or infinite gradient before a run gives up


def run(main: Callable[[], None]) -> None:
    """Runs a script's main; what a user can mend is printed as one line. PLUMB_TRACEBACK=1 shows where it came from.

    A rank that fails leaves its last words where the others find them, so that each can say who failed first.
    """
    try:
        main()
        parallel.close()
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("PLUMB_TRACEBACK"):
            raise
        _leave(str(error))
    except torch.cuda.OutOfMemoryError as error:
        world, memory = parallel.here().world, torch.cuda.mem_get_info()[1] / 2**30
        advice = plan.suggest(_running, world, memory) if _running else "lower --max-tokens"
        _leave(f"out of GPU memory ({error}): {advice}")
    except Exception as error:
        if parallel.here().world == 1:
            raise
        traceback.print_exc()
        _leave(
            f"{type(error).__name__}: {error}".splitlines()[0],
            ask_others=parallel.is_about_others(error),
        )


def _leave(reason: str, ask_others: bool = False) -> None:
    """Ends the process with one line on what went wrong, here or on another rank."""
    mesh = parallel.here()
    if mesh.world == 1:
        sys.exit(f"error: {reason}")
    others = parallel.last_words(mesh, reason, patience=PATIENCE if ask_others else 0.0)
    print(
        f"error on rank {mesh.rank}: {reason}" + (f"\n  {others}" if ask_others else ""),
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)  # not through c10d's tear-down, which may wait for ranks that are gone


def set_up(config: RunConfig, mesh: Mesh) -> tuple[torch.device, torch.dtype]:
    """Checks what every run needs, seeds every generator and makes OUT with its config.json. Silences all ranks but 0.

    Returns the device and the type of weights and activations. ValueError names the flag to mend.
    """
    global _running
    _running = config
    if not mesh.main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    for flag in ("model", "data"):
        if not getattr(config, flag):
            raise ValueError(f"--{flag} is missing; --help lists the flags")
    for flag in ("batch_size", "max_tokens", "max_length", "log_every", "epochs"):
        if getattr(config, flag) < 1:
            raise ValueError(
                f"--{flag.replace('_', '-')} must be at least 1, not {getattr(config, flag)}"
            )
    for flag, value in vars(config).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"--{flag.replace('_', '-')} {value} is no number to compute with")
    for flag in (
        "max_steps",
        "max_minutes",
        "eval_every",
        "save_every",
        "samples",
        "keep",
        "max_bad_rows",
        "clip",
    ):
        if getattr(config, flag) < 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(config, flag)} is below 0")
    if not 0 <= config.warmup <= 1:
        raise ValueError(f"--warmup {config.warmup} is a share of all steps: between 0 and 1")
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--device cuda, but torch sees no GPU: install a CUDA build of torch, or take --device cpu"
        )
    if config.samples and config.pp > 1:
        raise ValueError("--samples cannot be had from pipeline stages: leave it out, or --pp")
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    dtype = DTYPES[
        config.dtype if config.dtype != "auto" else "bf16" if device.type == "cuda" else "fp32"
    ]
    if device.type == "cpu":
        _keep_freed_memory()
    random.seed(config.seed)
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    mark = Path(config.out) / mesh.ask(lambda: _make_out(config))
    shared = all(mesh.everyone(mark.exists()))
    if mesh.main:
        mark.unlink()
    if not shared:
        raise ValueError(
            f"--out {config.out} is not the same folder on every node: take one on a shared file system"
        )
    layout = (
        f"{mesh.world} ranks: dp {mesh.dp}, tp {mesh.tp}, cp {mesh.cp}, pp {mesh.pp}; "
        if mesh.world > 1
        else ""
    )
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {layout}{str(dtype)[6:]}, output in {config.out}/")
    return device, dtype


def _make_out(config: RunConfig) -> str:
    """Makes OUT; the name of a file in it that no other run has made, by which the others know it."""
    out = Path(config.out)
    if not config.resume and (out / "metrics.jsonl").exists():
        raise ValueError(
            f"{out} holds a run already: --resume auto goes on with it, another --out starts afresh"
        )
    if config.wandb:
        _wandb()
    out.mkdir(parents=True, exist_ok=True)
    if config.resume and (out / "config.json").exists():
        before = json.loads((out / "config.json").read_text())
        for name, value in json.loads(to_json(config)).items():
            if name not in ("resume", "config") and name in before and before[name] != value:
                print(
                    f"warning: resuming with another --{name.replace('_', '-')}: {value}, it was {before[name]}"
                )
    (out / "config.json").write_text(to_json(config))
    mark = out / f".mark-{os.getpid()}-{time.time_ns()}"
    mark.touch()
    return mark.name


def _keep_freed_memory() -> None:
    """Stops glibc from handing every large buffer back to the system: a fifth of a CPU step went into page faults."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def cache_folder(config: RunConfig) -> Path:
    """Where tokenised data and reference log-probs are kept."""
    return Path(config.cache or Path(config.out) / "cache")


def load_rows(files: list[str], kind: str, template: Template, config: RunConfig) -> Dataset | None:
    """The rows of some files as token trees, by the flags of the run; None without files. `kind`: see load_dataset."""
    if not files:
        return None
    return load_dataset(
        files,
        kind,
        template,
        config.max_length,
        config.overlong,
        config.max_bad_rows,
        cache_folder(config),
    )


def prepare_model(model: GPT, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Flags that change how a loaded model runs; ValueError where model and tokenizer do not belong together."""
    if tokenizer.size > model.c.vocab:
        raise ValueError(
            f"the tokenizer has {tokenizer.size} ids, the embedding {model.c.vocab}: not from one folder?"
        )
    model.checkpoint_activations = config.checkpoint_activations
    if config.compile:
        for block in model.blocks.values():
            block.compile(dynamic=True)


def total_steps(config: RunConfig, per_epoch: int) -> int:
    """Optimizer steps of the whole run."""
    return min(config.max_steps or per_epoch * config.epochs, per_epoch * config.epochs)


def learning_rate(config: RunConfig, step: int, total: int) -> float:
    """Rate of step `step` (from 0) of `total`: linear from 0 over the warm-up, then the schedule down to 0."""
    warm = int(config.warmup * total)
    if step < warm:
        return config.lr * (step + 1) / warm
    if config.schedule == "constant":
        return config.lr
    left = 1 - (step - warm) / max(1, total - warm)
    return config.lr * (
        left if config.schedule == "linear" else 0.5 * (1 + np.cos(np.pi * (1 - left)))
    )


def describe(config: RunConfig, model: GPT, lengths: np.ndarray, total: int) -> str:
    """What the run will be, in three lines: sizes, steps and the memory that weights and optimizer take."""
    own, size, ranks = (
        sum(p.numel() for p in model.parameters()),
        model.dtype.itemsize,
        model.mesh.dp * model.mesh.cp,
    )
    whole, pieces = (
        size + max(4, size),
        2 * max(4, size) + (4 if size < 4 else 0),
    )  # weights, gradient | means, master
    if config.zero == 2 and ranks > 1:
        whole, pieces = size, pieces + max(4, size)
    memory = own * (whole + pieces / ranks) / 2**30
    step_tokens = lengths.mean() * min(config.batch_size, len(lengths))
    lines = [
        f"{parameter_count(model.c) / 1e6:,.2f}M parameters; weights, gradients and AdamW take {memory:.2f} GB"
        + (" on this rank" if model.mesh.world > 1 else ""),
        f"{total} steps of {config.batch_size} examples, about {step_tokens:,.0f} tokens each in micro-batches of at "
        f"most {config.max_tokens:,}",
    ]
    if lengths.max() > model.c.max_position:
        lines.append(
            f"warning: rows may reach {lengths.max()} tokens, the model was made for {model.c.max_position}"
        )
    return "\n".join(lines)


class Stop:
    """Tells a loop to save and leave: SIGTERM, SIGUSR1, SIGINT or --max-minutes. A second one ends the process at once,
    unless it is an echo: Slurm signals every process of a job, and torchrun then passes on to its own what it got.

    Ranks agree in optimizer.step: one that wants to stop stops them all, after the same step.
    """

    def __init__(self, max_minutes: float):
        self.reason = ""  # stays empty where another rank was told
        self.told = float("inf")  # when the first signal came
        self.deadline = time.monotonic() + 60 * max_minutes if max_minutes else float("inf")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._signal)

    def _signal(self, number: int, frame: Any) -> None:
        self.told = min(self.told, time.monotonic())
        self.reason = self.reason or signal.Signals(number).name
        if time.monotonic() > self.told + ECHO_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def __bool__(self) -> bool:
        if not self.reason and time.monotonic() > self.deadline:
            self.reason = "--max-minutes"
        return bool(self.reason)


class NonFinite:
    """Counts steps in a row whose gradient was not finite; too many end the run."""

    def __init__(self):
        self.row = 0

    def check(self, norm: float, step: int) -> bool:
        """True where the step was skipped. ValueError after NONFINITE_LIMIT in a row."""
        self.row = 0 if np.isfinite(norm) else self.row + 1
        if self.row >= NONFINITE_LIMIT:
            raise ValueError(
                f"the gradient was not finite in {self.row} steps in a row, up to step {step}: "
                "lower --lr, or look for broken rows; the last checkpoint is good"
            )
        return self.row > 0


def print_samples(
    model: GPT,
    data: Dataset,
    n: int,
    tokenizer: Tokenizer,
    template: Template,
    say: Callable[[str], Any],
) -> None:
    """Prints one sampled answer to each of the first n prompts of a data set: temperature 0.7, fixed seeds."""
    starts = data.tree_start[:-1][:n]
    prompts = [
        data.tokens[start : start + size].tolist() for start, size in zip(starts, data.prompt_len)
    ]
    answers = generate(model, prompts, 128, temperature=0.7, stop_ids=template.stop_ids)
    for prompt, answer in zip(prompts, answers):
        say(f"  prompt  {tokenizer.decode(prompt)[-300:].strip()!r}")
        say(f"  answer  {tokenizer.decode(answer.tokens).strip()!r}")
