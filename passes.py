"""Micro-batches of some examples, and one forward pass over them.

    batches = make_batches(train, examples, config, mesh)           for pipeline(), to train on
    for batch, hidden in forward(model, heldout, examples, config): for everything without gradients

Both cut the examples the same way: packed into rows of at most --max-tokens and dealt to the
data-parallel ranks.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
from torch import Tensor
from tqdm import tqdm

from data.dataset import Dataset
from data.trees import TreeBatch, make_batch, micro_batches
from model import GPT
from parallel import Mesh
from pipeline import pipeline


class Batching(Protocol):
    """The flags that decide how examples are cut into micro-batches."""

    max_tokens: int
    share_prompts: bool


def token_lengths(data: Dataset, config: Batching, only: int | None = None) -> np.ndarray:
    """Return the number of tokens each example costs, (n,); `only`: with its response k alone."""
    if only is None:
        return data.tree_lengths(config.share_prompts)
    return data.prompt_len + data.response_len[data.response_start[:-1] + only]


def make_batches(
    data: Dataset, examples: np.ndarray, config: Batching, mesh: Mesh, only: int | None = None
) -> list[TreeBatch]:
    """Return this rank's micro-batches of some examples; `only`: response k of each tree alone.

    ValueError: an example that is longer than --max-tokens.
    """
    return [
        make_batch(data, items, config.share_prompts, only)
        for items in _bins(data, examples, config, mesh, only)
    ]


def forward(
    model: GPT,
    data: Dataset,
    examples: np.ndarray,
    config: Batching,
    only: int | None = None,
    bar: str | None = None,
) -> Iterator[tuple[TreeBatch, Tensor]]:
    """Run a model over some examples; yield (micro-batch, hidden states) of this rank's share.

    Call it under torch.no_grad(). Every rank must run it to the end; with --pp only the last stage
    yields. bar: label of a progress bar on rank 0; None shows none.
    """
    bins = _bins(data, examples, config, model.mesh, only)
    batches = (make_batch(data, items, config.share_prompts, only) for items in bins)
    hidden = None if bar is not None and model.mesh.main else True
    yield from tqdm(pipeline(model, batches), bar, len(bins), disable=hidden)


def _bins(
    data: Dataset, examples: np.ndarray, config: Batching, mesh: Mesh, only: int | None
) -> list[list[int]]:
    """Return this rank's micro-batches as lists of examples."""
    lengths = token_lengths(data, config, only)
    return micro_batches(lengths, examples, config.max_tokens, mesh.dp_rank, mesh.dp)
