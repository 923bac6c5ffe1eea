"""Measure how start-up, a step, saving and loading grow with rows, tokens and parameters.

    python bench/growth.py            start-up up to 400,000 rows: two minutes on one core
    python bench/growth.py --quick    up to 100,000 rows

Copy this file into the checkout of another commit to measure that one.

Prints CPU-seconds and the exponent of each part: 1.0 grows as the size does, 2.0 as its square. The
exponent is the slope of log seconds over log size between the smallest and the largest size.
Start-up is the work on all rows before the first step, without reading files and the model:

    check       every row fits into a micro-batch
    shuffle     the examples of every step of an epoch
    reference   micro-batches of all rows, and the numbers of their responses
    kto         prompt, response and another prompt's response for every row

The rest trains and saves random models, on one thread. CPU-seconds are the least of a few rounds.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before the folder of this file

from ranks import peak_memory, random_pairs, start_memory, step

import checkpoint
import runtime
import training
from data.mismatched import kto_trees
from data.trees import make_batch, micro_batches
from model import GPT, GPTConfig, parameter_count
from optimizer import AdamW

CPU = torch.device("cpu")
BATCH = 64  # rows of a step
MAX_TOKENS = 8192  # of a micro-batch
Times = dict[str, float]


def clock(work: Callable[[], object]) -> float:
    """Return the CPU-seconds of a call, in all threads."""
    began = time.process_time()
    work()
    return time.process_time() - began


def start_up(rows: int) -> Times:
    """Return the CPU-seconds of start-up over this many pairs of about 60 tokens."""
    data = random_pairs(rows, 32000, 20, 20)
    data.columns["label"] = np.ones(2 * rows, np.float32)
    config = SimpleNamespace(
        share_prompts=True, max_tokens=MAX_TOKENS, batch_size=BATCH, epochs=1, max_steps=0, seed=0
    )
    steps = training.Steps(rows, BATCH, 0, True, math.ceil(rows / BATCH), math.ceil(rows / BATCH))

    def reference() -> None:
        micro_batches(data.tree_lengths(), steps.visited(), MAX_TOKENS)
        data.responses_of(steps.visited())

    order = np.array_split(np.random.default_rng(0).permutation(rows), steps.total)
    start_memory(CPU)
    times = {
        "check": clock(lambda: runtime.check_fit(data, config)),
        "shuffle": clock(lambda: [steps.examples(k) for k in range(steps.total)]),
        "reference": clock(reference),
        "kto": clock(lambda: kto_trees(data, order, 1024)),
    }
    return times | {"total": sum(times.values()), "GB": peak_memory(CPU) / 1e9}


def make_optimizer(width: int) -> AdamW:
    """Return the optimizer of a random model of two layers."""
    heads = width // 32
    model = GPT(
        GPTConfig(
            family="llama",
            vocab=512,
            width=width,
            layers=2,
            heads=heads,
            kv_heads=heads,
            head_size=32,
            ffn=3 * width,
        )
    )
    model.init_weights(0)
    return AdamW(model, (0.9, 0.95), 1e-8, 0.0, 1)


def step_over(pairs: int) -> Times:
    """Return the CPU-seconds of a step over this many pairs of fixed length."""
    optimizer = make_optimizer(128)
    data = random_pairs(pairs, 512, 40, 40)
    bins = micro_batches(data.tree_lengths(), np.arange(pairs), 1024)
    batches = [make_batch(data, items) for items in bins]
    seconds = [clock(lambda: step(optimizer.model, optimizer, batches, pairs)) for _ in range(3)]
    return {"step": min(seconds)}


def save_and_load(width: int) -> Times:
    """Return the CPU-seconds of writing and of reading a checkpoint of a model of this width."""
    optimizer = make_optimizer(width)
    saving, loading = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, 4):
            state = checkpoint.State(step=number)
            saving.append(clock(partial(checkpoint.save, folder, state, optimizer, 1)))
            path = Path(folder) / f"step_{number}"
            loading.append(clock(partial(checkpoint.load, path, optimizer)))
    return {"save": min(saving), "load": min(loading)}


def report(title: str, sizes: list[int], results: list[Times]) -> None:
    """Print a row for each size, and the exponents."""
    names = list(results[0])
    print(f"\n{title:>12} " + " ".join(f"{name:>10}" for name in names))
    for size, times in zip(sizes, results):
        print(f"{size:12,} " + " ".join(f"{times[name]:10.4f}" for name in names))
    growth = math.log(sizes[-1] / sizes[0])
    slopes = [
        math.log(max(results[-1][name], 1e-6) / max(results[0][name], 1e-6)) / growth
        for name in names
    ]
    print(f"{'exponent':>12} " + " ".join(f"{slope:10.2f}" for slope in slopes), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--rows", type=int, nargs="+", help="pairs of start-up, ascending")
    parser.add_argument("--rounds", type=int, default=2, help="of start-up; the least counts")
    parser.add_argument("--start-only", action="store_true", help="measure start-up alone")
    args = parser.parse_args()
    torch.set_num_threads(1)

    rows = args.rows or [25000, 50000, 100000] + [200000, 400000] * (not args.quick)
    results = []
    for n in rows:
        rounds = [start_up(n) for _ in range(args.rounds)]
        results.append({name: min(times[name] for times in rounds) for name in rounds[0]})
    report("rows", rows, results)
    if args.start_only:
        return
    pairs = [16, 32, 64] if args.quick else [16, 32, 64, 128]
    report("pairs a step", pairs, [step_over(n) for n in pairs])
    widths = [512, 1024] if args.quick else [512, 1024, 1536]
    sizes = [parameter_count(make_optimizer(width).model.c) for width in widths]
    report("parameters", sizes, [save_and_load(width) for width in widths])


if __name__ == "__main__":
    main()
