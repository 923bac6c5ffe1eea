"""A language model as judge: --reward judge:DIR, or judge:DIR:TEMPLATE.json.

judge:http://host:8000, also with :TEMPLATE.json, asks a server instead (sampling/judge_server.py).

The template is a JSON object that a user edits (examples: sampling/judges/):

    question   text with {prompt}, {response}, {criterion}; with {other} too, it compares answers
    labels     what the judge may reply -> its value, such as {"1": 1, ..., "5": 5}
    criteria   a list of questions, a rubric; the value is their mean

Nothing is sampled or parsed. The judge scores every label as its reply; an answer's value is the
expectation Σ p(label) value(label) / Σ p(label). `mass`, Σ p(label), says how likely the judge
replies with a label at all: where it is below LEAST_MASS the reply would be unparsable, which is
counted and reported; the value stays the expectation over the labels, never silently 0.

A template that compares asks in both orders, since judges prefer a place: the value of an answer
against another is the mean of value(A, B) and 1 - value(B, A), with labels 1 (the first is better),
0 and, for a tie, 0.5. As a reward an answer gets its mean value against its siblings.

Letters: n prompts, G answers each, L labels, C criteria.
"""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.dataset import from_trees
from data.templates import Template
from data.tokenizer import load_tokenizer
from parallel import Mesh
from sampling.scoring import score_trees, with_whole_experts
from weights.folder import load_model

LEAST_MASS = 0.1  # of all labels together; below it the judge would seldom reply with one
DEFAULT = Path(__file__).parent / "judges" / "pointwise.json"


# questions -> the log-prob of every label as the reply, (questions, L) fp64; None on ranks without:
# on other pipeline stages, and on all but one of the ranks that would ask a server the same.
Asker = Callable[[list[str]], np.ndarray | None]


class JudgeTemplate(NamedTuple):
    """Questions of a judge, and the worth of its replies."""

    question: str
    labels: dict[str, float]
    criteria: list[str]

    @property
    def compares(self) -> bool:
        """Return whether a question shows two answers."""
        return "{other}" in self.question

    def ask(self, criterion: str, prompt: str, response: str, other: str = "") -> str:
        """Return a question. Braces in the texts stay what they are."""
        texts = {"prompt": prompt, "response": response, "other": other, "criterion": criterion}
        parts = self.question.split("{")
        result = parts[0]
        for part in parts[1:]:
            name, closed, rest = part.partition("}")
            known = closed and name in texts
            result += texts[name] + rest if known else "{" + part
        return result


class Verdicts(NamedTuple):
    """Values of questions, averaged over the criteria, and the least mass of its labels."""

    values: np.ndarray  # (questions,)
    mass: np.ndarray  # (questions,)


@dataclass
class Judge:
    """A judging model with its template; counts what it was asked."""

    template: JudgeTemplate
    ask: Asker
    counts: dict[str, int] = field(default_factory=lambda: {"asked": 0, "unparsable": 0})

    def values(self, questions: Sequence[tuple[str, str, str]]) -> Verdicts:
        """Return the value of each (prompt, response, other) and its mass. Collective.

        Only the ranks that have log-probs have values. A label with log-prob -inf was not seen;
        without any, a question's value is the mean of the labels'.
        """
        criteria = self.template.criteria
        worth = np.array(list(self.template.labels.values()), np.float64)  # (L,)
        texts = [self.template.ask(c, *question) for question in questions for c in criteria]
        logps = self.ask(texts)  # (questions C, L)
        if logps is None:
            return Verdicts(np.zeros(len(questions)), np.ones(len(questions)))
        top = logps.max(1, keepdims=True)
        unseen = np.isneginf(top[:, 0])
        logps = np.where(unseen[:, None], 0.0, logps)
        top = np.where(unseen[:, None], 0.0, top)
        chances = np.exp(logps - top)
        value = chances @ worth / chances.sum(1)
        mass = np.where(unseen, 0.0, chances.sum(1) * np.exp(top[:, 0]))
        value, mass = (x.reshape(len(questions), len(criteria)) for x in (value, mass))
        verdicts = Verdicts(value.mean(1), mass.min(1))
        self.counts["asked"] += len(questions)
        self.counts["unparsable"] += int((verdicts.mass < LEAST_MASS).sum())
        return verdicts

    def compare(self, pairs: Sequence[tuple[str, str, str]]) -> tuple[np.ndarray, np.ndarray]:
        """Return the values of (prompt, one, other) in both orders, each (pairs,).

        The first is the one's value in front, the second its value behind: without position bias
        they are equal.
        """
        swapped = [(prompt, other, one) for prompt, one, other in pairs]
        values = self.values([*pairs, *swapped]).values
        return values[: len(pairs)], 1 - values[len(pairs) :]

    def report(self) -> str:
        """Return a line on replies that would be unparsable."""
        asked, bad = self.counts["asked"], self.counts["unparsable"]
        return f"judge: {bad} of {asked} replies unparsable (labels below {LEAST_MASS:.0%} likely)"


def read_template(path: str | Path) -> JudgeTemplate:
    """Read a template. ValueError or OSError: what is wrong with the file, and the fix."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(content, dict) or content.keys() - {"question", "labels", "criteria"}:
        raise ValueError(f"{path} must be an object with question, labels and criteria")
    question, labels = content.get("question"), content.get("labels")
    criteria = content.get("criteria", [""])
    if not isinstance(question, str) or "{response}" not in question:
        raise ValueError(f"{path}: question must be a text with {{prompt}} and {{response}}")
    good = isinstance(labels, dict) and len(labels) > 1 and all(labels)
    if not good or not all(type(value) in (int, float) for value in labels.values()):
        raise ValueError(f"{path}: labels must map two or more replies to numbers")
    if not isinstance(criteria, list) or not criteria or not all(type(c) is str for c in criteria):
        raise ValueError(f"{path}: criteria must be a list of texts")
    if any(criteria) and "{criterion}" not in question:
        raise ValueError(f"{path}: the question shows no {{criterion}}: add it")
    template = JudgeTemplate(question, {k: float(v) for k, v in labels.items()}, criteria)
    if template.compares and not {0.0, 1.0} <= set(labels.values()) <= {0.0, 0.5, 1.0}:
        raise ValueError(
            f"{path} compares two answers: labels must be worth 1 (the first is better), 0, and "
            "0.5 for a tie"
        )
    return template


def load_judge(
    folder: str,
    template: str | Path = DEFAULT,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_tokens: int = 8192,
    mesh: Mesh = Mesh(),  # noqa: B008 - a mesh of one never changes
    chat: str = "auto",
) -> Judge:
    """Load the folder of a language model as judge. chat: its chat template.

    ValueError: two labels that cannot be told apart by their tokens.
    """
    read = read_template(template)
    tokenizer = load_tokenizer(folder)
    labels = [list(tokenizer.encode(label)) for label in read.labels]
    for i, one in enumerate(labels):
        for k, other in enumerate(labels):
            if i != k and other[: len(one)] == one:
                names = list(read.labels)
                raise ValueError(
                    f"{template}: label {names[k]!r} begins with {names[i]!r} for this tokenizer: "
                    "choose labels of which none begins another"
                )
    alone = with_whole_experts(mesh)  # ranks ask one by one
    model = load_model(folder, dtype, device, mesh=alone).requires_grad_(False)
    written = Template(chat, tokenizer)
    answers = [(label, [1] * len(label)) for label in labels]

    def ask(questions: list[str]) -> np.ndarray | None:
        trees = from_trees((written.prompt(question), answers) for question in questions)
        scores = score_trees(model, trees, max_tokens)
        return np.stack(scores).astype(np.float64) if mesh.last_stage else None

    return Judge(read, ask)


def split_name(argument: str) -> tuple[str, str | Path]:
    """Return folder or address, and template, of what stands behind judge: in --reward."""
    if address := re.fullmatch(r"(https?://.+?)(?::([^:]+\.json))?", argument):
        return address[1], address[2] or DEFAULT
    if Path(argument).is_dir():
        return argument, DEFAULT
    folder, _, template = argument.rpartition(":")
    if folder and Path(folder).is_dir():
        return folder, template
    raise ValueError(
        f"--reward judge:{argument} names no folder of a model: use judge:DIR, "
        "judge:DIR:TEMPLATE.json or judge:http://host:8000"
    )


def text_of(prompt: str | list) -> str:
    """Return a prompt as the judge reads it: the text, or the turns with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def judge_rewards(judge: Judge, prompts: list, responses: list[str], group: int) -> np.ndarray:
    """Return the rewards of G = group answers to each prompt, (n G,). Collective.

    A template that compares gives an answer's mean value against its siblings, in both orders.
    """
    texts = [text_of(prompt) for prompt in prompts]
    if not judge.template.compares:
        return judge.values([(p, r, "") for p, r in zip(texts, responses)]).values
    if group < 2:
        raise ValueError(
            "a judge that compares needs two answers to each prompt: --group-size 2 or more, and "
            "for --eval-data a template without {other}"
        )
    pairs, places = [], []
    for start in range(0, len(responses), group):
        for i in range(start, start + group):
            for k in range(i + 1, start + group):
                pairs.append((texts[i], responses[i], responses[k]))
                places.append((i, k))
    first, second = judge.compare(pairs)
    value = (first + second) / 2
    rewards = np.zeros(len(responses))
    for (i, k), won in zip(places, value):
        rewards[i] += won / (group - 1)
        rewards[k] += (1 - won) / (group - 1)
    return rewards


# ---- agreement with known truth ----------------------------------------------------------------


class Agreement(NamedTuple):
    """Agreement of a judge that compares with gold pairs, and with itself."""

    both: float  # share of pairs whose better answer wins over both orders; a tie counts half
    first: float  # the same where the better answer stands in front
    second: float  # the same where it stands behind
    consistent: float  # share of pairs with the same winner in both orders
    bias: float  # mean value of the answer in front, less 0.5: above 0, the first is favoured


def agreement(ahead: np.ndarray, behind: np.ndarray) -> Agreement:
    """Return the agreement on pairs. ahead, behind: the better answer's value in either place."""

    def wins(values: np.ndarray) -> float:
        return float(((values > 0.5) + 0.5 * (values == 0.5)).mean())

    same = np.sign(ahead - 0.5) == np.sign(behind - 0.5)
    bias = float((ahead - behind).mean() / 2)
    return Agreement(wins((ahead + behind) / 2), wins(ahead), wins(behind), same.mean(), bias)


def ranked_right(scores: np.ndarray, labels: np.ndarray) -> float:
    """Return the chance that a good answer scores above a bad one (AUC); a tie counts half."""
    good, bad = scores[labels], scores[~labels]
    above = good[:, None] - bad[None, :]
    return float(((above > 0) + 0.5 * (above == 0)).mean())
