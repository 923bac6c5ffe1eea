"""The experts that sampling chose, token by token, for --replay-routing.

    log = ExpertLog(lengths)           prompts' numbers of tokens
    log.note(chosen, fed, prompts)     after every forward of the sampler
    prompts, responses = log.arrays([len(sample.tokens) for sample in samples])

They stay on the device until the end, so that sampling never waits for them. Servers send those of
every layer with a sample:

    experts = decode(text)             of prompt and response, (T - 1, layers, K)
    experts = of_model(experts, c)     those of the model's sparse layers

Letters: T tokens of a forward, L sparse layers, K experts of a token.
"""

import base64
import io

import numpy as np
import torch
from torch import Tensor

from architecture import GPTConfig

UNKNOWN = -1  # of a token that sampling never fed to the model: the last of a response


class ExpertLog:
    """Experts of all tokens that a sampler has computed."""

    def __init__(self, prompt_lengths: list[int]):
        self.prompt_lengths = prompt_lengths
        self.chosen: list[Tensor] = []  # (T, L, K) of each forward
        self.places: list[tuple[int, int, int]] = []  # row of all, sample, token: of the responses
        self.starts: dict[int, int] = {}  # prompt -> its first row of all
        self.rows = 0

    def note(self, chosen: Tensor, fed: list[tuple[int, int]], prompts: list[int]) -> None:
        """Add a forward of some rows' last tokens, then of whole prompts.

        chosen: (T, L, K). fed: (sample, which of its tokens) of each row; token -1: none of them.
        """
        self.chosen.append(chosen.short())
        self.places += [(self.rows + r, i, token) for r, (i, token) in enumerate(fed) if token >= 0]
        start = self.rows + len(fed)
        for prompt in prompts:
            self.starts[prompt] = start
            start += self.prompt_lengths[prompt]
        self.rows += len(chosen)

    def arrays(self, lengths: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the experts of every prompt, (P, L, K) int16, and response, (N, L, K).

        lengths: tokens of the responses.
        """
        table = torch.cat(self.chosen).cpu().numpy()
        shape = table.shape[1:]
        responses = [np.full((n, *shape), UNKNOWN, np.int16) for n in lengths]
        for row, sample, token in self.places:
            responses[sample][token] = table[row]
        starts = [self.starts[i] for i in range(len(self.prompt_lengths))]
        prompts = [table[a : a + n] for a, n in zip(starts, self.prompt_lengths)]
        return prompts, responses


def decode(text: str) -> np.ndarray:
    """Return the experts that a server reports, (T, layers, K) int16.

    text: base64 of a .npy file, as vLLM writes it. ValueError: it is something else.
    """
    with io.BytesIO(base64.b64decode(text, validate=True)) as file:
        table = np.lib.format.read_array(file, allow_pickle=False)
    if table.ndim != 3 or table.dtype.kind not in "iu" or not table.size:
        raise ValueError(f"an array of {table.dtype}, {table.shape}")
    if table.min() < 0 or table.max() > np.iinfo(np.int16).max:
        raise ValueError(f"experts from {table.min()} to {table.max()}")
    return table.astype(np.int16)


def padded(table: np.ndarray, tokens: int) -> np.ndarray:
    """Return the experts of that many tokens, UNKNOWN for those that the table lacks at its end."""
    missing = np.full((tokens - len(table), *table.shape[1:]), UNKNOWN, np.int16)
    return np.concatenate([table, missing])


def of_model(table: np.ndarray | None, c: GPTConfig) -> np.ndarray | None:
    """Return the experts of a model's sparse layers, (T, L, K), from those of all its layers.

    ValueError: the table is of another model.
    """
    if table is None:
        return None
    sparse = [layer for layer in range(c.layers) if c.sparse(layer)]
    if table.shape[1:] != (c.layers, c.active) or table[:, sparse].max() >= c.experts:
        raise ValueError(
            f"the server has {table.max() + 1} experts or more, {table.shape[2]} a token, and "
            f"{table.shape[1]} layers; the policy has {c.experts}, {c.active} and {c.layers}: does "
            "it serve the policy?"
        )
    return table[:, sparse]
