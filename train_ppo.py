"""PPO with a critic, arXiv 1707.06347, for language models as in 1909.08593 and 2203.02155 (InstructGPT).

    python train_ppo.py --model sft/final --data prompts.jsonl --reward rm/final --out ppo --kl 0.05 --lr 1e-6
    python train_ppo.py --model sft/final --data prompts.jsonl --reward my.py:f --critic rm/final --kl-target 6
    torchrun --nproc_per_node 8 train_ppo.py --model sft/final --data prompts.jsonl --reward rm/final --group-size 4

Rows: {prompt}, text or messages, with whatever the reward wants to see. A step samples answers, scores them, and asks a
critic what was to be expected before each of their tokens: a token is pushed up or down by how much better it went from
there (GAE). Every token pays for straying from the reference, a frozen copy of --model or --ref. The critic starts as
--critic, as the reward model, or as the policy with a head that says 0; it is kept in OUT/critic.

Watch reward rise while kl stays low, and value/explained_variance grow towards 1; reward up and answers odd means it
has found a hole in the reward: read OUT/samples.jsonl. clip_fraction above 0.3: --lr is too high.

Letters: n prompts of a step, G samples each, R = n G responses, M sampled tokens.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
import losses
import reporting
import runtime
from config import RolloutConfig, parse
from data.dataset import Dataset, load_prompts
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import TreeBatch, make_batch, micro_batches, step_examples, steps_per_epoch
from model import GPT
from optimizer import AdamW
from parallel import Mesh, init_mesh
from pipeline import pipeline
from sampling import rollout
from sampling.rewards import load_reward, same_tokens
from sampling.rollout import Rollout
from sampling.server import Server
from weights.folder import load_model, save_model


@dataclass
class Config(RolloutConfig):
    group_size: int = (
        1  # samples a prompt: the critic is the baseline; more share the prompt's computation
    )
    gamma: float = 1.0  # discount of rewards to come; 1 unless answers are very long
    lam: float = (
        0.95  # λ of GAE: 1 = what really followed, 0 = what the critic expected one token later
    )
    clip_ratio: float = 0.2  # how far the ratio may leave 1 before a token's gradient ends
    clip_value: float = (
        0.2  # how far a value may leave the old one in a step, in units of the reward; 0 = no limit
    )
    entropy_weight: float = 0.0  # of the policy's entropy, a bonus; 0 to 0.01
    kl: float = 0.05  # β, what a nat away from the reference costs, in units of the reward; 0 = no reference
    kl_estimator: Literal[losses.KL_ESTIMATORS] = (
        "k1"  # of a token's nats: k1 is unbiased, abs NeMo-Aligner's
    )
    kl_target: float = (
        0.0  # nats a response: β rises while kl is above, falls while it is below; 0 = β is fixed
    )
    kl_gain: float = (
        0.1  # of that: β changes by this times the relative error, which counts as 0.2 at most
    )
    ppo_epochs: int = 4  # passes over each rollout; 1 to 4
    minibatches: int = 1  # updates a pass; --batch-size prompts are cut into so many
    critic: str = ""  # folder the critic starts from; default: the reward model's, else --model with a new head
    critic_lr: float = 1e-5  # its peak learning rate; about 10 times --lr
    critic_warmup: int = 0  # steps at the start in which only the critic learns; new heads need 4 to 20 (docs/ppo.md)
    ref: str = ""  # another Hugging Face folder as reference; default: --model as it was at step 0
    lr: float = 1e-6  # peak learning rate; 1e-6 for 7B models


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def updates(
    found: Rollout, step: int, config: Config, mesh: Mesh
) -> list[tuple[np.ndarray, list[list[int]]]]:
    """(prompts, this rank's micro-batches of them) of each update of a rollout; a group is never taken apart."""
    n, lengths = len(found.data), found.data.tree_lengths(config.share_prompts)
    parts = []
    for epoch in range(config.ppo_epochs):
        order = np.random.default_rng([config.seed, step, epoch]).permutation(n)
        parts += [np.sort(part) for part in np.array_split(order, config.minibatches) if len(part)]
    return [
        (part, micro_batches(lengths, part, config.max_tokens, mesh.dp_rank, mesh.dp))
        for part in parts
    ]


@torch.no_grad()
def token_values(critic: GPT, data: Dataset, bins: list[list[int]], config: Config) -> torch.Tensor:
    """The critic's value of the state that each sampled token was chosen in, (M,) fp64; collective."""
    found = torch.zeros(int(data.scored.sum()), dtype=torch.float64)
    batches = (make_batch(data, items, config.share_prompts) for items in bins)
    for batch, hidden in pipeline(critic, batches):
        found[batch.token_columns["place"].cpu()] = values_of(critic, hidden, batch).double().cpu()
    return critic.mesh.sum(found)


def values_of(critic: GPT, hidden: torch.Tensor, batch: TreeBatch) -> torch.Tensor:
    """Read where the policy predicts: at the token before each sampled one, (M,)."""
    return critic.score(hidden, batch, batch.logit_index)[:, 0]


def judge(
    found: Rollout,
    plan: list,
    model: GPT,
    critic: GPT,
    ref: GPT | None,
    beta: float,
    config: Config,
) -> dict[str, float]:
    """Puts advantage, return, old value and old log-prob of every token beside the samples; returns metrics of them.

    The policy's log-probs are computed again where the ratio needs them: a sampler's arithmetic is not training's.
    """
    first_pass = [items for _, bins in plan[: len(plan) // config.ppo_epochs] for items in bins]
    old_logps = rollout.token_logps(model, found.data, first_pass, config)  # (M,)
    found.data.add_tokens("old_logps", old_logps)
    row = {"sampler_gap": float(np.abs(found.logps - old_logps).mean())}
    logps, kl = torch.from_numpy(old_logps), torch.zeros(len(old_logps), dtype=torch.float64)
    if ref is not None:
        ref_logps = torch.from_numpy(rollout.token_logps(ref, found.data, first_pass, config))
        kl = losses.kl_estimate(logps, ref_logps, config.kl_estimator)
        for name, kind in (("kl", "k1"), ("kl_k3", "k3")):  # nats a response
            row[name] = losses.kl_estimate(logps, ref_logps, kind).sum().item() / len(found.samples)
    values = token_values(critic, found.data, first_pass, config)
    rewards, lengths = torch.from_numpy(found.rewards), torch.from_numpy(found.lengths)
    rewards = losses.token_rewards(rewards, kl, lengths, beta)
    advantages, returns = losses.gae(rewards, values, lengths, config.gamma, config.lam)
    # Every rank holds the whole step, so this whitens over all ranks.
    advantages = losses.whiten(advantages, losses.moments(advantages))
    for name, column in (("advantage", advantages), ("return", returns), ("old_value", values)):
        found.data.add_tokens(name, column.numpy())
    unexplained = (returns - values).var(correction=0) / returns.var(correction=0).clamp(min=1e-12)
    return {
        **row,
        "value/mean": values.mean().item(),
        "value/explained_variance": 1 - unexplained.item(),
    }


def policy_losses(
    model: GPT, hidden: torch.Tensor, batch: TreeBatch, config: Config
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The clipped surrogate of each sampled token less the bonus for entropy, (M,), and metrics (M,)."""
    logps, entropy = model.logps(hidden, batch, config.temperature, entropy=True)  # (M,)
    ratio = (logps - batch.token_columns["old_logps"]).exp()
    clip = config.clip_ratio
    per_token, held = losses.clipped_surrogate(ratio, batch.token_columns["advantage"], clip, clip)
    return per_token - config.entropy_weight * entropy, {
        "ratio": ratio,
        "clip_fraction": held,
        "entropy": entropy,
    }


def value_losses(
    critic: GPT, hidden: torch.Tensor, batch: TreeBatch, config: Config
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Half the square of what each value is off by, clipped beside the policy's ratio, (M,), and metrics (M,)."""
    known, clip = batch.token_columns, config.clip_value or float("inf")
    per_token, held = losses.clipped_value(
        values_of(critic, hidden, batch), known["old_value"], known["return"], clip
    )
    return per_token, {"value/loss": per_token, "value/clip_fraction": held}


def adapted(beta: float, kl: float, config: Config) -> float:
    """β for the next step by the nats a response of this one: Ziegler et al., arXiv 1909.08593 Sec. 2.2."""
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
    return beta * (1 + config.kl_gain * error)


def refuse(config: Config) -> None:
    """ValueError for settings that cannot be, or that would silently do nothing."""
    if config.kl_target and not config.kl:
        raise ValueError("--kl-target moves β, which --kl 0 leaves at 0: give the β to start from")
    if config.rollout_url and not config.rollout_reload:
        raise ValueError(
            "--rollout-url without --rollout-reload would sample from the first weights for ever"
        )
    if config.ppo_epochs < 1 or config.minibatches < 1 or config.temperature <= 0:
        raise ValueError("--ppo-epochs and --minibatches must be at least 1, --temperature above 0")


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    refuse(config)
    mesh = init_mesh(config.tp, config.cp, config.pp, config.device, config.timeout_minutes)
    device, dtype = runtime.set_up(config, mesh)
    stop = runtime.Stop(config.max_minutes)
    start = checkpoint.find(config.out, config.resume, mesh=mesh)

    # ---- data --------------------------------------------------------------------------------------------------------
    tokenizer = load_tokenizer(config.model)
    template = Template(config.template, tokenizer)
    train, heldout = (
        load_prompts(
            files,
            template,
            config.max_length - config.max_new_tokens,
            config.overlong,
            config.max_bad_rows,
        )
        if files
        else None
        for files in (config.data, config.eval_data)
    )
    rollout.check(train, config)
    reward = load_reward(
        config.reward, template, config.template, dtype, device, config.max_tokens, mesh
    )

    # ---- model and critic and reference ------------------------------------------------------------------------------
    model = load_model(config.model, dtype, device, mesh=mesh)
    runtime.prepare_model(model, config, tokenizer)
    per_epoch = steps_per_epoch(len(train.ids), config.batch_size)
    total = runtime.total_steps(config, per_epoch)
    longest = np.array([len(ids) + config.group_size * config.max_new_tokens for ids in train.ids])
    print(runtime.describe(config, model, longest, total))
    judged_by = config.critic or (config.reward if Path(config.reward).is_dir() else config.model)
    if not same_tokens(tokenizer, load_tokenizer(judged_by)):
        raise ValueError(
            f"--critic {judged_by} has another tokenizer than the policy: take a model of its family"
        )
    critic = load_model(judged_by, dtype, device, ("value",), mesh)
    runtime.prepare_model(critic, config, tokenizer)
    print(f"the critic starts from {judged_by}")
    ref = None
    if (
        config.kl or config.ref
    ):  # the folder itself: a resumed run must not take the half-trained policy
        ref = load_model(config.ref or config.model, dtype, device, mesh=mesh).requires_grad_(False)
        runtime.prepare_model(ref, config, tokenizer)
    server = Server(template, config) if config.rollout_url else None
    settings = (config.beta1, config.beta2), config.eps, config.weight_decay, config.zero
    optimizer, critic_optimizer = AdamW(model, *settings), AdamW(critic, *settings)
    state = checkpoint.State()
    if start:
        state = checkpoint.load(start, (optimizer, critic_optimizer))
        print(f"resumed from {start} after step {state.step}")
    if mesh.main:
        rollout.forget_samples(config.out, state.step)

    # ---- the loop ----------------------------------------------------------------------------------------------------
    log = reporting.Log(config, state.step, total, mesh)
    meter, nonfinite = reporting.Meter(model.c, device, mesh), runtime.NonFinite()
    if heldout and not state.step:
        sample = rollout.sampler(model, template, config, server)
        result, _ = rollout.evaluate(heldout, sample, reward, template, config, mesh)
        log.row({"step": 0, **result})
    for step in range(state.step, total):
        meter.start()
        examples = step_examples(
            len(train.ids), config.batch_size, step, config.seed, config.shuffle
        )
        own = rollout.seeds(config.seed, step + 1, len(examples), config.group_size)
        sample = rollout.sampler(model, template, config, server)
        found = rollout.collect(
            train.take(examples), sample, reward, template, config, mesh, own, config.temperature
        )
        began, beta = time.perf_counter(), state.extra.get("beta", config.kl)
        plan, lengths = (
            updates(found, step, config, mesh),
            found.data.tree_lengths(config.share_prompts),
        )
        judged = judge(found, plan, model, critic, ref, beta, config)
        row = {"step": step + 1, **found.metrics(), "beta": beta, **judged}
        found.seconds["scoring"] += time.perf_counter() - began
        began = time.perf_counter()

        lr = runtime.learning_rate(config, step, total)
        critic_lr = runtime.learning_rate(replace(config, lr=config.critic_lr), step, total)
        totals: dict[str, torch.Tensor] = {}
        norms = []
        for part, bins in plan:
            # Counted over the whole update, so that the loss does not depend on how it is cut into micro-batches.
            n_tokens = int(found.lengths.reshape(len(examples), -1)[part].sum())
            batches = [make_batch(found.data, items, config.share_prompts) for items in bins]
            norm = 0.0
            if step >= config.critic_warmup:
                for batch, hidden in pipeline(model, batches, optimizer):
                    per_token, metrics = policy_losses(model, hidden, batch, config)
                    (per_token.sum() / n_tokens).backward()
                    reporting.add(totals, {"loss": per_token, **metrics})
                norm, _ = optimizer.step(lr, config.clip)
            for batch, hidden in pipeline(critic, batches, critic_optimizer):
                per_token, metrics = value_losses(critic, hidden, batch, config)
                (per_token.sum() / n_tokens).backward()
                reporting.add(totals, metrics)
            critic_norm, stopping = critic_optimizer.step(critic_lr, config.clip, stop)
            norms.append((norm, critic_norm))
            if nonfinite.check(norm + critic_norm, step + 1):
                state.skipped += 1
                log.say(
                    f"step {step + 1}: the gradient is not finite, no update ({state.skipped} so far)"
                )

        state.step = step + 1
        row |= reporting.means(totals, int(found.lengths.sum()) * config.ppo_epochs, mesh)
        row |= {**dict(zip(("grad_norm", "value/grad_norm"), np.mean(norms, 0).tolist())), "lr": lr}
        if config.kl_target and step >= config.critic_warmup:
            state.extra["beta"] = adapted(beta, row["kl"], config)
        found.seconds["training"] = time.perf_counter() - began
        tokens = int(lengths.sum()) * config.ppo_epochs
        for name, seconds in found.seconds.items():
            done = {
                "rollout": int(found.lengths.sum()),
                "scoring": int(lengths.sum()),
                "training": tokens,
            }[name]
            row |= {f"{name}_seconds": seconds, f"{name}_tokens_per_second": done / seconds}
        row |= {"epoch": state.step / per_epoch, **meter.read(tokens, batches)}
        state.tokens += tokens
        if reporting.due(config.log_every, state.step) or state.step == total:
            log.row(row)
        if mesh.main and (
            reporting.due(config.log_samples, state.step) or config.log_samples and state.step == 1
        ):
            rollout.log_samples(config.out, state.step, found)
        log.progress({"loss": row["value/loss"], **row})  # the critic's where only it learns

        if heldout and (reporting.due(config.eval_every, state.step) or state.step == total):
            sample = rollout.sampler(model, template, config, server)
            result, answers = rollout.evaluate(heldout, sample, reward, template, config, mesh)
            log.row({"step": state.step, **result})
            log.say(
                f"step {state.step}: "
                + ", ".join(f"{name} {value:.4f}" for name, value in result.items())
            )
            for i in range(min(config.samples, len(answers.texts))):
                log.say(
                    f"  prompt  {str(heldout.prompts[i])[-300:]!r}\n  answer  {answers.texts[i]!r}"
                )
            if state.best is None or -result["eval/reward"] < state.best:
                state.best, state.best_step = -result["eval/reward"], state.step
                save_model(model, Path(config.out) / "best", config.model, template)
        stopping = stopping and state.step < total
        if reporting.due(config.save_every, state.step) or stopping:
            checkpoint.save(config.out, state, (optimizer, critic_optimizer), config.keep)
        if stopping:
            why = stop.reason or "another rank"
            log.say(
                f"stopped by {why} after step {state.step} of {total}; --resume auto goes on from here"
            )
            log.close()
            return
    log.close()
    save_model(critic, Path(config.out) / "critic", config.model, template)
    save_model(model, Path(config.out) / "final", config.model, template)
    print(f"{total} steps done, {state.tokens:,} tokens; the model is in {config.out}/final")


if __name__ == "__main__":
    runtime.run(main)
