"""Sampling with a KV cache: rollouts for the scripts, a prompt or a chat for a person.

    python generate.py --model DIR --prompt "Where does Ada live?"
    python generate.py --model DIR --data prompts.jsonl --out answers.jsonl --temperature 0.7 --n 4
    python generate.py --model steerlm/final --prompt "Where does Ada live?" --attributes "helpfulness:4,verbosity:1"
    python generate.py --model DIR --chat

The file form reads {"prompt": text or messages} rows (other keys stay) and writes each with a "response", or with
"responses" where --n asks for several. A sample is a function of its prompt and its seed: not of the batch it was
computed in, nor of the rank.

A fixed number of rows is computed at a time; a row whose answer ends takes the next sample at once, whose prompt rides
along with the other rows' next token. The n samples of a prompt share its computation, and long prompts are kept once.

PLUMB_DECODE=static pads every step to fixed shapes, PLUMB_DECODE=graphs also replays it as a CUDA graph. The first is
tested; the second has NEVER RUN, for want of a GPU, and is therefore off unless asked for.

Letters: R rows, P prompts in the cache, N rows of one prompt, L length, V vocabulary, H query heads, G key/value heads,
E head size.
"""

import functools
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal

import torch

from config import parse
from data import attributes
from data.rows import read_rows, write_rows
from data.templates import Template
from data.tokenizer import load_tokenizer
from sampling.sampler import Sample, generate
from weights.folder import DTYPES, load_model


@dataclass
class Flags:
    """Flags of generate.py."""

    model: str = ""  # Hugging Face folder
    prompt: str = ""  # one prompt, answered on the screen
    data: str = ""  # or a JSONL file of rows with a "prompt"
    out: str = ""  # where the rows go, each with a "response", or "responses" with --n
    chat: bool = False  # or a conversation on the screen; an empty line ends it
    template: Literal["auto", "plain", "chatml", "zephyr", "llama2", "llama3"] = (
        "auto"  # as in training
    )
    attributes: str = (
        ""  # for a model of train_steerlm.py: the answer to ask for, "helpfulness:4,verbosity:1"
    )
    n: int = 1  # answers to each prompt
    temperature: float = 0.7  # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int = 0  # only the k likeliest tokens; 0 = all
    top_p: float = 1.0  # only the likeliest tokens that make up this much probability
    max_new_tokens: int = 256  # longest answer
    stop: list[str] = field(
        default_factory=list
    )  # texts that end an answer, and are left out of it
    no_repeat: int = (
        0  # cut an answer whose last so many tokens go round in circles, 32 is careful; 0 = never
    )
    batch_size: int = 64  # answers in progress at a time: lower it when memory runs out
    seed: int = 0  # of the samples
    limit: int = 0  # only the first rows; 0 = all
    dtype: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # auto: bf16 on GPUs, else fp32


def steered(prompt: str | list, flags: Flags) -> str | list:
    """The prompt with its attribute line, where one is asked for. ValueError: the model knows none, or not this one."""
    if not flags.attributes:
        return prompt
    trained = attributes.load(flags.model)
    if not trained:
        raise ValueError(
            f"--attributes: {flags.model} was not trained with any: train_steerlm.py does that"
        )
    return attributes.condition(
        prompt, attributes.read_line(flags.attributes, trained[1]), trained[0]
    )


def before(text: str, stops: Collection[str]) -> str:
    """A text up to the first of some others in it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class Stream:
    """Prints an answer as its tokens come, up to the first stop text."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Collection[str]):
        self.decode, self.stops, self.ids, self.text, self.shown = decode, stops, [], "", 0

    def __call__(self, _: int, token: int) -> None:
        self.ids.append(token)
        self.text = before(self.decode(self.ids), self.stops)
        if not self.text.endswith("\ufffd"):  # the rest of the character is still to come
            self.flush()

    def flush(self) -> None:
        print(self.text[self.shown :], end="", flush=True)
        self.shown = len(self.text)


def chat(answer: Callable[..., list[Sample]], template: Template, flags: Flags) -> None:
    """A conversation on the screen: answer(prompts, seed=, on_token=) is asked at every turn."""
    plain = (
        " The template is plain and has no turns: every question stands alone."
        if template.plain
        else ""
    )
    print(f"An empty line ends the chat.{plain}")
    messages = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        messages = [*([] if template.plain else messages), {"role": "user", "content": question}]
        stream = Stream(template.tokenizer.decode, flags.stop)
        answer(
            [template.prompt(steered(messages, flags))],
            seed=flags.seed + len(messages),
            on_token=stream,
        )
        stream.flush()
        print()
        messages.append({"role": "assistant", "content": stream.text.strip()})


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, __doc__, argv)
    if (
        not flags.model
        or bool(flags.prompt) + bool(flags.data) + flags.chat != 1
        or bool(flags.data) != bool(flags.out)
    ):
        raise ValueError(
            "generate.py needs --model, and one of --prompt TEXT, --data FILE with --out FILE, and --chat"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[flags.dtype if flags.dtype != "auto" else "bf16" if device == "cuda" else "fp32"]
    tokenizer = load_tokenizer(flags.model)
    template = Template(flags.template, tokenizer)
    rows = [{"prompt": flags.prompt}] if flags.prompt else []
    if flags.data:
        rows = list(read_rows(flags.data))[: flags.limit or None]
    if lacking := [i for i, row in enumerate(rows, 1) if not row.get("prompt")]:
        raise ValueError(f"row {lacking[0]} of {flags.data} has no prompt")
    prompts = [template.prompt(steered(row["prompt"], flags)) for row in rows]
    model = load_model(flags.model, dtype, device)
    answer = functools.partial(
        generate, model, max_new_tokens=flags.max_new_tokens, temperature=flags.temperature, top_k=flags.top_k,
        top_p=flags.top_p, stop_ids=template.stop_ids, batch_size=flags.batch_size, stop_texts=flags.stop,
        decode=tokenizer.decode, no_repeat=flags.no_repeat,
    )  # fmt: skip
    if flags.chat:
        chat(answer, template, flags)
        return
    answers = answer(prompts, seed=flags.seed, n=flags.n)
    texts = [before(tokenizer.decode(found.tokens), flags.stop).strip() for found in answers]
    if flags.prompt:
        print("\n\n".join(texts))
        return
    groups = [texts[i : i + flags.n] for i in range(0, len(texts), flags.n)]
    found = ({"response": group[0]} if flags.n == 1 else {"responses": group} for group in groups)
    write_rows(flags.out, ({**row, **more} for row, more in zip(rows, found)))
    ended = sum(found.ended for found in answers)
    print(f"{len(texts)} answers in {flags.out}, {ended} of them ended by themselves")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
