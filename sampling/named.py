"""Named rewards: what a reward function returned, checked, and one number made of several.

    values = by_response(name, returned, G, response)   of a function that sees a group
    rewards = as_array(name, values, responses)         numbers, or a column under each name
    total(columns, read_weights(["correct:2", "brief:0.5"]))

Letters: R responses, G of them in a group.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from config import RolloutConfig


def sees_groups(function: Callable) -> bool:
    """Return True if the first parameter of a function is called `prompts`."""
    try:
        return next(iter(inspect.signature(function).parameters), "") == "prompts"
    except (TypeError, ValueError):  # a callable without a signature
        return False


def by_response(name: str, value: Any, size: int, response: str) -> list:
    """Return the rewards of a group, lists of numbers or {name: list}, response by response.

    ValueError: they are not one for each response.
    """
    columns = value if isinstance(value, dict) else {"": value}
    try:
        columns = {key: list(column) for key, column in columns.items()}
        complete = bool(columns) and all(len(column) == size for column in columns.values())
    except TypeError:
        complete = False
    if not complete:
        raise ValueError(
            f"--reward {name} returned {str(value)[:80]!r} for a group of {size} responses: it "
            f"must return a list of {size} numbers, or such a list for each name"
        )
    if not isinstance(value, dict):
        return columns[""]
    return [{key: column[i] for key, column in columns.items()} for i in range(size)]


def as_array(name: str, values: list, responses: list[str]) -> np.ndarray:
    """Return rewards as an array of numbers, (R,), or of named columns.

    ValueError names the response whose reward is not a finite number, or has other names.
    """
    names = list(values[0]) if values and isinstance(values[0], dict) else None
    kind = [(str(key), np.float64) for key in names] if names else np.float64
    rewards = np.zeros(len(values), kind)
    for i, (value, response) in enumerate(zip(values, responses)):
        same = list(value) == names if isinstance(value, dict) else names is None
        if not same or value == {}:
            raise ValueError(
                f"--reward {name} returned {value!r} for {response[:80]!r}, but "
                f"{values[0]!r} for another response: return the same names every time"
            )
        for key in names or [None]:
            number = value if key is None else value[key]
            try:
                number = float(number)
            except (TypeError, ValueError):
                raise ValueError(
                    f"--reward {name} returned {value!r}, not a number, for {response[:80]!r}"
                ) from None
            if not math.isfinite(number):
                raise ValueError(
                    f"--reward {name} returned {value!r} for {response[:80]!r}: it must be finite"
                )
            if key is None:
                rewards[i] = number
            else:
                rewards[str(key)][i] = number
    return rewards


def total(named: dict[str, np.ndarray], weights: dict[str, float]) -> np.ndarray:
    """Return the weighted sum of named rewards, (R,): without weights their plain sum.

    With some weights given, names without one are only logged. ValueError: an unknown name.
    """
    unknown = weights.keys() - named.keys()
    if unknown:
        have = f"has {', '.join(named)}" if named else "is one number"
        raise ValueError(
            f"--reward-weights names {', '.join(sorted(unknown))}, but the reward {have}"
        )
    used = weights or dict.fromkeys(named, 1.0)
    terms = [weight * named[name] for name, weight in used.items()]
    return np.sum(terms, axis=0)


def read_weights(words: list[str]) -> dict[str, float]:
    """Return {name: weight} of --reward-weights name:weight ... ValueError says what is wrong."""
    weights: dict[str, float] = {}
    for word in words:
        name, colon, number = word.rpartition(":")
        try:
            weights[name] = float(number)
        except ValueError:
            colon = ""
        if not colon or not name or not math.isfinite(weights[name]):
            raise ValueError(f"--reward-weights {word}: write NAME:WEIGHT, as in correct:2")
    return weights


def totals(scores: list, config: RolloutConfig) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the rewards of R responses, (R,), and the named ones that they are made of, (R,) each.

    scores: numbers, or {name: number} for each response. ValueError: --reward-weights names others.
    """
    named: dict[str, np.ndarray] = {}
    if isinstance(scores[0], dict):
        if any(score.keys() != scores[0].keys() for score in scores):
            raise ValueError("the reward returned other names for other prompts: always the same")
        named = {name: np.array([score[name] for score in scores]) for name in scores[0]}
    if named or config.reward_weights:
        return total(named, read_weights(config.reward_weights)), named
    return np.array(scores), named
