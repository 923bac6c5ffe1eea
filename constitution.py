"""Constitutional AI: answer, criticise by a principle, revise; compare by a principle. 2212.08073.

    python constitution.py --model sft/final --data red_team.jsonl --out cai
    python train_sft.py --model sft/final --data cai/sft.jsonl --out sl_cai --lr 1e-5
    python train_dpo.py --model sl_cai/final --data cai/pairs.jsonl --out rl_cai
    python constitution.py --model sft/final --data x.jsonl --principles mine.txt --rounds 2 --out y

Rows: {prompt}, text or messages: requests that tempt a model to break its rules. The same model
then does all the work, by the principles and questions of --principles, a text file to edit.
  - supervised part: an answer, a critique of it by a random principle, a revision by that critique,
    --rounds times. OUT/sft.jsonl gets the prompt with the last revision.
  - pairs: two more answers; the model says which of them follows a random principle better, by the
    log-probs of the two letters as its reply. It is asked in both orders, since it may favour a
    place; the mean of both is the `probability` that the better one is better. OUT/pairs.jsonl.
Rows carry what made them: principles, draft, critiques, revisions, log-probs, the number of their
prompt. Texts that were cut at --max-new-tokens, or are empty, make no row and are counted.

A run that is stopped keeps what it has in OUT/trace.jsonl: the same command goes on from there, and
ends with the same rows. A text depends on --seed and its prompt alone, not on the others.

--rollout-url samples and scores on servers that hold --model; its folder then only needs the
tokenizer. Read OUT/trace.jsonl: a small model writes critiques that say nothing.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

import hub
import lock
from commandline import Range, parse
from config import Count, Number, RolloutConfig, SampleTemperature, Seed, Wait
from data.chat import as_row
from data.jinja import read_kwargs
from data.keys import prompt_in
from data.rows import read_rows, write_rows
from data.templates import Template
from data.tokenizer import load_tokenizer
from kernels.device import pick_device
from sampling.constitution import (
    Constitution,
    Speaker,
    check_choices,
    fill,
    local_speaker,
    read_constitution,
    remote_speaker,
)
from sampling.draw import check_drawing
from sampling.engine import Engine
from sampling.judge import text_of
from sampling.traces import finished, run_key, write_results
from weights.folder import DTYPES, fingerprint, load_model

# What a random number is for: the second word of its seed.
DRAFT, CRITIQUE, REVISION, PRINCIPLE, ANSWER, QUESTION = range(6)


@dataclass
class Flags:
    """Flags of constitution.py."""

    model: str = ""  # Hugging Face folder of the model that answers, criticises and compares
    data: str = ""  # JSONL file of rows with a "prompt"
    out: str = ""  # folder for sft.jsonl, pairs.jsonl and trace.jsonl
    principles: str = str(Path(__file__).parent / "data/constitution.txt")  # principles and
    # questions: a text file
    rounds: Count = 1  # critiques and revisions of each answer; 0 = none, pairs alone
    pairs: Count = 1  # compared pairs of answers to each prompt; 0 = none, revisions alone
    min_confidence: Annotated[float, Range(0.5, 1, below=True)] = 0.5  # least probability of a
    # label, over both orders
    consistent: bool = False  # keep only pairs with the same winner in both orders
    temperature: SampleTemperature = 0.7  # of all texts; at 0 both answers of a pair are the same
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0  # sample from the likeliest tokens that
    # make up this much probability
    max_new_tokens: Number = 256  # longest answer, critique or revision
    stop: list[str] = field(default_factory=list)  # texts that end a text, which keeps them
    template: Literal["auto", "plain", "chatml", "zephyr", "llama2", "llama3"] = (
        "auto"  # chat format, as in training
    )
    template_kwargs: str = ""  # a JSON object of values for the chat template, for example
    # '{"enable_thinking": false}'
    rollout_url: list[str] = field(default_factory=list)  # OpenAI-compatible servers that hold
    # --model, http://host:8000
    rollout_timeout: Wait = 600.0  # seconds that a request may take
    batch_size: Number = 64  # prompts at a time: lower it when memory runs out; servers take more
    max_tokens: Number = 8192  # tokens per micro-batch of comparisons
    seed: Seed = 0  # seed of all texts and principles
    limit: Count = 0  # use only the first rows of --data; 0 = all
    dtype: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # auto: bf16 on GPUs, else fp32
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU if there is one


def seed_of(flags: Flags, row: int, use: int, number: int = 0) -> int:
    """Return the seed of one text: a function of --seed, prompt, use and number alone."""
    sequence = np.random.SeedSequence([flags.seed, use, row, number])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def principle_of(rules: Constitution, flags: Flags, row: int, use: int, number: int) -> str:
    """Return a random principle, a function of the same things."""
    return rules.principles[seed_of(flags, row, use, number) % len(rules.principles)]


# ---- the algorithm -----------------------------------------------------------------------------


def revise(
    speaker: Speaker, rules: Constitution, prompts: list, rows: range, flags: Flags
) -> list[dict[str, Any]]:
    """Return for each prompt its draft and its rounds of principle, critique and revision."""
    texts = [text_of(prompt) for prompt in prompts]
    answers, ended = speaker.answer(prompts, [seed_of(flags, row, DRAFT) for row in rows])
    traces: list[dict] = [{"draft": a, "rounds": [], "ended": e} for a, e in zip(answers, ended)]
    for number in range(flags.rounds):
        principles = [principle_of(rules, flags, row, PRINCIPLE, number) for row in rows]
        shown = list(zip(texts, answers, principles))
        asked = [fill(rules.critique, prompt=p, response=a, principle=c) for p, a, c in shown]
        critiques, _ = speaker.answer(asked, [seed_of(flags, r, CRITIQUE, number) for r in rows])
        asked = [
            fill(rules.revise, prompt=p, response=a, principle=c, critique=critique)
            for (p, a, c), critique in zip(shown, critiques)
        ]
        answers, ended = speaker.answer(asked, [seed_of(flags, r, REVISION, number) for r in rows])
        for i, trace in enumerate(traces):
            made = {"principle": principles[i], "critique": critiques[i], "revision": answers[i]}
            trace["rounds"].append(made)
            trace["ended"] = ended[i]
    return traces


def compare(
    speaker: Speaker, rules: Constitution, prompts: list, rows: range, flags: Flags
) -> list[list[dict[str, Any]]]:
    """Return for each prompt its pairs of answers, with the log-probs of both choices.

    logps [order][choice]: in order 0 the first of the answers stands in front, in order 1 behind.
    """
    n = 2 * flags.pairs
    seeds = [seed_of(flags, row, ANSWER, k) for row in rows for k in range(n)]
    answers, ended = speaker.answer([p for p in prompts for _ in range(n)], seeds)
    places = [(i, k) for i in range(len(prompts)) for k in range(flags.pairs)]
    pairs, asked = [], []
    for i, k in places:
        own = slice(i * n + 2 * k, i * n + 2 * k + 2)
        one, two = answers[own]
        principle = principle_of(rules, flags, rows[i], QUESTION, k)
        pairs.append({"answers": [one, two], "ended": ended[own], "principle": principle})
        for first, second in ((one, two), (two, one)):
            texts = {"prompt": text_of(prompts[i]), "first": first, "second": second}
            asked.append(fill(rules.compare, principle=principle, **texts))
    logps = speaker.choose(asked, rules.choices).reshape(len(places), 2, 2)
    by_prompt: list[list[dict]] = [[] for _ in prompts]
    for (i, _), pair, values in zip(places, pairs, logps):
        by_prompt[i].append({**pair, "logps": values.tolist()})
    return by_prompt


# ---- the run -------------------------------------------------------------------------------------


def run(speaker: Speaker, rules: Constitution, prompts: list, done: list, flags: Flags) -> None:
    """Trace the prompts that are not done yet, a batch at a time, and append to `done`."""
    path = Path(flags.out) / "trace.jsonl"
    # A JSON escape can hold half of a surrogate pair, UTF-8 cannot.
    with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
        for first in range(len(done), len(prompts), flags.batch_size):
            rows = range(first, min(first + flags.batch_size, len(prompts)))
            part = [prompts[row] for row in rows]
            revised: list[dict] = [{"draft": "", "rounds": [], "ended": False}] * len(rows)
            compared: list[list[dict]] = [[] for _ in rows]
            if flags.rounds:
                revised = revise(speaker, rules, part, rows, flags)
            if flags.pairs:
                compared = compare(speaker, rules, part, rows, flags)
            for i, row in enumerate(rows):
                prompt = {"row": row + 1, "prompt": as_row(part[i])}
                trace = {**prompt, **revised[i], "pairs": compared[i]}
                file.write(json.dumps(trace, ensure_ascii=False) + "\n")
                done.append(trace)
            file.flush()
            os.fsync(file.fileno())
            print(f"{len(done)} of {len(prompts)} prompts", flush=True)


def rollout_config(flags: Flags) -> RolloutConfig:
    """Return the flags under the names that samplers read."""
    names = "model temperature top_p max_new_tokens stop seed rollout_url rollout_timeout".split()
    config = RolloutConfig(**{name: getattr(flags, name) for name in names})
    config.rollout_batch = flags.batch_size
    check_drawing(config)
    return config


def validate(flags: Flags) -> None:
    """Raise ValueError if the flags do not name something to do."""
    if not (flags.model and flags.data and flags.out):
        raise ValueError("constitution.py needs --model, --data and --out")
    if not flags.rounds and not flags.pairs:
        raise ValueError("--rounds 0 and --pairs 0 leave nothing to do: raise one of them")
    if flags.pairs and not flags.temperature:
        raise ValueError("--temperature 0 makes equal answers: raise it, or use --pairs 0")


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, __doc__, argv)
    validate(flags)
    config = rollout_config(flags)
    rules = read_constitution(flags.principles)
    hub.resolve(flags, ("model",))
    kwargs = read_kwargs(flags.template_kwargs)
    template = Template(flags.template, load_tokenizer(flags.model), kwargs)
    check_choices(rules, template, flags.principles)
    rows = list(read_rows(flags.data))[: flags.limit or None]
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            prompts.append(prompt_in(row, template.plain))
            template.prompt(prompts[-1])
        except ValueError as error:
            raise ValueError(f"row {number} of {flags.data}: {error}") from None
    if not prompts:
        raise ValueError(f"{flags.data} has no rows: give it prompts")
    engine = Engine(template, config, learns=False) if flags.rollout_url else None
    name = engine.servers[0].model if engine else fingerprint(flags.model)
    key = run_key(rows, rules, f"{name} {template.fingerprint}", vars(flags))

    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    lock.take(out)
    try:
        done = finished(out / "trace.jsonl", key, flags.batch_size, len(prompts))
        if done:
            print(f"going on after {len(done)} of {len(prompts)} prompts in {out}/trace.jsonl")
        write_rows(out / "trace.jsonl", [key, *done])
        if len(done) < len(prompts):
            if engine:
                speaker = remote_speaker(engine, template, config)
            else:
                device = pick_device(flags.device)
                best = "bf16" if device == "cuda" else "fp32"
                dtype = DTYPES[best if flags.dtype == "auto" else flags.dtype]
                model = load_model(flags.model, dtype, device).requires_grad_(False)
                speaker = local_speaker(model, template, config, flags.max_tokens)
            run(speaker, rules, prompts, done, flags)
        write_results(done, flags.out, flags.min_confidence, flags.consistent)
    finally:
        lock.release()


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped: the same command goes on")
        sys.exit(130)
