"""Best of n: sample responses, keep the best. RAFT, arXiv 2304.06767; Llama 2, 2307.09288 Sec. 3.2.

    python best_of_n.py --model sft/final --data prompts.jsonl --reward rm/final --out best
    python train_sft.py --model sft/final --data best/kept.jsonl --out best/sft --lr 1e-5
    torchrun --nproc_per_node 8 best_of_n.py --model sft/final --data x.jsonl --reward "exact:####"

Rows: {prompt}, text or messages, with whatever else the reward reads. The model samples
--group-size responses to each prompt, and the reward ranks those that ended. OUT/kept.jsonl gets
the best --top of each prompt, for train_sft.py: rejection sampling. OUT/pairs.jsonl gets the best
and the worst of each prompt, for train_dpo.py: with each new policy again, this is iterative DPO.
The rows carry the sampled token ids beside the text (response_ids, chosen_ids, rejected_ids), which
training takes wherever its tokenizer and template are the same.

--batch-size is the number of prompts sampled at a time. A run that finds kept.jsonl in OUT has
nothing left to do.

Look at kept/reward and reward: their difference is all there is to learn, and it grows with
--group-size.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np

import runtime
import sources
from commandline import Range, parse
from config import Count, Number, Real, RolloutConfig
from data.chat import as_row
from data.dataset import Prompts
from data.rows import write_rows
from data.trees import step_examples
from model import GPT
from runtime import Run
from sampling import ahead, rollout, source, updates
from sampling.draw import check_drawing
from sampling.engine import connect
from sampling.gap import ServerCheck
from sampling.rewards import Reward, load_reward
from sampling.rollout import Rollout, Sampler


@dataclass
class Config(RolloutConfig):
    group_size: Annotated[int, Range(2)] = 8  # samples per prompt; the best is √(2 ln n) deviations
    # above the mean
    top: Number = 1  # how many of them to keep
    min_reward: Real = -1e30  # keep none with a lower reward; "exact" wants 1
    pairs: Number = 1  # pairs of a prompt: its best response with each of so many of the worst;
    # more use the same samples more often
    cut_rejected: bool = False  # a response that did not end may be the rejected one of a pair,
    # never the best: where --max-new-tokens is short and few responses end
    prompts: Count = 0  # sample for this many prompts, drawn with --seed; 0 = all


def select(
    samples: Rollout, config: Config, fingerprint: str = ""
) -> tuple[list[dict], list[dict]]:
    """Return (rows of the best responses, pairs of the best and the worst) of each prompt.

    --pairs N makes up to N pairs of a prompt, the best with each of the worst. Only responses that
    ended and are not empty count, with --cut-rejected for the worst also those that did not end.
    Each text counts once; of equal rewards the one drawn first wins. A prompt whose responses all
    have the same reward makes no pair.
    fingerprint: of the template; with it the rows carry the ids of responses that the policy chose
    whole.
    """
    kept, pairs = [], []
    for i, prompt in enumerate(samples.prompts.prompts):
        places: dict[str, int] = {}  # of each text among the samples, from best to worst
        group = range(i * config.group_size, (i + 1) * config.group_size)
        for k in sorted(group, key=lambda k: -samples.rewards[k]):
            if (samples.ended[k] or config.cut_rejected) and samples.texts[k].strip():
                places.setdefault(samples.texts[k], k)
        ranked = [k for k in places.values() if samples.ended[k]]
        for k in ranked[: config.top]:
            reward = samples.rewards[k].item()
            if reward >= config.min_reward:
                row = {**as_row(prompt), "response": samples.texts[k], "reward": reward}
                kept.append(row | sampled_ids(samples, {"response_ids": k}, fingerprint))
        if not ranked:
            continue
        best = ranked[0]
        high = samples.rewards[best].item()
        for worst in list(places.values())[: -config.pairs - 1 : -1]:
            low = samples.rewards[worst].item()
            if high <= low:
                break
            pair = {**as_row(prompt), "chosen": samples.texts[best]}
            pair |= {"rejected": samples.texts[worst], "chosen_reward": high}
            pair["rejected_reward"] = low
            ids = sampled_ids(samples, {"chosen_ids": best, "rejected_ids": worst}, fingerprint)
            pairs.append(pair | ids)
    return kept, pairs


def sampled_ids(samples: Rollout, places: dict[str, int], fingerprint: str) -> dict:
    """Return the ids of samples under their keys, and whose they are; {} without a fingerprint.

    {} too where a tool wrote part of a sample: a row has no marks for the tokens that it scores.
    """
    drawn = {key: samples.samples[k] for key, k in places.items()}
    if not fingerprint or any(0 in rollout.scored_marks(sample) for sample in drawn.values()):
        return {}
    return {"tokenizer": fingerprint} | {key: sample.tokens for key, sample in drawn.items()}


def check_server(samples: Rollout, model: GPT, run: Run, config: Config) -> None:
    """Raise ValueError if a server did not sample from --model. Collective."""
    if config.rollout_url:
        plan = updates.plan(samples, 1, 1, 0, config, run.mesh)
        _, _, row = updates.add_logps(samples, plan, model, None, config)
        ServerCheck(config, run.dtype)(row.get("sampler_gap"), samples)


def sample_and_select(
    prompts: Prompts, sample: Sampler, reward: Reward, model: GPT, run: Run, config: Config
) -> dict[str, float]:
    """Sample, score and select; write kept.jsonl and pairs.jsonl; return means. Collective."""
    n = len(prompts.ids)
    size = min(config.prompts or n, n)
    chosen = step_examples(n, size, 0, config.seed, shuffle=config.prompts > 0)
    kept, pairs, rewards, ended = [], [], [], []
    rollout.drop_samples_after(0, config, run.mesh)
    for number, start in enumerate(range(0, size, config.batch_size), 1):
        part = prompts.take(chosen[start : start + config.batch_size])
        seeds = ahead.seeds(config.seed, number, len(part.ids), config.group_size)
        samples = rollout.collect(
            part, sample, reward, run.template, config, run.mesh, seeds, config.temperature
        )
        if number == 1:
            check_server(samples, model, run, config)
        best, extremes = select(samples, config, run.template.fingerprint)
        kept += best
        pairs += extremes
        rewards.append(samples.rewards)
        ended.append(samples.ended)
        rollout.log_samples(samples, number, config, run.mesh)
        done = start + len(part.ids)
        print(f"{done} of {size} prompts sampled, {len(kept)} responses kept", flush=True)
    all_rewards, all_ended = np.concatenate(rewards), np.concatenate(ended)
    if not kept:
        raise ValueError(
            f"none of {len(all_rewards)} samples can be kept ({all_ended.mean():.0%} ended): "
            "lower --min-reward or raise --max-new-tokens"
        )
    if run.mesh.main:
        write_rows(Path(config.out) / "pairs.jsonl", pairs)
        write_rows(Path(config.out) / "kept.jsonl", kept)  # last: it marks a finished run
    return {
        "reward": all_rewards.mean().item(),
        "reward_std": all_rewards.std().item(),
        "kept/reward": float(np.mean([row["reward"] for row in kept])),
        "kept/rows": len(kept),
        "kept/pairs": len(pairs),
        "completions/ended": all_ended.mean().item(),
    }


def validate(config: Config) -> None:
    """Raise ValueError for impossible flags, and for those of training, which have no effect."""
    check_drawing(config)
    if config.top > config.group_size:
        raise ValueError(f"--top {config.top} of --group-size {config.group_size}: raise that")
    sources.refuse_shares(config.data, "here: each prompt is sampled once")
    training = {
        "eval_data": config.eval_data,
        "best_by": config.best_by,
        "shuffle": config.shuffle,
        "epochs": config.epochs,
        "max_steps": config.max_steps,
        "lr": config.lr,
        "schedule": config.schedule,
        "clip": config.clip,
        "eval_every": config.eval_every,
        "save_every": config.save_every,
        "keep": config.keep,
        "log_every": config.log_every,
    }
    for name, value in training.items():
        if value != getattr(Config(), name):
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} has no effect here: pass it to train_sft.py")


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    validate(config)
    run = runtime.start(config)
    out = Path(config.out)
    if run.mesh.ask((out / "kept.jsonl").exists):
        print(f"{out}/kept.jsonl is there already: nothing to do")
        return
    prompts = rollout.load(config.data, run.template, config)
    rollout.refuse_correction(config, "nothing is trained here")
    reward = load_reward(
        config.reward,
        run.template,
        config.template,
        run.dtype,
        run.device,
        config.max_tokens,
        run.mesh,
        read=config.reward_read,
    )
    model = runtime.load_model(run)
    server = connect(run.template, config, prompts, learns=False)
    sample = source.make_sampler(model, run.template, config, server)
    result = sample_and_select(prompts, sample, reward, model, run, config)
    print(", ".join(f"{name} {value:.4g}" for name, value in result.items()))
    print(f"the best are in {out}/kept.jsonl, pairs for train_dpo.py in {out}/pairs.jsonl")


if __name__ == "__main__":
    runtime.run(main)
