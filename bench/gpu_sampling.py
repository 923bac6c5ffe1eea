"""Parts sampling and graphs of bench/gpu.py: tokens a second of the sampler."""

import os
import time

import torch
from gpu_steps import SHAPES, llama, random_model
from harness import Bench

from model import GPT
from sampling.sampler import generate


def sampling(bench: Bench) -> None:
    """Time the sampler as it runs by default, every step launched by the host."""
    time_samplers(bench, "eager", "")


def graphs(bench: Bench) -> None:
    """Time the sampler with fixed shapes, then with its steps as CUDA graphs."""
    time_samplers(bench, "fixed shapes", "static")
    if bench.cuda:
        time_samplers(bench, "CUDA graphs", "graphs")
    else:
        bench.record("CUDA graphs", skipped="there is no GPU")


def time_samplers(bench: Bench, how: str, mode: str) -> None:
    """Time one way of decoding, for few and for many rows."""
    label = "tiny" if bench.tiny else "1B"
    os.environ["PLUMB_DECODE"] = mode
    model = random_model(bench, llama(SHAPES[label]))
    for prompts, n in ((1, 2),) if bench.tiny else ((1, 1), (8, 8), (32, 8)):
        name = f"{label} {how}, {prompts} prompts x {n}"
        bench.attempt(name, time_sampler, bench, model, prompts, n)


def time_sampler(bench: Bench, model: GPT, prompts: int, n: int) -> dict:
    """Time samples of random prompts: seconds, tokens a second, host waits a token."""
    length, new = (20, 4) if bench.tiny else (512, 256)
    ids = torch.randint(2, model.c.vocab, (prompts, length)).tolist()

    def sample() -> None:
        generate(model, ids, new, batch_size=prompts * n, n=n)

    times = []
    for _ in range(1 if bench.tiny else 3):  # the first one compiles and captures
        start = time.perf_counter()
        sample()
        bench.synchronize()
        times.append(time.perf_counter() - start)
    seconds = min(times)
    return {
        "seconds": seconds,
        "first_seconds": times[0],
        "tokens_per_s": prompts * n * new / seconds,
        "ms_per_token_step": seconds / new * 1e3,
        "host_waits_per_token": bench.host_waits(sample) / new,
    }
