"""Measure how start-up, a step, saving, loading and memory grow with the work.

    python bench/growth.py            start-up up to 400,000 rows: five minutes on one core
    python bench/growth.py --quick    up to 100,000 rows
    python bench/growth.py --only rows files --rows 250000 500000 1000000

Prints CPU-seconds and the exponent of each part: 1.0 grows as the size does, 2.0 as its square. The
exponent is the slope of log seconds over log size between the smallest and the largest size.
Tables, over rows, files, pairs, length, layers, parameters and ranks:

rows: the work on all rows between reading them and the first step, without the model:

    check       every row fits into a micro-batch
    shuffle     the examples of every step of an epoch
    reference   micro-batches of all rows, and the numbers of their responses
    kto         prompt, response and another prompt's response for every row

files: tokenising a file of pairs with a sentencepiece tokenizer (the toy world's) in one process,
and reading them again from the cache, which compares the SHA-256 of the file and of every array.

The rest trains and saves random models, on one thread: more pairs of one length in a step, longer
ones, more layers, wider ones; and the same step on more data-parallel ranks of gloo with ZeRO-2, in
bytes, as more processes than cores say nothing about time. CPU-seconds are the least of a few
rounds, GB the peak.
"""

import argparse
import json
import math
import random
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

from ranks import measure, peak_memory, random_pairs, start_memory, step

import checkpoint
import runtime
import training
from data.dataset import load_dataset
from data.mismatched import kto_trees
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.toy.answers import preference
from data.toy.tokenizer import make_tokenizer
from data.trees import make_batch, micro_batches
from model import GPT, GPTConfig, parameter_count
from optimizer import AdamW
from plan import Layout

CPU = torch.device("cpu")
BATCH = 64  # rows of a step
MAX_TOKENS = 8192  # of a micro-batch
Times = dict[str, float]
TABLES = ["rows", "files", "pairs", "length", "layers", "parameters", "ranks"]


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


def read_files(rows: int) -> Times:
    """Return the CPU-seconds of tokenising a file of this many pairs, and of reading the cache."""
    rng = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(Path(folder), rng)
        template = Template("plain", load_tokenizer(folder))
        with open(f"{folder}/pairs.jsonl", "w", encoding="utf-8") as file:
            for _ in range(rows):
                file.write(json.dumps(preference(rng, "train")) + "\n")

        def read() -> None:
            load_dataset(
                f"{folder}/pairs.jsonl",
                "preference",
                template,
                cache=f"{folder}/cache",
                workers=1,
                log=str,
            )

        return {"tokenise": clock(read), "from cache": clock(read)}


def make_optimizer(width: int, layers: int = 2) -> AdamW:
    """Return the optimizer of a random model."""
    heads = width // 32
    model = GPT(
        GPTConfig(
            family="llama",
            vocab=512,
            width=width,
            layers=layers,
            heads=heads,
            kv_heads=heads,
            head_size=32,
            ffn=3 * width,
        )
    )
    model.init_weights(0)
    return AdamW(model, (0.9, 0.95), 1e-8, 0.0, 1)


def step_over(pairs: int, length: int = 40, layers: int = 2) -> Times:
    """Return the CPU-seconds of a step over pairs whose prompt and answers have about `length`."""
    optimizer = make_optimizer(128, layers)
    data = random_pairs(pairs, 512, length, length)
    start_memory(CPU)
    bins = micro_batches(data.tree_lengths(), np.arange(pairs), max(1024, 5 * length))
    batches = [make_batch(data, items) for items in bins]
    seconds = [clock(lambda: step(optimizer.model, optimizer, batches, pairs)) for _ in range(3)]
    return {"step": min(seconds), "GB": peak_memory(CPU) / 1e9}


def save_and_load(width: int, layers: int = 2) -> Times:
    """Return the CPU-seconds of writing and of reading a checkpoint of a random model."""
    optimizer = make_optimizer(width, layers)
    saving, loading = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1, 4):
            state = checkpoint.State(step=number)
            saving.append(clock(partial(checkpoint.save, folder, state, optimizer, 1)))
            path = Path(folder) / f"step_{number}"
            loading.append(clock(partial(checkpoint.load, path, optimizer)))
    return {"save": min(saving), "load": min(loading)}


def on_ranks(world: int) -> Times:
    """Return MB at the peak of the fullest of `world` ranks, and MB that one sends, for a step."""
    flags = SimpleNamespace(
        checkpoint_activations=False,
        batch_size=8,
        prompt=64,
        answer=64,
        max_tokens=512,
        steps=1,
        profile=False,
    )
    config = make_optimizer(512).model.c
    results = measure(config, Layout(dp=world, zero=2), flags)
    fullest = max(results, key=lambda result: result["peak"])
    held = fullest["modelled"]
    return {
        "peak MB": fullest["peak"] / 1e6,
        "optimizer MB": held["optimizer"] / 1e6,
        "sent MB": fullest["sent"] / 1e6,
    }


def report(title: str, sizes: list[int], results: list[Times]) -> None:
    """Print a row for each size, and the exponents."""
    names = list(results[0])
    print(f"\n{title:>12} " + " ".join(f"{name:>10}" for name in names))
    for size, times in zip(sizes, results):
        print(f"{size:12,} " + " ".join(f"{times[name]:10.4f}" for name in names))
    growth = math.log(sizes[-1] / sizes[0])
    slopes = []
    for name in names:
        ends = results[0][name], results[-1][name]
        slope = f"{math.log(ends[1] / ends[0]) / growth:.2f}" if min(ends) > 0 else ""
        slopes.append(f"{slope:>10}")
    print(f"{'exponent':>12} " + " ".join(slopes), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--rows", type=int, nargs="+", help="pairs of start-up, ascending")
    parser.add_argument("--rounds", type=int, default=2, help="of start-up; the least counts")
    parser.add_argument("--only", nargs="+", choices=TABLES, default=TABLES, help="tables")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # Without a reference, long pairs saturate the loss: their denormal gradients are 15 times as
    # slow on a CPU, which says nothing about training.
    torch.set_flush_denormal(True)

    if "rows" in args.only:
        rows = args.rows or [25000, 50000, 100000] + [200000, 400000] * (not args.quick)
        results = []
        for n in rows:
            rounds = [start_up(n) for _ in range(args.rounds)]
            results.append({name: min(times[name] for times in rounds) for name in rounds[0]})
        report("rows", rows, results)
    grids: dict[str, tuple[str, list[int], Callable[[int], Times]]] = {
        "files": ("rows of a file", [2000, 4000, 8000, 16000], read_files),
        "pairs": ("pairs a step", [16, 32, 64, 128], step_over),
        "length": ("tokens a part", [40, 80, 160, 320], partial(step_over, 8)),
        "layers": ("layers", [2, 4, 8, 16], over_layers),
        "ranks": ("ranks", [1, 2, 4], on_ranks),
    }
    for name, (title, sizes, work) in grids.items():
        if name in args.only:
            sizes = sizes[:3] if args.quick else sizes
            report(title, sizes, [work(size) for size in sizes])
    if "parameters" in args.only:
        widths = [512, 1024] if args.quick else [512, 1024, 1536]
        sizes = [parameter_count(make_optimizer(width).model.c) for width in widths]
        report("parameters", sizes, [save_and_load(width) for width in widths])


def over_layers(layers: int) -> Times:
    """Return the CPU-seconds of a step, of saving and of loading with this many layers."""
    return step_over(16, layers=layers) | save_and_load(256, layers)


if __name__ == "__main__":
    main()
