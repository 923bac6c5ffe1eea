"""The null test of online learning: a constant reward and policy = reference teach nothing."""

import json
from pathlib import Path

import torch
from launch import weights_in

CONSTANT = "regex:[\\s\\S]*"  # reward 1 for every response
ZERO = "regex:never said"  # reward 0 for every response


def null_flags(model: Path, data: Path, **more) -> dict:
    """Return the flags of three steps without decay; --kl 1 makes any KL visible."""
    return {
        "model": model,
        "data": data,
        "batch_size": 4,
        "group_size": 3,
        "max_new_tokens": 6,
        "max_tokens": 90,
        "max_steps": 3,
        "lr": 1e-2,
        "kl": 1.0,
        "warmup": 0.0,
        "reward": CONSTANT,
        "shuffle": False,
        **more,
    }


def words_of(out: Path, flags: dict) -> list[str]:
    """Return the command line of some flags."""
    words = ["--out", str(out)]
    for name, value in flags.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def metrics(out: Path) -> list[dict]:
    """Return the rows of the training steps."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "grad_norm" in row]


def moved(out: Path, model: Path) -> float:
    """Return the largest change of a weight, in the precision that it is saved in."""
    before, after = weights_in(model), weights_in(out / "final")
    changes = [
        (after[name].double() - before[name].to(after[name].dtype).double()).abs().max().item()
        for name in before
    ]
    return max(changes)


def null_numbers(out: Path, model: Path) -> dict[str, float]:
    """Return the largest |kl|, |ratio - 1| and gradient norm of the steps, and the change."""
    rows = metrics(out)
    assert len(rows) == 3
    kls = [abs(row[name]) for row in rows for name in ("kl", "kl_k3") if name in row]
    return {
        "kl": max(kls),
        "ratio": max(abs(row["ratio"] - 1) for row in rows),
        "grad_norm": max(row["grad_norm"] for row in rows),
        "moved": moved(out, model),
    }


NOTHING = {"kl": 0.0, "ratio": 0.0, "grad_norm": 0.0, "moved": 0.0}
torch.set_num_threads(1)
