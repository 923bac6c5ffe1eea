r"""Rewards of sampled responses: a reward model, a Python function, or a rule.

    --reward rm/final                a reward-model folder, as train_rm.py writes it
    --reward judge:DIR               a language model as judge: sampling/judge.py
    --reward judge:http://host:8000  the same behind a server: sampling/judge_server.py
    --reward my_rewards.py:helpful   a function helpful(prompt, response, row) -> float, or
                                     helpful(prompts, responses, rows) -> list of floats: a group
    --reward "exact:####"            1 if what follows the last "####" is the row's answer, else 0
    --reward boxed:                  1 if the last \boxed{...} equals the row's answer, else 0
    --reward "regex:^(yes|no)"       1 where the expression matches in the response, else 0
    --reward length:50               0 for a response of 50 words, down to -1 for 0 or 100 words

A reward model reads the sampled token ids: nothing is decoded and tokenised again. A function sees
the response as it was sampled, spaces at its ends included, and its own copy of prompt and row. One
whose first parameter is called `prompts` sees the G responses to a prompt at once, as lists.

A function may return several named rewards, {"correct": 1.0, "brief": 0.2} (a function of a group:
a list for each name); so does a reward model with several outputs. --reward-weights correct:2
brief:0.5 makes one number of them, and each is logged as reward/NAME.

Letters: n prompts, G samples each, R = n G responses.
"""

import copy
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from decimal import Decimal
from pathlib import Path

import numpy as np
import torch

from data.dataset import Dataset
from data.templates import Template
from data.tokenizer import Tokenizer, load_tokenizer
from model import GPT
from parallel import Mesh
from sampling.judge import Judge, judge_rewards, load_judge, read_template, split_name
from sampling.judge_server import ask_server
from sampling.named import as_array, by_response, sees_groups
from sampling.scoring import load_scorer, score_trees, standardised, tail_of, with_tail

# (prompts, responses, rows, trees) -> (R,) rewards: R prompts as in the rows, R texts, R rows, and
# the same as n trees of G responses in token ids. Several named rewards are a structured array: a
# column of float64 under each name.
Reward = Callable[[list, list[str], list[dict], Dataset], np.ndarray]
# (prompt, response, row) -> the reward of one response, or {name: reward}.
RewardFunction = Callable[[str | list, str, dict], float | dict[str, float]]
# Keys of a row that may hold the true answer, in order of preference.
ANSWER_KEYS = ("answer", "solution", "ground_truth", "target", "response", "completion", "output")
RULES = ("exact", "boxed", "regex", "length")
# A number as people write it: commas, if any, between thousands.
NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)?(\.\d*)?")


def load_reward(
    name: str,
    template: Template,
    template_name: str = "auto",
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    max_tokens: int = 8192,
    mesh: Mesh = Mesh(),  # noqa: B008 - a mesh of one never changes
    over: Callable[[str], GPT] | None = None,
    read: str = "auto",
) -> Reward:
    """Return the reward that --reward names.

    template: the policy's. over: loads the folder of an adapter over a base that is in memory.
    read: where a reward model is read, see sampling.scoring.tail_of.
    Every rank that shares some examples calls the reward on them; only a `leader`'s numbers count.
    ValueError or OSError: what is wrong with the name or the folder.
    """
    kind, _, argument = name.partition(":")
    if kind in RULES:
        rule = {"exact": exact, "boxed": boxed, "regex": regex, "length": length}[kind]
        return _per_response(name, rule(argument), mesh)
    if over and name and Path(name).is_dir():
        tail = tail_of(name, ("reward",), template, read)  # an adapter on the policy's own base
        model = over(name).requires_grad_(False)
        return model_reward(model, name, max_tokens, mesh, tail, template.end)
    if name and Path(name).is_dir():
        return reward_model(name, template, template_name, dtype, device, max_tokens, mesh, read)
    if kind == "judge":
        folder, questions = split_name(argument)
        if folder.startswith(("http://", "https://")):
            return model_judge(ask_server(folder, questions, leader(mesh)))
        return model_judge(load_judge(folder, questions, dtype, device, max_tokens, mesh))
    file, colon, function = name.rpartition(":")
    if colon and file.endswith(".py"):
        return _per_response(name, load_function(file, function), mesh)
    rules = ", ".join(f"{kind}:..." for kind in RULES)
    raise ValueError(
        f"--reward {name or '(missing)'} is no folder of a reward model, no file.py:function, "
        f"no judge:DIR or judge:URL, and none of {rules}"
    )


def compares(name: str) -> bool:
    """Return whether --reward names a judge that compares two answers."""
    kind, _, argument = name.partition(":")
    return kind == "judge" and read_template(split_name(argument)[1]).compares


def model_judge(judge: Judge) -> Reward:
    """Return a judge as a reward, which reports replies that would be unparsable."""

    def reward(prompts: list, responses: list[str], rows: list[dict], trees: Dataset) -> np.ndarray:
        bad = judge.counts["unparsable"]
        rewards = judge_rewards(judge, prompts, responses, len(responses) // len(trees))
        if judge.counts["unparsable"] > bad:
            print(f"warning: {judge.report()}")
        return rewards

    return reward


def no_reward(prompts: list, responses: list, rows: list, trees: Dataset) -> np.ndarray:
    """Return 0 for every sample, (R,): a reward for methods that need none."""
    return np.zeros(len(responses))


def leader(mesh: Mesh) -> bool:
    """Return True on one rank of those that share examples: the one whose samples and scores count.

    It is the first rank of the last pipeline stage, which has the final hidden states.
    """
    return mesh.last_stage and mesh.tp_rank == mesh.cp_rank == 0


def _per_response(name: str, function: Callable, mesh: Mesh) -> Reward:
    """Return a reward that calls a function once per response or group, on the leaders only.

    ValueError names the response whose reward is not a finite number.
    """
    grouped = sees_groups(function)

    def reward(prompts: list, responses: list[str], rows: list[dict], trees: Dataset) -> np.ndarray:
        if not leader(mesh):  # a function may cost money or be random: one rank calls it
            return np.zeros(len(responses))
        group = len(responses) // len(trees) if grouped and trees is not None else len(responses)
        size = max(1, group) if grouped else 1
        values: list = []  # a number or {name: number} for each response
        for start in range(0, len(responses), size):
            part = slice(start, start + size)
            # Copies: a function that pops a key must not change what the next response sees.
            args: list = [copy.deepcopy(prompts[part]), responses[part], copy.deepcopy(rows[part])]
            try:
                value = function(*args) if grouped else function(*(one[0] for one in args))
            except (Exception, SystemExit) as error:
                place = _place(error, name.rpartition(":")[0])
                raise ValueError(
                    f"--reward {name} raised {type(error).__name__}: {error} ({place}) for "
                    f"{responses[start][:80]!r}"
                ) from error
            values += by_response(name, value, size, responses[start]) if grouped else [value]
        return as_array(name, values, responses)

    return reward


def _place(error: BaseException, file: str) -> str:
    """Return file and line that an error came from: the innermost in the user's file, if any."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    calls = traceback.extract_tb(error.__traceback__)
    own = [call for call in calls if Path(call.filename).name == Path(file).name]
    call = (own or calls)[-1]
    return f"{call.filename}, line {call.lineno}"


# ---- functions of a text ----------------------------------------------------------------------


def load_function(file: str, name: str) -> RewardFunction:
    """Load a function from a Python file. The file is executed, so it must be trusted."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--reward {file}:{name}: {file} does not exist")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look up their module
    folder = str(path.parent.resolve())
    if folder not in sys.path:
        sys.path.append(folder)  # for imports from beside the file; last, so that it hides nothing
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # anything may go wrong in the user's file
        raise ValueError(
            f"--reward {file}:{name}: {file} cannot be run: {type(error).__name__}: {error} "
            f"({_place(error, file)})"
        ) from error
    if not callable(getattr(module, name, None)):
        functions = [
            key
            for key, value in vars(module).items()
            if getattr(value, "__module__", "") == spec.name and not isinstance(value, type)
        ]
        only = f", only {', '.join(functions)}" if functions else ""
        raise ValueError(f"--reward {file}:{name}: {file} has no function {name}{only}")
    return getattr(module, name)


def exact(marker: str) -> RewardFunction:
    """Return a reward of 1.0 for the row's answer after the last marker (default ####), else 0.0.

    The response's answer is what follows its last marker, to the end of the line. The row's answer
    is what follows the marker in its `answer` (or another of ANSWER_KEYS), or the whole value if
    there is no marker. $, a final full stop, case, and commas between thousands are ignored; 42
    equals 42.0. Numbers are compared exactly, whatever their size.
    """
    marker = marker or "####"

    def answer_in(text: str) -> str | Decimal:
        line = text.rpartition(marker)[2].strip().split("\n")[0]
        answer = line.strip().rstrip(".").strip("$ ").casefold()
        is_number = NUMBER.fullmatch(answer) and any(map(str.isdecimal, answer))
        return Decimal(answer.replace(",", "")) if is_number and answer.isascii() else answer

    def reward(prompt: str | list, response: str, row: dict) -> float:
        true = answer_in(answer_of(row, "exact"))
        return float(marker in response and answer_in(response) == true)

    return reward


def answer_of(row: dict, rule: str) -> str:
    """Return the true answer in a row. ValueError: it has none of ANSWER_KEYS."""
    answers = [row[key] for key in ANSWER_KEYS if isinstance(row.get(key), (str, int, float))]
    if not answers:
        raise ValueError(
            f"--reward {rule} needs rows with an answer: one of {', '.join(ANSWER_KEYS)}; "
            f"have {', '.join(row)}"
        )
    return str(answers[0])


def boxed(argument: str) -> RewardFunction:
    r"""Return a reward of 1.0 where the last \boxed{...} equals the row's answer, else 0.0.

    Fractions, decimals, percentages and simple expressions are equal where their values are, as the
    package math-verify finds: \frac12, 0.5 and 50\%. The row's answer is what its last \boxed
    holds, or the whole value. ImportError: the package is missing.
    """
    if argument:
        raise ValueError(f"--reward boxed:{argument} takes nothing behind the colon")
    try:
        import math_verify
    except ImportError:
        raise ImportError(
            "--reward boxed: compares by the package math-verify: pip install math-verify"
        ) from None

    def parsed(answer: str) -> list:
        return math_verify.parse(f"\\boxed{{{answer}}}", parsing_timeout=None)

    def reward(prompt: str | list, response: str, row: dict) -> float:
        given, true = in_box(response), answer_of(row, "boxed")
        true = in_box(true) or true
        if given is None or not given.strip():
            return 0.0
        if "".join(given.split()) == "".join(true.split()):
            return 1.0
        return float(math_verify.verify(parsed(true), parsed(given), timeout_seconds=None))

    return reward


def in_box(text: str) -> str | None:
    r"""Return what the last \boxed{...} of a text holds, None without a closed one.

    "so \boxed{\frac{1}{2}}." -> "\frac{1}{2}"
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    return None


def regex(pattern: str) -> RewardFunction:
    """Return a reward of 1.0 where a regular expression matches in the response, else 0.0.

    ^ and $ are the ends of the response; a dot matches any character, line breaks included.
    """
    try:
        compiled = re.compile(pattern, re.S)
    except re.error as error:
        raise ValueError(f"--reward regex:{pattern} is no regular expression: {error}") from None
    if not pattern:
        raise ValueError("--reward regex: needs an expression, as in regex:^(yes|no)")
    return lambda prompt, response, row: float(bool(compiled.search(response)))


def length(words: str) -> RewardFunction:
    """Return the reward -|words of the response - target| / target, at least -1."""
    if not words.isdecimal() or not int(words):
        raise ValueError(f"--reward length:{words} needs a number of words, as in length:50")
    target = int(words)
    return lambda prompt, response, row: -min(1.0, abs(len(response.split()) - target) / target)


# ---- a reward model ---------------------------------------------------------------------------


def reward_model(
    folder: str,
    template: Template,
    template_name: str,
    dtype: torch.dtype,
    device: torch.device | str,
    max_tokens: int,
    mesh: Mesh,
    read: str,
) -> Reward:
    """Load a reward model and return it as a reward; each response is scored at its last token.

    Several outputs are named rewards. ValueError: its tokenizer differs from the policy's, so that
    it could not read the sampled tokens.
    """
    tokenizer = load_tokenizer(folder)
    if not same_tokens(template.tokenizer, tokenizer):
        raise ValueError(
            f"the reward model {folder} has another tokenizer than the policy and cannot read its "
            "samples: train one from the policy's family (train_rm.py), or call it from a "
            "function: --reward file.py:function"
        )
    own = Template(template_name, tokenizer)
    if own.source != template.source:
        print(
            f"warning: the reward model {folder} was trained with another chat template than the "
            "policy",
        )
    model, names = load_scorer(folder, dtype, device, mesh)
    if len(names) > 1:
        print(f"reward: the sum of {', '.join(names)}, or what --reward-weights makes of them")
    tail = tail_of(folder, names, own, read)
    return model_reward(model.requires_grad_(False), folder, max_tokens, mesh, tail, own.end, names)


def model_reward(
    model: GPT,
    folder: str,
    max_tokens: int,
    mesh: Mesh,
    tail: Collection[int] = (),
    end: int | None = None,
    names: Sequence[str] = (),
) -> Reward:
    """Return a reward model as a reward; with several names its outputs are named rewards.

    folder: its name in errors. tail: ids read behind the end of an answer, `end`.
    """

    def reward(prompts: list, responses: list[str], rows: list[dict], trees: Dataset) -> np.ndarray:
        scores = score_trees(model, with_tail(trees, tail, end), max_tokens)
        if not mesh.last_stage:
            return np.zeros(len(responses))
        rewards = standardised(model, np.concatenate(scores).astype(np.float64))
        rewards = rewards[:, : max(1, len(names))]  # (R, names)
        bad = np.flatnonzero(~np.isfinite(rewards).all(1))
        if len(bad):
            response = responses[bad[0]]
            raise ValueError(
                f"the reward model {folder} gives {response[:80]!r} a score that is not finite"
            )
        if len(names) < 2:
            return rewards[:, 0]
        return np.array([tuple(row) for row in rewards], [(name, np.float64) for name in names])

    return reward


def same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Return True if every token id means the same in both tokenizers, judging by a sample of ids.

    Their padding tokens and chat templates may differ.
    """
    if (one.size, one.bos, one.eos) != (other.size, other.bos, other.eos):
        return False
    some_ids = range(0, one.size, max(1, one.size // 4096))
    return all(one.decode([i], False) == other.decode([i], False) for i in some_ids)
