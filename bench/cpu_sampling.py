"""Sampling in bench/cpu_vs_trl.py: plumb's sampler against transformers' generate."""

import argparse
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

from cpu_process import call, medians, timed
from cpu_rows import choose_prompts

SAMPLES, NEW_TOKENS = 32, 64


def run_sampling(spec: dict) -> dict:
    """Time one sampling of SAMPLES answers, after a short one; sample greedily too."""
    import torch

    torch.set_num_threads(1)
    n = spec["n"]
    sample = (plumb_sampler if spec["run"] == "plumb" else peer_sampler)(spec)
    times = []
    sample(4, 1.0, n)
    answers = timed(sample, times)(NEW_TOKENS, 1.0, n)
    if [len(tokens) for tokens in answers] != [NEW_TOKENS] * SAMPLES:
        raise ValueError("an answer ended early: nothing to compare")
    return {**times[0], "greedy": sample(NEW_TOKENS, 0.0, 1)}


def plumb_sampler(spec: dict):
    """Return a function (new tokens, temperature, n) -> answers, n to each prompt, by plumb."""
    import torch

    from sampling.sampler import generate
    from weights.folder import load_model

    model = load_model(spec["model"], torch.float32)

    def sample(new: int, temperature: float, n: int) -> list[list[int]]:
        answers = generate(model, spec["prompts"], new, temperature, n=n)
        return [answer.tokens for answer in answers]

    return sample


def peer_sampler(spec: dict):
    """Return the same function by transformers, whose prompts are padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None  # no early stop
    prompts = spec["prompts"]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    def sample(new: int, temperature: float, n: int) -> list[list[int]]:
        how = {"do_sample": False}
        if temperature:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
            how["num_return_sequences"] = n
        answers = model.generate(
            ids, attention_mask=mask, max_new_tokens=new, pad_token_id=0, **how
        )
        return answers[:, longest:].tolist()

    return sample


def compare_sampling(spec: dict, args: argparse.Namespace) -> Iterator[tuple[str, dict]]:
    """Measure and report one sample a prompt, then eight; yield each name and its numbers."""
    work = Path(spec["work"])
    request = {**spec, "data": args.data, "prompts": SAMPLES}
    chosen, _ = call(choose_prompts, request, work / "prompts.log")
    prompts = chosen["prompts"]
    if len(prompts) < SAMPLES:
        raise ValueError(
            f"{len(prompts)} of {SAMPLES} prompts of at most 200 tokens: give another --data"
        )
    runs = {"plumb": "plumb"} if args.tiny else {"plumb": "plumb", "peer": "transformers"}
    for n in (1, 8):
        name = f"generate.py, {SAMPLES // n} prompts, {n} samples of {NEW_TOKENS} tokens each"
        workload = {"prompts": prompts[: SAMPLES // n], "n": n}
        results = {run: [] for run in runs}
        for repeat, run in itertools.product(range(args.repeats), runs):
            log = work / f"generate_{n}_{run}_{repeat}.log"
            result, usage = call(run_sampling, {**spec, **workload, "run": run}, log)
            results[run].append({**result, **usage})
        lengths = [len(ids) for ids in workload["prompts"]]
        print(
            f"\n{name}; prompts of {min(lengths)} to {max(lengths)} tokens,"
            f" mean {statistics.mean(lengths):.0f}"
        )
        print(" " * 18 + "CPU s   wall s  peak GB")
        typical = medians(results, ("cpu", "wall", "peak_gb"))
        for run, m in typical.items():
            print(f"{runs[run]:16}{m['cpu']:7.2f}{m['wall']:9.2f}{m['peak_gb']:9.2f}")
        if "peer" in runs:
            ratio = typical["peer"]["cpu"] / typical["plumb"]["cpu"]
            pairs = zip(results["plumb"][0]["greedy"], results["peer"][0]["greedy"], strict=True)
            same = [ours == theirs for ours, theirs in pairs]
            print(
                f"transformers / plumb: {ratio:.2f} times the CPU time;"
                f" same greedy answers: {sum(same)} of {len(same)}"
            )
        yield name, {"medians": typical, "runs": results}
