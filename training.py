"""Steps of a run: their plan, the learning rate, and what follows every step of every script.

    steps = training.plan_steps(config, len(train), train.file_start)
    loop = training.begin(run, steps, optimizer)            resumes, opens the log
    for step in training.remaining(loop):
        examples = steps.examples(step)
        ...                                                 the algorithm: forward, loss, backward
        norm, stopping = optimizer.step(lr, config.clip, run.stop)
        training.check_update(loop, norm)                   counts steps without an update
        training.report_step(loop, row, tokens, batches)    a row of metrics.jsonl
        if training.evaluation_due(loop):
            result = training.report_evaluation(loop, results)
            if training.is_best(loop, result["eval/loss"]): ...
        if training.save_or_stop(loop, stopping):           a checkpoint; true: leave
            return
    training.finish(loop, model)                            OUT/final

Nothing here calls back into a script.
"""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import checkpoint
import lock
import routing
import runtime
from background import Writer
from checkpoint import State
from config import RunConfig
from data.blend import Blend, make_blend
from data.dataset import Dataset
from data.trees import TreeBatch, step_examples, steps_per_epoch, visited
from disk import write_text
from model import GPT, parameter_count
from optimizer import AdamW, bucket_sizes, frozen_memory, memory, saved_bytes
from parallel import limit_waits
from reporting import Log, Meter, due, in_bytes, in_units
from runtime import Run
from sampling.sampler import generate

FINISHED = "finished.json"  # in OUT, once the last step is done and its model written
NONFINITE_LIMIT = 5  # steps in a row without a finite gradient before a run gives up
SAMPLE_TOKENS = 128  # longest answer that --samples prints
SAMPLE_TEMPERATURE = 0.7
SHOWN_CHARACTERS = 300  # of a prompt, its end


@dataclass(frozen=True)
class Steps:
    """The optimizer steps of a run over n examples, and which examples each takes."""

    n: int
    batch_size: int
    seed: int
    shuffle: bool
    per_epoch: int
    total: int
    blend: Blend | None = None  # of files with weights

    def examples(self, step: int) -> np.ndarray:
        """Return the examples of a step (from 0): a function of (seed, epoch, step) alone."""
        if self.blend:
            epoch, place = divmod(step, self.per_epoch)
            order = self.blend.epoch(epoch, self.seed, self.shuffle)
            return order[place * self.batch_size : (place + 1) * self.batch_size].copy()
        return step_examples(self.n, self.batch_size, step, self.seed, self.shuffle)

    def visited(self) -> np.ndarray:
        """Return the examples that any step takes, ascending."""
        if self.blend:
            marks = np.zeros(self.n, bool)
            for step in range(self.total):
                marks[self.examples(step)] = True
            return np.flatnonzero(marks)
        return visited(self.n, self.batch_size, self.total, self.seed, self.shuffle)


@dataclass
class Loop:
    """A training loop between two steps; `begin` makes it."""

    run: Run
    steps: Steps
    optimizer: AdamW | tuple[AdamW, ...]
    state: State
    log: Log
    meter: Meter
    writer: Writer | None = None  # of checkpoints, with --async-save
    nonfinite: int = 0  # updates in a row that were skipped


# ---- before the loop ---------------------------------------------------------------------------


def plan_steps(config: RunConfig, n: int, file_start: np.ndarray) -> Steps:
    """Return the steps of a run over n examples: --epochs, or --max-steps if that is fewer.

    file_start: number of the first example of every file of --data, and the end; blends read it.
    """
    per_epoch = steps_per_epoch(n, config.batch_size)
    total = per_epoch * config.epochs
    if config.max_steps:
        total = min(total, config.max_steps)
    blend = make_blend(config.data, file_start)
    if blend:
        print(blend.describe())
    return Steps(n, config.batch_size, config.seed, config.shuffle, per_epoch, total, blend)


def describe(model: GPT, lengths: np.ndarray, steps: Steps, config: RunConfig) -> str:
    """Return two lines on parameters, memory and steps, and a warning if rows are too long.

    lengths: tokens of every example, (n,). The memory is that of weights, gradients and optimizer.
    """
    held = frozen_memory(model, model.mesh, config.zero, model.dtype)
    sizes = bucket_sizes(model, model.mesh, config.zero)
    offload, half_grads = config.offload == "optimizer", config.grad_dtype == "bf16"
    used = memory(sizes, held, config.zero, model.dtype, offload, half_grads)
    host = used.host + (saved_bytes(sizes, model.dtype) if config.async_save else 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    declared = model.weights()  # without the corrections of routers, which nothing freezes
    frozen = sum(
        p.numel()
        for name, p in model.named_parameters()
        if declared[name].trains and not p.requires_grad
    )
    tokens = lengths.mean() * min(config.batch_size, len(lengths))
    lines = [
        f"{in_units(parameter_count(model.c))} parameters"
        + (f", {in_units(trained)} trained and {in_units(frozen)} frozen" if frozen else "")
        + f"; weights, gradients and AdamW take {in_bytes(sum(used) - used.host)}"
        + (f", in host memory {in_bytes(host)}" if host else "")
        + (" on this rank" if model.mesh.world > 1 else ""),
        f"{steps.total} steps of {config.batch_size} examples, about {tokens:,.0f} tokens each, "
        f"in micro-batches of at most {config.max_tokens:,}",
    ]
    if model.c.longest and lengths.max() > model.c.longest:
        raise ValueError(
            f"rows have up to {lengths.max()} tokens, but beyond {model.c.longest} the rotary "
            f"positions of this model are others: --max-length {model.c.longest}"
        )
    if lengths.max() > model.c.max_position:
        lines.append(
            f"warning: rows have up to {lengths.max()} tokens, but the model was made for "
            f"{model.c.max_position}: lower --max-length"
        )
    return "\n".join(lines)


def begin(
    run: Run,
    steps: Steps,
    optimizer: AdamW | tuple[AdamW, ...],
    first_row: dict[str, float] | None = None,
) -> Loop:
    """Load the checkpoint to resume from, if any, open the log and return the loop.

    first_row: metrics of step 0, logged unless the run resumes.
    """
    run.mesh.ask(lambda: _check_unfinished(run, steps.total))
    state = State()
    if run.checkpoint:
        state = checkpoint.load(run.checkpoint, optimizer)
        print(f"resumed from {run.checkpoint} after step {state.step}")
        if state.step > steps.total:
            raise ValueError(
                f"{run.checkpoint} is past the {steps.total} steps asked for: raise --max-steps or "
                "--epochs, or --resume an earlier checkpoint"
            )
    for warning in run.warnings:  # last, where they are seen
        print(f"warning: {warning}")
    limit_waits(run.mesh, run.config.timeout_minutes)
    first = first_optimizer(optimizer)
    log = Log(run.config, state.step, steps.total, run.mesh)
    meter = Meter(first.model.c, run.device, run.mesh)
    if first_row and not run.checkpoint:
        log.row({"step": 0, **first_row})
    writer = Writer(run.stop) if run.config.async_save else None
    return Loop(run, steps, optimizer, state, log, meter, writer)


def _check_unfinished(run: Run, total: int) -> None:
    """Raise ValueError where --resume auto finds a run that has taken all its steps."""
    out = Path(run.config.out)
    try:
        done = json.loads((out / FINISHED).read_text())["steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    folder = out / ("final" if run.config.merge else "adapter")
    if run.config.resume != "auto" or not folder.exists():
        return
    if total <= done or not run.checkpoint:
        without = "" if run.checkpoint else ", and no checkpoint is left to go on from"
        raise ValueError(
            f"{out} is already finished: {folder} is there after {done} steps{without}: "
            "--max-steps or --epochs to go on, or choose another --out"
        )


def first_optimizer(optimizer: AdamW | tuple[AdamW, ...]) -> AdamW:
    """Return the optimizer of the policy."""
    return optimizer[0] if isinstance(optimizer, tuple) else optimizer


# ---- in the loop -------------------------------------------------------------------------------


def remaining(loop: Loop) -> Iterator[int]:
    """Yield the number (from 0) of every step that is left, and start its clock."""
    for step in range(loop.state.step, loop.steps.total):
        loop.meter.start()
        yield step


def learning_rate(config: RunConfig, step: int, total: int, peak: float | None = None) -> float:
    """Return the rate of step `step` (from 0) of `total`: linear warm-up from 0, then the schedule.

    peak: the highest rate, --lr by default.
    """
    peak = config.lr if peak is None else peak
    warm = int(config.warmup * total)
    if step < warm:
        return peak * (step + 1) / warm
    if config.schedule == "constant":
        return peak
    left = 1 - (step - warm) / max(1, total - warm)
    return peak * (left if config.schedule == "linear" else 0.5 * (1 + np.cos(np.pi * (1 - left))))


def check_update(loop: Loop, norm: float) -> bool:
    """Return whether an update took place: false where the gradient's norm was not finite.

    Such an update is counted and reported. ValueError after NONFINITE_LIMIT in a row.
    """
    if math.isfinite(norm):
        loop.nonfinite = 0
        return True
    loop.nonfinite += 1
    step = loop.state.step + 1
    if loop.nonfinite >= NONFINITE_LIMIT:
        raise ValueError(
            f"the gradient was not finite in {loop.nonfinite} steps in a row, up to step {step}: "
            "lower --lr, or look for broken rows; "
            + checkpoint.last_good(loop.run.config.out, loop.run.mesh)
        )
    loop.state.skipped += 1
    loop.log.say(
        f"step {step}: the gradient is not finite, no update ({loop.state.skipped} so far)"
    )
    return False


def report_step(
    loop: Loop, row: dict[str, float], tokens: int, batches: Sequence[TreeBatch] = ()
) -> None:
    """End a step: add step, epoch, tokens, time and memory to its row, log it and move the bar.

    row: the step's metrics. tokens: real tokens of the step on all ranks. batches: this rank's
    micro-batches, of which `mfu` needs the mean context.
    """
    state = loop.state
    state.step += 1
    state.tokens += tokens
    epoch = state.step / loop.steps.per_epoch
    model = first_optimizer(loop.optimizer).model
    if model.c.experts:
        counts = model.tallies, model.c.layers, model.c.experts, model.mesh
        row = {**row, **routing.metrics(*counts)}
    row = {"step": state.step, **row, "epoch": epoch, **loop.meter.read(tokens, batches)}
    if due(loop.run.config.log_every, state.step) or state.step == loop.steps.total:
        loop.log.row(row)
    loop.log.progress(row)


def evaluation_due(loop: Loop) -> bool:
    """Return whether to evaluate after this step: every --eval-every steps, and after the last."""
    return due(loop.run.config.eval_every, loop.state.step) or loop.state.step == loop.steps.total


def report_evaluation(loop: Loop, results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Log and print the results of every set of --eval-data; return those of the first.

    results: name of a set -> its metrics, eval/... In the log those of a named set are
    eval/NAME/...; the first set decides which model is best.
    """
    row = {
        metric.replace("eval/", f"eval/{name}/", 1) if name else metric: value
        for name, result in results.items()
        for metric, value in result.items()
    }
    loop.log.row({"step": loop.state.step, **row})
    numbers = ", ".join(f"{name} {value:.4f}" for name, value in row.items())
    loop.log.say(f"step {loop.state.step}: {numbers}")
    return next(iter(results.values()))


def print_samples(loop: Loop, model: GPT, sets: dict[str, Dataset]) -> None:
    """Print a sampled answer to each of the first --samples prompts, the same at every call."""
    data = next(iter(sets.values()))
    n, template = min(loop.run.config.samples, len(data)), loop.run.template
    starts, sizes = data.tree_start[:n], data.prompt_len[:n]
    prompts = [data.tokens[start : start + size].tolist() for start, size in zip(starts, sizes)]
    with model.whole():
        answers = generate(
            model,
            prompts,
            SAMPLE_TOKENS,
            temperature=SAMPLE_TEMPERATURE,
            stop_ids=template.stop_ids,
        )
    decode = template.tokenizer.decode
    for prompt, answer in zip(prompts, answers):
        loop.log.say(f"  prompt  {decode(prompt)[-SHOWN_CHARACTERS:].strip()!r}")
        loop.log.say(f"  answer  {decode(answer.tokens).strip()!r}")


def is_best(loop: Loop, loss: float) -> bool:
    """Return whether this evaluation's loss is the lowest so far, and remember it if so.

    Pass a reward with its sign changed. A loss that is not finite is never the best.
    """
    best = math.isfinite(loss) and (loop.state.best is None or loss < loop.state.best)
    if best:
        loop.state.best, loop.state.best_step = loss, loop.state.step
    return best


def save_or_stop(loop: Loop, stopping: bool) -> bool:
    """Write a checkpoint if one is due or the run stops; return whether the script must leave.

    With --async-save a thread writes it, unless the run stops: then it is whole on return.
    stopping: what optimizer.step returned. After the last step there is nothing left to stop.
    """
    run, state, total = loop.run, loop.state, loop.steps.total
    stopping = stopping and state.step < total
    if due(run.config.save_every, state.step) or stopping:
        description: dict = dict(run.description)
        save = loop.writer.save if loop.writer else checkpoint.save
        save(run.config.out, state, loop.optimizer, run.config.keep, description)
    if not stopping:
        return False
    if loop.writer:
        loop.writer.wait()
    reason = run.stop.reason or "another rank"
    loop.log.say(
        f"stopped by {reason} after step {state.step} of {total}; continue with --resume auto"
    )
    loop.log.close()
    lock.release()
    return True


def finish(loop: Loop, model: GPT) -> Path:
    """Close the log, write the trained model to OUT/final and return that folder."""
    loop.log.close()
    if loop.writer:
        loop.writer.wait()
    folder = runtime.save_model(loop.run, model, "final")
    finished = Path(loop.run.config.out) / FINISHED
    text = json.dumps({"steps": loop.steps.total, "model": folder.name}) + "\n"
    loop.run.mesh.ask(lambda: write_text(finished, text))
    lock.release()
    print(f"{loop.steps.total} steps done, {loop.state.tokens:,} tokens; the model is in {folder}")
    return folder
