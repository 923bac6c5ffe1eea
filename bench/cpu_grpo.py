"""Whole GRPO steps in bench/cpu_vs_trl.py: samples and update, plumb against TRL."""

import argparse
import itertools
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from cpu_process import CLOCKS, call, medians, timed
from cpu_rows import BATCH, choose_prompts, read_rows, write_rows
from cpu_training import plumb_command, read_plumb, trl_clock, trl_settings

GROUP, NEW_TOKENS = 8, 64  # samples to each of BATCH prompts, tokens of each
REWARD_WORDS = 50  # the reward length:50 is highest at so many words


def run_grpo(spec: dict) -> dict:
    """Train on one side; return the seconds of every step and of its rollout, and what it did.

    A rollout is samples, texts and rewards. samples: token ids of each step. tokens: how many the
    update computes a step, padding included. With spec["replay"] plumb trains on those samples.
    """
    import torch

    torch.set_num_threads(1)
    result = (run_plumb if spec["run"] == "plumb" else run_trl)(spec)
    if result["prompts"] != spec["prompts"]:
        raise ValueError(f"{spec['run']} read other prompts than the file's: nothing to compare")
    lengths = [len(ids) for step in result["samples"] for ids in step]
    if lengths != [NEW_TOKENS] * (GROUP * BATCH * spec["steps"]):
        raise ValueError(
            f"{spec['run']} drew samples of another number or length: nothing to compare"
        )
    return result


def run_plumb(spec: dict) -> dict:
    """Run train_reinforce.py in this process, with samples that never stop early."""
    import runtime
    import train_reinforce as script
    from sampling.sampler import Sample

    rollouts, prompts, samples = [], [], []
    collect = timed(script.rollout.collect, rollouts)

    class EndlessTemplate(runtime.Template):
        def __init__(self, *args):
            super().__init__(*args)
            self.stop_ids = frozenset()

    def collect_and_keep(*args):
        rollout = collect(*args)
        prompts.extend(rollout.prompts.ids)
        samples.append([sample.tokens for sample in rollout.samples])
        return rollout

    script.refill.collect = collect_and_keep
    runtime.Template = EndlessTemplate
    if "replay" in spec:
        given, zeros = iter(spec["replay"]), [0.0] * NEW_TOKENS

        def replay(*_):
            return [Sample(ids, zeros, zeros, False) for ids in next(given)]

        script.refill.make_sampler = lambda *_: replay
    flags = f"--group-size {GROUP} --max-new-tokens {NEW_TOKENS} --reward length:{REWARD_WORDS}"
    flags += " --advantage grpo --loss grpo --aggregate token --kl 0 --log-samples 0"
    script.main(plumb_command(spec, *flags.split())[2:])
    result = read_plumb(Path(spec["out"]))
    return {**result, "rollouts": rollouts, "prompts": prompts, "samples": samples}


def run_trl(spec: dict) -> dict:
    """Run GRPOTrainer in this process, with samples that never stop early."""
    from datasets import Dataset
    from transformers import PrinterCallback
    from trl import GRPOConfig, GRPOTrainer

    from sampling.rewards import length

    config = json.loads((Path(spec["model"]) / "config.json").read_text())
    never = config["vocab_size"]  # no token has this id
    steps, rollouts, prompts, samples, tokens = [], [], [], [], []
    score = length(str(REWARD_WORDS))

    def reward(prompts, completions, **_):
        return [score(prompt, text, {}) for prompt, text in zip(prompts, completions, strict=True)]

    loss = dict(beta=0.0, num_iterations=1, loss_type="dapo", scale_rewards="group")
    sampling = dict(temperature=1.0, top_p=1.0, top_k=0, generation_kwargs={"eos_token_id": never})
    sampling |= dict(num_generations=GROUP, max_completion_length=NEW_TOKENS)
    data = dict(per_device_train_batch_size=BATCH * GROUP, shuffle_dataset=False)
    settings = GRPOConfig(**trl_settings(spec), **loss, **sampling, **data)
    rows = Dataset.from_list(read_rows(spec["data"]))
    trainer = GRPOTrainer(spec["model"], reward, settings, rows, callbacks=[trl_clock(steps)])
    trainer.remove_callback(PrinterCallback)
    trainer.eos_token_ids = [never]  # where it cuts samples
    score_rollout = trainer._generate_and_score_completions
    trainer._generate_and_score_completions = timed(score_rollout, rollouts)
    generate = trainer._generate_single_turn

    def generate_and_keep(ids, *args, **kwargs):
        generated = generate(ids, *args, **kwargs)
        answers = generated[0]
        prompts.extend(ids[::GROUP])
        samples.append(answers)
        tokens.append(len(ids) * (max(map(len, ids)) + max(map(len, answers))))
        return generated

    trainer._generate_single_turn = generate_and_keep
    trainer.train()
    logs = [row for row in trainer.state.log_history if "grad_norm" in row]
    result = {key: [row[key] for row in logs] for key in ("reward", "grad_norm")}
    result |= {"steps": steps, "rollouts": rollouts, "tokens": tokens}
    return {**result, "prompts": prompts, "samples": samples}


def measure_grpo(run: str, spec: dict, log: Path, **more) -> dict:
    """Do one run of one side; return means a step, the first not counted, beside its numbers."""
    out = str(log.with_suffix(""))
    result, usage = call(run_grpo, {**spec, "run": run, "out": out, **more}, log)
    for clock in CLOCKS:
        for name, times in {"step": result["steps"], "rollout": result["rollouts"]}.items():
            result[f"{name}_{clock}"] = statistics.mean(seconds[clock] for seconds in times[1:])
    return {**result, **usage, "update_cpu": result["step_cpu"] - result["rollout_cpu"]}


def compare_grpo(spec: dict, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Measure and report GRPO's steps; yield the name and the numbers."""
    work, count = Path(spec["work"]), spec["steps"] * BATCH
    request = {**spec, "data": args.data, "prompts": count}
    chosen, _ = call(choose_prompts, request, work / "grpo_prompts.log")
    if len(chosen["prompts"]) < count:
        raise ValueError(
            f"{len(chosen['prompts'])} of {count} prompts: give another --data or fewer --steps"
        )
    spec = {**spec, "prompts": chosen["prompts"], "data": str(work / "grpo.jsonl")}
    write_rows(spec["data"], [{"prompt": text} for text in chosen["texts"]])
    runs = {"plumb": "plumb"} if args.tiny else {"plumb": "plumb", "stock": "TRL"}
    results = {run: [] for run in runs}
    for repeat, run in itertools.product(range(args.repeats), runs):
        results[run].append(measure_grpo(run, spec, work / f"grpo_{run}_{repeat}.log"))

    name = f"train_reinforce.py, GRPO, {BATCH} prompts, {GROUP} samples of {NEW_TOKENS} tokens each"
    mean = statistics.mean(map(len, spec["prompts"]))
    print(f"\n{name}: {args.steps} steps; prompts of {mean:.0f} tokens")
    print(
        " " * 16 + "CPU s/step  rollout   update  wall s/step  peak GB"
        "  tokens a step: sampled  in the update"
    )
    keys = ("step_cpu", "rollout_cpu", "update_cpu", "step_wall", "peak_gb")
    typical = medians(results, keys)
    for run, m in typical.items():
        first = results[run][0]
        sampled = statistics.mean(sum(map(len, step)) for step in first["samples"])
        print(
            f"{runs[run]:16}{m['step_cpu']:10.3f}{m['rollout_cpu']:9.3f}{m['update_cpu']:9.3f}"
            f"{m['step_wall']:13.3f}{m['peak_gb']:9.2f}{sampled:24.0f}"
            f"{statistics.mean(first['tokens']):15.0f}"
        )
    if "stock" in runs:
        theirs = results["stock"][0]
        ours = measure_grpo("plumb", spec, work / "grpo_replay.log", replay=theirs["samples"])
        gaps = {key: relative_gap(ours[key], theirs[key]) for key in ("reward", "grad_norm")}
        ratio = {key: typical["stock"][key] / typical["plumb"][key] for key in keys}
        print(
            f"TRL / plumb: {ratio['step_cpu']:.2f} times the CPU time (rollout"
            f" {ratio['rollout_cpu']:.2f}, update {ratio['update_cpu']:.2f}),"
            f" {ratio['peak_gb']:.2f} times the memory. On TRL's samples rewards agree within"
            f" {gaps['reward']:.1e}, gradient norms within {gaps['grad_norm']:.1e}"
        )
        typical["stock"] |= {"ratios": ratio, "gaps": gaps}
    for result in itertools.chain.from_iterable(results.values()):
        del result["samples"], result["prompts"]  # long, and of no use to a reader
    yield name, {"medians": typical, "runs": results}


def relative_gap(ours: list[float], theirs: list[float]) -> float:
    """Return the largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
