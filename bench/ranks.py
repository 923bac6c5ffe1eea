"""Time an optimizer step in two gloo processes against one, and compare peak memory with plan.py.

    python bench/ranks.py                           one process, then every layout of two
    python bench/ranks.py --layouts tp2 dp2zero2 --steps 10
    python bench/ranks.py --device cuda --profile   one process on a GPU in bf16, kernels by time

Every layout takes the same DPO steps on the same random trees, in fp32, one thread a process. Two
cores show overheads, not speed-ups: two processes share caches, the memory bus and whatever else
runs, and gloo copies through the kernel. At best two processes take half the time of one; what they
take beyond that is the price of the layout here.

Memory is the peak of the fullest rank above what its process had before the model. Weights,
gradients and optimizer state in plan.memory are exact; its activations and logits are those of the
GPU kernels, so expect a CPU's to differ. The CUDA path has never run.
"""

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # before the folder of this file

import losses
import parallel
import pipeline
import plan
from data.dataset import Dataset
from data.trees import TreeBatch, make_batch, micro_batches
from model import GPT, GPTConfig, parameter_count
from optimizer import AdamW
from plan import Layout

LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "dp2": Layout(dp=2),
    "dp2zero2": Layout(dp=2, zero=2),
    "cp2": Layout(cp=2),
    "pp2": Layout(pp=2),
}
MIB = 2**20


def random_pairs(n: int, vocab: int, prompt: int, answer: int) -> Dataset:
    """Return n random pairs of about these lengths."""
    random = np.random.default_rng(0)
    prompts = random.integers(prompt // 2, prompt * 3 // 2, n)
    answers = random.integers(answer // 2, answer * 3 // 2, 2 * n)
    starts = np.cumsum([0, *(prompts + answers.reshape(-1, 2).sum(1))])
    scored = np.ones(starts[-1], np.uint8)
    for start, length in zip(starts, prompts):
        scored[start : start + length] = 0
    return Dataset(
        tokens=random.integers(0, vocab, starts[-1]).astype(np.int32),
        scored=scored,
        tree_start=starts,
        prompt_len=prompts.astype(np.int32),
        response_start=np.arange(0, 2 * n + 1, 2),
        response_len=answers.astype(np.int32),
    )


def process_memory(field: str) -> int:
    """Return bytes of this process as the kernel counts them: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def start_memory(device: torch.device) -> int:
    """Forget the peak so far; return the bytes in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return process_memory("VmRSS")


def peak_memory(device: torch.device) -> int:
    """Return the most bytes in use since `start_memory`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else process_memory("VmHWM")


def step(model: GPT, optimizer: AdamW, batches: list[TreeBatch], pairs: int) -> None:
    """Take one DPO step whose reference log-probs are 0."""
    for batch, hidden in pipeline.pipeline(model, batches, optimizer):
        sums = batch.sum_by_response(model.logps(hidden, batch))
        chosen, rejected = sums.view(-1, 2).unbind(1)
        per_pair = losses.sigmoid(chosen, rejected, 0.1)
        (per_pair.sum() / pairs).backward()
    optimizer.step(1e-6, 1.0)
    model.wait()
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def train(
    c: GPTConfig,
    layout: Layout,
    flags: argparse.Namespace,
    mesh: parallel.Mesh,
    device: torch.device,
) -> dict:
    """Train some steps on one rank; return seconds a step, and bytes measured and modelled."""
    before = start_memory(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        model = GPT(c, mesh).to(dtype)
    model.init_weights(0)
    model.checkpoint_activations = flags.checkpoint_activations
    optimizer = AdamW(model, (0.9, 0.95), 1e-8, 0.0, layout.zero)
    pairs = flags.batch_size
    data = random_pairs(pairs, c.vocab, flags.prompt, flags.answer)
    lengths = data.tree_lengths(True)
    bins = micro_batches(lengths, np.arange(pairs), flags.max_tokens, mesh.dp_rank, mesh.dp)
    batches = [make_batch(data, items) for items in bins]

    seconds = []
    for _ in range(flags.steps + 1):
        start = time.perf_counter()
        step(model, optimizer, batches, pairs)
        seconds.append(time.perf_counter() - start)
    peak = peak_memory(device)
    sent = sum(parallel.SENT.values()) / (flags.steps + 1)
    if flags.profile:
        with torch.profiler.profile() as profile:
            step(model, optimizer, batches, pairs)
        order = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=25))
    largest = max(batches, key=lambda batch: len(batch.tokens))
    modelled = plan.memory(
        c,
        layout,
        mesh.rank,
        len(largest.tokens),
        len(largest.target),
        len(batches),
        dtype,
        flags.checkpoint_activations,
    )
    return {
        "seconds": statistics.median(seconds[1:]),
        "peak": peak - before,
        "modelled": modelled,
        "tokens": sum(len(batch.tokens) for batch in batches),
        "sent": sent,
    }


def run_rank(
    c: GPTConfig, layout: Layout, flags: argparse.Namespace, rank: int, store: str, answers
) -> None:
    """Train as one rank of a layout; put the result, or the traceback, into `answers`."""
    try:
        torch.set_num_threads(1)
        mesh = parallel.Mesh()
        if layout.world > 1:
            store = dist.FileStore(store, layout.world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=layout.world)
            mesh = parallel.grid(rank, layout.pp, layout.dp, layout.cp, layout.tp)
        answers.put((rank, train(c, layout, flags, mesh, torch.device("cpu"))))
        if layout.world > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        answers.put((rank, traceback.format_exc()))


def measure(c: GPTConfig, layout: Layout, flags: argparse.Namespace) -> list[dict]:
    """Run a layout and return the results of its ranks. RuntimeError: the traceback of one."""
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = f"{folder}/store"
        processes = [
            fork.Process(target=run_rank, args=(c, layout, flags, rank, store, answers))
            for rank in range(layout.world)
        ]
        for process in processes:
            process.start()
        results = dict(answers.get() for _ in processes)
        for process in processes:
            process.join()
    for result in results.values():
        if isinstance(result, str):
            raise RuntimeError(result)
    return [results[rank] for rank in range(layout.world)]


def measure_all(c: GPTConfig, flags: argparse.Namespace) -> dict[str, list[dict]]:
    """Measure the layouts in turns; return the fastest repeat of each."""
    if flags.device == "cuda":
        return {"one": [train(c, Layout(), flags, parallel.Mesh(), torch.device("cuda"))]}
    fastest = {}
    for _ in range(flags.repeats):
        for name in flags.layouts:
            ranks = measure(c, LAYOUTS[name], flags)
            if name not in fastest or ranks[0]["seconds"] < fastest[name][0]["seconds"]:
                fastest[name] = ranks
    print("two processes on few cores: overheads, not speed-ups")
    return fastest


def report(results: dict[str, list[dict]]) -> None:
    """Print a line a layout."""
    print(
        f"{'layout':10}{'s/step':>9}{'tokens/s':>10}{'of one':>8}{'sent MiB':>10}{'peak MiB':>10}"
        f"{'plan':>8}{'weights':>9}{'grads':>7}{'optimizer':>11}{'activations':>13}{'logits':>8}"
    )
    for name, ranks in results.items():
        layout = LAYOUTS[name]
        seconds = max(result["seconds"] for result in ranks)
        tokens = sum(ranks[dp * layout.cp * layout.tp]["tokens"] for dp in range(layout.dp))
        fullest = max(ranks, key=lambda result: result["peak"])
        share = f"{seconds / results['one'][0]['seconds']:.2f}" if "one" in results else ""
        modelled = [n / MIB for n in fullest["modelled"].values()]
        weights, grads, optimizer, _, activations, logits = modelled
        print(
            f"{name:10}{seconds:9.3f}{tokens / seconds:10.0f}{share:>8}"
            f"{fullest['sent'] / MIB:10.1f}{fullest['peak'] / MIB:10.0f}{sum(modelled):8.0f}"
            f"{weights:9.0f}{grads:7.0f}{optimizer:11.0f}{activations:13.0f}{logits:8.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=5, help="timed steps, after one that is not")
    parser.add_argument("--repeats", type=int, default=1, help="runs of a layout; fastest counts")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    parser.add_argument("--max-tokens", type=int, default=1024, help="tokens of a micro-batch")
    parser.add_argument("--prompt", type=int, default=128, help="mean tokens of a prompt")
    parser.add_argument("--answer", type=int, default=128, help="mean tokens of an answer")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=704)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--profile", action="store_true", help="one more step, profiled")
    flags = parser.parse_args()
    c = GPTConfig(
        family="llama",
        vocab=flags.vocab,
        width=flags.width,
        layers=flags.layers,
        heads=flags.heads,
        kv_heads=flags.kv_heads,
        head_size=flags.width // flags.heads,
        ffn=flags.ffn,
    )
    millions = parameter_count(c) / 1e6
    print(f"{millions:.1f}M parameters, {flags.batch_size} pairs a step, {flags.device}")
    report(measure_all(c, flags))


if __name__ == "__main__":
    main()
