"""What a sampled answer is worth: a reward model, a function of yours, or a rule.

    --reward rm/final                   a reward-model folder, as train_rm.py writes it
    --reward my_rewards.py:helpful      def helpful(prompt, response, row) -> float; the row is the data's, all of it
    --reward "exact:####"               1 if what follows the last "####" is the row's answer, else 0 (GSM8K)
    --reward "regex:^(yes|no)"          1 where the expression is found in the answer, else 0
    --reward length:50                  0 for an answer of 50 words, falling to -1 for one of none or of 100

A reward model reads the sampled tokens themselves: nothing is decoded and tokenised again.

Letters: n prompts, G samples each, R = n G.
"""

import importlib.util
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from data.dataset import Dataset
from data.templates import Template
from data.tokenizer import Tokenizer, load_tokenizer
from parallel import Mesh
from sampling.scoring import load_scorer, score_trees

# (prompts, responses, rows, trees): R prompts as the rows have them, R texts, R rows, and the same as a data set of
# token ids, n trees of G responses -> R numbers.
Reward = Callable[[list, list[str], list[dict], Dataset], np.ndarray]
TRUTH = (
    "answer",
    "solution",
    "ground_truth",
    "target",
    "response",
    "completion",
    "output",
)  # where a row has it
BUILT_IN = ("exact", "regex", "length")


def load_reward(
    name: str,
    template: Template,
    template_name: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_tokens: int = 8192,
    mesh: Mesh = Mesh(),  # noqa: B008 - a mesh of one never changes
) -> Reward:
    """The reward that --reward names; template is the policy's. ValueError or OSError says what is wrong with it.

    Every rank that shares some examples calls it on them; only a `leader`'s numbers mean anything.
    """
    kind, colon, rest = name.partition(":")
    if kind in BUILT_IN:
        return _each(name, {"exact": exact, "regex": regex, "length": length}[kind](rest), mesh)
    if name and Path(name).is_dir():
        return reward_model(name, template, template_name, dtype, device, max_tokens, mesh)
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _each(name, load_function(file, function), mesh)
    raise ValueError(
        f"--reward {name or '(missing)'} is no folder of a reward model, no file.py:function, and none of "
        + ", ".join(f"{kind}:..." for kind in BUILT_IN)
    )


def leader(mesh: Mesh) -> bool:
    """Whether this rank speaks for those that share its examples: it sees final hidden states, and is the first to."""
    return mesh.last_stage and mesh.tp_rank == mesh.cp_rank == 0


def _each(name: str, function: Callable[[str | list, str, dict], float], mesh: Mesh) -> Reward:
    """A reward from a function of one answer. ValueError names the answer whose reward is no finite number."""

    def reward(prompts: list, responses: list[str], rows: list[dict], trees: Dataset) -> np.ndarray:
        found = np.zeros(len(responses))
        if not leader(mesh):  # a judge that costs money, or has moods, is asked once
            return found
        for i, answer in enumerate(zip(prompts, responses, rows)):
            value = function(*answer)
            try:
                found[i] = float(value)
            except (TypeError, ValueError):
                raise ValueError(
                    f"--reward {name} returned {value!r}, not a number, for {answer[1][:80]!r}"
                ) from None
            if not math.isfinite(found[i]):
                raise ValueError(
                    f"--reward {name} returned {value!r} for {answer[1][:80]!r}: it must be finite"
                )
        return found

    return reward


# ---- functions of a text ---------------------------------------------------------------------------------------------


def load_function(file: str, name: str) -> Callable[[str | list, str, dict], float]:
    """A function out of a Python file of the user's, who vouches for it: the file is run."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--reward {file}:{name}: there is no file {file}")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    if str(path.parent.resolve()) not in sys.path:
        sys.path.append(
            str(path.parent.resolve())
        )  # for what it imports beside it; last, so that it hides nothing
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the file trips over is the file's
        raise ValueError(
            f"--reward {file}:{name}: {file} cannot be run: {type(error).__name__}: {error}"
        ) from error
    if not callable(getattr(module, name, None)):
        own = [k for k, v in vars(module).items() if getattr(v, "__module__", "") == spec.name]
        have = ", ".join(k for k in own if not isinstance(getattr(module, k), type))
        raise ValueError(
            f"--reward {file}:{name}: {file} has no function {name}"
            + (f", only {have}" if have else "")
        )
    return getattr(module, name)


def exact(marker: str) -> Callable[[str | list, str, dict], float]:
    """1.0 where what follows the last marker of the response, to the end of its line, is the row's answer, else 0.0.

    The row's answer is what follows the marker in its `answer` (or another key of TRUTH), or all of it where there is
    no marker. Commas in numbers, $, a final full stop and capitals do not count; 42 is 42.0.
    """
    marker = marker or "####"

    def value(text: str) -> str | float:
        said = (
            text.rpartition(marker)[2]
            .strip()
            .split("\n")[0]
            .strip()
            .rstrip(".")
            .strip("$ ")
            .casefold()
        )
        try:
            return float(said.replace(",", ""))
        except ValueError:
            return said

    def reward(prompt: str | list, response: str, row: dict) -> float:
        truth = next(
            (row[key] for key in TRUTH if isinstance(row.get(key), (str, int, float))), None
        )
        if truth is None:
            raise ValueError(
                f"--reward exact needs rows with an answer: one of {', '.join(TRUTH)}; have {', '.join(row)}"
            )
        return float(marker in response and value(response) == value(str(truth)))

    return reward


def regex(pattern: str) -> Callable[[str | list, str, dict], float]:
    """1.0 where the expression is found in the response, else 0.0; ^ and $ are its ends, a dot is any character."""
    try:
        compiled = re.compile(pattern, re.S)
    except re.error as error:
        raise ValueError(f"--reward regex:{pattern} is no regular expression: {error}") from None
    if not pattern:
        raise ValueError("--reward regex: needs an expression, as in regex:^(yes|no)")
    return lambda prompt, response, row: float(bool(compiled.search(response)))


def length(words: str) -> Callable[[str | list, str, dict], float]:
    """-|words of the response - wanted| / wanted, not below -1."""
    if not words.isdecimal() or not int(words):
        raise ValueError(f"--reward length:{words} needs a number of words, as in length:50")
    return lambda prompt, response, row: (
        -min(1.0, abs(len(response.split()) - int(words)) / int(words))
    )


# ---- a reward model --------------------------------------------------------------------------------------------------


def reward_model(
    folder: str, template: Template, template_name: str, dtype: torch.dtype, device: torch.device | str,
    max_tokens: int, mesh: Mesh,
) -> Reward:  # fmt: skip
    """A reward-model folder, which stays in memory; each answer is scored at its last token.

    ValueError: it has several outputs, or its tokenizer is not the policy's, so that it could not read the samples.
    """
    theirs = load_tokenizer(folder)
    if not same_tokens(template.tokenizer, theirs):
        raise ValueError(
            f"the reward model {folder} has another tokenizer than the policy: it cannot read the sampled tokens. "
            "Train one from the policy's family (train_rm.py), or call it from a function: --reward file.py:function"
        )
    if Template(template_name, theirs).source != template.source:
        print(
            f"warning: the reward model {folder} was made with another chat template than the policy",
            file=sys.stderr,
        )
    model, names = load_scorer(folder, dtype, device, mesh)
    if len(names) != 1:
        raise ValueError(
            f"the reward model {folder} scores {', '.join(names)}: a reward is one number"
        )
    model.requires_grad_(False)

    def reward(prompts: list, responses: list[str], rows: list[dict], trees: Dataset) -> np.ndarray:
        scores = score_trees(model, trees, max_tokens)
        if not mesh.last_stage:
            return np.zeros(len(responses))
        found = np.concatenate(scores)[:, 0].astype(np.float64)
        if not np.isfinite(found).all():
            bad = responses[int(np.flatnonzero(~np.isfinite(found))[0])]
            raise ValueError(
                f"the reward model {folder} scores {bad[:80]!r} with a number that is not finite"
            )
        return found

    return reward


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether two tokenizers give every id the same meaning. Their padding tokens and chat templates may differ."""
    if (one.size, one.bos, one.eos) != (other.size, other.bos, other.eos):
        return False
    some = range(0, one.size, max(1, one.size // 4096))
    return all(one.decode([i], False) == other.decode([i], False) for i in some)
