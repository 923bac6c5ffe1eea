"""REINFORCE without a critic: RLOO, GRPO, Dr. GRPO, REINFORCE++; arXiv 2402.14740, 2402.03300.

    python train_reinforce.py --model sft/final --data prompts.jsonl --reward rm/final --out rloo
    python train_reinforce.py --model sft/final --data gsm8k.jsonl --reward "exact:####" --loss dapo
    torchrun --nproc_per_node 8 train_reinforce.py --model sft/final --data x.jsonl --reward my.py:f

Rows: {prompt}, text or messages, with whatever else the reward reads. A step samples G responses to
each prompt and scores them. A response's advantage compares its reward with those of the other
responses to its prompt; the loss makes its tokens more or less likely accordingly. The responses
share their prompt, which is computed once. The reference is a frozen copy of --model, or --ref.

Watch reward rise while kl stays low. If reward rises and the responses get odd, the policy exploits
a flaw of the reward: read OUT/samples.jsonl. If completions/ended falls, or frac_reward_zero_std is
near 1, nothing is learned.

Letters: n prompts of a step, G samples each, R = n G responses, M scored tokens.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
import torch

import losses
import runtime
import training
from commandline import Range, parse
from config import Amount, Count, Number, Real, RolloutConfig, Share
from data.trees import TreeBatch, make_batch
from kernels.device import upload
from pipeline import pipeline
from reporting import add, means
from sampling import refill, rollout, updates
from sampling.engine import connect
from sampling.gap import ServerCheck
from sampling.named import read_weights
from sampling.rewards import load_reward
from sampling.rollout import Rollout


@dataclass
class Config(RolloutConfig):
    advantage: Literal[losses.ADVANTAGES] = "rloo"  # baseline of the rewards; formulas: losses.py
    loss: Literal[tuple(losses.POLICY_LOSSES)] = "grpo"  # policy loss; formulas: losses.py
    clip_low: Share = 0.0  # lower clip of the ratio; 0 = grpo and dapo 0.2, gspo 3e-4,
    # gmpo 0.4 (of the log-ratio)
    clip_high: Amount = 0.0  # upper; 0 = grpo 0.2, dapo 0.28, gspo 4e-4, cispo 4, gmpo 0.4
    aggregate: Literal[losses.AGGREGATES] = "token"  # weight of a token; formulas: losses.py
    dual_clip: Annotated[float, Range(0, 100)] = 0.0  # grpo, dapo: bound of the ratio where the
    # advantage is negative; 3 is common, 0 = none
    cov_share: Annotated[float, Range(0, 1, above=True)] = 0.002  # kl_cov: share of the step's
    # tokens that pay for moving; clip_cov: share that is left out, 0.0002 in the paper
    cov_low: Real = 1.0  # clip_cov: least covariance of log-prob and advantage of those left out
    cov_high: Real = 5.0  # clip_cov: largest one
    kl: Amount = 0.05  # β: cost of a nat away from the reference, in reward units; 0 = no reference
    kl_in: Literal["auto", "reward", "loss"] = "auto"  # part of the reward, or a term of the loss;
    # auto: loss where advantages are scaled (grpo, reinforce++), else reward
    kl_estimator: Literal["auto", *losses.KL_ESTIMATORS] = "auto"  # auto: k1 in the reward, k3 (or
    # take k2) in the loss; what each differentiates to: losses.py
    rollout_epochs: Number = 1  # passes over each rollout; more reuse samples, and clipping matters
    minibatches: Number = 1  # updates per pass, on equal parts of its prompts
    gdpo: bool = False  # normalise each of several named rewards before they are added; with
    # --advantage dr_grpo
    refill: Count = 0  # rounds in which groups of equal rewards are replaced by samples of other
    # prompts (DAPO); 1 to 4, 10 in DAPO's recipe
    mask_cut: bool = False  # no loss on samples that did not end; their rewards stay in baselines
    ref: str = ""  # another Hugging Face folder as reference; default: --model as it was at step 0
    lr: Amount = 1e-6  # peak learning rate; 1e-6 for 7B models


# ---- the algorithm -----------------------------------------------------------------------------


def resolve_kl(config: Config) -> Config:
    """Return the config with --kl-in and --kl-estimator decided.

    A scaled advantage divides a KL in the reward by the deviation of rewards: in a group of equal
    rewards β cancels, and rounding becomes a gradient of unit size. The loss term is not scaled.
    """
    place, kind = config.kl_in, config.kl_estimator
    if place == "auto":
        place = "loss" if config.advantage in losses.SCALED_ADVANTAGES else "reward"
    if kind == "auto":
        kind = "k3" if place == "loss" else "k1"
    return replace(config, kl_in=place, kl_estimator=kind)


def normalised_rewards(samples: Rollout, config: Config) -> torch.Tensor:
    """Return the named rewards of a step, normalised one by one and added, (R,).

    ValueError: the reward has no names.
    """
    if not samples.named:
        raise ValueError("--gdpo normalises several named rewards, and this reward is one number")
    weights = read_weights(config.reward_weights) or dict.fromkeys(samples.named, 1.0)
    columns = np.stack([samples.named[name] for name in weights], 1)  # (R, k)
    factors = torch.tensor(list(weights.values()), dtype=torch.float64)
    return losses.gdpo(torch.from_numpy(columns), factors, config.group_size)


def add_advantages(
    samples: Rollout, old_logps: torch.Tensor, ref_logps: torch.Tensor, config: Config, step: int
) -> dict[str, float]:
    """Add the advantage of every scored token to the samples, as a token column; return metrics.

    old_logps, ref_logps: (M,). step: from 1, which seeds clip_cov's draw.
    """
    rewards = torch.from_numpy(samples.rewards)
    if config.gdpo:
        rewards = normalised_rewards(samples, config)
    advantages = losses.advantages(
        config.advantage,
        rewards,
        losses.kl_estimate(old_logps, ref_logps, config.kl_estimator),
        torch.from_numpy(samples.scored_lengths),
        config.group_size,
        config.kl if config.kl_in == "reward" else 0.0,
    )  # (M,)
    samples.data.add_tokens("advantage", advantages.numpy())
    if config.loss in ("kl_cov", "clip_cov"):
        marks = losses.high_covariance(old_logps, advantages, config.cov_share)
        if config.loss == "clip_cov":
            bounds, seed = (config.cov_low, config.cov_high), [config.seed, step]
            marks = losses.drawn_covariance(old_logps, advantages, config.cov_share, *bounds, seed)
        samples.data.add_tokens("marked", marks.numpy())
    # The mean of -log π over samples is an unbiased estimate of the entropy of a token.
    return {"entropy": -old_logps.numpy().mean().item()}


def policy_loss(
    logps: torch.Tensor, batch: TreeBatch, update_lengths: torch.Tensor, config: Config
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return a micro-batch's share of the update's loss, a scalar, and metrics, (M,) each.

    update_lengths: scored tokens of all responses of the update.
    """
    columns = batch.token_columns
    per_token, metrics = losses.policy_gradient(
        logps,
        columns["old_logps"],
        columns["advantage"],
        batch.response,
        batch.lengths,
        config.loss,
        config.clip_low or None,
        config.clip_high or None,
        config.dual_clip,
        columns.get("marked"),
    )  # (M,)
    if "engine_weight" in columns:
        per_token = per_token * columns["engine_weight"]
    if config.kl and config.kl_in == "loss":
        kl = losses.kl_estimate(logps, columns["ref_logps"], config.kl_estimator)
        per_token = per_token + config.kl * kl
    if config.mask_cut:
        per_token = per_token * columns["kept"]
    sizes = batch.lengths.double(), update_lengths
    weights = losses.token_weights(*sizes, config.aggregate, config.max_new_tokens)  # (R,)
    return (per_token * weights[batch.response]).sum(), metrics


def validate(config: Config) -> None:
    """Raise ValueError for flags that contradict each other or would have no effect."""
    rollout.validate(config)
    if config.advantage != "reinforce++" and config.group_size < 2:
        raise ValueError(
            f"--advantage {config.advantage} compares the responses to a prompt: "
            "use --group-size 2 or more"
        )
    if config.kl and config.kl_in == "loss" and config.kl_estimator == "k1":
        raise ValueError(
            "--kl-in loss with --kl-estimator k1 has no gradient on average: use k3 or k2"
        )
    if config.gdpo and config.advantage != "dr_grpo":
        raise ValueError(
            f"--gdpo with --advantage {config.advantage}: the rewards are normalised already: use "
            "--advantage dr_grpo"
        )
    if config.gdpo and (config.overlong_buffer or config.no_eos_penalty):
        raise ValueError(
            "--gdpo reads the named rewards alone, without --overlong-buffer and --no-eos-penalty: "
            "leave them at 0, and return the length as a reward of its own"
        )
    if config.dual_clip and (config.loss not in ("grpo", "dapo") or config.dual_clip <= 1):
        raise ValueError(
            f"--dual-clip {config.dual_clip:g} with --loss {config.loss}: it bounds the ratio of "
            "grpo and dapo and must be above 1: 3 is common, 0 turns it off"
        )
    if config.loss == "clip_cov" and config.cov_low > config.cov_high:
        raise ValueError(f"--cov-low {config.cov_low:g} is above --cov-high {config.cov_high:g}")
    if config.loss == "reinforce" and config.rollout_epochs * config.minibatches > 1:
        raise ValueError(
            "--loss reinforce has no ratio and allows one update per rollout: use --loss grpo, or "
            "one epoch and one minibatch"
        )


def main(argv: list[str] | None = None) -> None:
    config = resolve_kl(parse(Config, __doc__, argv))
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
    steps = training.plan_steps(config, len(train.ids), train.file_start)

    # ---- model and reference -------------------------------------------------------------------
    model = runtime.load_model(run)
    print(training.describe(model, rollout.tree_limits(train, config), steps, config))
    ref = None
    if config.kl or config.ref:  # the folder: a resumed run must not use its half-trained policy
        ref = runtime.load_reference(run, model, config.ref)
    server = connect(template, config, train, steps)
    check_server = ServerCheck(config, run.dtype)
    optimizer = runtime.make_optimizer(model, config)
    loop = training.begin(run, steps, optimizer)
    rollout.drop_samples_after(loop.state.step, config, mesh)
    if heldout and not loop.state.step:
        results, _ = rollout.evaluate(heldout, model, reward, template, config, server)
        result = training.report_evaluation(loop, results)
        if training.is_best(loop, -result["eval/reward"]):
            runtime.save_model(run, model, "best")

    # ---- the loop ------------------------------------------------------------------------------
    for step in training.remaining(loop):
        samples, drawn = refill.draw(
            train,
            steps.examples(step),
            config.refill,
            step + 1,
            model,
            reward,
            template,
            config,
            server,
        )
        if config.mask_cut:
            kept = np.repeat(samples.ended, samples.scored_lengths)
            samples.data.add_tokens("kept", kept.astype(float))
        plan = updates.plan(samples, config.rollout_epochs, config.minibatches, step, config, mesh)
        old_logps, ref_logps, row = updates.add_logps(samples, plan, model, ref, config)
        check_server(row.get("sampler_gap"), samples, ref_logps if ref else None)
        row |= add_advantages(samples, old_logps, ref_logps, config, step + 1)
        samples.lap("scoring")

        lr = training.learning_rate(config, step, steps.total)
        n_tokens = int(samples.scored_lengths.sum()) * config.rollout_epochs
        totals: dict[str, torch.Tensor] = {}
        norms = []
        for update in plan:
            # Counted over the whole update: the loss does not depend on its micro-batches.
            lengths = upload(update.lengths.astype(np.float64), run.device)
            if config.mask_cut:  # 0 tokens of the samples without a loss
                ended = samples.ended[samples.data.responses_of(update.prompts)]
                lengths = lengths * upload(ended, run.device)
            batches = [make_batch(samples.data, part, config.share_prompts) for part in update.bins]
            for batch, hidden in pipeline(model, batches, optimizer):
                logps = model.logps(hidden, batch, config.temperature)  # (M,)
                loss, metrics = policy_loss(logps, batch, lengths, config)
                loss.backward()
                add(totals, {"loss": loss * n_tokens / len(plan), **metrics})
            norm, stopping = optimizer.step(lr, config.clip, run.stop)
            training.check_update(loop, norm)
            norms.append(norm)
        samples.lap("training")

        tokens = samples.tokens(config) * config.rollout_epochs
        if config.refill:
            row |= drawn
        row |= {**samples.metrics(), **means(totals, n_tokens, mesh), "lr": lr}
        row |= {"grad_norm": sum(norms) / len(norms), **samples.throughput(tokens, config)}
        training.report_step(loop, row, tokens, batches)
        rollout.log_samples(samples, step + 1, config, mesh)
        if heldout and training.evaluation_due(loop):
            results, answers = rollout.evaluate(heldout, model, reward, template, config, server)
            result = training.report_evaluation(loop, results)
            rollout.print_samples(answers, config.samples, loop.log.say)
            if training.is_best(loop, -result["eval/reward"]):
                runtime.save_model(run, model, "best")
        if training.save_or_stop(loop, stopping):
            return
    training.finish(loop, model)


if __name__ == "__main__":
    runtime.run(main)
