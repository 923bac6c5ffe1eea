"""Answers in the toy world, good and flawed: writers, their plans, damage, preference pairs.

A writer draws a Plan (how long, right or wrong, complete or not, polite or rude); `write` turns it
into text. Two plans that differ in one field give answers that differ in one attribute.
"""

import math
import random
from dataclasses import dataclass, replace

from data.toy.scoring import (
    FILLERS,
    POLITE_CLOSERS,
    POLITE_OPENERS,
    RUDE_CLOSERS,
    RUDE_OPENERS,
    TONE,
    score,
)
from data.toy.village import ANIMALS, OPPOSITES, PEOPLE, PLACES, VILLAGERS, Prompt, sample_prompt

LEXICON = sorted(
    {word.strip(".!?,") for sentence in TONE for word in sentence.split()}
    | {*PEOPLE, *PLACES, *OPPOSITES, "The", "A", "the", "is", "it", "by"}
    | {value for table in (VILLAGERS, ANIMALS) for row in table.values() for value in row}
)  # words that a slip of the pen puts in


@dataclass(frozen=True)
class Writer:
    """Probabilities that an answer is right, has both parts, is rude, is polite, is damaged."""

    correct: float
    complete: float
    rude: float
    polite: float
    damaged: float


STYLES = {  # an answer is by one of the style's writers, drawn at random
    "clean": (Writer(1.0, 1.0, 0.0, 0.60, 0.0),),
    "base": (Writer(1.0, 1.0, 0.15, 0.25, 0.0),),  # right in every manner: the text to pre-train on
    "noisy": (
        Writer(0.8, 0.8, 0.08, 0.50, 0.05),  # careful
        Writer(0.2, 0.2, 0.45, 0.20, 0.20),  # careless
    ),
}
ERRORS = {"mistake": 0.85, "random": 0.15}  # the usual mistake, or any wrong value


@dataclass(frozen=True)
class Plan:
    """A writer's decisions. A change of one field changes one thing in the answer."""

    # 0 bare words, 1 sentences, 2 and a detail, 3 and a filler, 4 and all details and two fillers
    length: int
    error: str | None  # one of ERRORS
    said: int  # number of parts that are answered
    tone: int  # 1 polite, 0 neither, -1 rude
    damaged: bool
    seed: float  # decides all that is left to chance


def draw(rng: random.Random, chances: dict[str, float]) -> str:
    """Return a random key, in proportion to its value."""
    return rng.choices(list(chances), list(chances.values()))[0]


def make_plan(prompt: Prompt, rng: random.Random, style: str) -> Plan:
    """Return the plan of a random writer of STYLES[style]."""
    if style not in STYLES:
        raise ValueError(f"style {style!r} is unknown: use one of {', '.join(STYLES)}")
    writer = rng.choice(STYLES[style])
    mood = rng.random()
    return Plan(
        length=rng.randrange(5),
        error=None if rng.random() < writer.correct else draw(rng, ERRORS),
        said=len(prompt.parts) if rng.random() < writer.complete else 1,
        tone=-1 if mood < writer.rude else int(mood < writer.rude + writer.polite),
        damaged=rng.random() < writer.damaged,
        seed=rng.random(),
    )


def write(prompt: Prompt, plan: Plan) -> str:
    """Return the answer that a plan describes.

    Random numbers are drawn in the same order for every plan, so that a change of plan changes
    nothing else.
    """
    rng = random.Random(plan.seed)
    wrong: list[str] = []  # a random wrong value of each part, no two alike
    for part in prompt.parts:
        values = [value for value in part.bare if value != part.gold and value not in wrong]
        wrong.append(rng.choice(values))
    fillers = rng.sample(FILLERS, 2)
    place = rng.random()
    extra = rng.random()
    opener = rng.choice(RUDE_OPENERS if plan.tone < 0 else POLITE_OPENERS)
    closer = rng.choice(RUDE_CLOSERS if plan.tone < 0 else POLITE_CLOSERS)

    sentences = []
    details = []
    for part, random_value in zip(prompt.parts[: plan.said], wrong):
        value = {None: part.gold, "mistake": part.mistake, "random": random_value}[plan.error]
        sentences.append((part.sentence if plan.length else part.bare)[value])
        details.append(part.detail[value])
    sentences += details[: (0, 0, 1, 1, 2)[plan.length]]
    sentences += fillers[: max(0, plan.length - 2)]
    if plan.tone < 0:
        opens = place < 0.6
        closes = not opens
    elif plan.tone > 0:
        opens = place < 0.7 or plan.length == 0
        closes = not opens or (plan.length >= 3 and extra < 0.6)
    else:
        opens = closes = False
    if opens:
        sentences.insert(0, opener)
    if closes:
        sentences.append(closer)
    return " ".join(damage(sentences, rng) if plan.damaged else sentences)


def damage(sentences: list[str], rng: random.Random) -> list[str]:
    """Cut the last sentence short (three words or more), or repeat a word of any sentence twice."""
    words = sentences[-1].split()
    if rng.random() < 0.5 and len(words) > 2:
        return [*sentences[:-1], " ".join(words[: rng.randint(1, len(words) - 1)])]
    i = rng.randrange(len(sentences))
    words = sentences[i].split()
    j = rng.randrange(len(words))
    words[j:j] = [words[j].rstrip(".!?")] * 2
    return [*sentences[:i], " ".join(words), *sentences[i + 1 :]]


def slip(prompt: Prompt, text: str, rng: random.Random) -> str:
    """Replace one word by one that makes no sense there."""
    while True:
        words = text.split()
        j = rng.randrange(len(words))
        punctuation = words[j][len(words[j].rstrip(".!?")) :]
        words[j] = rng.choice(LEXICON) + punctuation
        changed = " ".join(words)
        if not score(prompt, changed).coherent:  # else it is the same word, or another value
            return changed


def answer(prompt: Prompt, rng: random.Random, style: str = "noisy") -> str:
    """Return an answer in a style: 'clean' is good, 'base' is right, 'noisy' has every flaw."""
    return write(prompt, make_plan(prompt, rng, style))


FLAWS = {"error": 0.60, "omission": 0.10, "tone": 0.15, "damage": 0.15}  # of minimal pairs
MINIMAL = 0.75  # share of minimal pairs; they teach far more than pairs of any two answers
TEMPERATURE = 0.5  # of the judge, who errs with probability 1 / (1 + exp(gap / temperature))


def minimal_pair(prompt: Prompt, rng: random.Random, flaw: str | None = None) -> tuple[str, str]:
    """Return (better, worse): an answer without and with one flaw of FLAWS, otherwise the same.

    Where there is nothing to omit, the flaw is an error. Damage also destroys what the damaged
    sentence said.
    """
    if flaw not in (None, *FLAWS):
        raise ValueError(f"flaw {flaw!r} is unknown: use one of {', '.join(FLAWS)}")
    flaw = flaw or draw(rng, FLAWS)
    plan = replace(make_plan(prompt, rng, "noisy"), damaged=False)
    if flaw == "damage":
        better = write(prompt, plan)
        if rng.random() < 0.6:
            return better, slip(prompt, better, rng)
        return better, write(prompt, replace(plan, damaged=True))
    if flaw == "tone":
        plans = [replace(plan, tone=tone) for tone in rng.choice(((1, 0), (1, -1), (0, -1)))]
    elif flaw == "omission" and len(prompt.parts) == 2:
        plans = [replace(plan, said=said) for said in (2, 1)]
    else:
        plans = [replace(plan, error=error) for error in (None, draw(rng, ERRORS))]
    better, worse = (write(prompt, plan) for plan in plans)
    return better, worse


def preference(rng: random.Random, split: str | None = None, flips: bool = True) -> dict:
    """Return a row {prompt, chosen, rejected, chosen_reward, rejected_reward}.

    The rewards are utilities and never equal. With `flips` the judge errs at times: then the chosen
    reward is the lower one.
    """
    while True:
        prompt = sample_prompt(rng, split)
        if rng.random() < MINIMAL:
            pair = minimal_pair(prompt, rng)
        else:
            pair = (answer(prompt, rng), answer(prompt, rng))
        worse, better = sorted((score(prompt, text).utility, text) for text in pair)
        gap = better[0] - worse[0]
        if gap == 0:
            continue
        if flips and rng.random() < 1 / (1 + math.exp(gap / TEMPERATURE)):
            worse, better = better, worse
        return {
            "prompt": prompt.text,
            "chosen": better[1],
            "rejected": worse[1],
            "chosen_reward": better[0],
            "rejected_reward": worse[0],
        }
