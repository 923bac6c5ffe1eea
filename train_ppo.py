"""PPO with a critic, arXiv 1707.06347, as InstructGPT (2203.02155) uses it for language models.

    python train_ppo.py --model sft/final --data prompts.jsonl --reward rm/final --out ppo
    python train_ppo.py --model sft/final --data prompts.jsonl --reward my.py:f --kl-target 6
    torchrun --nproc_per_node 8 train_ppo.py --model sft/final --data x.jsonl --reward rm/final

Rows: {prompt}, text or messages, with whatever else the reward reads. A step samples responses and
scores them. A critic predicts the return before each token; generalised advantage estimation (GAE)
compares what followed with that prediction, and the loss makes tokens that did better more likely.
Every token pays for its distance from the reference, a frozen copy of --model or --ref. The critic
starts from --critic, from the reward model, or from the policy with a new head that outputs 0. It
is kept in OUT/critic.

Watch reward rise while kl stays low, and value/explained_variance grow towards 1. If reward rises
and the responses get odd, the policy exploits a flaw of the reward: read OUT/samples.jsonl. If
clip_fraction is above 0.3, --lr is too high.

Letters: n prompts of a step, G samples each, R = n G responses, M scored tokens.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

import losses
import runtime
import training
from commandline import Range, parse
from config import Amount, Count, Number, RolloutConfig, Share
from data.dataset import Dataset
from data.tokenizer import load_tokenizer
from data.trees import TreeBatch, make_batch
from model import GPT
from pipeline import pipeline
from reporting import add, means
from sampling import rollout, updates
from sampling.engine import connect
from sampling.gap import ServerCheck
from sampling.rewards import load_reward, same_tokens
from sampling.rollout import Rollout


@dataclass
class Config(RolloutConfig):
    group_size: Number = 1  # samples per prompt; the critic is the baseline, so 1 will do
    gamma: Share = 1.0  # discount of future rewards; 1 unless responses are very long
    lam: Share = 0.95  # λ of GAE: 1 = the rewards that followed, 0 = the critic one token later
    clip_ratio: Annotated[float, Range(0, 1, above=True)] = 0.2  # how far the ratio may move from 1
    # before the gradient stops
    clip_value: Amount = 0.2  # how far a value may move in a step, in reward units; 0 = no limit
    entropy_weight: Amount = 0.0  # weight of an entropy bonus; 0 to 0.01
    kl: Amount = 0.05  # β: cost of a nat away from the reference, in reward units; 0 = no reference
    kl_estimator: Literal[losses.KL_ESTIMATORS] = "k1"  # k1 is unbiased; abs is NeMo-Aligner's
    kl_target: Amount = 0.0  # nats per response that β is adapted to; 0 = β is fixed
    kl_gain: Share = 0.1  # rate of that: β changes by this times the relative error, at most 0.2
    ppo_epochs: Number = 4  # passes over each rollout; 1 to 4
    minibatches: Number = 1  # updates per pass, on equal parts of its prompts
    critic: str = ""  # folder the critic starts from; default: the reward model, else --model
    critic_lr: Amount = 1e-5  # peak learning rate of the critic; about 10 times --lr
    shared_base: bool = False  # with --lora: policy, critic and reward model are adapters and
    # heads on one base; --reward and --critic then are adapters trained on --model
    mask_cut: bool = False  # no loss, of policy and critic, on samples that did not end
    critic_warmup: Count = 0  # steps that train only the critic; 4 to 20 for a new head
    ref: str = ""  # another Hugging Face folder as reference; default: --model as it was at step 0
    lr: Amount = 1e-6  # peak learning rate; 1e-6 for 7B models


# ---- the algorithm -----------------------------------------------------------------------------


def predicted_values(critic: GPT, hidden: torch.Tensor, batch: TreeBatch) -> torch.Tensor:
    """Return the critic's value of the state in which each scored token was sampled, (M,).

    It is read at the token before, where the policy predicts the sampled one.
    """
    return critic.score(hidden, batch, batch.logit_index)[:, 0]


@torch.no_grad()
def token_values(critic: GPT, data: Dataset, bins: list[list[int]], config: Config) -> torch.Tensor:
    """Return the critic's value of each scored token, (M,). bins: micro-batches. Collective."""
    n_tokens = int(data.scored_len.sum())
    values = torch.zeros(n_tokens, dtype=torch.float64, device=critic.device)
    batches = (make_batch(data, items, config.share_prompts) for items in bins)
    for batch, hidden in pipeline(critic, batches):
        batch_values = predicted_values(critic, hidden, batch)
        values[batch.token_columns["token_index"]] = batch_values.double()
    return critic.mesh.sum(values.cpu())  # each token is on one rank, 0 on the others


def add_advantages(
    samples: Rollout,
    old_logps: torch.Tensor,
    ref_logps: torch.Tensor,
    old_values: torch.Tensor,
    beta: float,
    config: Config,
) -> dict[str, float]:
    """Add advantage, return and old value of every scored token to the samples, as token columns.

    old_logps, ref_logps, old_values: (M,). beta: β of this step. Returns metrics of the critic.
    """
    lengths = torch.from_numpy(samples.scored_lengths)  # (R,)
    kl = losses.kl_estimate(old_logps, ref_logps, config.kl_estimator)  # (M,)
    rewards = losses.token_rewards(torch.from_numpy(samples.rewards), kl, lengths, beta)  # (M,)
    advantages, returns = losses.gae(rewards, old_values, lengths, config.gamma, config.lam)
    counted = advantages
    if config.mask_cut and samples.ended.any():
        counted = advantages[torch.from_numpy(np.repeat(samples.ended, samples.scored_lengths))]
    # Every rank holds the whole step, so this whitens over all ranks.
    advantages = losses.whiten(advantages, losses.moments(counted))
    samples.data.add_tokens("advantage", advantages.numpy())
    samples.data.add_tokens("return", returns.numpy())
    samples.data.add_tokens("old_value", old_values.numpy())
    errors = (returns - old_values).var(correction=0)
    variance = returns.var(correction=0).clamp(min=1e-12)
    return {
        "value/mean": old_values.mean().item(),
        "value/explained_variance": 1 - (errors / variance).item(),
    }


def policy_losses(
    model: GPT, hidden: torch.Tensor, batch: TreeBatch, config: Config
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return each token's clipped surrogate less an entropy bonus, (M,), and metrics, (M,) each."""
    logps, entropy = model.logps(hidden, batch, config.temperature, entropy=True)  # (M,)
    ratio = losses.safe_exp(logps - batch.token_columns["old_logps"])
    advantage, clip = batch.token_columns["advantage"], config.clip_ratio
    surrogate, clipped = losses.clipped_surrogate(ratio, advantage, clip, clip)
    metrics = {"ratio": ratio, "clip_fraction": clipped, "entropy": entropy}
    if "engine_weight" in batch.token_columns:
        surrogate = surrogate * batch.token_columns["engine_weight"]
    return masked(surrogate - config.entropy_weight * entropy, batch), metrics


def masked(per_token: torch.Tensor, batch: TreeBatch) -> torch.Tensor:
    """Return losses without those of samples that did not end, where --mask-cut marks them."""
    kept = batch.token_columns.get("kept")
    return per_token if kept is None else per_token * kept


def value_losses(
    critic: GPT, hidden: torch.Tensor, batch: TreeBatch, config: Config
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return each value's clipped squared error, halved, (M,), and metrics, (M,) each."""
    values = predicted_values(critic, hidden, batch)
    old_values, returns = batch.token_columns["old_value"], batch.token_columns["return"]
    clip = config.clip_value or float("inf")
    per_token, clipped = losses.clipped_value(values, old_values, returns, clip)
    per_token = masked(per_token, batch)
    return per_token, {"value/loss": per_token, "value/clip_fraction": clipped}


def adapted_beta(beta: float, kl: float, config: Config) -> float:
    """Return the next step's β, given this step's KL per response: arXiv 1909.08593 Sec. 2.2."""
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
    return beta * (1 + config.kl_gain * error)


def load_critic(run: runtime.Run, model: GPT, config: Config) -> GPT:
    """Return the critic: --critic, else the reward model, else the policy with a new head."""
    folder = config.critic or (config.reward if Path(config.reward).is_dir() else "")
    print(f"the critic starts from {folder or config.model}")
    if config.shared_base:
        return runtime.load_over(run, model, folder)
    folder = folder or config.model
    if not same_tokens(run.template.tokenizer, load_tokenizer(folder)):
        raise ValueError(
            f"--critic {folder} has another tokenizer than the policy: use a model of its family"
        )
    return runtime.load_model(run, folder, scores=("value",))


def validate(config: Config) -> None:
    """Raise ValueError for flags that contradict each other or would have no effect."""
    rollout.validate(config)
    if config.shared_base and not (config.lora or config.adapter):
        raise ValueError("--shared-base trains adapters on one frozen base: add --lora 16")
    if config.shared_base and (config.zero == 3 or config.ep > 1):  # ranks score one by one
        raise ValueError("--shared-base cannot score with sharded weights: use --zero 2, or --tp")
    if config.kl_target and not config.kl:
        raise ValueError("--kl-target adapts β, which --kl 0 keeps at 0: give an initial --kl")


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    validate(config)
    run = runtime.start(config)
    template, mesh = run.template, run.mesh

    # ---- data ----------------------------------------------------------------------------------
    train = rollout.load(config.data, template, config)
    heldout = rollout.load_sets(template, config)
    rollout.check_fits(train, config)
    steps = training.plan_steps(config, len(train.ids), train.file_start)

    # ---- model and critic and reference --------------------------------------------------------
    model = runtime.load_model(run)
    print(training.describe(model, rollout.tree_limits(train, config), steps, config))
    reward = load_reward(
        config.reward,
        template,
        config.template,
        run.dtype,
        run.device,
        config.max_tokens,
        mesh,
        over=partial(runtime.load_over, run, model) if config.shared_base else None,
        read=config.reward_read,
    )
    critic = load_critic(run, model, config)
    ref = None
    if config.kl or config.ref:  # the folder: a resumed run must not use its half-trained policy
        ref = runtime.load_reference(run, model, config.ref)
    server = connect(template, config, train, steps)
    check_server = ServerCheck(config, run.dtype)
    optimizer = runtime.make_optimizer(model, config)
    critic_optimizer = runtime.make_optimizer(critic, config)
    loop = training.begin(run, steps, (optimizer, critic_optimizer))
    rollout.drop_samples_after(loop.state.step, config, mesh)
    if heldout and not loop.state.step:
        results, _ = rollout.evaluate(heldout, model, reward, template, config, server)
        result = training.report_evaluation(loop, results)
        if training.is_best(loop, -result["eval/reward"]):
            runtime.save_model(run, model, "best")

    # ---- the loop ------------------------------------------------------------------------------
    for step in training.remaining(loop):
        prompts = train.take(steps.examples(step))
        samples = rollout.draw(prompts, step + 1, model, reward, template, config, server)
        if config.mask_cut:
            kept = np.repeat(samples.ended, samples.scored_lengths)
            samples.data.add_tokens("kept", kept.astype(float))
        plan = updates.plan(samples, config.ppo_epochs, config.minibatches, step, config, mesh)
        beta = loop.state.extra.get("beta", config.kl)
        old_logps, ref_logps, row = updates.add_logps(samples, plan, model, ref, config)
        check_server(row.get("sampler_gap"), samples, ref_logps if ref else None)
        values = token_values(critic, samples.data, updates.first_epoch(plan), config)
        row |= add_advantages(samples, old_logps, ref_logps, values, beta, config)
        samples.lap("scoring")

        lr = training.learning_rate(config, step, steps.total)
        critic_lr = training.learning_rate(config, step, steps.total, config.critic_lr)
        totals: dict[str, torch.Tensor] = {}
        norms, critic_norms = [], []
        for update in plan:
            # Counted over the whole update: the loss does not depend on its micro-batches.
            n_tokens = int(update.lengths.sum())
            if config.mask_cut:
                ended = samples.ended[samples.data.responses_of(update.prompts)]
                n_tokens = max(1, int(update.lengths[ended].sum()))
            batches = [
                make_batch(samples.data, items, config.share_prompts) for items in update.bins
            ]
            norm = 0.0
            if step >= config.critic_warmup:
                for batch, hidden in pipeline(model, batches, optimizer):
                    per_token, metrics = policy_losses(model, hidden, batch, config)
                    (per_token.sum() / n_tokens).backward()
                    add(totals, {"loss": per_token, **metrics})
                norm, _ = optimizer.step(lr, config.clip)
            for batch, hidden in pipeline(critic, batches, critic_optimizer):
                per_token, metrics = value_losses(critic, hidden, batch, config)
                (per_token.sum() / n_tokens).backward()
                add(totals, metrics)
            critic_norm, stopping = critic_optimizer.step(critic_lr, config.clip, run.stop)
            training.check_update(loop, norm + critic_norm)
            norms.append(norm)
            critic_norms.append(critic_norm)
        samples.lap("training")

        tokens = samples.tokens(config) * config.ppo_epochs
        n_scored = int(samples.scored_lengths.sum()) * config.ppo_epochs
        row |= {**samples.metrics(), **means(totals, n_scored, mesh), "beta": beta, "lr": lr}
        row |= {"grad_norm": sum(norms) / len(norms), **samples.throughput(tokens, config)}
        row["value/grad_norm"] = sum(critic_norms) / len(critic_norms)
        if config.kl_target and step >= config.critic_warmup:
            loop.state.extra["beta"] = adapted_beta(beta, row["kl"], config)
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
    runtime.save_model(run, critic, "critic")
    training.finish(loop, model)


if __name__ == "__main__":
    runtime.run(main)
