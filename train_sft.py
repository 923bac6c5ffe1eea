"""Supervised fine-tuning: learn to write the responses of a data set, token by token.

    python train_sft.py --model base --data demos.jsonl --out sft --lr 2e-5
    torchrun --nproc_per_node 8 train_sft.py --model base --data demos.jsonl --eval-data test.jsonl
    python train_sft.py --model base --data annotated.jsonl --attributes --out steerlm

Rows: {prompt, response}, or {messages} of a conversation, of which every assistant turn is learned.
The loss is the mean negative log-likelihood of the response tokens of the whole optimizer step;
prompts carry no loss.

With --attributes, the SFT of SteerLM, arXiv 2310.05344: rows {prompt, response, attributes:
{helpfulness: 4, ...}} as score.py --attributes writes them, or HelpSteer's columns. Each prompt
gets the attributes of its response as a line; generate.py --attributes then asks for others.

Watch eval/loss: if it rises while loss keeps falling, the run overfits: fewer --epochs, lower --lr.
"""

from dataclasses import dataclass

import numpy as np
import torch

import runtime
import training
from commandline import parse
from config import Amount, RunConfig, Share
from data import attributes
from data.dataset import Dataset
from model import GPT
from passes import forward, make_batches
from pipeline import pipeline
from reporting import add, means


@dataclass
class Config(RunConfig):
    lr: Amount = 2e-5  # peak learning rate; 1e-5 to 2e-5 for 7B models, from 1e-3 for tiny new ones
    attributes: bool = False  # SteerLM: put the attributes of each row into its prompt
    attribute_template: str = ""  # their place; default "{prompt}<extra_id_2>{attributes}\n"
    attribute_dropout: Share = 0.0  # share of values to leave out, so that subsets can be asked for


# ---- the algorithm -----------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model: GPT, data: Dataset, config: Config) -> dict[str, float]:
    """Return the metrics of a whole data set, under eval/."""
    totals: dict[str, torch.Tensor] = {}
    for batch, hidden in forward(model, data, np.arange(len(data)), config):
        add(totals, {"loss": -model.logps(hidden, batch)})
    row = means(totals, int(data.scored_len.sum()), model.mesh)
    return {f"eval/{name}": value for name, value in row.items()}


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    run = runtime.start(config)

    # ---- data ----------------------------------------------------------------------------------
    files = attributes.condition_files(config, run.mesh)  # as given, unless --attributes
    train = runtime.load_rows(run, files.data, "sft")
    heldout = runtime.load_sets(run, "sft", files.eval_data)
    lengths = train.tree_lengths(config.share_prompts)
    steps = training.plan_steps(config, len(train), train.file_start)

    # ---- model ---------------------------------------------------------------------------------
    model = runtime.load_model(run)
    print(training.describe(model, lengths, steps, config))
    optimizer = runtime.make_optimizer(model, config)
    loop = training.begin(run, steps, optimizer)

    # ---- the loop ------------------------------------------------------------------------------
    for step in training.remaining(loop):
        examples = steps.examples(step)
        batches = make_batches(train, examples, config, run.mesh)
        # Counted over the whole step: the loss does not depend on how it is cut into micro-batches.
        n_scored = int(train.scored_len[train.responses_of(examples)].sum())

        totals: dict[str, torch.Tensor] = {}
        for batch, hidden in pipeline(model, batches, optimizer):
            nll = -model.logps(hidden, batch)  # (M,) of scored tokens
            (nll.sum() / n_scored).backward()
            add(totals, {"loss": nll})
        lr = training.learning_rate(config, step, steps.total)
        norm, stopping = optimizer.step(lr, config.clip, run.stop)

        training.check_update(loop, norm)
        row = {**means(totals, n_scored, run.mesh), "grad_norm": norm, "lr": lr}
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
