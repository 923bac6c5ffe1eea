"""Principles and questions of Constitutional AI (arXiv 2212.08073), and the model that is asked.

    [principles]           data/constitution.txt is an example with comments
    One rule a line.
    [critique]
    ... {prompt} ... {response} ... {principle} ...
    [revise]
    ... {response} ... {critique} ... {principle} ...
    [compare]
    ... {first} ... {second} ... {principle} ...
    [choices]
    A
    B

A speaker answers questions: a model of this process, or a server that holds the same one.

Letters: Q questions.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from config import RolloutConfig
from data.dataset import from_trees
from data.templates import Template
from model import GPT
from sampling.engine import Engine
from sampling.sampler import Sample
from sampling.scoring import score_trees
from sampling.source import Sampler, local_sampler
from sampling.together import together

# (questions, replies), ids each -> the log-prob of every reply to every question, (Q, replies).
ReplyLogps = Callable[[list[list[int]], list[list[int]]], np.ndarray]

FIELD = re.compile(r"\{(\w+)\}")
# section: the fields that its text must have, and those that it may have
QUESTIONS = {
    "critique": ({"response", "principle"}, {"prompt"}),
    "revise": ({"response", "critique", "principle"}, {"prompt"}),
    "compare": ({"first", "second", "principle"}, {"prompt"}),
}
SECTIONS = ("principles", *QUESTIONS, "choices")


class Constitution(NamedTuple):
    """Principles, the questions about them, and the two replies to a comparison."""

    principles: list[str]
    critique: str
    revise: str
    compare: str
    choices: list[str]  # the first answer is better; the second is


def fill(question: str, **texts: str) -> str:
    """Return a question with its fields filled in. Braces in the texts stay what they are."""
    return FIELD.sub(lambda match: texts.get(match[1], match[0]), question)


def read_constitution(path: str | Path) -> Constitution:
    """Read a file of principles. ValueError or OSError: what is wrong with it, and the fix."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 at byte {error.start}: save it as UTF-8") from None
    sections = _sections(text, path)
    if missing := [name for name in SECTIONS if not "".join(sections.get(name, [])).strip()]:
        raise ValueError(
            f"{path} has no [{missing[0]}], or nothing in it: data/constitution.txt shows all "
            f"sections: {', '.join(SECTIONS)}"
        )
    principles = [line.strip() for line in sections["principles"] if line.strip()]
    if twice := [one for one in principles if principles.count(one) > 1]:
        raise ValueError(f"{path}: the principle {twice[0]!r} stands there twice: keep one")
    choices = [line.rstrip() for line in sections["choices"] if line.strip()]
    if len(choices) != 2 or choices[0] == choices[1]:
        raise ValueError(f"{path}: [choices] needs two different replies, one a line")
    questions = {name: "\n".join(sections[name]).strip() for name in QUESTIONS}
    for name, question in questions.items():
        _check_fields(name, question, path)
    return Constitution(principles, choices=choices, **questions)


def _sections(text: str, path: str | Path) -> dict[str, list[str]]:
    """Return the lines of each section, without comments. ValueError: a line in none of them."""
    sections: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        line = line.removesuffix("\r")
        if line.startswith("#"):
            continue
        if name := re.fullmatch(r"\[(.*)\]\s*", line):
            if name[1] not in SECTIONS:
                raise ValueError(
                    f"{path}:{number}: there is no section [{name[1]}], only "
                    f"{', '.join(SECTIONS)}: write \\[ where it is a text"
                )
            if name[1] in sections:
                raise ValueError(f"{path}:{number}: [{name[1]}] stands there twice: keep one")
            lines = sections[name[1]] = []
            continue
        if lines is None:
            if line.strip():
                raise ValueError(f"{path}:{number}: a text before the first section: open one")
            continue
        lines.append(line[1:] if line.startswith(("\\#", "\\[")) else line)
    return sections


def _check_fields(name: str, question: str, path: str | Path) -> None:
    """Raise ValueError where a question lacks a field, or has one that nothing fills in."""
    needed, allowed = QUESTIONS[name]
    fields = set(FIELD.findall(question))
    if missing := sorted(needed - fields):
        raise ValueError(f"{path}: [{name}] shows no {{{missing[0]}}}: add it")
    if unknown := sorted(fields - needed - allowed):
        known = ", ".join(f"{{{one}}}" for one in sorted(needed | allowed))
        raise ValueError(f"{path}: nothing fills in {{{unknown[0]}}} in [{name}]: it has {known}")


# ---- the model that is asked -------------------------------------------------------------------


class Speaker(NamedTuple):
    """A model that answers questions and says how likely a reply is."""

    template: Template
    sample: Sampler
    reply_logps: ReplyLogps
    temperature: float

    def answer(self, questions: list, seeds: list[int]) -> tuple[list[str], list[bool]]:
        """Return an answer to each question, texts or messages, and whether each has ended.

        seeds: one a question. An answer depends on its question and its seed alone.
        """
        ids = [self.template.prompt(question) for question in questions]
        samples: list[Sample] = self.sample(ids, seeds, 1, self.temperature)
        texts = [self.template.tokenizer.decode(one.tokens).strip() for one in samples]
        return texts, [one.ended for one in samples]

    def choose(self, questions: list[str], choices: list[str]) -> np.ndarray:
        """Return the log-prob of each choice as the reply to each question, (Q, 2) fp64."""
        ids = [self.template.prompt(question) for question in questions]
        encode = self.template.tokenizer.encode
        return self.reply_logps(ids, [list(encode(choice)) for choice in choices])


def check_choices(constitution: Constitution, template: Template, path: str) -> None:
    """Raise ValueError where the tokens of one choice begin the other's."""
    one, two = (list(template.tokenizer.encode(choice)) for choice in constitution.choices)
    if one[: len(two)] == two[: len(one)]:
        raise ValueError(
            f"{path}: one of the choices {constitution.choices} begins the other for this "
            "tokenizer: choose others"
        )


def local_speaker(
    model: GPT, template: Template, config: RolloutConfig, max_tokens: int
) -> Speaker:
    """Return a model of this process as speaker."""

    def reply_logps(questions: list[list[int]], replies: list[list[int]]) -> np.ndarray:
        answers = [(reply, [1] * len(reply)) for reply in replies]
        trees = from_trees((ids, answers) for ids in questions)
        return np.stack(score_trees(model, trees, max_tokens)).astype(np.float64)

    sampler = local_sampler(model, template, config)
    return Speaker(template, sampler, reply_logps, config.temperature)


def remote_speaker(engine: Engine, template: Template, config: RolloutConfig) -> Speaker:
    """Return the servers of --rollout-url as speaker."""

    def logp(asked: tuple[int, list[int], list[int]]) -> float:
        place, question, reply = asked
        k, logps = engine.ask(place, lambda server: server.logps(question + reply))
        value = sum(logps[-len(reply) :])
        if np.isnan(value):
            raise OSError(
                f"--rollout-url {engine.servers[k].url} reports no log-probs of a prompt's tokens, "
                "which comparisons need: use --pairs 0, or another server"
            )
        return value

    def reply_logps(questions: list[list[int]], replies: list[list[int]]) -> np.ndarray:
        pairs = [(question, reply) for question in questions for reply in replies]
        values = together(logp, [(i, *pair) for i, pair in enumerate(pairs)])
        return np.array(values, np.float64).reshape(len(questions), len(replies))

    return Speaker(template, engine.sample, reply_logps, config.temperature)
