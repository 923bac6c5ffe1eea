"""Nash-MD: learn to be preferred to a mixture of itself and the reference; arXiv 2312.00886.

    python train_nash.py --model sft/final --data prompts.jsonl --reward judge:chat-model --out nash
    torchrun --nproc_per_node 8 train_nash.py --model sft/final --data x.jsonl --reward rm/final

Rows: {prompt}, text or messages, with whatever else the reward reads. A step draws two samples of
each prompt: y from the policy, y' token by token from the geometric mixture π^(1-a) ref^a with
a = --mixture. What is learned is P(y ≻ y'), the chance that y is preferred. A judge that compares
gives it (docs/judge.md); from a reward r of single answers it is σ(--reward-scale (r(y) - r(y'))).
Unlike a reward, a preference may be circular: what is reached then is an equilibrium, a policy that
no other is preferred to, less --beta times the KL to the reference.

Watch preference: 0.5 says that the policy is no better than the mixture; 0.55 to 0.7 is learning.
If kl runs away, raise --beta. Read OUT/samples.jsonl.

Letters: n prompts of a step, B of a micro-batch.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch

import losses
import runtime
import training
from commandline import Range, parse
from config import Above0, Amount, Count, Number, RolloutConfig
from data.dataset import Dataset, from_trees
from data.trees import TreeBatch
from model import GPT
from passes import make_batches
from pipeline import pipeline
from reference import first_reference, renew_reference
from reporting import add, means
from sampling import ahead, rollout, source
from sampling.rewards import compares, load_reward
from sampling.rollout import Rollout


@dataclass
class Config(RolloutConfig):
    group_size: Number = 2  # samples a prompt: one of the policy, one of the mixture
    mixture: Annotated[float, Range(0, 1)] = 0.25  # share of the reference in the mixture; 0 is
    # play against oneself, 1 against the reference; 0.1 to 0.5
    beta: Amount = 0.1  # weight of the KL to the reference; smaller strays further
    reward_scale: Above0 = 1.0  # of rewards of single answers: how surely a larger one is preferred
    ref_every: Count = 0  # steps after which the policy becomes the reference; 0: never
    ref: str = ""  # another Hugging Face folder as first reference; default: --model as it was at
    # step 0


# ---- the algorithm -----------------------------------------------------------------------------


def preferences(samples: Rollout, compared: bool, scale: float) -> np.ndarray:
    """Return P(y ≻ y') of each prompt, (n,). compared: the rewards are such chances already."""
    own, other = samples.rewards.reshape(-1, 2).T
    return own if compared else 1 / (1 + np.exp(-scale * (own - other)))


def own_samples(samples: Rollout, preference: np.ndarray) -> Dataset:
    """Return the policy's samples, n trees of one response, with a column preference (n,)."""
    own = samples.samples[::2]
    answers = [[(sample.tokens, rollout.scored_marks(sample))] for sample in own]
    return from_trees(zip(samples.prompts.ids, answers), {"preference": preference})


def sums(model: GPT, hidden: torch.Tensor, batch: TreeBatch, temperature: float) -> torch.Tensor:
    """Return the summed log-probs of the responses of a micro-batch, (B,)."""
    return batch.sum_by_response(model.logps(hidden, batch, temperature))


def validate(config: Config) -> None:
    """Raise ValueError for flags that contradict each other or would have no effect."""
    rollout.validate(config)
    rollout.refuse_correction(config, "its loss has no ratio to the sampler")
    if config.group_size != 2:
        raise ValueError("--group-size must be 2: one sample of the policy, one of the mixture")
    if not config.reward:
        raise ValueError("--reward is missing: it judges the samples (sampling/rewards.py)")
    if config.eval_data and compares(config.reward):
        raise ValueError(
            "--eval-data has one sample a prompt, and this judge compares two: drop it"
        )
    for flag, given in (
        (f"--pp {config.pp}", config.pp > 1),
        (f"--ep {config.ep}", config.ep > 1),
        ("--rollout-url", bool(config.rollout_url)),
    ):
        if given:
            raise ValueError(
                f"{flag} is not supported: every token is drawn from two models of one process"
            )


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    validate(config)
    run = runtime.start(config)
    template, mesh = run.template, run.mesh

    # ---- data ----------------------------------------------------------------------------------
    train = rollout.load(config.data, template, config)
    heldout = rollout.load_sets(template, config)
    rollout.check_fits(train, config)
    reward = load_reward(
        config.reward,
        template,
        config.template,
        run.dtype,
        run.device,
        config.max_tokens,
        mesh,
        read=config.reward_read,
    )
    compared = compares(config.reward)
    steps = training.plan_steps(config, len(train.ids), train.file_start)

    # ---- model and reference -------------------------------------------------------------------
    model = runtime.load_model(run)
    print(training.describe(model, rollout.tree_limits(train, config), steps, config))
    optimizer = runtime.make_optimizer(model, config)
    loop = training.begin(run, steps, optimizer)
    ref = first_reference(run, model, config.ref, config.ref_every, loop.state.step)
    rollout.drop_samples_after(loop.state.step, config, mesh)
    if heldout and not loop.state.step:
        results, _ = rollout.evaluate(heldout, model, reward, template, config, None)
        result = training.report_evaluation(loop, results)
        if training.is_best(loop, -result["eval/reward"]):
            runtime.save_model(run, model, "best")

    # ---- the loop ------------------------------------------------------------------------------
    for step in training.remaining(loop):
        prompts = train.take(steps.examples(step))
        policy = source.make_sampler(model, template, config)
        mixture = source.local_sampler(model, template, config, (ref, config.mixture))
        sample = source.with_reference(policy, mixture, 1)
        seeds = ahead.seeds(config.seed, step + 1, len(prompts.ids), 2)
        samples = rollout.collect(
            prompts, sample, reward, template, config, mesh, seeds, config.temperature
        )
        preference = preferences(samples, compared, config.reward_scale)
        data = own_samples(samples, preference)
        batches = make_batches(data, np.arange(len(data)), config, mesh)
        with torch.no_grad():
            ref_sums = [
                sums(ref, hidden, batch, config.temperature)
                for batch, hidden in pipeline(ref, batches)
            ]
        samples.lap("scoring")

        totals: dict[str, torch.Tensor] = {}
        for i, (batch, hidden) in enumerate(pipeline(model, batches, optimizer)):
            logps = sums(model, hidden, batch, config.temperature)
            chances = batch.columns["preference"]
            per_sample = losses.nash_md(logps, ref_sums[i], chances, config.beta)
            (per_sample.sum() / len(data)).backward()
            kl = (logps - ref_sums[i]).detach()
            add(totals, {"loss": per_sample, "preference": chances, "kl": kl})
        lr = training.learning_rate(config, step, steps.total)
        norm, stopping = optimizer.step(lr, config.clip, run.stop)
        training.check_update(loop, norm)
        samples.lap("training")

        tokens = int(data.tree_lengths(config.share_prompts).sum())
        row = {**means(totals, len(data), mesh), "grad_norm": norm, "lr": lr, **samples.metrics()}
        row["reward"] = samples.rewards[::2].mean().item()  # of the policy's samples alone
        row |= samples.throughput(tokens, config)
        training.report_step(loop, row, tokens, batches)
        rollout.log_samples(samples, step + 1, config, mesh)
        if config.ref_every and loop.state.step % config.ref_every == 0:
            ref = renew_reference(run, model, config.ref_every, loop.state.step)
        if heldout and training.evaluation_due(loop):
            results, texts = rollout.evaluate(heldout, model, reward, template, config, None)
            result = training.report_evaluation(loop, results)
            rollout.print_samples(texts, config.samples, loop.log.say)
            if training.is_best(loop, -result["eval/reward"]):
                runtime.save_model(run, model, "best")
        if training.save_or_stop(loop, stopping):
            return
    training.finish(loop, model)


if __name__ == "__main__":
    runtime.run(main)
