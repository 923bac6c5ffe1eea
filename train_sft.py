"""Supervised fine-tuning: learn to write the responses of a data set, token by token.

    python train_sft.py --model base --data demos.jsonl --out sft --lr 2e-5
    torchrun --nproc_per_node 8 train_sft.py --model base --data demos.jsonl --eval-data test.jsonl --eval-every 50

Rows: {prompt, response}, or {messages} of a conversation, every assistant turn of which is learned. The loss is the
mean negative log-likelihood a response token over the whole optimizer step; prompts carry none.

Watch eval/loss: where it turns up while loss goes on falling, the run overfits (fewer --epochs, lower --lr).

Letters: M scored tokens, R responses.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
import reporting
import runtime
from config import RunConfig, parse
from data.dataset import Dataset
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import make_batch, micro_batches, pack, step_examples, steps_per_epoch
from model import GPT
from optimizer import AdamW
from parallel import init_mesh
from pipeline import pipeline
from weights.folder import load_model, save_model


@dataclass
class Config(RunConfig):
    lr: float = 2e-5  # peak learning rate; 1e-5 to 2e-5 for 7B models, 1e-3 and more from scratch on tiny ones


# ---- the algorithm ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: GPT, data: Dataset, config: Config) -> dict[str, float]:
    """Mean loss a response token over a whole data set, under eval/."""
    mesh, lengths = model.mesh, data.tree_lengths(config.share_prompts)
    bins = micro_batches(lengths, np.arange(len(data)), config.max_tokens, mesh.dp_rank, mesh.dp)
    nll = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch, hidden in pipeline(
        model, (make_batch(data, items, config.share_prompts) for items in bins)
    ):
        nll -= model.logps(hidden, batch).double().sum()
    return {"eval/loss": mesh.sum(nll).item() / int(data.scored_len.sum())}


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    mesh = init_mesh(config.tp, config.cp, config.pp, config.device, config.timeout_minutes)
    device, dtype = runtime.set_up(config, mesh)
    stop = runtime.Stop(config.max_minutes)
    start = checkpoint.find(config.out, config.resume, mesh=mesh)

    # ---- data --------------------------------------------------------------------------------------------------------
    tokenizer = load_tokenizer(config.model)
    template = Template(config.template, tokenizer)
    with mesh.one_first():  # the others find it in the cache
        train = runtime.load_rows(config.data, "sft", template, config)
        heldout = runtime.load_rows(config.eval_data, "sft", template, config)
    for data in filter(None, (train, heldout)):
        pack(
            data.tree_lengths(config.share_prompts), config.max_tokens
        )  # a row that does not fit is refused here
    lengths = train.tree_lengths(config.share_prompts)

    # ---- model -------------------------------------------------------------------------------------------------------
    model = load_model(config.model, dtype, device, mesh=mesh)
    runtime.prepare_model(model, config, tokenizer)
    per_epoch = steps_per_epoch(len(train), config.batch_size)
    total = runtime.total_steps(config, per_epoch)
    print(runtime.describe(config, model, lengths, total))
    optimizer = AdamW(
        model, (config.beta1, config.beta2), config.eps, config.weight_decay, config.zero
    )
    state = checkpoint.State()
    if start:
        state = checkpoint.load(start, optimizer)
        print(f"resumed from {start} after step {state.step}")

    # ---- the loop ----------------------------------------------------------------------------------------------------
    log = reporting.Log(config, state.step, total, mesh)
    meter, nonfinite = reporting.Meter(model.c, device, mesh), runtime.NonFinite()
    for step in range(state.step, total):
        meter.start()
        examples = step_examples(len(train), config.batch_size, step, config.seed, config.shuffle)
        bins = micro_batches(lengths, examples, config.max_tokens, mesh.dp_rank, mesh.dp)
        batches = [make_batch(train, items, config.share_prompts) for items in bins]
        # Counted over the whole step, so that the loss does not depend on how it is cut into micro-batches.
        n_scored = int(train.scored_len[train.responses_of(examples)].sum())

        totals: dict[str, torch.Tensor] = {}
        for batch, hidden in pipeline(model, batches, optimizer):
            nll = -model.logps(hidden, batch)  # (M,)
            (nll.sum() / n_scored).backward()
            reporting.add(totals, {"loss": nll})
        lr = runtime.learning_rate(config, step, total)
        norm, stopping = optimizer.step(lr, config.clip, stop)

        state.step = step + 1
        row = {
            "step": state.step,
            **reporting.means(totals, n_scored, mesh),
            "grad_norm": norm,
            "lr": lr,
        }
        tokens = int(lengths[examples].sum())
        row |= {"epoch": state.step / per_epoch, **meter.read(tokens, batches)}
        state.tokens += tokens
        if nonfinite.check(norm, state.step):
            state.skipped += 1
            log.say(
                f"step {state.step}: the gradient is not finite, no update ({state.skipped} so far)"
            )
        if reporting.due(config.log_every, state.step) or state.step == total:
            log.row(row)
        log.progress(row)

        if heldout and (reporting.due(config.eval_every, state.step) or state.step == total):
            result = evaluate(model, heldout, config)
            log.row({"step": state.step, **result})
            log.say(
                f"step {state.step}: "
                + ", ".join(f"{name} {value:.4f}" for name, value in result.items())
            )
            if config.samples:
                runtime.print_samples(model, heldout, config.samples, tokenizer, template, log.say)
            if state.best is None or result["eval/loss"] < state.best:
                state.best, state.best_step = result["eval/loss"], state.step
                save_model(model, Path(config.out) / "best", config.model, template)
        stopping = stopping and state.step < total
        if reporting.due(config.save_every, state.step) or stopping:
            checkpoint.save(config.out, state, optimizer, config.keep)
        if stopping:
            why = stop.reason or "another rank"
            log.say(
                f"stopped by {why} after step {state.step} of {total}; --resume auto goes on from here"
            )
            log.close()
            return
    log.close()
    save_model(model, Path(config.out) / "final", config.model, template)
    print(f"{total} steps done, {state.tokens:,} tokens; the model is in {config.out}/final")


if __name__ == "__main__":
    runtime.run(main)
