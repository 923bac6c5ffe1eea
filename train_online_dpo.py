"""Online DPO, iterated DPO and SPIN: learn from pairs of fresh samples; arXiv 2402.04792.

    python train_online_dpo.py --model sft/final --data prompts.jsonl --reward rm/final --out odpo
    python train_online_dpo.py --model sft/final --data demos.jsonl --chosen data --ref-samples 1 \\
        --group-size 1 --ref-every 100 --out spin
    torchrun --nproc_per_node 8 train_online_dpo.py --model sft/final --data x.jsonl --reward rm

Rows: {prompt}, text or messages, with whatever else the reward reads. A step samples G responses to
each prompt and scores them; the best and the worst are a pair, on which it takes a DPO step. Equal
rewards say nothing: such a pair does not count. --ref-every N makes the policy of every N-th step
the new reference (iterated DPO), and --ref-samples draws from the reference too. With --chosen data
the row's own response is the chosen one, and every sample a rejected one (SPIN,
arXiv 2401.01335).

Watch reward rise and rewards/accuracies pass 0.5. If frac_reward_zero_std is near 1, no pairs are
left. If completions/mean_length runs away, the reward likes length: read OUT/samples.jsonl.

Letters: n prompts of a step, G samples each, k pairs of a step, B of a micro-batch.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch

import losses
import runtime
import training
from commandline import Range, parse
from config import Above0, Amount, Count, RolloutConfig
from data.dataset import Dataset, Prompts, from_trees
from data.encode import Answer, encode_pair, sampled_ids
from data.formats import answers_of
from data.keys import canonical
from data.templates import Template
from data.trees import TreeBatch
from losses import Pairs
from model import GPT
from passes import make_batches
from pipeline import pipeline
from reference import first_reference, renew_reference
from reporting import add, means
from sampling import ahead, rollout, source
from sampling.engine import connect
from sampling.rewards import Reward, load_reward, no_reward
from sampling.rollout import Rollout


@dataclass
class Config(RolloutConfig):
    loss: Literal[losses.FRESH_PAIR_LOSSES] = "sigmoid"  # ipo is online IPO; formulas: docs/dpo.md
    beta: Above0 = 0.1  # temperature of the implicit reward; smaller strays further; SPIN: 0.1 to 5
    label_smoothing: Annotated[float, Range(0, 0.5, below=True)] = 0.0  # assumed share of wrong
    # labels (sigmoid, robust), and exo_pair's ε, which must be above 0: 0.001
    gamma: Amount = 0.5  # simpo: target margin, in units of β-scaled log-prob a token
    reward_scale: Above0 = 1.0  # rpo_*: scale of the rewards relative to the implicit ones
    average_logps: bool = False  # divide log-probs by the response's length, as TRL's ipo does
    sft_weight: Amount = 0.0  # weight of the mean token NLL of the chosen responses; 0.1 to 1
    chosen: Literal["best", "data"] = "best"  # of the samples, by reward; or the row's response
    ref_every: Count = 0  # steps after which the policy becomes the reference; 0: never. 50 to 500
    ref_samples: Count = 0  # of the --group-size samples, how many come from the reference; all of
    # them is SPIN's and iterated DPO's way, 0 online DPO's
    ref: str = ""  # another Hugging Face folder as first reference; default: --model as it was at
    # step 0


# ---- the algorithm -----------------------------------------------------------------------------


def best_and_worst(samples: Rollout) -> Dataset:
    """Return a pair (best, worst by reward) for each prompt, k = n trees.

    The first of several best or worst is taken. Columns reward and weight, (2k,): a pair of equal
    rewards weighs 0, others 1.
    """
    groups = samples.rewards.reshape(len(samples.prompts.ids), -1)  # (n, G)
    size = groups.shape[1]
    trees, rewards = [], []
    for i, group in enumerate(groups):
        places = [int(group.argmax()), int(group.argmin())]
        pair = [samples.samples[i * size + place] for place in places]
        trees.append((samples.prompts.ids[i], [(s.tokens, rollout.scored_marks(s)) for s in pair]))
        rewards.append(group[places])
    weights = np.repeat(np.ptp(rewards, 1) > 0, 2).astype(np.float32)
    return from_trees(trees, {"reward": np.concatenate(rewards), "weight": weights})


def data_and_samples(samples: Rollout, answers: list[Answer]) -> Dataset:
    """Return a pair (the row's response, a sample) for each sample, k = nG trees. SPIN's Eq. 4.7.

    answers: ids and marks of the rows' responses, one a prompt.
    """
    group = len(samples.samples) // len(answers)
    trees = []
    for i, sample in enumerate(samples.samples):
        rejected = (sample.tokens, rollout.scored_marks(sample))
        trees.append((samples.prompts.ids[i // group], [answers[i // group], rejected]))
    unknown, weights = np.full(2 * len(trees), np.nan), np.ones(2 * len(trees), np.float32)
    return from_trees(trees, {"reward": unknown, "weight": weights})


def pair_sums(model: GPT, hidden: torch.Tensor, batch: TreeBatch) -> torch.Tensor:
    """Return the summed log-probs of the responses of a micro-batch, (B, 2): chosen, rejected."""
    return batch.sum_by_response(model.logps(hidden, batch)).view(-1, 2)


def policy_pairs(sums: torch.Tensor, ref_sums: torch.Tensor, batch: TreeBatch) -> Pairs:
    """Return the pairs of a micro-batch, (B,) each. sums, ref_sums: (B, 2)."""
    lengths = batch.lengths.view(-1, 2).unbind(1)
    rewards = batch.columns["reward"].view(-1, 2).unbind(1)
    return Pairs(*sums.unbind(1), *ref_sums.unbind(1), *lengths, *rewards)


def pair_losses(pairs: Pairs, config: Config) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return the loss of each pair, (B,), and its metrics, (B,) each."""
    return losses.dpo(
        pairs,
        config.loss,
        config.beta,
        config.label_smoothing,
        config.gamma,
        config.reward_scale,
        average_logps=config.average_logps,
    )


def encode_answers(
    prompts: Prompts, template: Template, config: Config
) -> tuple[Prompts, list[Answer]]:
    """Return the prompts whose rows have a response that fits, and the responses' ids and marks.

    ValueError: a row without a response.
    """
    kept, answers = [], []
    for i, (row, ids) in enumerate(zip(prompts.rows, prompts.ids)):
        prompt, responses = answers_of(canonical(row)[0], template.plain)
        same_prompt, encoded, _ = encode_pair(template, prompt, responses[:1], sampled_ids(row))
        fits = len(ids) + len(encoded[0][0]) <= config.max_length
        if fits and same_prompt == ids:  # not where a token holds the end of the prompt
            kept.append(i)
            answers.append(encoded[0])
    if not kept:
        raise ValueError("no row has a response that fits: raise --max-length")
    print(f"--chosen data: {len(kept)} of {len(prompts.ids)} rows have a response that fits")
    longest = max(
        len(prompts.ids[i]) + len(answer[0]) + config.max_new_tokens
        for i, answer in zip(kept, answers)
    )
    if longest > config.max_tokens:
        raise ValueError(f"a pair may have {longest} tokens: raise --max-tokens to {longest}")
    return prompts.take(kept), answers


def validate(config: Config) -> None:
    """Raise ValueError for flags that contradict each other or would have no effect."""
    rollout.validate(config)
    rollout.refuse_correction(config, "its loss has no ratio to the sampler")
    if config.chosen == "best" and config.group_size < 2:
        raise ValueError("--chosen best compares the samples to a prompt: use --group-size 2 to 8")
    if config.chosen == "data" and config.loss in losses.REWARD_LOSSES:
        raise ValueError(f"--loss {config.loss} needs rewards of both responses: use --chosen best")
    if not config.reward and (config.chosen == "best" or config.eval_data):
        raise ValueError("--reward is missing: it judges the samples (sampling/rewards.py)")
    if config.average_logps and config.loss in losses.NORMALISED_LOSSES:
        raise ValueError(
            f"--loss {config.loss} divides by the lengths itself: drop --average-logps"
        )
    if config.ref_samples > config.group_size:
        raise ValueError(
            f"--ref-samples {config.ref_samples} is more than --group-size {config.group_size}"
        )
    if config.ref_samples and (config.pp > 1 or config.rollout_url):
        flag = f"--pp {config.pp}" if config.pp > 1 else "--rollout-url"
        raise ValueError(f"--ref-samples is not supported with {flag}: drop one of the two")
    if config.ref_every and config.base_dtype != "none":
        raise ValueError(
            f"--ref-every with --base-dtype {config.base_dtype}: the new reference would have "
            "other weights than the policy: drop one of the two"
        )


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, __doc__, argv)
    validate(config)
    run = runtime.start(config)
    template, mesh = run.template, run.mesh
    pair_losses(Pairs(*torch.ones(8, 1)), config)  # ValueError: settings the loss cannot take

    # ---- data ----------------------------------------------------------------------------------
    train = rollout.load(config.data, template, config)
    heldout = rollout.load_sets(template, config)
    rollout.check_fits(train, config)
    answers: list[Answer] = []
    if config.chosen == "data":
        train, answers = encode_answers(train, template, config)
    reward: Reward = no_reward
    if config.reward:
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
    server = connect(template, config, train)
    optimizer = runtime.make_optimizer(model, config)
    loop = training.begin(run, steps, optimizer)
    ref = first_reference(run, model, config.ref, config.ref_every, loop.state.step)
    rollout.drop_samples_after(loop.state.step, config, mesh)
    if heldout and not loop.state.step:
        results, _ = rollout.evaluate(heldout, model, reward, template, config, server)
        result = training.report_evaluation(loop, results)
        if training.is_best(loop, -result["eval/reward"]):
            runtime.save_model(run, model, "best")

    # ---- the loop ------------------------------------------------------------------------------
    for step in training.remaining(loop):
        examples = steps.examples(step)
        prompts = train.take(examples)
        sample = source.make_sampler(model, template, config, server)
        if config.ref_samples:
            from_ref = source.local_sampler(ref, template, config)
            sample = source.with_reference(sample, from_ref, config.ref_samples)
        seeds = ahead.seeds(config.seed, step + 1, len(prompts.ids), config.group_size)
        samples = rollout.collect(
            prompts, sample, reward, template, config, mesh, seeds, config.temperature
        )
        if answers:
            data = data_and_samples(samples, [answers[i] for i in examples])
        else:
            data = best_and_worst(samples)
        # Counted over the whole step: the loss does not depend on how it is cut into micro-batches.
        weights = data.columns["weight"][::2]  # (k,)
        n_pairs = max(1, int(weights.sum()))
        n_chosen = max(1, int(data.scored_len[::2] @ weights))
        batches = make_batches(data, np.arange(len(data)), config, mesh)
        with torch.no_grad():
            ref_sums = [pair_sums(ref, hidden, batch) for batch, hidden in pipeline(ref, batches)]
        samples.lap("scoring")

        totals: dict[str, torch.Tensor] = {}
        for i, (batch, hidden) in enumerate(pipeline(model, batches, optimizer)):
            pairs = policy_pairs(pair_sums(model, hidden, batch), ref_sums[i], batch)
            per_pair, metrics = pair_losses(pairs, config)
            if config.sft_weight:
                metrics["nll"] = -pairs.chosen * n_pairs / n_chosen
                per_pair = per_pair + config.sft_weight * metrics["nll"]
            weight = batch.columns["weight"][::2]  # (B,)
            ((weight * per_pair).sum() / n_pairs).backward()
            columns = {"loss": per_pair, **metrics}
            add(totals, {name: weight * column for name, column in columns.items()})
        # Without a pair the moments of AdamW decay, and no weight moves.
        lr = training.learning_rate(config, step, steps.total) if weights.any() else 0.0
        norm, stopping = optimizer.step(lr, config.clip, run.stop)
        training.check_update(loop, norm)
        samples.lap("training")

        tokens = int(data.tree_lengths(config.share_prompts).sum())
        row = {**means(totals, n_pairs, mesh), "grad_norm": norm, "lr": lr}
        row |= {"pairs": float(weights.sum()), **samples.metrics()}
        row |= samples.throughput(tokens, config)
        training.report_step(loop, row, tokens, batches)
        rollout.log_samples(samples, step + 1, config, mesh)
        if config.ref_every and loop.state.step % config.ref_every == 0:
            ref = renew_reference(run, model, config.ref_every, loop.state.step)
        if heldout and training.evaluation_due(loop):
            results, texts = rollout.evaluate(heldout, model, reward, template, config, server)
            result = training.report_evaluation(loop, results)
            rollout.print_samples(texts, config.samples, loop.log.say)
            if training.is_best(loop, -result["eval/reward"]):
                runtime.save_model(run, model, "best")
        if training.save_or_stop(loop, stopping):
            return
    training.finish(loop, model)


if __name__ == "__main__":
    runtime.run(main)
