"""SteerLM, arXiv 2310.05344: answers that are written to order, by attributes; and SteerLM 2.0, arXiv 2406.08673.

    1  python train_steerlm.py --stage attributes --model base --data helpsteer.jsonl --out predictor
    2  python train_steerlm.py --stage annotate   --model predictor/final --data any.jsonl --out labelled
    3  python train_steerlm.py --stage sft        --model base --data labelled/annotated.jsonl --out steerlm --lr 2e-5
    4  python train_steerlm.py --stage bootstrap  --model steerlm/final --predictor predictor/final --data prompts.jsonl
    torchrun --nproc_per_node 8 train_steerlm.py --stage sft ...

(1) learns to predict attributes (0 to 4) of an answer, (2) writes its predictions beside any rows, (3) learns answers
given their attribute line, (4) samples answers at the best attributes, labels what came out and learns from that.
Then: generate.py --model steerlm/final --attributes "helpfulness:4,verbosity:1". train_rm.py --loss regression makes
the predictor of (1) just as well. Rows: {prompt, response, attributes: {helpfulness: 4, ...}}, or HelpSteer's columns;
SteerLM 2.0 (--loss steerlm2) weighs several answers to one prompt, of (4) or {prompt, responses: [...], attributes}.

Watch eval/loss, and whether answers to low and to high settings differ.

Letters: R responses, M scored tokens, A attributes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
import losses
import reference
import reporting
import runtime
from config import RunConfig, parse
from data import attributes
from data.dataset import Dataset
from data.formats import ATTRIBUTES, attribute_row
from data.rows import read_rows, write_rows
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import (
    TreeBatch,
    make_batch,
    micro_batches,
    pack,
    step_examples,
    steps_per_epoch,
    visited,
)
from model import GPT
from optimizer import AdamW
from parallel import init_mesh
from pipeline import pipeline
from sampling.sampler import generate
from sampling.scoring import all_answers, annotate, load_scorer, score
from weights.folder import load_model, save_model


@dataclass
class Config(RunConfig):
    stage: Literal["attributes", "annotate", "sft", "bootstrap"] = (
        "sft"  # which of the four steps above
    )
    loss: Literal["nll", "steerlm2"] = (
        "nll"  # of sft and bootstrap: SteerLM's own, or 2.0 over several answers
    )
    attribute_template: str = (
        ""  # where the line goes; default: --model's, or "{prompt}<extra_id_2>{attributes}\n"
    )
    attribute_dropout: float = (
        0.0  # sft: share of values left out at random: subsets can be asked for later
    )
    predictor: str = ""  # bootstrap and steerlm2: folder of the attribute model
    ask: str = ""  # bootstrap: attributes to sample at, "helpfulness:4,verbosity:2"; default: the best of all
    answers: int = 1  # bootstrap: samples a prompt; steerlm2 wants 4 or more
    temperature: float = (
        1.0  # bootstrap: of the samples; leave it at 1 for steerlm2, whose weights need it
    )
    max_new_tokens: int = 512  # bootstrap: longest answer; one that has not ended is left out
    prior: str = ""  # steerlm2: folder of P(y|x), a model tuned without attributes
    spread: float = (
        1.0  # steerlm2: standard deviation of the predictor's errors, in units of an attribute
    )
    lr: float = 2e-5  # peak learning rate; 1e-5 to 2e-5 for 7B models, 1e-3 and more from scratch on tiny ones


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def sample(
    model: GPT, rows: list[dict], names: tuple, line: str, template: Template, config: Config
) -> list[dict]:
    """Answers of the model at the asked attributes, {prompt, responses, attributes}; those that did not end are out."""
    wanted = attributes.read_line(config.ask, names) if config.ask else attributes.best(names)
    unique = {json.dumps(row["prompt"]): row["prompt"] for row in rows if row.get("prompt")}
    if not unique:
        raise ValueError("--stage bootstrap: no row of --data has a prompt")
    ids = [
        template.prompt(attributes.condition(prompt, wanted, line)) for prompt in unique.values()
    ]
    limits = (config.max_new_tokens, config.temperature)
    found = generate(
        model, ids, *limits, stop_ids=template.stop_ids, seed=config.seed, n=config.answers
    )
    prompts = [prompt for prompt in unique.values() for _ in range(config.answers)]
    kept: dict[str, list[str]] = {key: [] for key in unique}
    for prompt, answer in zip(prompts, found):
        text = template.tokenizer.decode(answer.tokens).strip()
        if answer.ended and text:
            kept[json.dumps(prompt)].append(text)
    print(
        f"{sum(map(len, kept.values()))} of {len(found)} samples ended by themselves, at {attributes.line(wanted)}"
    )
    return [
        {"prompt": unique[key], "responses": texts, "attributes": wanted}
        for key, texts in kept.items()
        if texts
    ]


def weighted(
    rows: list[dict], line: str, config: Config, device, dtype
) -> tuple[list[dict], tuple[str, ...]]:
    """SteerLM 2.0: each prompt with its line, its answers, and log P(a|x,y) + log P(y|x) of each as their weights.

    P(a|x,y) is a normal distribution around what the predictor says; P(y|x) is the prior model's.
    """
    if not config.predictor or not config.prior:
        raise ValueError(
            "--loss steerlm2 needs --predictor DIR for P(a|x,y) and --prior DIR for P(y|x)"
        )
    groups, seen = [], set()
    for row in rows:
        found = attribute_row(row)
        values = [
            {name: column[i] for name, column in found.columns.items()}
            for i in range(len(found.responses))
        ]
        if found.prompt is None or len({attributes.line(v) for v in values}) > 1:
            raise ValueError(
                "--loss steerlm2: a row is {prompt, responses: [...], attributes: {...}}, one set for all"
            )
        if len(found.responses) > 1:
            groups.append(
                (found.prompt, found.responses, {k: v for k, v in values[0].items() if v == v})
            )
            seen |= groups[-1][2].keys()
    if not groups:
        raise ValueError(
            "--loss steerlm2 compares answers to one prompt: every row has one alone; raise --answers"
        )
    answers = [(prompt, responses) for prompt, responses, _ in groups]
    model, names = load_scorer(config.predictor, dtype, device)
    if lacking := [name for name in seen if name not in names]:
        raise ValueError(
            f"{config.predictor} does not predict {lacking[0]}, only {', '.join(names)}"
        )
    predicted = score(
        model,
        Template(config.template, load_tokenizer(config.predictor)),
        answers,
        config.max_tokens,
    )
    model = load_model(config.prior, dtype, device)
    prior = score(
        model, Template(config.template, load_tokenizer(config.prior)), answers, config.max_tokens
    )
    made = []
    for (prompt, responses, wanted), scores, logps in zip(groups, predicted, prior):
        target = np.array([wanted.get(name, np.nan) for name in names])
        fit = -np.nansum((scores - target) ** 2, 1) / (
            2 * config.spread**2
        )  # log P(a|x,y) up to a constant
        weights = (
            fit + logps - (fit + logps).mean()
        )  # only differences count, and fp32 keeps small ones better
        conditional = attributes.condition(prompt, wanted, line)
        made.append({"prompt": conditional, "responses": responses, "weights": weights.tolist()})
    return made, tuple(name for name in ATTRIBUTES if name in seen)


def prepare(
    config: Config, template: Template, trained: tuple | None, line: str, device, dtype
) -> tuple:
    """Samples, labels and puts lines into prompts; what is trained on lies in OUT for all to see.

    Returns the files to train and to evaluate on, and the attributes in them.
    """
    out, files, names = Path(config.out), {"train": config.data, "heldout": config.eval_data}, []
    if config.stage == "annotate":
        _, answers = all_answers(rows_in(config.data), template, "--data")
        rows = annotate(config.model, answers, config.template, config.max_tokens, dtype, device)
        print(f"{len(rows)} rows in {write_rows(out / 'annotated.jsonl', rows)}")
        return files, ()
    if config.stage == "bootstrap":
        if not trained or not config.predictor:
            raise ValueError(
                "--stage bootstrap needs a --model of --stage sft and a --predictor of --stage attributes"
            )
        files["train"] = [str(out / "bootstrap.jsonl")]
        if not (out / "bootstrap.jsonl").exists():  # a resumed run trains on the same samples
            model = load_model(config.model, dtype, device)
            rows = sample(model, rows_in(config.data), trained[1], line, template, config)
            if config.loss == "nll":
                _, answers = all_answers(rows, template, "the samples")
                rows = annotate(
                    config.predictor, answers, config.template, config.max_tokens, dtype, device
                )
            write_rows(out / "bootstrap.jsonl", rows)
    for part, rows in ((part, rows_in(given)) for part, given in list(files.items()) if given):
        if config.loss == "steerlm2":
            made, found = weighted(rows, line, config, device, dtype)
        else:
            made, found = attributes.conditioned(rows, line, config.attribute_dropout, config.seed)
        names = names or list(found)
        files[part] = [write_rows(out / f"conditioned_{part}.jsonl", made)]
    return files, tuple(names)


def rows_in(files: list[str]) -> list[dict]:
    """Every row of some files."""
    return [row for file in files for row in read_rows(file)]


def item_losses(
    model: GPT, hidden: torch.Tensor, batch: TreeBatch, names: tuple[str, ...], config: Config
) -> torch.Tensor:
    """Losses of a batch, unreduced.

    attributes: squared errors (R, A), over labels that are there. nll: (M,), over tokens. steerlm2: terms (R,) of a
    divergence, over prompts.
    """
    if config.stage == "attributes":
        wanted = torch.stack([batch.columns[name] for name in names], 1)
        return losses.regression(model.score(hidden, batch, batch.last), wanted)
    logps = model.logps(hidden, batch)
    if config.loss == "nll":
        return -logps
    q_logps, group = (
        batch.columns["ref_logps"],
        batch.columns["group"].unique(return_inverse=True)[1],
    )
    return losses.steerlm2(
        batch.sum_by_response(logps), q_logps, batch.columns["weight"] - q_logps, group
    )


def items_in(data: Dataset, examples: np.ndarray, names: tuple[str, ...], config: Config) -> int:
    """What the loss of some examples is averaged over: labels, tokens or prompts."""
    rows = data.responses_of(examples)
    if config.stage == "attributes":
        return int(sum((~np.isnan(data.columns[name][rows])).sum() for name in names))
    return int(data.scored_len[rows].sum()) if config.loss == "nll" else len(examples)


@torch.no_grad()
def evaluate(model: GPT, data: Dataset, names: tuple[str, ...], config: Config) -> dict[str, float]:
    """Mean loss over a whole data set, under eval/."""
    mesh, everything = model.mesh, np.arange(len(data))
    lengths = data.tree_lengths(config.share_prompts)
    bins = micro_batches(lengths, everything, config.max_tokens, mesh.dp_rank, mesh.dp)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch, hidden in pipeline(
        model, (make_batch(data, items, config.share_prompts) for items in bins)
    ):
        total += item_losses(model, hidden, batch, names, config).double().sum()
    return {"eval/loss": mesh.sum(total).item() / max(1, items_in(data, everything, names, config))}


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    mesh = init_mesh(config.tp, config.cp, config.pp, config.device, config.timeout_minutes)
    device, dtype = runtime.set_up(config, mesh)
    stop = runtime.Stop(config.max_minutes)
    start = checkpoint.find(config.out, config.resume, mesh=mesh)

    # ---- data --------------------------------------------------------------------------------------------------------
    tokenizer = load_tokenizer(config.model)
    template = Template(config.template, tokenizer)
    trained = attributes.load(config.model)
    line = attributes.check_template(
        config.attribute_template or (trained[0] if trained else attributes.TEMPLATE)
    )
    kind, data_files = "attributes", {"train": config.data, "heldout": config.eval_data}
    if config.stage != "attributes":  # rank 0 makes the data with whole models, the others wait
        kind = "sft" if config.loss == "nll" else "weights"
        data_files, names = mesh.ask(
            lambda: prepare(config, template, trained, line, device, dtype)
        )
    if config.stage == "annotate":
        return
    with mesh.one_first():  # the others find it in the cache
        train = runtime.load_rows(data_files["train"], kind, template, config)
        heldout = runtime.load_rows(data_files["heldout"], kind, template, config)
    if config.stage == "attributes":
        names = tuple(name for name in ATTRIBUTES if not np.isnan(train.columns[name]).all())
        if not names:
            raise ValueError(f"no row of --data has an attribute: {', '.join(ATTRIBUTES)}")
    for data in filter(None, (train, heldout)):
        pack(
            data.tree_lengths(config.share_prompts), config.max_tokens
        )  # a row that does not fit is refused here
    lengths = train.tree_lengths(config.share_prompts)

    # ---- model and reference -----------------------------------------------------------------------------------------
    model = load_model(
        config.model, dtype, device, names if config.stage == "attributes" else None, mesh
    )
    runtime.prepare_model(model, config, tokenizer)
    per_epoch = steps_per_epoch(len(train), config.batch_size)
    total = runtime.total_steps(config, per_epoch)
    print(runtime.describe(config, model, lengths, total))
    print(f"attributes: {', '.join(names)}")
    if (
        config.loss == "steerlm2" and config.stage != "attributes"
    ):  # Q, what the answers were drawn from
        seen = visited(len(train), config.batch_size, total, config.seed, config.shuffle)
        for data, examples in [(train, seen)] + (
            [(heldout, np.arange(len(heldout)))] if heldout else []
        ):
            data.columns["group"] = np.repeat(np.arange(len(data)), np.diff(data.response_start))
            data.columns["ref_logps"], _ = reference.reference_logps(
                model, "", data, examples, config, print
            )
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
            per_item = item_losses(model, hidden, batch, names, config)
            (per_item.sum() / n_items).backward()
            reporting.add(totals, {"loss": per_item})
        lr = runtime.learning_rate(config, step, total)
        norm, stopping = optimizer.step(lr, config.clip, stop)

        state.step = step + 1
        row = {
            "step": state.step,
            **reporting.means(totals, n_items, mesh),
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
            result = evaluate(model, heldout, names, config)
            log.row({"step": state.step, **result})
            log.say(
                f"step {state.step}: "
                + ", ".join(f"{name} {value:.4f}" for name, value in result.items())
            )
            if config.samples and config.stage != "attributes":
                runtime.print_samples(model, heldout, config.samples, tokenizer, template, log.say)
            if state.best is None or result["eval/loss"] < state.best:
                state.best, state.best_step = result["eval/loss"], state.step
                save_model(model, Path(config.out) / "best", config.model, template)
                if config.stage != "attributes":
                    attributes.save(Path(config.out) / "best", line, names)
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
    if config.stage != "attributes":
        attributes.save(Path(config.out) / "final", line, names)
    print(f"{total} steps done, {state.tokens:,} tokens; the model is in {config.out}/final")


if __name__ == "__main__":
    runtime.run(main)
