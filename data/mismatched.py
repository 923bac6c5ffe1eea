"""KTO's trees: a prompt, its own response, and the response of another prompt of the same optimizer step.

    tree = [ prompt of i | response of i | response of j ],   j the next example of the step with another prompt

The second response is what KTO estimates its reference point from. Who is paired with whom follows from the data order
alone, that is from (seed, epoch, step): so the reference can score both once, before the first step, prompt shared.
"""

import hashlib

import numpy as np

from data.dataset import Dataset, from_trees


def partners(prompts: list[int]) -> list[int]:
    """For every example of a step, given by the number of its prompt, the next one (cyclically) of another prompt."""
    n = len(prompts)
    found = []
    for i in range(n):
        others = (j % n for j in range(i + 1, i + n) if prompts[j % n] != prompts[i])
        partner = next(others, None)
        if partner is None:
            raise ValueError(
                f"{n} example{'s' * (n > 1)} of a single prompt, and KTO takes a response to another prompt from the "
                "same step"
            )
        found.append(partner)
    return found


def kto_trees(
    data: Dataset, steps: list[np.ndarray], max_length: int, mismatched: bool = True
) -> Dataset:
    """A tree for every example of every step, in the order of training; examples are responses of `data` by number.

    Each tree has its own response and, if `mismatched`, another prompt's, cut where prompt and response would pass
    max_length tokens. Column `label` belongs to the first. ValueError: a step of one prompt only, where that is needed.
    """
    tree_of = np.repeat(np.arange(len(data)), np.diff(data.response_start))
    before = (
        np.cumsum(data.response_len) - data.response_len
    )  # response tokens before each, over all trees
    prompts_before = np.cumsum(
        data.prompt_len
    )  # prompt tokens up to and with the response's own tree
    numbers: dict[bytes, int] = {}  # of different prompts

    def prompt(i: int) -> np.ndarray:
        start = data.tree_start[tree_of[i]]
        return data.tokens[start : start + data.prompt_len[tree_of[i]]]

    def response(i: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
        start = before[i] + prompts_before[tree_of[i]]
        part = slice(start, start + min(data.response_len[i], longest))
        return data.tokens[part], data.scored[part]

    trees, label = [], []
    for number, examples in enumerate(steps):
        others: list[int | None] = [None] * len(examples)
        if mismatched:
            try:
                others = partners(
                    [numbers.setdefault(prompt(i).tobytes(), len(numbers)) for i in examples]
                )
            except ValueError as error:
                raise ValueError(
                    f"step {number + 1} would be {error}: choose another --batch-size"
                ) from None
        for i, other in zip(examples, others):
            head = prompt(i)
            answers = [response(i, max_length)]
            if other is not None:
                answers.append(response(examples[other], max(1, max_length - len(head))))
            trees.append((head, answers))
            label += [data.columns["label"][i]] * len(answers)
    key = hashlib.sha256(f"{data.key} {max_length} {mismatched}".encode())
    for examples in steps:
        key.update(np.asarray(examples, np.int64).tobytes() + b"|")
    return from_trees(trees, {"label": np.array(label, np.float32)}, key.hexdigest())
