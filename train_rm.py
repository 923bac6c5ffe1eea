"""Reward models: learn to score an answer, from pairs (Bradley-Terry, arXiv 2203.02155 Eq. 1) or from attributes.

    python train_rm.py --model sft/final --data prefs.jsonl --out rm --lr 1e-5
    torchrun --nproc_per_node 8 train_rm.py --model sft/final --data helpsteer.jsonl --loss regression --out rm

Rows: {prompt, chosen, rejected}; for --loss regression {prompt, response, attributes: {helpfulness: 4, ...}}, or
HelpSteer's columns. The vocabulary head makes way for a score head, read at the last token of a response: its end
token where it has one. Both answers hang on one prompt, which is computed once. score.py applies the result, and
transformers loads it as AutoModelForSequenceClassification.

Watch eval/rewards/accuracies: one epoch is usually best, a reward model overfits fast.

Letters: R responses, B = R / 2 pairs of a micro-batch (chosen, rejected, chosen, ...), A attributes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
import losses
import reporting
import runtime
from config import RunConfig, parse
from data.dataset import Dataset
from data.formats import ATTRIBUTES, known_attributes
from data.templates import Template
from data.tokenizer import Tokenizer, load_tokenizer
from data.trees import TreeBatch, make_batch, micro_batches, pack, step_examples, steps_per_epoch
from model import GPT
from optimizer import AdamW
from parallel import init_mesh
from pipeline import pipeline
from weights.folder import load_model, save_model


@dataclass
class Config(RunConfig):
    loss: Literal[losses.REWARD_MODEL_LOSSES] = (
        "bradley_terry"  # margin_bt, scaled_bt: the data says by how much
    )
    centering: float = 0.0  # pulls scores towards 0: weight of r_c² + r_r²; 0.001 to 0.01
    attributes: list[str] = field(
        default_factory=list
    )  # regression: what to learn; default: all that the data has
    lr: float = 1e-5  # peak learning rate; 1e-6 to 1e-5 for 7B models


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def margins(data: Dataset) -> np.ndarray:
    """By how much each answer's pair is judged apart, (R,): `margin`, else the rewards' difference, else NaN."""
    reward = data.columns["reward"].reshape(-1, 2)
    return np.where(
        np.isnan(data.columns["margin"]),
        np.repeat(reward[:, 0] - reward[:, 1], 2),
        data.columns["margin"],
    )


def wanted_of(batch: TreeBatch, names: tuple[str, ...]) -> torch.Tensor:
    """The attributes of every response, (R, A), NaN where the data has none."""
    return torch.stack([batch.columns[name] for name in names], 1)


def score_losses(
    scores: torch.Tensor, batch: TreeBatch, names: tuple[str, ...], config: Config
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The chosen loss of each pair, (B,), or of each attribute, (R, A), and its metrics."""
    if config.loss == "regression":
        wanted = wanted_of(batch, names)
        errors = losses.regression(scores, wanted)
        return errors, {"rewards/errors": errors.detach().sqrt()}
    margin = batch.columns["margin"][::2]
    return losses.pairwise_reward(scores.view(-1, 2), margin, config.loss, config.centering)


def items_in(data: Dataset, examples: np.ndarray, names: tuple[str, ...], config: Config) -> int:
    """What the loss of some examples is averaged over: pairs, or attributes that the data has."""
    if config.loss == "regression":
        rows = data.responses_of(examples)
        return int(sum((~np.isnan(data.columns[name][rows])).sum() for name in names))
    return len(examples)


@torch.no_grad()
def evaluate(model: GPT, data: Dataset, names: tuple[str, ...], config: Config) -> dict[str, float]:
    """Loss and metrics over a whole data set, under eval/; for attributes the error and correlation of each."""
    mesh, everything, totals = model.mesh, np.arange(len(data)), {}
    scores = torch.zeros(
        len(data.response_len), len(names), dtype=torch.float64, device=model.device
    )
    lengths = data.tree_lengths(config.share_prompts)
    bins = micro_batches(lengths, everything, config.max_tokens, mesh.dp_rank, mesh.dp)
    batches = (make_batch(data, items, config.share_prompts) for items in bins)
    for batch, hidden in pipeline(model, batches):
        found = model.score(hidden, batch, batch.last)
        scores[data.responses_of(batch.examples)] = found.double()
        per_item, metrics = score_losses(found, batch, names, config)
        reporting.add(totals, {"loss": per_item, **metrics})
    means = reporting.means(totals, items_in(data, everything, names, config), mesh)
    row = {f"eval/{name}": value for name, value in means.items()}
    if config.loss != "regression":
        return deviation(row, "eval/rewards")
    for name, got in zip(names, mesh.sum(scores).cpu().T):
        right = torch.from_numpy(np.array(data.columns[name], np.float64))
        known = ~right.isnan()
        if known.any():
            row[f"eval/error/{name}"] = (got - right)[known].abs().mean().item()
        if known.sum() > 1 and right[known].std() > 0 and got[known].std() > 0:
            row[f"eval/correlation/{name}"] = torch.corrcoef(
                torch.stack((got[known], right[known]))
            )[0, 1].item()
    return row


def deviation(row: dict[str, float], name: str) -> dict[str, float]:
    """The row with the scores' standard deviation in place of their mean square."""
    square = row.pop(f"{name}/square", None)
    if square is not None:
        row[f"{name}/std"] = max(0.0, square - row[f"{name}/mean"] ** 2) ** 0.5
    return row


@torch.no_grad()
def print_scored(
    model: GPT, data: Dataset, n: int, tokenizer: Tokenizer, say: Callable[[str], None]
) -> None:
    """Prints the first n held-out prompts, and their answers with the scores they get."""
    batch = make_batch(data, list(range(min(n, len(data))))).to(model.device)
    scores = iter(model.score(model(batch), batch, batch.last).tolist())
    tokens = iter(batch.tokens.tolist())
    for prompt_len, sizes in batch.spans:
        say(f"  prompt  {tokenizer.decode(list(islice(tokens, prompt_len)))[-300:].strip()!r}")
        for size in sizes:
            found = ", ".join(f"{score:.3f}" for score in next(scores))
            say(f"  {found}  {tokenizer.decode(list(islice(tokens, size))).strip()!r}")


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    mesh = init_mesh(config.tp, config.cp, config.pp, config.device, config.timeout_minutes)
    device, dtype = runtime.set_up(config, mesh)
    stop = runtime.Stop(config.max_minutes)
    start = checkpoint.find(config.out, config.resume, mesh=mesh)

    # ---- data --------------------------------------------------------------------------------------------------------
    tokenizer = load_tokenizer(config.model)
    template = Template(config.template, tokenizer)
    kind = "attributes" if config.loss == "regression" else "preference"
    with mesh.one_first():  # the others find it in the cache
        train = runtime.load_rows(config.data, kind, template, config)
        heldout = runtime.load_rows(config.eval_data, kind, template, config)
    names: tuple[str, ...] = ("reward",)
    if config.loss == "regression":
        known_attributes(config.attributes)
        names = tuple(name for name in ATTRIBUTES if not np.isnan(train.columns[name]).all())
        if lacking := [name for name in config.attributes if name not in names] or (
            [] if names else ["attribute"]
        ):
            raise ValueError(
                f"no row of --data gives {lacking[0]}: it has {', '.join(names) or 'none of them'}"
            )
        names = tuple(name for name in names if not config.attributes or name in config.attributes)
    for data in filter(None, (train, heldout) if config.loss != "regression" else ()):
        data.columns["margin"] = margins(data)
        if config.loss != "bradley_terry" and np.isnan(data.columns["margin"]).any():
            raise ValueError(
                f"--loss {config.loss} needs margin, or chosen_reward and rejected_reward, in every row"
            )
    for data in filter(None, (train, heldout)):
        pack(
            data.tree_lengths(config.share_prompts), config.max_tokens
        )  # a row that does not fit is refused here
    lengths = train.tree_lengths(config.share_prompts)

    # ---- model -------------------------------------------------------------------------------------------------------
    model = load_model(config.model, dtype, device, names, mesh)
    runtime.prepare_model(model, config, tokenizer)
    per_epoch = steps_per_epoch(len(train), config.batch_size)
    total = runtime.total_steps(config, per_epoch)
    print(runtime.describe(config, model, lengths, total))
    print(f"scores: {', '.join(names)}")
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
        n_items = max(
            1, items_in(train, examples, names, config)
        )  # a step without any attribute is no step

        totals: dict[str, torch.Tensor] = {}
        for batch, hidden in pipeline(model, batches, optimizer):
            scores = model.score(hidden, batch, batch.last)  # (R, outputs)
            per_item, metrics = score_losses(scores, batch, names, config)
            (per_item.sum() / n_items).backward()
            reporting.add(totals, {"loss": per_item, **metrics})
        lr = runtime.learning_rate(config, step, total)
        norm, stopping = optimizer.step(lr, config.clip, stop)

        state.step = step + 1
        row = {
            "step": state.step,
            **reporting.means(totals, n_items, mesh),
            "grad_norm": norm,
            "lr": lr,
        }
        row = deviation(row, "rewards")
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
            result = evaluate(model, heldout, names, config)
            log.row({"step": state.step, **result})
            log.say(
                f"step {state.step}: "
                + ", ".join(f"{name} {value:.4f}" for name, value in result.items())
            )
            if config.samples:
                print_scored(model, heldout, config.samples, tokenizer, log.say)
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
