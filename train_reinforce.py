"""REINFORCE with samples of its own and no critic: RLOO, GRPO, Dr. GRPO and REINFORCE++, arXiv 2402.14740, 2402.03300.

    python train_reinforce.py --model sft/final --data prompts.jsonl --reward rm/final --out rloo --kl 0.05 --lr 1e-6
    python train_reinforce.py --model sft/final --data gsm8k.jsonl --reward "exact:####" --advantage grpo --group-size 8
    torchrun --nproc_per_node 8 train_reinforce.py --model sft/final --data prompts.jsonl --reward my.py:f --loss dapo

Rows: {prompt}, text or messages, with whatever the reward wants to see. A step samples G answers to each prompt, scores
them, takes what its siblings got as the baseline of an answer, and pushes its tokens up or down by the difference. The
G answers hang on one prompt, which is computed once. The reference is a frozen copy of --model, or --ref.

Watch reward rise while kl stays low; reward up and answers odd means it has found a hole in the reward: read
OUT/samples.jsonl. completions/ended falling or frac_reward_zero_std near 1 means nothing is learned.

Letters: n prompts of a step, G samples each, R = n G responses, M sampled tokens.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import checkpoint
import losses
import reporting
import runtime
from config import RolloutConfig, parse
from data.dataset import load_prompts
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import TreeBatch, make_batch, micro_batches, step_examples, steps_per_epoch
from model import GPT
from optimizer import AdamW
from parallel import Mesh, init_mesh
from pipeline import pipeline
from sampling import rollout
from sampling.rewards import load_reward
from sampling.rollout import Rollout
from sampling.server import Server
from weights.folder import load_model, save_model


@dataclass
class Config(RolloutConfig):
    advantage: Literal[losses.ADVANTAGES] = (
        "rloo"  # what an answer is compared to; formulas and papers: losses.py
    )
    loss: Literal[tuple(losses.POLICY_LOSSES)] = (
        "grpo"  # what happens to the ratio once the policy has moved on
    )
    clip_low: float = (
        0.0  # how far the ratio may fall below 1; 0 = the paper's: grpo and dapo 0.2, gspo 3e-4
    )
    clip_high: float = (
        0.0  # and rise above it; 0 = the paper's: grpo 0.2, dapo 0.28, gspo 4e-4, cispo 4
    )
    aggregate: Literal[losses.AGGREGATES] = (
        "token"  # mean of all tokens (dapo); of the responses' means (grpo, gspo); sum over a constant (dr_grpo)
    )
    kl: float = 0.05  # β, what a nat away from the reference costs, in units of the reward; 0 = no reference
    kl_in: Literal["reward", "loss"] = (
        "reward"  # part of what is compared, or a term beside it (GRPO's paper)
    )
    kl_estimator: Literal[losses.KL_ESTIMATORS] = "k1"  # in the loss: k3 (GRPO) or k2
    rollout_epochs: int = (
        1  # passes over each rollout; more reuse samples, and the clip begins to matter
    )
    minibatches: int = 1  # updates a pass; --batch-size prompts are cut into so many
    ref: str = ""  # another Hugging Face folder as reference; default: --model as it was at step 0
    lr: float = 1e-6  # peak learning rate; 1e-6 for 7B models


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def updates(
    found: Rollout, step: int, config: Config, mesh: Mesh
) -> list[tuple[np.ndarray, list[list[int]]]]:
    """(prompts, this rank's micro-batches of them) of each update of a rollout; a group is never taken apart."""
    n, lengths = len(found.data), found.data.tree_lengths(config.share_prompts)
    parts = []
    for epoch in range(config.rollout_epochs):
        order = np.random.default_rng([config.seed, step, epoch]).permutation(n)
        parts += [np.sort(part) for part in np.array_split(order, config.minibatches) if len(part)]
    return [
        (part, micro_batches(lengths, part, config.max_tokens, mesh.dp_rank, mesh.dp))
        for part in parts
    ]


def judge(
    found: Rollout, plan: list, model: GPT, ref: GPT | None, config: Config
) -> dict[str, float]:
    """Puts advantage, old and reference log-probs of every token beside the samples; returns metrics of the policy.

    The policy's log-probs are computed again where the ratio needs them: a sampler's arithmetic is not training's.
    """
    first_pass = [items for _, bins in plan[: len(plan) // config.rollout_epochs] for items in bins]
    logps, row = found.logps, {}  # (M,)
    if len(plan) > 1 or np.isnan(logps).any():
        sampled, logps = logps, rollout.token_logps(model, found.data, first_pass, config)
        row["sampler_gap"] = float(np.abs(sampled - logps).mean())
    found.data.add_tokens("old_logps", logps)
    row[
        "entropy"
    ] = -logps.mean().item()  # of a token: the mean over samples of -log π is an unbiased estimate
    kl = np.zeros_like(logps)
    if ref is not None:
        ref_logps = rollout.token_logps(ref, found.data, first_pass, config)
        found.data.add_tokens("ref_logps", ref_logps)
        both = torch.from_numpy(logps), torch.from_numpy(ref_logps)
        kl = losses.kl_estimate(*both, config.kl_estimator).numpy()
        for name, kind in (("kl", "k1"), ("kl_k3", "k3")):  # nats a response
            row[name] = losses.kl_estimate(*both, kind).sum().item() / len(found.samples)
    found.data.add_tokens("advantage", losses.advantages(
        config.advantage, torch.from_numpy(found.rewards), torch.from_numpy(kl),
        torch.from_numpy(found.lengths), config.group_size, config.kl if config.kl_in == "reward" else 0.0,
    ).numpy())  # fmt: skip
    return row


def policy_loss(
    logps: torch.Tensor, batch: TreeBatch, step_lengths: torch.Tensor, config: Config, several: bool
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A micro-batch's share of the update's loss, a scalar, and metrics (M,); step_lengths: of all its responses."""
    known = batch.token_columns
    old = known["old_logps"] if several else logps.detach()
    per_token, metrics = losses.policy_gradient(
        logps, old, known["advantage"], batch.response, batch.lengths, config.loss, config.clip_low or None,
        config.clip_high or None,
    )  # fmt: skip
    if config.kl and config.kl_in == "loss":
        per_token = per_token + config.kl * losses.kl_estimate(
            logps, known["ref_logps"], config.kl_estimator
        )
    weights = losses.token_weights(
        batch.lengths.double(), step_lengths, config.aggregate, config.max_new_tokens
    )
    return (per_token * weights[batch.response]).sum(), metrics


def refuse(config: Config) -> None:
    """ValueError for settings that cannot be, or that would silently do nothing."""
    if config.advantage != "reinforce++" and config.group_size < 2:
        raise ValueError(
            f"--advantage {config.advantage} compares the answers to a prompt: --group-size 2 or more"
        )
    if config.kl and config.kl_in == "loss" and config.kl_estimator == "k1":
        raise ValueError(
            "--kl-in loss with --kl-estimator k1 pulls nowhere on average: take k3 or k2"
        )
    if config.loss == "reinforce" and config.rollout_epochs * config.minibatches > 1:
        raise ValueError(
            "--loss reinforce has no ratio, so one update a rollout: take grpo, or one epoch and minibatch"
        )
    if config.rollout_url and not config.rollout_reload:
        raise ValueError(
            "--rollout-url without --rollout-reload would sample from the first weights for ever"
        )
    if config.rollout_epochs < 1 or config.minibatches < 1 or config.temperature <= 0:
        raise ValueError(
            "--rollout-epochs and --minibatches must be at least 1, --temperature above 0"
        )


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

    # ---- model and reference -----------------------------------------------------------------------------------------
    model = load_model(config.model, dtype, device, mesh=mesh)
    runtime.prepare_model(model, config, tokenizer)
    per_epoch = steps_per_epoch(len(train.ids), config.batch_size)
    total = runtime.total_steps(config, per_epoch)
    longest = np.array([len(ids) + config.group_size * config.max_new_tokens for ids in train.ids])
    print(runtime.describe(config, model, longest, total))
    ref = None
    if (
        config.kl or config.ref
    ):  # the folder itself: a resumed run must not take the half-trained policy
        ref = load_model(config.ref or config.model, dtype, device, mesh=mesh).requires_grad_(False)
        runtime.prepare_model(ref, config, tokenizer)
    server = Server(template, config) if config.rollout_url else None
    optimizer = AdamW(
        model, (config.beta1, config.beta2), config.eps, config.weight_decay, config.zero
    )
    state = checkpoint.State()
    if start:
        state = checkpoint.load(start, optimizer)
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
        began = time.perf_counter()
        plan, lengths = (
            updates(found, step, config, mesh),
            found.data.tree_lengths(config.share_prompts),
        )
        row = {"step": step + 1, **found.metrics(), **judge(found, plan, model, ref, config)}
        found.seconds["scoring"] += time.perf_counter() - began
        began = time.perf_counter()

        lr = runtime.learning_rate(config, step, total)
        totals: dict[str, torch.Tensor] = {}
        n_tokens, norms, batches = int(found.lengths.sum()) * config.rollout_epochs, [], []
        for part, bins in plan:
            # Counted over the whole update, so that the loss does not depend on how it is cut into micro-batches.
            step_lengths = (
                torch.from_numpy(found.lengths.reshape(len(examples), -1)[part].ravel())
                .double()
                .to(device)
            )
            batches = [make_batch(found.data, items, config.share_prompts) for items in bins]
            for batch, hidden in pipeline(model, batches, optimizer):
                logps = model.logps(hidden, batch, config.temperature)  # (M,)
                loss, metrics = policy_loss(logps, batch, step_lengths, config, len(plan) > 1)
                loss.backward()
                reporting.add(totals, {"loss": loss * n_tokens / len(plan), **metrics})
            norm, stopping = optimizer.step(lr, config.clip, stop)
            norms.append(norm)
            if nonfinite.check(norm, step + 1):
                state.skipped += 1
                log.say(
                    f"step {step + 1}: the gradient is not finite, no update ({state.skipped} so far)"
                )

        state.step = step + 1
        row |= {
            **reporting.means(totals, n_tokens, mesh),
            "grad_norm": sum(norms) / len(norms),
            "lr": lr,
        }
        found.seconds["training"] = time.perf_counter() - began
        tokens = int(lengths.sum()) * config.rollout_epochs
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
        log.progress(row)

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
