"""Rejection sampling, best of n (RAFT, arXiv 2304.06767; Llama 2, arXiv 2307.09288 Sec. 3.2.3): imitate one's own best.

    python train_rejection.py --model sft/final --data prompts.jsonl --reward rm/final --out best --group-size 8
    python train_rejection.py --model sft/final --data prompts.jsonl --reward rm/final --out pairs --no-train
    torchrun --nproc_per_node 8 train_rejection.py --model sft/final --data prompts.jsonl --reward "exact:####"

Rows: {prompt}, text or messages, with whatever the reward wants to see. The model samples --group-size answers to each
prompt, the reward ranks those that ended, the best --top of them are learned as by train_sft.py. OUT/kept.jsonl holds
them, OUT/pairs.jsonl the best and the worst of each prompt, which train_dpo.py takes as they are: sample, score and
learn from pairs again and again is iterative DPO.

Watch kept/reward against reward: their gap is all there is to learn, and it grows with --group-size.

Letters: n prompts, G samples each, M scored tokens.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
import reporting
import runtime
from config import RolloutConfig, parse
from data.dataset import Prompts, load_prompts
from data.rows import write_rows
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import make_batch, micro_batches, pack, step_examples, steps_per_epoch
from optimizer import AdamW
from parallel import Mesh, init_mesh
from pipeline import pipeline
from sampling import rollout
from sampling.rewards import Reward, load_reward
from sampling.rollout import Rollout, Sampler
from sampling.server import Server
from weights.folder import load_model, save_model


@dataclass
class Config(RolloutConfig):
    group_size: int = (
        8  # samples a prompt; the best of n is about √(2 ln n) deviations above the mean
    )
    top: int = 1  # how many of them to keep
    min_reward: float = -1e30  # keep none that earned less; "exact" wants 1
    prompts: int = 0  # sample for so many prompts, drawn with --seed; 0 = all
    train: bool = True  # --no-train ends when kept.jsonl and pairs.jsonl are written
    lr: float = 1e-5  # peak learning rate, as for SFT


# ---- the algorithm ---------------------------------------------------------------------------------------------------


def choose(found: Rollout, config: Config) -> tuple[list[dict], list[dict]]:
    """(rows of the best answers, pairs of best and worst) of some prompts. Only answers that ended and say something
    count, each text once; a prompt whose answers are all worth the same makes no pair."""
    kept, pairs = [], []
    for i, prompt in enumerate(found.prompts.prompts):
        best: dict[str, float] = {}
        group = range(i * config.group_size, (i + 1) * config.group_size)
        for k in sorted(
            group, key=lambda k: -found.rewards[k]
        ):  # stable: the first of equals is drawn first
            if found.ended[k] and found.texts[k]:
                best.setdefault(found.texts[k], found.rewards[k].item())
        ranked = list(best.items())
        for text, reward in ranked[: config.top]:
            if reward >= config.min_reward:
                kept.append({"prompt": prompt, "response": text, "reward": reward})
        if ranked and ranked[0][1] > ranked[-1][1]:
            (chosen, high), (rejected, low) = ranked[0], ranked[-1]
            pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            pairs.append({**pair, "chosen_reward": high, "rejected_reward": low})
    return kept, pairs


def best_of_n(
    prompts: Prompts,
    sample: Sampler,
    reward: Reward,
    template: Template,
    config: Config,
    mesh: Mesh,
) -> dict[str, float]:
    """Samples, scores and writes OUT/kept.jsonl and OUT/pairs.jsonl; collective. Returns what was found, as means."""
    n = len(prompts.ids)
    mine = step_examples(n, min(config.prompts or n, n), 0, config.seed, config.prompts > 0)
    kept, pairs, rewards, ended = [], [], [], []
    if mesh.main:
        rollout.forget_samples(config.out, 0)
    for number, start in enumerate(range(0, len(mine), config.batch_size), 1):
        part = prompts.take(mine[start : start + config.batch_size])
        own = rollout.seeds(config.seed, number, len(part.ids), config.group_size)
        found = rollout.collect(
            part, sample, reward, template, config, mesh, own, config.temperature
        )
        more = choose(found, config)
        kept += more[0]
        pairs += more[1]
        rewards.append(found.rewards)
        ended.append(found.ended)
        if mesh.main:
            if reporting.due(config.log_samples, number) or config.log_samples and number == 1:
                rollout.log_samples(config.out, number, found)
            print(
                f"{start + len(part.ids)} of {len(mine)} prompts sampled, {len(kept)} answers kept",
                flush=True,
            )
    if not kept:
        raise ValueError(
            f"none of {len(mine) * config.group_size} samples is worth keeping ({np.concatenate(ended).mean():.0%} "
            "ended): lower --min-reward or raise --max-new-tokens"
        )
    if mesh.main:
        write_rows(Path(config.out) / "pairs.jsonl", pairs)
        write_rows(
            Path(config.out) / "kept.jsonl", kept
        )  # the last: a resumed run samples again unless it is there
    every = np.concatenate(rewards)
    return {
        "reward": every.mean().item(), "reward_std": every.std().item(),
        "kept/reward": float(np.mean([row["reward"] for row in kept])),
        "kept/rows": len(kept), "kept/pairs": len(pairs), "completions/ended": np.concatenate(ended).mean().item(),
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    if config.group_size < 2 or not 1 <= config.top <= config.group_size:
        raise ValueError(
            "the best of n needs --group-size 2 or more, and --top between 1 and --group-size"
        )
    mesh = init_mesh(config.tp, config.cp, config.pp, config.device, config.timeout_minutes)
    device, dtype = runtime.set_up(config, mesh)
    stop = runtime.Stop(config.max_minutes)
    start = checkpoint.find(config.out, config.resume, mesh=mesh)
    out = Path(config.out)

    # ---- data --------------------------------------------------------------------------------------------------------
    tokenizer = load_tokenizer(config.model)
    template = Template(config.template, tokenizer)
    prompts, heldout = (
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
    reward = load_reward(
        config.reward, template, config.template, dtype, device, config.max_tokens, mesh
    )
    # The samples are drawn before the first update, by the model as it is then.
    model = load_model(config.model, dtype, device, mesh=mesh)
    drawn = {}
    if not mesh.ask((out / "kept.jsonl").exists):  # a resumed run trains on the same samples
        server = Server(template, config) if config.rollout_url else None
        sample = rollout.sampler(model, template, config, server)
        drawn = best_of_n(prompts, sample, reward, template, config, mesh)
        print(", ".join(f"{name} {value:.4g}" for name, value in drawn.items()))
    if not config.train:
        print(f"the best are in {out}/kept.jsonl, pairs for train_dpo.py in {out}/pairs.jsonl")
        return
    with mesh.one_first():  # the others find it in the cache
        train = runtime.load_rows([str(out / "kept.jsonl")], "sft", template, config)
    lengths = train.tree_lengths(config.share_prompts)
    pack(lengths, config.max_tokens)  # a row that does not fit is refused here

    # ---- model -------------------------------------------------------------------------------------------------------
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
    if drawn and not start:
        log.row({"step": 0, **drawn})
    if heldout and not state.step:
        sample = rollout.sampler(model, template, config)
        result, _ = rollout.evaluate(heldout, sample, reward, template, config, mesh)
        log.row({"step": 0, **result})
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
            sample = rollout.sampler(model, template, config)
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
