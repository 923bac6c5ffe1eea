"""What a layout costs: time of an optimizer step in two gloo processes against one, and peak memory against plan.py.

    python bench/parallel.py                          one process, then tp 2, dp 2 (zero 1 and 2), cp 2, pp 2
    python bench/parallel.py --layouts tp2 dp2zero2 --steps 10
    python bench/parallel.py --device cuda --profile  one process on a GPU in bf16: step time, memory, kernels by time

Every layout takes the same DPO steps on the same random trees, in fp32, one thread a process. TWO CORES SHOW OVERHEADS,
NOT SPEED-UPS: two processes share caches, the memory bus and whatever else runs, and gloo copies through the kernel. At
best a layout of two takes half of the wall time of one; what it takes beyond that is its price here.

Memory is the peak of a process above what it had before the model, the fullest rank's. plan.memory's first three kinds
are exact; its activations and logits are for the GPU's kernels, whose plain twins keep other things, so expect those of
the CPU to be off. The CUDA path has never run.
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

from model import parameter_count
from optimizer import AdamW

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import losses  # noqa: E402
import parallel  # noqa: E402
import pipeline
import plan  # noqa: E402
from data.dataset import Dataset
from data.trees import make_batch, micro_batches  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from plan import Layout  # noqa: E402

LAYOUTS = {
    "one": Layout(), "tp2": Layout(tp=2), "dp2": Layout(dp=2), "dp2zero2": Layout(dp=2, zero=2), "cp2": Layout(cp=2),
    "pp2": Layout(pp=2),
}  # fmt: skip
MIB = 2**20


def pairs(n: int, vocab: int, prompt: int, answer: int) -> Dataset:
    """n random pairs of about these lengths, the reference's log-probs 0."""
    random = np.random.default_rng(0)
    prompts = random.integers(prompt // 2, prompt * 3 // 2, n)
    answers = random.integers(answer // 2, answer * 3 // 2, 2 * n)
    lengths = prompts + answers.reshape(-1, 2).sum(1)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    scored = np.ones(starts[-1], np.uint8)
    for start, length in zip(starts, prompts):
        scored[start : start + length] = 0
    tokens = random.integers(0, vocab, starts[-1]).astype(np.int32)
    responses = np.arange(0, 2 * n + 1, 2)
    return Dataset(
        tokens,
        scored,
        starts,
        prompts.astype(np.int32),
        responses,
        answers.astype(np.int32),
        {},
        {},
        "",
    )


def memory_of(field: str) -> int:
    """Bytes of this process by the kernel's count: VmRSS now, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def train(
    c: GPTConfig,
    layout: Layout,
    flags: argparse.Namespace,
    mesh: parallel.Mesh,
    device: torch.device,
) -> dict:
    """Some steps of DPO on one rank: seconds each, peak memory and what plan.py says of it."""
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = torch.cuda.memory_allocated() if cuda else memory_of("VmRSS")
    dtype = torch.bfloat16 if cuda else torch.float32
    with device:
        model = GPT(c, mesh).to(dtype)
    model.init_weights(0)
    model.checkpoint_activations = flags.checkpoint_activations
    optimizer = AdamW(model, (0.9, 0.95), 1e-8, 0.0, layout.zero)
    data = pairs(flags.batch_size, c.vocab, flags.prompt, flags.answer)
    examples, lengths = np.arange(flags.batch_size), data.tree_lengths(True)
    bins = micro_batches(lengths, examples, flags.max_tokens, mesh.dp_rank, mesh.dp)
    batches = [make_batch(data, items) for items in bins]

    def step() -> None:
        for batch, hidden in pipeline.pipeline(model, batches, optimizer):
            chosen, rejected = (
                batch.sum_by_response(model.logps(hidden, batch)).view(-1, 2).unbind(1)
            )
            nothing, length = torch.zeros_like(chosen), torch.ones_like(chosen)
            each, _ = losses.dpo(
                losses.Pairs(chosen, rejected, nothing, nothing, length, length, nothing, nothing)
            )
            (each.sum() / flags.batch_size).backward()
        optimizer.step(1e-6, 1.0)
        model.wait()
        if cuda:
            torch.cuda.synchronize()

    seconds = []
    for _ in range(flags.steps + 1):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else memory_of("VmHWM")
    if flags.profile:
        kinds = [torch.profiler.ProfilerActivity.CPU] + [
            torch.profiler.ProfilerActivity.CUDA
        ] * cuda
        with torch.profiler.profile(activities=kinds) as profile:
            step()
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=25))
    most = max(batches, key=lambda batch: len(batch.tokens))
    foretold = plan.memory(c, layout, mesh.rank, len(most.tokens), len(most.target), len(batches), dtype,
                           flags.checkpoint_activations)  # fmt: skip
    tokens = sum(len(batch.tokens) for batch in batches)
    sent = sum(parallel.SENT.values()) / (flags.steps + 1)
    return {"seconds": statistics.median(seconds[1:]), "peak": peak - before, "plan": foretold, "tokens": tokens,
            "sent": sent}  # fmt: skip


def rank_of(
    c: GPTConfig, layout: Layout, flags: argparse.Namespace, rank: int, store: str, answers
) -> None:
    """A process of a layout."""
    try:
        torch.set_num_threads(1)
        mesh = parallel.Mesh()
        if layout.world > 1:
            dist.init_process_group("gloo", store=dist.FileStore(store, layout.world), rank=rank,
                                    world_size=layout.world)  # fmt: skip
            mesh = parallel.grid(rank, layout.pp, layout.dp, layout.cp, layout.tp)
        answers.put((rank, train(c, layout, flags, mesh, torch.device("cpu"))))
        if layout.world > 1:
            dist.barrier()
            dist.destroy_process_group()
    except BaseException:
        answers.put((rank, traceback.format_exc()))


def measure(c: GPTConfig, layout: Layout, flags: argparse.Namespace) -> list[dict]:
    """The results of every rank. RuntimeError: what went wrong in one."""
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            fork.Process(target=rank_of, args=(c, layout, flags, rank, f"{folder}/store", answers))
            for rank in range(layout.world)
        ]
        for process in processes:
            process.start()
        found = dict(answers.get() for _ in processes)
        for process in processes:
            process.join()
    for result in found.values():
        if isinstance(result, str):
            raise RuntimeError(result)
    return [found[rank] for rank in range(layout.world)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--steps", type=int, default=5, help="timed, after one that is not")
    parser.add_argument(
        "--repeats", type=int, default=1, help="of every layout, in turns; the fastest counts"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="pairs a step")
    parser.add_argument("--max-tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument("--prompt", type=int, default=128, help="mean tokens")
    parser.add_argument("--answer", type=int, default=128, help="mean tokens")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--ffn", type=int, default=704)
    parser.add_argument("--vocab", type=int, default=8192)
    parser.add_argument("--checkpoint-activations", action="store_true")
    parser.add_argument("--profile", action="store_true", help="one more step under torch.profiler")
    flags = parser.parse_args()
    c = GPTConfig("llama", flags.vocab, flags.width, flags.layers, flags.heads, flags.kv_heads,
                  flags.width // flags.heads, flags.ffn)  # fmt: skip
    print(
        f"{parameter_count(c) / 1e6:.1f}M parameters, {flags.batch_size} pairs a step, {flags.device}"
    )
    if flags.device == "cuda":
        result = train(c, Layout(), flags, parallel.Mesh(), torch.device("cuda"))
        found = {"one": [result]}
    else:
        found = {}
        for _ in range(flags.repeats):
            for name in flags.layouts:
                ranks = measure(c, LAYOUTS[name], flags)
                if name not in found or ranks[0]["seconds"] < found[name][0]["seconds"]:
                    found[name] = ranks
        print("two processes on few cores: overheads, not speed-ups")
    print(f"{'layout':10}{'s/step':>9}{'tokens/s':>10}{'of one':>8}{'sent MiB':>10}{'peak MiB':>10}"
          f"{'plan':>8}{'weights':>9}{'grads':>7}{'optimizer':>11}{'activations':>13}{'logits':>8}")  # fmt: skip
    for name, ranks in found.items():
        layout = LAYOUTS[name]
        seconds = max(result["seconds"] for result in ranks)
        tokens = sum(ranks[dp * layout.cp * layout.tp]["tokens"] for dp in range(layout.dp))
        fullest = max(ranks, key=lambda result: result["peak"])
        share = f"{seconds / found['one'][0]['seconds']:.2f}" if "one" in found else ""
        kinds = [f"{n / MIB:.0f}" for n in fullest["plan"].values()]
        print(f"{name:10}{seconds:9.3f}{tokens / seconds:10.0f}{share:>8}{fullest['sent'] / MIB:10.1f}"
              f"{fullest['peak'] / MIB:10.0f}{sum(fullest['plan'].values()) / MIB:8.0f}"
              f"{kinds[0]:>9}{kinds[1]:>7}{kinds[2]:>11}{kinds[3]:>13}{kinds[4]:>8}")  # fmt: skip


if __name__ == "__main__":
    main()
