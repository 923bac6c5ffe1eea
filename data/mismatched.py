"""KTO's trees: a prompt, its own response, and the response to another prompt of the same step.

    tree = [ prompt of i | response of i | response of j ],   j the next example with another prompt

KTO estimates its reference point from the second response. The pairing follows from the data order
alone, that is from (seed, epoch, step), so the reference model can score both responses once,
before the first step, with their prompt shared.
"""

import hashlib

import numpy as np

from data.dataset import Dataset, from_trees


def partners(prompts: list[int]) -> list[int]:
    """Return for each example of a step the next one (cyclically) with another prompt.

    prompts: the number of each example's prompt. Example: [0, 0, 1, 2] -> [2, 2, 3, 0].
    ValueError: there is only one prompt.
    """
    n = len(prompts)
    if not n:
        return []
    first = next((j for j in range(n) if prompts[j] != prompts[-1]), None)
    if first is None:
        raise ValueError(
            f"{n} example{'s' * (n > 1)} of a single prompt, but KTO needs a response to "
            "another prompt from the same step"
        )
    # From the back: an example has the partner of its successor, unless it is the first partner.
    result = [first] * n
    for i in range(n - 2, -1, -1):
        result[i] = result[i + 1] if prompts[i] == prompts[i + 1] else i + 1
    return result


def kto_trees(
    data: Dataset, steps: list[np.ndarray], max_length: int, mismatched: bool = True
) -> Dataset:
    """Return a tree for every example of every step, in the order of training.

    steps: the examples of each step, numbers of responses in `data`. Each tree has its own response
    and, if `mismatched`, another prompt's, cut so that prompt and response have at most max_length
    tokens. Column `label` is that of the first response.
    ValueError: a step with a single prompt, if `mismatched`.
    """
    tree_of = np.repeat(np.arange(len(data)), np.diff(data.response_start))  # (R,)
    # Tokens before each response: those of earlier responses, and of prompts up to its own.
    responses_before = np.cumsum(data.response_len) - data.response_len  # (R,)
    prompts_before = np.cumsum(data.prompt_len)  # (n,)
    prompt_numbers: dict[bytes, int] = {}  # of distinct prompts

    def prompt(i: int) -> np.ndarray:
        start = data.tree_start[tree_of[i]]
        return data.tokens[start : start + data.prompt_len[tree_of[i]]]

    def prompt_number(i: int) -> int:
        return prompt_numbers.setdefault(prompt(i).tobytes(), len(prompt_numbers))

    def response(i: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
        start = responses_before[i] + prompts_before[tree_of[i]]
        part = slice(start, start + min(data.response_len[i], longest))
        return data.tokens[part], data.scored[part]

    trees, label = [], []
    for number, examples in enumerate(steps):
        others: list[int | None] = [None] * len(examples)
        if mismatched:
            try:
                others = partners([prompt_number(i) for i in examples])
            except ValueError as error:
                raise ValueError(
                    f"step {number + 1} would be {error}: choose another --batch-size"
                ) from None
        for i, other in zip(examples, others):
            ids = prompt(i)
            answers = [response(i, max_length)]
            if other is not None:
                answers.append(response(examples[other], max(1, max_length - len(ids))))
            trees.append((ids, answers))
            label += [data.columns["label"][i]] * len(answers)
    key = hashlib.sha256(f"{data.key} {max_length} {mismatched}".encode())
    for examples in steps:
        key.update(np.asarray(examples, np.int64).tobytes() + b"|")
    return from_trees(trees, {"label": np.array(label, np.float32)}, key.hexdigest())
