"""Plain functions that a training script calls: set-up, learning rate, logging, when to save, stop signals.

Nothing here calls back into a script.
"""

import contextlib
import ctypes
import hashlib
import json
import math
import os
import random
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import parallel
import plan
from config import RunConfig, to_json
from data.dataset import Dataset, load_dataset
from data.templates import Template
from data.tokenizer import Tokenizer
from data.trees import TreeBatch, make_batch, micro_batches
from generate import generate
from hf import DTYPES, fingerprint, load_model
from model import GPT, GPTConfig
from parallel import Mesh, pipeline

# bf16 matmul peaks without sparsity, TFLOP/s, from the makers' data sheets: the yardstick of `mfu`.
PEAK_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "B200": 2250,
    "4090": 165,
}
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


def _wandb() -> Any:
    try:
        import wandb
    except ImportError:
        raise ImportError("--wandb needs: pip install wandb") from None
    return wandb


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
        f"{model.c.parameters / 1e6:,.2f}M parameters; weights, gradients and AdamW take {memory:.2f} GB"
        + (" on this rank" if model.mesh.world > 1 else ""),
        f"{total} steps of {config.batch_size} examples, about {step_tokens:,.0f} tokens each in micro-batches of at "
        f"most {config.max_tokens:,}",
    ]
    if lengths.max() > model.c.max_position:
        lines.append(
            f"warning: rows may reach {lengths.max()} tokens, the model was made for {model.c.max_position}"
        )
    return "\n".join(lines)


def due(every: int, step: int) -> bool:
    """Whether something that happens every so many steps (0 = never) happens after step `step`."""
    return bool(every) and step % every == 0


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


def add(totals: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Adds the sums of some per-example metrics to running totals, without waiting for a GPU."""
    for name, value in values.items():
        total = value.detach().double().sum()
        totals[name] = totals[name] + total if name in totals else total


def means(totals: dict[str, Tensor], n: float, mesh: Mesh) -> dict[str, float]:
    """Running totals of all ranks over the n examples of them all, as plain numbers on every rank."""
    values: dict[str, float] = {}
    if mesh.last_stage:  # elsewhere nothing was counted
        summed = mesh.group("dp").all_reduce(torch.stack(list(totals.values())), "sum")
        values = dict(zip(totals, (summed / n).tolist()))
    return mesh.metrics(values)


@torch.no_grad()
def reference_logps(
    policy: GPT,
    other: str,
    dataset: Dataset,
    examples: np.ndarray,
    config: RunConfig,
    say: Callable[[str], Any],
) -> tuple[np.ndarray, dict[str, float]]:
    """Log-prob of every response of some examples under the reference, (R,), NaN for those of other examples; and what
    it cost, {} if it was cached.

    The reference is the policy before its first update, or the folder `other`, which is loaded, scores, and is freed.
    The result is kept in the cache under the hash of weights, tokens and type: a resumed run reads it and cannot take
    a half-trained policy for its reference. Every rank scores its share and gets all of it.
    """
    dtype, device, mesh = policy.dtype, policy.device, policy.mesh
    inputs = hashlib.sha256(
        f"{mesh.ask(lambda: fingerprint(other or config.model))} {dataset.key} {dtype}".encode()
    )
    key = hashlib.sha256(
        inputs.digest() + np.sort(examples).astype(np.int64).tobytes()
    ).hexdigest()[:24]
    path = cache_folder(config) / f"reference-{key}.safetensors"
    cached = _cached_logps(path, len(dataset.response_len), say)
    if all(mesh.everyone(cached is not None)):
        say(f"reference: {len(examples)} examples from {path}")
        return cached, {}
    model = load_model(other, dtype, device, mesh=mesh) if other else policy
    if model.c.vocab != policy.c.vocab:
        raise ValueError(
            f"--ref {other} has a vocabulary of {model.c.vocab}, the policy {policy.c.vocab}: not a pair"
        )
    meter = Meter(model.c, device, mesh)
    logps = np.zeros(len(dataset.response_len))
    lengths = dataset.tree_lengths(config.share_prompts)
    bins = micro_batches(lengths, examples, config.max_tokens, mesh.dp_rank, mesh.dp)
    batches = (make_batch(dataset, items, config.share_prompts) for items in bins)
    shown = tqdm(
        pipeline(model, batches), "reference", len(bins), disable=None if mesh.main else True
    )
    for batch, hidden in shown:
        logps[dataset.responses_of(batch.examples)] = (
            batch.sum_by_response(model.logps(hidden, batch)).cpu().numpy()
        )
    logps = mesh.sum(torch.from_numpy(logps)).numpy()
    unseen = np.ones(len(logps), bool)
    unseen[dataset.responses_of(examples)] = False
    logps[unseen] = np.nan
    cost = meter.read(int(lengths[examples].sum()))
    if mesh.main:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        save_file({"logps": logps}, partial)
        partial.replace(path)
    say(f"reference: {len(examples)} examples scored in {cost['seconds']:.1f} s, kept in {path}")
    return logps, {f"reference_{k}": cost[k] for k in ("seconds", "cpu_seconds") if k in cost}


def _cached_logps(path: Path, n: int, say: Callable[[str], Any]) -> np.ndarray | None:
    """The cached log-probs of n responses, None where there are none or the file is damaged."""
    try:
        cached = load_file(path)["logps"] if path.exists() else None
    except (SafetensorError, KeyError):
        say(f"warning: {path} is damaged, scoring again")
        return None
    return cached if cached is not None and len(cached) == n else None


class Meter:
    """Time, tokens and memory of the steps, from one reading to the next. Tokens are those of all ranks."""

    def __init__(self, model: GPTConfig, device: torch.device, mesh: Mesh):
        self.model, self.device, self.ranks = model, device, mesh.world
        name = torch.cuda.get_device_name() if device.type == "cuda" else ""
        self.peak = next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
        self.start()

    def start(self) -> None:
        """Begins a step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def read(self, tokens: int, batches: Sequence[TreeBatch] = ()) -> dict[str, float]:
        """Ends a step of `tokens` real tokens, some of them in `batches`: what those saw stands for all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.wall
        row = {"tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds}
        if self.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
            if self.peak:
                here = max(1, sum(len(batch.tokens) for batch in batches))
                context = sum(batch.context * len(batch.tokens) for batch in batches) / here
                flops = tokens * self.model.flops_per_token(context)
                row["mfu"] = flops / seconds / (self.peak * 1e12 * self.ranks)
        else:
            row["cpu_seconds"] = time.process_time() - self.cpu
            row["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return row


class Log:
    """OUT/metrics.jsonl, the progress bar and, if asked for, Weights & Biases; all of it on rank 0 only."""

    def __init__(self, config: RunConfig, first_step: int, total: int, mesh: Mesh):
        self.path = Path(config.out) / "metrics.jsonl" if mesh.main else Path(os.devnull)
        if mesh.main:
            self._forget_after(first_step)
        self.file = open(self.path, "a")  # noqa: SIM115 - closed in close()
        self.first, self.total, self.started = first_step, total, time.monotonic()
        hidden = None if mesh.main else True
        self.bar = tqdm(
            total=total, initial=first_step, unit="step", dynamic_ncols=True, disable=hidden
        )
        self.wandb = None
        if config.wandb and mesh.main:
            self.wandb = _wandb().init(
                project=config.wandb, name=Path(config.out).name, config=vars(config)
            )

    def _forget_after(self, step: int) -> None:
        """Drops rows of steps that a resumed run takes again, and a last row that a killed run left half written."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if row.get("step", 0) <= step:
                kept.append(line + "\n")
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(self.path)

    def row(self, row: dict[str, Any]) -> None:
        """Appends a row; it is on its way to the disk when this returns."""
        row = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])

    def progress(self, row: dict[str, Any]) -> None:
        """Moves the bar by one step; where there is no terminal, prints twenty lines over the run."""
        what = f"loss {row['loss']:.4f}, {row['tokens_per_second']:,.0f} tok/s"
        self.bar.set_postfix_str(what, refresh=False)
        self.bar.update()
        if self.bar.disable and due(max(1, self.total // 20), row["step"]):
            done = row["step"] - self.first
            left = (time.monotonic() - self.started) / done * (self.total - row["step"])
            print(f"step {row['step']}/{self.total}: {what}, {left / 60:.1f} min left", flush=True)

    def say(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        tqdm.write(text, file=sys.stdout)

    def close(self) -> None:
        self.bar.close()
        self.file.close()
        if self.wandb:
            self.wandb.finish()


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
