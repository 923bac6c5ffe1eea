"""Metrics of a run: sums over micro-batches, time and memory, metrics.jsonl, the progress bar."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from config import RunConfig
from data.rows import read_rows
from data.trees import TreeBatch
from disk import drop_rows_after
from model import GPTConfig
from parallel import Mesh

# Dense bf16 matmul peaks in TFLOP/s, from the vendors' data sheets: `mfu` is a share of these.
PEAK_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "H800": 989,
    "A100": 312,
    "A800": 312,
    "L40S": 362,
    "B200": 2250,
    "MI300X": 1307,
    "MI325X": 1307,
    "MI355X": 2517,
    "4090": 165,
}
# Metrics of an algorithm that the bar shows beside the loss.
SHOWN = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "reward": "reward",
    "kl": "kl",
    "completions/mean_length": "length",
    "frac_reward_zero_std": "without spread",
}
SAMPLE_COLUMNS = ("step", "prompt", "response", "reward")  # of tables of samples
PROGRESS_LINES = 20  # printed over a run where there is no terminal for a bar


def due(every: int, step: int) -> bool:
    """Return whether what happens every `every` steps (0: never) happens after `step`."""
    return bool(every) and step % every == 0


def in_units(n: int) -> str:
    """Return a count for people: 640 -> "640", 12,345 -> "12.3k", 6,738,415,616 -> "6.74B"."""
    for size, letter in ((10**9, "B"), (10**6, "M")):
        if n >= size:
            return f"{n / size:,.2f}{letter}"
    return f"{n / 1000:,.1f}k" if n >= 10_000 else f"{n:,}"


def in_bytes(n: int) -> str:
    """Return bytes for people, in powers of 1024: 5,000,000 -> "4.8 MB"."""
    for size, unit in ((2**30, "GB"), (2**20, "MB")):
        if n >= size:
            return f"{n / size:,.2f} GB" if unit == "GB" else f"{n / size:,.1f} MB"
    return f"{n / 1024:,.1f} kB"


def add(totals: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Add the sum of each metric's values to running totals, without waiting for a GPU."""
    for name, value in values.items():
        total = value.detach().double().sum()
        totals[name] = totals[name] + total if name in totals else total


def means(totals: dict[str, Tensor], n: float, mesh: Mesh) -> dict[str, float]:
    """Return the totals of all ranks divided by n, the count over all ranks; collective."""
    values: dict[str, float] = {}
    if mesh.last_stage:  # the only stage that computes losses
        summed = mesh.group("dp").all_reduce(torch.stack(list(totals.values())), "sum")
        values = dict(zip(totals, (summed / n).tolist()))
    return mesh.metrics(values)


class Meter:
    """Clock, token counter and memory gauge of each step. Tokens are those of all ranks."""

    def __init__(self, model: GPTConfig, device: torch.device, mesh: Mesh):
        self.model, self.device, self.ranks = model, device, mesh.world
        name = torch.cuda.get_device_name() if device.type == "cuda" else ""
        self.peak = next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
        self.start()

    def start(self) -> None:
        """Start the clock of a step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.wall = time.perf_counter()
        self.cpu = time.process_time()

    def read(self, tokens: int, batches: Sequence[TreeBatch] = ()) -> dict[str, float]:
        """Return what a step of `tokens` real tokens took.

        batches: some of the step's micro-batches; their mean context stands for all in `mfu`.
        """
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.wall
        row = {"tokens": tokens, "tokens_per_second": tokens / seconds, "seconds": seconds}
        if self.device.type == "cuda":
            row["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
            if self.peak:
                seen = max(1, sum(len(batch.tokens) for batch in batches))
                context = sum(batch.context * len(batch.tokens) for batch in batches) / seen
                flops = tokens * self.model.flops_per_token(context)
                row["mfu"] = flops / seconds / (self.peak * 1e12 * self.ranks)
        else:
            row["cpu_seconds"] = time.process_time() - self.cpu
            row["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return row


class Log:
    """OUT/metrics.jsonl, the progress bar, Weights & Biases and TensorBoard; on rank 0 only."""

    def __init__(self, config: RunConfig, first_step: int, total: int, mesh: Mesh):
        self.path = Path(config.out) / "metrics.jsonl" if mesh.main else Path(os.devnull)
        if mesh.main:
            drop_rows_after(self.path, first_step)
        self.samples = self.path.with_name("samples.jsonl")  # of online scripts
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed in close()
        self.first, self.total, self.started = first_step, total, time.monotonic()
        hidden = None if mesh.main else True
        self.bar = tqdm(
            total=total, initial=first_step, unit="step", dynamic_ncols=True, disable=hidden
        )
        self.wandb = None
        if config.wandb and mesh.main:
            self.wandb = import_wandb().init(
                project=config.wandb,
                name=os.environ.get("WANDB_NAME", Path(config.out).name),
                config=vars(config),
            )  # WANDB_ENTITY, WANDB_TAGS, WANDB_RUN_GROUP and others are read by wandb itself
        self.board = None
        if config.tensorboard and mesh.main:
            self.board = import_tensorboard()(Path(config.out) / "tensorboard")

    def row(self, row: dict[str, Any]) -> None:
        """Append a row to metrics.jsonl and flush it; a number that is not finite becomes null."""
        row = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()
        }
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log({k: v for k, v in row.items() if k != "step"}, step=row["step"])
        if self.board:
            for name, value in row.items():
                if name != "step" and isinstance(value, (int, float)):
                    self.board.add_scalar(name, value, row["step"])

    def progress(self, row: dict[str, Any]) -> None:
        """Advance the bar by one step; without a terminal, print twenty lines over the run."""
        loss = row["loss"] if "loss" in row else row["value/loss"]  # PPO may train its critic alone
        own = [f"{words} {row[key]:.3f}" for key, words in SHOWN.items() if key in row]
        text = ", ".join([f"loss {loss:.4f}", *own, f"{row['tokens_per_second']:,.0f} tok/s"])
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update()
        if self.bar.disable and due(max(1, self.total // PROGRESS_LINES), row["step"]):
            done = row["step"] - self.first
            left = (time.monotonic() - self.started) / done * (self.total - row["step"])
            print(f"step {row['step']}/{self.total}: {text}, {left / 60:.1f} min left", flush=True)

    def say(self, text: str) -> None:
        """Print a line without breaking the bar."""
        tqdm.write(text, file=sys.stdout)

    def close(self) -> None:
        """Close the file, the bar and the connection to Weights & Biases."""
        self.bar.close()
        self.file.close()
        samples = list(read_rows(self.samples)) if self.samples.is_file() else []
        cells = [[str(row.get(name, "")) for name in SAMPLE_COLUMNS] for row in samples]
        if self.wandb:
            if cells:
                table = import_wandb().Table(columns=list(SAMPLE_COLUMNS), data=cells)
                self.wandb.log({"samples": table})
            self.wandb.finish()
        if self.board:
            for row, (_, prompt, response, reward) in zip(samples, cells):
                text = f"{prompt}\n\n---\n\n{response}\n\n---\n\nreward {reward}"
                self.board.add_text("samples", text, row["step"])
            self.board.close()


def import_tensorboard() -> Any:
    """Return TensorBoard's writer. ImportError: how to install it."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ImportError("--tensorboard needs: pip install tensorboard") from None
    return SummaryWriter


def import_wandb() -> Any:
    """Return the wandb module. ImportError: how to install it."""
    try:
        import wandb
    except ImportError:
        raise ImportError("--wandb needs: pip install wandb") from None
    return wandb
