"""SteerLM, arXiv 2310.05344, trained on its own samples; and SteerLM 2.0, arXiv 2406.08673.

    python train_rm.py --loss regression --model base --data helpsteer.jsonl --out predictor
    python score.py --attributes --model predictor/final --data any.jsonl --out annotated.jsonl
    python train_sft.py --attributes --model base --data annotated.jsonl --out steerlm
    python train_steerlm.py --model steerlm/final --predictor predictor/final --data x.jsonl
    torchrun --nproc_per_node 8 train_steerlm.py --model steerlm/final ...

SteerLM learns responses given their attributes, 0 to 4. Its first three steps are other scripts:
train an attribute model, annotate responses with it, learn responses given their attributes. This
script is the fourth, bootstrapping: sample responses at the best attributes, label what came out,
learn from that. Ask the result with generate.py --attributes "helpfulness:4,verbosity:1".

--loss steerlm2 weighs several responses to one prompt by how well they fit the attributes that were
asked for. With --answers 0 it learns from the responses of --data instead of samples: rows {prompt,
responses: [...], attributes: {...}}.

Watch eval/loss, and whether responses to low and to high settings differ.

Letters: R responses, M scored tokens, A attributes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

import losses
import runtime
import sources
import training
from commandline import Range, parse
from config import Amount, Count, Number, RunConfig, Temperature
from data import attributes
from data.attributes import Conditioned, ConditionedRows
from data.chat import as_row
from data.dataset import Dataset
from data.keys import prompt_in
from data.rows import write_rows
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import TreeBatch
from model import GPT
from passes import forward, make_batches
from pipeline import pipeline
from reference import add_ref_logps
from reporting import add, means
from runtime import Run
from sampling.sampler import generate
from sampling.scoring import all_answers, annotate, load_scorer, score
from weights.folder import load_model


@dataclass
class Config(RunConfig):
    loss: Literal["nll", "steerlm2"] = "nll"  # SteerLM's own, or 2.0 over several responses
    predictor: str = ""  # folder of the attribute model
    ask: str = ""  # attributes to sample at, "helpfulness:4,verbosity:2"; default: the best of all
    answers: Count = 1  # samples per prompt; steerlm2 wants 4 or more, or 0: those of --data
    temperature: Temperature = 1.0  # of the samples; leave it at 1 for steerlm2, whose weights
    # need it
    max_new_tokens: Number = 512  # longest sample; one that has not ended is left out
    attribute_template: str = ""  # place of the attribute line; default: --model's own
    prior: str = ""  # steerlm2: folder of P(y|x), a model tuned without attributes
    spread: Annotated[float, Range(1e-6)] = 1.0  # steerlm2: standard deviation of the predictor's
    # errors
    lr: Amount = 2e-5  # peak learning rate; 1e-5 to 2e-5 for 7B models, from 1e-3 for tiny new ones


# ---- the algorithm -----------------------------------------------------------------------------


def sample_responses(line: str, run: Run, config: Config) -> list[dict]:
    """Sample responses to every prompt of --data: rows {prompt, responses, attributes asked for}.

    Samples that did not end, or are empty, are left out. line: the attribute template.
    """
    trained = attributes.load(config.model)
    if not trained or not config.predictor:
        raise ValueError(
            "sampling needs a --model of train_sft.py --attributes and a --predictor of "
            "train_rm.py --loss regression; --answers 0 takes the responses of --data"
        )
    names = trained[1]
    asked = attributes.read_line(config.ask, names) if config.ask else attributes.best(names)
    rows = attributes.all_rows(sources.paths(config.data, "data"))
    asked_for = [prompt_in(row, run.template.plain) for row in rows]
    prompts = {json.dumps(as_row(prompt)): prompt for prompt in asked_for}
    if not prompts:
        raise ValueError(f"{', '.join(config.data)} has no row")
    samples = generate(
        load_model(config.model, run.dtype, run.device),
        [run.template.prompt(attributes.condition(p, asked, line)) for p in prompts.values()],
        config.max_new_tokens,
        config.temperature,
        stop_ids=run.template.stop_ids,
        seed=config.seed,
        n=config.answers,
    )
    result, n = [], config.answers
    for i, prompt in enumerate(prompts.values()):
        ended = [s.tokens for s in samples[i * n : (i + 1) * n] if s.ended]
        texts = [run.template.tokenizer.decode(tokens).strip() for tokens in ended]
        if any(texts):
            responses = [text for text in texts if text]
            result.append({**as_row(prompt), "responses": responses, "attributes": asked})
    kept = sum(len(row["responses"]) for row in result)
    print(f"{kept} of {len(samples)} samples ended, at {attributes.line(asked)}")
    return result


def weigh(files: list[str], line: str, run: Run, config: Config) -> ConditionedRows:
    """Weigh the responses to each prompt by log P(a|x,y) + log P(y|x), for SteerLM 2.0.

    P(a|x,y) is a normal distribution around the predictor's values, P(y|x) is the prior model's.
    Returns rows {prompt, responses, weights}, prompts with their line, and the attributes in them.
    """
    if not config.predictor or not config.prior:
        raise ValueError(
            "--loss steerlm2 needs --predictor DIR for P(a|x,y) and --prior DIR for P(y|x)"
        )
    rows = attributes.compared_rows(files)
    names = attributes.in_order(name for row in rows for name in row.asked)
    answers = [(row.prompt, row.responses) for row in rows]
    model, known = load_scorer(config.predictor, run.dtype, run.device)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{config.predictor} does not predict {unknown[0]}, only {known}")
    template = Template(config.template, load_tokenizer(config.predictor))
    scores = score(model, template, answers, config.max_tokens)  # (responses, A) of each row
    model = load_model(config.prior, run.dtype, run.device)
    template = Template(config.template, load_tokenizer(config.prior))
    prior_logps = score(model, template, answers, config.max_tokens)  # (responses,) of each row
    result = []
    for row, values, logps in zip(rows, scores, prior_logps):
        asked = np.array([row.asked.get(name, np.nan) for name in known])  # (A,)
        fit = -np.nansum((values - asked) ** 2, 1) / (2 * config.spread**2)  # log P(a|x,y) + const
        weights = fit + logps - (fit + logps).mean()  # around 0, where fp32 is most precise
        prompt = attributes.condition(row.prompt, row.asked, line)
        weighed = {"responses": row.responses, "weights": weights.tolist()}
        result.append(as_row(prompt) | weighed)
    return result, names


def prepare(run: Run, config: Config) -> Conditioned:
    """Sample, label and weigh; write the files to train on to OUT and return them. On rank 0.

    A resumed run finds its samples in OUT/bootstrap.jsonl.
    """
    line = attributes.template_of(config.model, config.attribute_template)
    data, path = sources.paths(config.data, "data"), Path(config.out) / "bootstrap.jsonl"
    sets = sources.named_sets(config.eval_data, config.best_by)
    if config.answers:
        data = [str(path)]
        if not path.exists():
            rows = sample_responses(line, run, config)
            if config.loss == "nll":  # steerlm2 keeps what was asked for, and weighs the responses
                _, answers = all_answers(rows, run.template, "the samples")
                limits = (config.template, config.max_tokens, run.dtype, run.device)
                rows = annotate(config.predictor, answers, *limits)
            write_rows(path, rows)
    if config.loss == "nll":
        train = attributes.condition_rows(data, line, 0.0, config.seed)
        heldout = {
            name: attributes.condition_rows(files, line, 0.0, config.seed)
            for name, files in sets.items()
        }
    else:
        train = weigh(data, line, run, config)
        heldout = {name: weigh(files, line, run, config) for name, files in sets.items()}
    return attributes.write_files(config.out, line, train, heldout)


def item_losses(model: GPT, hidden: torch.Tensor, batch: TreeBatch, config: Config) -> torch.Tensor:
    """Return unreduced losses: nll of each token, (M,), or steerlm2 of each response, (R,)."""
    logps = model.logps(hidden, batch)  # (M,)
    if config.loss == "nll":
        return -logps
    q_logps = batch.columns["ref_logps"]  # (R,)
    group = batch.columns["group"]  # (R,), of a prompt's responses, which are neighbours
    prompt = torch.zeros_like(group, dtype=torch.int64)
    prompt[1:] = group[1:] != group[:-1]
    prompt = prompt.cumsum(0)  # counts from 0
    pi_logps = batch.sum_by_response(logps)  # (R,)
    return losses.steerlm2(pi_logps, q_logps, batch.columns["weight"] - q_logps, prompt)


def count_items(data: Dataset, examples: np.ndarray, config: Config) -> int:
    """Return what the loss of some examples is divided by: tokens for nll, prompts for steerlm2."""
    if config.loss == "nll":
        return int(data.scored_len[data.responses_of(examples)].sum())
    return len(examples)


@torch.no_grad()
def evaluate(model: GPT, data: Dataset, config: Config) -> dict[str, float]:
    """Return the mean loss over a data set, under eval/."""
    examples = np.arange(len(data))
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    for batch, hidden in forward(model, data, examples, config):
        total += item_losses(model, hidden, batch, config).double().sum()
    return {"eval/loss": model.mesh.sum(total).item() / count_items(data, examples, config)}


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    if config.loss == "nll" and not config.answers:
        raise ValueError("--answers 0 is for --loss steerlm2: use train_sft.py --attributes")
    sources.refuse_shares(config.data, "where new rows are written from all rows")
    run = runtime.start(config)

    # ---- data ----------------------------------------------------------------------------------
    files = run.mesh.ask(lambda: prepare(run, config))  # rank 0 uses whole models, the others wait
    kind = "sft" if config.loss == "nll" else "weights"
    train = runtime.load_rows(run, files.data, kind)
    heldout = runtime.load_sets(run, kind, files.eval_data)
    lengths = train.tree_lengths(config.share_prompts)
    steps = training.plan_steps(config, len(train), train.file_start)

    # ---- model and reference -------------------------------------------------------------------
    model = runtime.load_model(run)
    print(training.describe(model, lengths, steps, config))
    print(f"attributes: {', '.join(files.names)}")
    if config.loss == "steerlm2":  # Q, the distribution of the responses: the policy at step 0
        scored = [(train, steps.visited())]
        scored += [(data, np.arange(len(data))) for data in heldout.values()]
        add_ref_logps(model, "", scored, config)
        for data, _ in scored:
            data.columns["group"] = np.repeat(np.arange(len(data)), np.diff(data.response_start))
    optimizer = runtime.make_optimizer(model, config)
    loop = training.begin(run, steps, optimizer)

    # ---- the loop ------------------------------------------------------------------------------
    for step in training.remaining(loop):
        examples = steps.examples(step)
        batches = make_batches(train, examples, config, run.mesh)
        # Counted over the whole step: the loss does not depend on how it is cut into micro-batches.
        n_items = count_items(train, examples, config)

        totals: dict[str, torch.Tensor] = {}
        for batch, hidden in pipeline(model, batches, optimizer):
            per_item = item_losses(model, hidden, batch, config)
            (per_item.sum() / n_items).backward()
            add(totals, {"loss": per_item})
        lr = training.learning_rate(config, step, steps.total)
        norm, stopping = optimizer.step(lr, config.clip, run.stop)

        training.check_update(loop, norm)
        row = {**means(totals, n_items, run.mesh), "grad_norm": norm, "lr": lr}
        training.report_step(loop, row, int(lengths[examples].sum()), batches)
        if heldout and training.evaluation_due(loop):
            results = {name: evaluate(model, data, config) for name, data in heldout.items()}
            result = training.report_evaluation(loop, results)
            training.print_samples(loop, model, heldout)
            if training.is_best(loop, result["eval/loss"]):
                attributes.save(runtime.save_model(run, model, "best"), files, run.mesh)
        if training.save_or_stop(loop, stopping):
            return
    attributes.save(training.finish(loop, model), files, run.mesh)


if __name__ == "__main__":
    runtime.run(main)
