"""KTO's trees: a prompt, its own response, and the response to another prompt of the same step.

    tree = [ prompt of i | response of i | response of j ],   j the next example with another prompt

KTO estimates its reference point from the second response. The pairing follows from the data order
alone, that is from (seed, epoch, step), so the reference model can score both responses once,
before the first step, with their prompt shared.
"""

import hashlib

import numpy as np

from data.dataset import Dataset

GATHER_ROWS = 4096  # trees copied at a time


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
    # As plain arrays: each slice of a memory-mapped one takes microseconds more.
    tokens, scored, tree_start = map(np.asarray, (data.tokens, data.scored, data.tree_start))
    response_len = np.asarray(data.response_len)
    tree_of = np.repeat(np.arange(len(data)), np.diff(data.response_start))  # (R,)
    # Tokens before each response: those of earlier responses, and of prompts up to its own.
    response_first = np.cumsum(response_len, dtype=np.int64) - response_len  # (R,)
    response_first += np.cumsum(data.prompt_len, dtype=np.int64)[tree_of]
    prompt_first = tree_start[tree_of]  # (R,)
    prompt_len = np.asarray(data.prompt_len)[tree_of]  # (R,)

    own = np.concatenate(steps)  # (n,): a response of each tree
    starts = [prompt_first[own], response_first[own]]  # of its parts in `data`, (n,) each
    sizes = [prompt_len[own], np.minimum(response_len[own], max_length)]
    if mismatched:
        other = np.concatenate(
            [
                examples[_partners_of_step(number, examples, tokens, prompt_first, prompt_len)]
                for number, examples in enumerate(steps, 1)
            ]
        )
        starts.append(response_first[other])
        sizes.append(np.minimum(response_len[other], np.maximum(1, max_length - sizes[0])))
    start, size = np.stack(starts, 1), np.stack(sizes, 1).astype(np.int64)  # (n, parts)
    ends = np.cumsum(size.sum(1))  # (n,)
    responses = len(sizes) - 1  # of a tree

    key = hashlib.sha256(f"{data.key} {max_length} {mismatched}".encode())
    for examples in steps:
        key.update(np.asarray(examples, np.int64).tobytes() + b"|")
    return Dataset(
        tokens=_gather(tokens, start, size),
        scored=_gather(scored, start, size),
        tree_start=np.concatenate([[0], ends]),
        prompt_len=size[:, 0].astype(np.int32),
        response_start=np.arange(0, responses * len(own) + 1, responses),
        response_len=size[:, 1:].reshape(-1).astype(np.int32),
        columns={"label": np.repeat(data.columns["label"][own], responses).astype(np.float32)},
        key=key.hexdigest(),
    )


def _partners_of_step(
    number: int, examples: np.ndarray, tokens: np.ndarray, first: np.ndarray, length: np.ndarray
) -> list[int]:
    """Return `partners` of the examples of a step, as places in the step.

    first, length: of the prompt of every response, in `tokens`. ValueError names the step.
    """
    places = zip(first[examples].tolist(), length[examples].tolist())
    numbers: dict[bytes, int] = {}  # of distinct prompts
    prompts = [numbers.setdefault(tokens[a : a + n].tobytes(), len(numbers)) for a, n in places]
    try:
        return partners(prompts)
    except ValueError as error:
        raise ValueError(f"step {number} would be {error}: choose another --batch-size") from None


def _gather(values: np.ndarray, start: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return the parts of `values` that begin at `start` and have `size` items, end to end.

    A few thousand rows of `start` at a time: the indices take eight bytes each.
    """
    result = np.empty(size.sum(), values.dtype)
    end = 0
    for row in range(0, len(start), GATHER_ROWS):
        first = start[row : row + GATHER_ROWS].reshape(-1)
        count = size[row : row + GATHER_ROWS].reshape(-1)
        index = np.repeat(first - np.cumsum(count) + count, count) + np.arange(count.sum())
        result[end : end + len(index)] = values[index]
        end += len(index)
    return result
