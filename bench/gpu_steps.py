"""Parts steps and trace of bench/gpu.py: whole optimizer steps of random Llamas.

Examples are as long as UltraFeedback's.
"""

import gc
import time
from collections.abc import Callable, Iterator

import numpy as np
import torch
from harness import Bench

import losses
from data.dataset import Dataset
from data.trees import TreeBatch, make_batch, micro_batches
from model import GPT, GPTConfig, parameter_count
from optimizer import AdamW
from weights.adapters import Lora, attach

SHAPES = {
    "1B": dict(
        vocab=128256, width=2048, layers=16, heads=32, kv_heads=8, head_size=64, ffn=8192, tied=True
    ),
    "7B": dict(vocab=32000, width=4096, layers=32, heads=32, kv_heads=8, head_size=128, ffn=14336),
    "tiny": dict(vocab=300, width=64, layers=2, heads=4, kv_heads=2, head_size=16, ffn=96),
}
BYTES = {"whole": 18, "LoRA": 3}  # of memory a parameter before activations
TASKS = {  # what is trained -> tasks and packings, most valuable first
    "whole": [("DPO", "prompts shared"), ("DPO", "prompts repeated"), ("SFT", "packed")],
    "LoRA": [("DPO", "prompts shared")],
}
ROOM_GB = 14  # left for activations


def examples(bench: Bench, responses: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw the token counts of one step's examples: prompts (n,), answers (n, responses)."""
    rng = np.random.default_rng(0)
    count, shrink = (2, 40) if bench.tiny else (32, 1)

    def lengths(n: int, median: int) -> np.ndarray:
        drawn = rng.lognormal(np.log(median // shrink), 0.8, n).astype(int)
        return np.clip(drawn, 4, 512 // shrink)

    return lengths(count, 160), lengths(count * responses, 280).reshape(count, responses)


def llama(sizes: dict) -> GPTConfig:
    """Return the config of a Llama."""
    return GPTConfig(family="llama", **sizes)


def shapes(
    bench: Bench, trained: tuple[str, ...] = tuple(TASKS)
) -> Iterator[tuple[str, GPTConfig, bool, str]]:
    """Yield the models to train: label, config, whether activations are recomputed, what trains.

    A model that does not fit gets fewer layers.
    """
    for label in ["tiny"] if bench.tiny else ["1B", "7B"]:
        for kind in trained:
            sizes = dict(SHAPES[label])
            whole = sizes["layers"]
            if bench.cuda:
                room = torch.cuda.mem_get_info()[1] - ROOM_GB * 1e9
                while sizes["layers"] > 1 and BYTES[kind] * parameter_count(llama(sizes)) > room:
                    sizes["layers"] -= 1
            name = label if kind == "whole" else f"{label} {kind}"
            if sizes["layers"] < whole:
                name += f" shape with {sizes['layers']} of {whole} layers"
            yield name, llama(sizes), label == "7B", kind


def steps(bench: Bench) -> None:
    """Time DPO with prompts shared and repeated, and SFT; DPO with LoRA too."""
    for label, c, recomputed, kind in shapes(bench):
        bench.attempt(label, build_and_train, bench, label, c, recomputed, kind)
        gc.collect()
        bench.free()


def random_model(bench: Bench, c: GPTConfig) -> GPT:
    """Build a model on the device: matrices are drawn there, which is fast, and norms are 1."""
    with torch.device(bench.device):
        model = GPT(c).to(bench.dtype)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.02)
        else:
            torch.nn.init.ones_(p)
    return model


def build(bench: Bench, c: GPTConfig, recomputed: bool, kind: str) -> tuple[GPT, AdamW]:
    """Build a model with random weights, and its optimizer."""
    model = random_model(bench, c)
    if kind == "LoRA":
        attach(model, Lora(16, 32.0))
    model.checkpoint_activations = recomputed
    return model, AdamW(model, (0.9, 0.95), 1e-8, 0.0)


def build_and_train(bench: Bench, label: str, c: GPTConfig, recomputed: bool, kind: str) -> dict:
    """Build a model, record the steps of every task, and return its parameter count."""
    model, optimizer = build(bench, c, recomputed, kind)
    for task, packing in TASKS[kind][: 1 if bench.tiny else 3]:
        batches = make_batches(bench, c, task, packing != "prompts repeated")
        name = f"{label} {task}, {packing}"
        bench.attempt(name, time_step, bench, model, optimizer, task, batches)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"parameters": parameter_count(c), "trained": trained}


def make_batches(bench: Bench, c: GPTConfig, task: str, shared: bool) -> list[TreeBatch]:
    """Pack one step of random tokens into micro-batches."""
    responses = 2 if task == "DPO" else 1
    prompts, answers = examples(bench, responses)
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *(prompts + answers.sum(1))])
    scored = [np.repeat([0, 1], [p, sum(row)]) for p, row in zip(prompts, answers, strict=True)]
    data = Dataset(
        tokens=rng.integers(0, c.vocab, starts[-1]).astype(np.int32),
        scored=np.concatenate(scored).astype(np.uint8),
        tree_start=starts,
        prompt_len=prompts.astype(np.int32),
        response_start=np.arange(0, answers.size + 1, responses),
        response_len=answers.ravel().astype(np.int32),
    )
    budget = 200 if bench.tiny else 16384
    bins = micro_batches(data.tree_lengths(shared), np.arange(len(prompts)), budget)
    return [make_batch(data, items, shared) for items in bins]


def make_step(
    bench: Bench, model: GPT, optimizer: AdamW, task: str, batches: list[TreeBatch]
) -> Callable[[], None]:
    """Return a function that takes an optimizer step."""
    count = sum(len(batch.examples) for batch in batches)

    def step() -> None:
        for batch in batches:
            batch = batch.to(bench.device)
            sums = batch.sum_by_response(model.logps(model(batch), batch))
            if task == "DPO":
                chosen, rejected = sums.view(-1, 2).unbind(1)
                chosen, rejected = chosen - chosen.detach(), rejected - rejected.detach()
                loss = losses.sigmoid(chosen, rejected, 0.1).sum() / count
            else:
                loss = -sums.sum() / 1e4
            loss.backward()
        optimizer.step(1e-7, 1.0)

    return step


def time_step(
    bench: Bench, model: GPT, optimizer: AdamW, task: str, batches: list[TreeBatch]
) -> dict:
    """Time an optimizer step, and count what it computes and how often the host waits in it."""
    count = sum(len(batch.examples) for batch in batches)
    step = make_step(bench, model, optimizer, task, batches)
    bench.reset_peak()
    seconds = bench.seconds(step, least=3, budget=6)
    tokens = sum(len(b.tokens) for b in batches)
    values = {
        "seconds": seconds,
        "examples_per_s": count / seconds,
        "tokens_per_s": tokens / seconds,
        "tokens": tokens,
        "context": sum(b.context * len(b.tokens) for b in batches) / tokens,
        "tflops": step_flop(model, batches) / seconds / 1e12,
        "host_waits": bench.host_waits(step),
    }
    if peak := bench.data_sheet_tflops():
        values["mfu"] = values["tflops"] / peak
    return values | ({"peak_gb": bench.peak_gb()} if bench.cuda else {})


def step_flop(model: GPT, batches: list[TreeBatch]) -> float:
    """Count the FLOPs of a step: those of frozen weights have no gradient, so 4 of 6 are left.

    Only scored tokens reach the head; recomputed activations do not count as work.
    """
    c, total = model.c, 0.0
    whole = next(model.blocks["0"].parameters()).requires_grad
    for batch in batches:
        scored, tokens = len(batch.target), len(batch.tokens)
        weights = tokens * c.flops_per_token(0) - 6 * (tokens - scored) * c.vocab * c.width
        scores = tokens * (c.flops_per_token(batch.context) - c.flops_per_token(0))
        total += (weights if whole else weights * 4 / 6) + scores
    return total


def trace(bench: Bench) -> None:
    """Record what runs when in a DPO step: trace.json for a viewer, and the longest kernels."""
    label, c, recomputed, kind = next(shapes(bench))
    bench.attempt(f"{label} DPO, one step", trace_step, bench, c, recomputed, kind)


def trace_step(bench: Bench, c: GPTConfig, recomputed: bool, kind: str) -> dict:
    """Write trace.json and trace.txt beside the rows; return how busy the GPU was."""
    from torch.profiler import ProfilerActivity, profile

    model, optimizer = build(bench, c, recomputed, kind)
    step = make_step(bench, model, optimizer, "DPO", make_batches(bench, c, "DPO", True))
    for _ in range(1 if bench.tiny else 3):
        step()
    bench.synchronize()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * bench.cuda
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        step()
        bench.synchronize()
        seconds = time.perf_counter() - start
    profiler.export_chrome_trace(str(bench.rows.parent / "trace.json"))
    events = profiler.key_averages()
    where = "device" if bench.cuda else "cpu"
    # On a GPU the kernels alone: an operator is given the time of its kernels once more.
    counted = [
        e for e in events if not bench.cuda or e.device_type == torch.autograd.DeviceType.CUDA
    ]
    times = {e.key: getattr(e, f"self_{where}_time_total") / 1e6 for e in counted}
    table = events.table(sort_by=f"self_{where}_time_total", row_limit=30, max_name_column_width=80)
    (bench.rows.parent / "trace.txt").write_text(table)
    longest = sorted(times, key=lambda key: -times[key])[:5]
    values = {"seconds": seconds, "longest": {key[:60]: times[key] for key in longest}}
    return values | ({"gpu_busy": sum(times.values()) / seconds} if bench.cuda else {})
