"""Prompt trees: the one batch format of every algorithm, and how examples are ordered and packed into it.

    tree  = prompt, then its responses side by side:   [ p p p p | a a a | b b b b b ]
    batch = trees packed one after another into one flat row of T tokens, no padding between them

A prompt is computed once for all its responses: a response token attends to its prompt and to its own response, never
to a sibling, and its positions go on from the end of the prompt. So the log-probs are those of each (prompt, response)
run alone.

Letters: T tokens, M scored tokens, R responses, n examples.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.dataset import Dataset
from layout import TreeLayout, share_rows


@dataclass
class TreeBatch:
    """What a model and a loss need of one micro-batch."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, counted from the start of the prompt
    kv_end: Tensor  # (T,) int32: key j is visible to query i iff j <= i < kv_end[j]
    logit_index: Tensor  # (M,) int64: whose hidden state predicts each scored token
    target: Tensor  # (M,) int64: what it should predict
    response: Tensor  # (M,) int64: whose token it is
    lengths: Tensor  # (R,) fp32: scored tokens of each response
    tree: Tensor  # (R,) int64: which tree of the batch the response hangs on
    last: Tensor  # (R,) int64: place of the response's last token in the flat row, where a reward model is read
    columns: dict[
        str, Tensor
    ]  # (R,) fp32 each: what the data or the script knows of every response
    token_columns: dict[str, Tensor]  # (M,) each: what the script knows of every scored token
    spans: list[tuple[int, list[int]]]  # of every tree: prompt length, response lengths
    layout: TreeLayout  # the same for the attention kernel
    examples: list[int]  # of the data set, whose trees these are
    _shares: dict[int, list[Tensor]] = field(default_factory=dict)
    _layouts: dict[tuple[int, int], TreeLayout] = field(default_factory=dict)

    def shares(self, ranks: int) -> list[Tensor]:
        """Places of the rows of every rank, ascending, where several share the flat row: about equal work for each."""
        if ranks not in self._shares:
            rows = share_rows(self.spans, ranks)
            self._shares[ranks] = [torch.from_numpy(own).to(self.tokens.device) for own in rows]
        return self._shares[ranks]

    def share_layout(self, ranks: int, rank: int) -> TreeLayout:
        """Attention of the queries of one rank's share."""
        if (ranks, rank) not in self._layouts:
            self._layouts[ranks, rank] = self.layout.shard(share_rows(self.spans, ranks)[rank])
        return self._layouts[ranks, rank]

    def sum_by_response(self, values: Tensor) -> Tensor:
        """Adds up (M,) values a response, (R,) in fp64: losses live on small differences of sums in the hundreds."""
        zeros = torch.zeros(len(self.lengths), dtype=torch.float64, device=values.device)
        return zeros.index_add(0, self.response, values.double())

    @property
    def context(self) -> float:
        """How many keys a token sees on average (sliding windows left aside)."""
        seen = sum(
            p * (p + 1) // 2 + sum(n * p + n * (n + 1) // 2 for n in sizes)
            for p, sizes in self.spans
        )
        return seen / max(1, len(self.tokens))

    def to(self, device: torch.device) -> "TreeBatch":
        """The same batch on another device; copies run beside the computation where the device can."""

        def move(x: Tensor) -> Tensor:
            return (
                x.pin_memory().to(device, non_blocking=True)
                if device.type == "cuda"
                else x.to(device)
            )

        moved: dict[str, Any] = {
            k: move(value) for k, value in vars(self).items() if isinstance(value, Tensor)
        }
        for name in ("columns", "token_columns"):
            moved[name] = {k: move(value) for k, value in getattr(self, name).items()}
        layout = TreeLayout(self.spans, moved["kv_end"], moved["positions"], self.layout.rows)
        return replace(self, **moved, layout=layout, _shares={}, _layouts={})


def make_batch(
    dataset: Dataset, examples: list[int], share_prompts: bool = True, only: int | None = None
) -> TreeBatch:
    """Packs the trees of some examples into one flat row, in the order given.

    share_prompts=False repeats the prompt for every response, each pair of them a tree of its own: the plain packed
    layout, for comparison. The order of responses, and so of sums and columns, is the same either way.
    only=k takes nothing but response k of every tree.
    """
    tokens, positions, kv_end, logit_index, target, response, lengths, tree, spans, rows = (
        [] for _ in range(10)
    )
    last_token, places = [], []
    start = 0  # of the tree in the flat row
    for example in examples:
        first, last = dataset.response_start[example], dataset.response_start[example + 1]
        own = [int(n) for n in dataset.response_len[first:last]]
        prompt_len, source = int(dataset.prompt_len[example]), int(dataset.tree_start[example])
        prompt = dataset.tokens[source : source + prompt_len]
        at = source + prompt_len  # of the response in the data set
        if only is not None:
            at, first, own = at + sum(own[:only]), first + only, own[only : only + 1]
        for k, sizes in enumerate([own] if share_prompts else [[n] for n in own]):
            end = start + prompt_len + sum(sizes)
            tokens.append(prompt)
            positions.append(np.arange(prompt_len))
            kv_end.append(np.full(prompt_len, end))
            here = start + prompt_len  # of the response in the flat row
            for i, size in enumerate(sizes):
                ids = dataset.tokens[at : at + size]
                scored = np.flatnonzero(dataset.scored[at : at + size])
                tokens.append(ids)
                positions.append(np.arange(prompt_len, prompt_len + size))
                kv_end.append(np.full(size, here + size))
                # A token is predicted one place before it: the first of a response by the end of the prompt.
                logit_index.append(np.where(scored == 0, start + prompt_len - 1, here + scored - 1))
                target.append(ids[scored])
                places.append(at + scored)
                response.append(np.full(len(scored), len(lengths)))
                lengths.append(len(scored))
                rows.append(int(first) + (i if share_prompts else k))
                tree.append(len(spans))
                at, here = at + size, here + size
                last_token.append(here - 1)
            spans.append((prompt_len, sizes))
            start = end

    def joined(parts: list, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0)).to(dtype)

    place = (
        np.concatenate(places) if places else np.empty(0, np.int64)
    )  # (M,) of the scored tokens in the data set
    flat_kv_end, flat_positions = joined(kv_end, torch.int32), joined(positions, torch.int64)
    return TreeBatch(
        tokens=joined(tokens, torch.int64),
        positions=flat_positions,
        kv_end=flat_kv_end,
        logit_index=joined(logit_index, torch.int64),
        target=joined(target, torch.int64),
        response=joined(response, torch.int64),
        lengths=torch.tensor(lengths, dtype=torch.float32),
        tree=torch.tensor(tree, dtype=torch.int64),
        last=torch.tensor(last_token, dtype=torch.int64),
        columns={
            name: torch.from_numpy(np.array(values[rows]))
            for name, values in dataset.columns.items()
        },
        token_columns={
            name: torch.from_numpy(values[place]) for name, values in dataset.token_columns.items()
        },
        spans=spans,
        layout=TreeLayout(spans, flat_kv_end, flat_positions),
        examples=[int(example) for example in examples],
    )


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Optimizer steps in a pass over n examples; the last one may be short."""
    return -(-n // batch_size)


def step_examples(n: int, batch_size: int, step: int, seed: int, shuffle: bool) -> np.ndarray:
    """Examples of optimizer step `step` (counted from 0 over all epochs), in order.

    A function of (n, batch_size, seed, step) alone, so that a resumed run sees exactly the rows it would have seen.
    """
    epoch, within = divmod(step, steps_per_epoch(n, batch_size))
    order = np.random.default_rng([seed, epoch]).permutation(n) if shuffle else np.arange(n)
    return order[within * batch_size : (within + 1) * batch_size]


def visited(n: int, batch_size: int, steps: int, seed: int, shuffle: bool) -> np.ndarray:
    """Examples that the first `steps` optimizer steps touch, in ascending order."""
    if steps >= steps_per_epoch(n, batch_size):
        return np.arange(n)
    return np.sort(
        np.concatenate([step_examples(n, batch_size, step, seed, shuffle) for step in range(steps)])
    )


def pack(lengths: np.ndarray, budget: int, ranks: int = 1) -> list[list[int]]:
    """First-fit-decreasing: which items go together so that no bin passes `budget` tokens.

    The number of bins is a multiple of `ranks` (the largest are split, empty ones added if need be), and they are
    sorted by size, so that rank r takes bins[r::ranks]: as many as every other rank, and about as heavy.
    ValueError: an item that fits no bin.
    """
    if len(lengths) and lengths.max() > budget:
        raise ValueError(
            f"an example has {int(lengths.max())} tokens, more than a micro-batch of {budget}: "
            f"raise --max-tokens to {int(lengths.max())} or lower --max-length"
        )
    bins: list[list[int]] = []
    room: list[int] = []
    for i in np.argsort(-lengths, kind="stable"):
        size = int(lengths[i])
        fit = next((b for b, free in enumerate(room) if free >= size), None)
        if fit is None:
            bins.append([])
            room.append(budget)
            fit = len(bins) - 1
        bins[fit].append(int(i))
        room[fit] -= size
    while len(bins) % ranks:
        largest = max(range(len(bins)), key=lambda b: len(bins[b]))
        bins.append(bins[largest][1::2])
        bins[largest] = bins[largest][::2]
    bins.sort(key=lambda items: -int(lengths[items].sum()))
    return [sorted(items) for items in bins]


def micro_batches(
    lengths: np.ndarray, examples: np.ndarray, budget: int, rank: int = 0, ranks: int = 1
) -> list[list[int]]:
    """The examples of one optimizer step, packed into this rank's micro-batches of at most `budget` tokens.

    lengths: tokens of every example of the data set (Dataset.tree_lengths).
    """
    return [
        [int(examples[i]) for i in items]
        for items in pack(lengths[examples], budget, ranks)[rank::ranks]
    ]
