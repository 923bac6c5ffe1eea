"""Sample responses to a prompt, to the prompts of a file, or in a chat.

    python generate.py --model DIR --prompt "Where does Ada live?"
    python generate.py --model DIR --data prompts.jsonl --out answers.jsonl --temperature 0.7 --n 4
    python generate.py --model DIR --prompt "Where does Ada live?" --attributes "helpfulness:4"
    python generate.py --model DIR --chat
    python generate.py --model DIR --data prompts.jsonl --out a.jsonl --rollout-url http://x:8000

--data reads rows {"prompt": text or messages} and writes each with a "response", or with
"responses" if --n asks for several; other keys stay. A sample depends on its prompt and its seed
alone, not on the rest of its batch. A run that is stopped keeps the answers that it has: the same
command goes on from there. With --rollout-url a server answers (vLLM, SGLang), which must serve
this model; --model then gives the tokenizer and the chat format.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch

import hub
from commandline import Range, parse
from config import Count, Number, RolloutConfig, SampleTemperature, Seed
from data import attributes
from data.jinja import read_kwargs
from data.keys import prompt_in
from data.rows import read_rows, write_rows
from data.templates import Template
from data.tokenizer import load_tokenizer
from kernels.device import pick_device
from sampling.engine import Engine
from sampling.sampler import Sample, generate
from weights.folder import DTYPES, fingerprint, load_model

PART = 8  # times --batch-size: samples that are drawn before their rows are kept


@dataclass
class Flags:
    """Flags of generate.py."""

    model: str = ""  # Hugging Face folder
    prompt: str = ""  # one prompt, answered on the screen
    data: str = ""  # or a JSONL file of rows with a "prompt"
    out: str = ""  # JSONL file for the answered rows of --data
    chat: bool = False  # or a conversation on the screen; an empty line ends it
    template: Literal["auto", "plain", "chatml", "zephyr", "llama2", "llama3"] = (
        "auto"  # chat format, as in training
    )
    template_kwargs: str = ""  # a JSON object of values for the chat template, for example
    # '{"enable_thinking": false}'
    attributes: str = ""  # for a SteerLM model: what to ask for, "helpfulness:4,verbosity:1"
    n: Number = 1  # responses to each prompt
    temperature: SampleTemperature = 0.7  # 0 = always the likeliest token; 1 = the model's own
    # distribution
    top_k: Count = 0  # sample from the k likeliest tokens; 0 = all
    top_p: Annotated[float, Range(0, 1, above=True)] = 1.0  # sample from the likeliest tokens that
    # make up this much probability
    max_new_tokens: Number = 256  # longest response
    min_new_tokens: Count = 0  # tokens of a response before it may end
    stop: list[str] = field(default_factory=list)  # texts that end a response, left out of it
    no_repeat: Count = 0  # end a response if its last N tokens repeat a cycle; 32 is safe; 0 = off
    batch_size: Number = 64  # responses in progress at a time: lower it when memory runs out
    seed: Seed = 0  # seed of the samples
    limit: Count = 0  # use only the first rows of --data; 0 = all
    rollout_url: list[str] = field(default_factory=list)  # servers that answer instead, which share
    # the prompts: http://host:8000
    dtype: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # auto: bf16 on GPUs, else fp32
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: a GPU if there is one


def validate(flags: Flags) -> None:
    """Raise ValueError if the flags do not name one thing to do."""
    modes = bool(flags.prompt) + bool(flags.data) + flags.chat
    if not flags.model or modes != 1 or bool(flags.data) != bool(flags.out):
        raise ValueError(
            "generate.py needs --model, and one of --prompt TEXT, --data FILE with --out FILE, "
            "and --chat"
        )
    if flags.rollout_url and (flags.chat or flags.no_repeat):
        flag = "--chat" if flags.chat else "--no-repeat"
        raise ValueError(f"{flag} needs each token as it is drawn: drop --rollout-url")


def conditioned(prompt: str | list, flags: Flags) -> str | list:
    """Return the prompt with the attribute line that --attributes asks for, if any.

    ValueError: the model was not trained with attributes, or not with these.
    """
    if not flags.attributes:
        return prompt
    trained = attributes.load(flags.model)
    if not trained:
        raise ValueError(
            f"--attributes: {flags.model} was not trained with attributes: "
            "use a model of train_sft.py --attributes"
        )
    template, names = trained
    return attributes.condition(prompt, attributes.read_line(flags.attributes, names), template)


def cut_at(text: str, stops: Collection[str]) -> str:
    """Return the text up to the first of the stop texts in it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class Stream:
    """Printer of a response, token by token, up to the first stop text."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Collection[str]):
        self.decode = decode
        self.stops = stops
        self.ids: list[int] = []
        self.text = ""
        self.shown = 0  # characters printed so far

    def __call__(self, _: int, token: int) -> None:
        """Take the next token; print what it completes."""
        self.ids.append(token)
        self.text = cut_at(self.decode(self.ids), self.stops)
        if not self.text.endswith("\ufffd"):  # the rest of the character is still to come
            self.flush()

    def flush(self) -> None:
        """Print the text that is not shown yet."""
        print(self.text[self.shown :], end="", flush=True)
        self.shown = len(self.text)


def chat(answer: Callable[..., list[Sample]], template: Template, flags: Flags) -> None:
    """Hold a conversation on the screen; answer(prompts, seed=, on_token=) is called every turn."""
    print("An empty line ends the chat.", end="")
    if template.plain:
        print(" The template is plain and has no turns: every question stands alone.", end="")
    print()
    messages = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        if template.plain:
            messages = []
        messages = [*messages, {"role": "user", "content": question}]
        stream = Stream(template.tokenizer.decode, flags.stop)
        prompt = template.prompt(conditioned(messages, flags))
        answer([prompt], seed=flags.seed + len(messages), on_token=stream)
        stream.flush()
        print()
        messages.append({"role": "assistant", "content": stream.text.strip()})


def answer_file(
    answer: Callable[..., list[Sample]],
    decode: Callable[[list[int]], str],
    rows: list[dict],
    prompts: list[list[int]],
    flags: Flags,
) -> None:
    """Answer the rows of --data a part at a time, and write --out when all are answered.

    Until then finished rows lie in a hidden file beside it, from which the same command goes on.
    """
    out = Path(flags.out)
    partial = out.with_name(f".{out.name}.partial")
    key = run_key(rows, flags)
    done = finished_rows(partial, key)
    if done:
        print(f"going on after {len(done)} of {len(rows)} rows, which {partial} holds")
    size = max(1, PART * flags.batch_size // flags.n)  # rows of a part
    try:
        with open(partial, "w", encoding="utf-8", errors="backslashreplace") as file:
            for entry in (key, *done):
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            for first in range(len(done), len(rows), size):
                part = range(first, min(first + size, len(rows)))
                seeds = [[flags.seed, i * flags.n + k] for i in part for k in range(flags.n)]
                answers = answer([prompts[i] for i in part], n=flags.n, seeds=seeds)
                texts = [cut_at(decode(a.tokens), flags.stop).strip() for a in answers]
                for k, i in enumerate(part):
                    own = slice(k * flags.n, (k + 1) * flags.n)
                    new = {"responses": texts[own]} if flags.n > 1 else {"response": texts[k]}
                    entry = {"row": rows[i] | new, "ended": sum(a.ended for a in answers[own])}
                    file.write(json.dumps(entry, ensure_ascii=False) + "\n")
                    done.append(entry)
                file.flush()
    except KeyboardInterrupt:
        print(f"\nstopped after {len(done)} of {len(rows)} rows: the same command goes on")
        raise SystemExit(130) from None
    write_rows(out, [entry["row"] for entry in done])
    partial.unlink()
    ended = sum(entry["ended"] for entry in done)
    print(f"{len(rows) * flags.n} answers in {out}, {ended} of them ended by themselves")


def run_key(rows: list[dict], flags: Flags) -> dict[str, str]:
    """Return what decides the answers: model, rows and settings, hashed."""
    settings = {k: v for k, v in vars(flags).items() if k not in ("model", "data", "out", "limit")}
    text = json.dumps([fingerprint(flags.model), rows, settings])
    return {"run": hashlib.sha256(text.encode()).hexdigest()}


def finished_rows(partial: Path, key: dict[str, str]) -> list[dict]:
    """Return the finished rows of a run that was stopped, [] if there was none or another one."""
    if not partial.exists():
        return []
    entries = []
    # Lines end at line feeds alone: an answer may hold other line separators.
    for line in partial.read_text(encoding="utf-8").split("\n"):
        try:
            entries.append(json.loads(line))
        except ValueError:  # cut off in the middle of a line, or the end
            break
    return entries[1:] if entries[:1] == [key] else []


def from_model(
    template: Template, flags: Flags, device: str, dtype: torch.dtype
) -> Callable[..., list[Sample]]:
    """Return a function that answers prompts with --model in this process, as `generate` does."""
    return functools.partial(
        generate,
        load_model(flags.model, dtype, device),
        max_new_tokens=flags.max_new_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        stop_ids=template.stop_ids,
        batch_size=flags.batch_size,
        stop_texts=flags.stop,
        decode=template.tokenizer.decode,
        no_repeat=flags.no_repeat,
        min_new_tokens=flags.min_new_tokens,
    )


def from_servers(template: Template, flags: Flags) -> Callable[..., list[Sample]]:
    """Return a function that answers prompts with the servers of --rollout-url."""
    config = RolloutConfig(
        rollout_url=flags.rollout_url,
        max_new_tokens=flags.max_new_tokens,
        top_k=flags.top_k,
        top_p=flags.top_p,
        stop=flags.stop,
        min_new_tokens=flags.min_new_tokens,
    )
    engine = Engine(template, config, learns=False)

    def answer(
        prompts: list[list[int]], n: int = 1, seed: int = 0, seeds: list | None = None
    ) -> list[Sample]:
        own = seeds or [[seed, k] for k in range(n * len(prompts))]
        states = [np.random.SeedSequence(words).generate_state(1) for words in own]
        numbers = [int(state[0]) for state in states]
        return engine.sample(prompts, numbers, n, flags.temperature)

    return answer


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, __doc__, argv)
    validate(flags)
    hub.resolve(flags, ("model",))
    device = pick_device(flags.device)
    best_dtype = "bf16" if device == "cuda" else "fp32"
    dtype = DTYPES[best_dtype if flags.dtype == "auto" else flags.dtype]
    tokenizer = load_tokenizer(flags.model)
    template = Template(flags.template, tokenizer, read_kwargs(flags.template_kwargs))
    rows: list[dict] = [{"prompt": flags.prompt}] if flags.prompt else []
    if flags.data:
        rows = list(read_rows(flags.data))[: flags.limit or None]
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            prompt = conditioned(prompt_in(row, template.plain), flags)
            prompts.append(template.prompt(prompt))
        except ValueError as error:
            raise ValueError(f"row {number} of {flags.data or '--prompt'}: {error}") from None
    if flags.rollout_url:
        answer = from_servers(template, flags)
    else:
        answer = from_model(template, flags, device, dtype)
    if flags.chat:
        chat(answer, template, flags)
        return
    if flags.prompt:
        answers = answer(prompts, seed=flags.seed, n=flags.n)
        print("\n\n".join(cut_at(tokenizer.decode(a.tokens), flags.stop).strip() for a in answers))
        return
    answer_file(answer, tokenizer.decode, rows, prompts, flags)


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
