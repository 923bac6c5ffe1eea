"""Prompt trees: the one batch format of every algorithm, and how examples are ordered and packed.

    tree  = prompt, then its responses side by side:   [ p p p p | a a a | b b b b b ]
    batch = trees packed one after another into one flat row of T tokens, no padding between them

A prompt is computed once for all its responses: a response token attends to its prompt and to its
own response, never to a sibling, and its positions continue from the end of the prompt. So the
log-probs are those of each (prompt, response) run alone.

Letters: T tokens, M scored tokens, R responses, n examples. A place is an index into the flat row.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from heapq import heapify, heappush, heapreplace
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.dataset import Dataset
from kernels.device import upload
from layout import Spans, TreeLayout, host_layout, share_rows


@dataclass
class TreeBatch:
    """One micro-batch as the model and the loss need it. make_batch shows an example."""

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64: counted from the start of the prompt
    kv_end: Tensor  # (T,) int32: key j is visible to query i iff j <= i < kv_end[j]
    logit_index: Tensor  # (M,) int64: place of the hidden state that predicts each scored token
    target: Tensor  # (M,) int64: the scored token itself
    response: Tensor  # (M,) int64: number of its response in the batch
    lengths: Tensor  # (R,) fp32: scored tokens of each response
    tree: Tensor  # (R,) int64: number of its tree in the batch
    last: Tensor  # (R,) int64: place of its last token, where a reward model is read
    columns: dict[str, Tensor]  # name -> (R,) fp32, from the data set or the script
    token_columns: dict[str, Tensor]  # name -> (M,), from the data set or the script
    spans: Spans  # of every tree: prompt length, response lengths
    layout: TreeLayout  # the same for the attention kernel
    examples: list[int]  # numbers of the trees in the data set
    experts: Tensor | None = None  # (T, L, K) int16: experts that sampling chose in sparse layers
    _shares: dict[int, list[Tensor]] = field(default_factory=dict)
    _layouts: dict[tuple[int, int], TreeLayout] = field(default_factory=dict)

    def shares(self, ranks: int) -> list[Tensor]:
        """Return each rank's places under context parallelism, ascending: about equal work."""
        if ranks not in self._shares:
            rows = share_rows(self.spans, ranks)
            self._shares[ranks] = [upload(own, self.tokens.device) for own in rows]
        return self._shares[ranks]

    def share_layout(self, ranks: int, rank: int) -> TreeLayout:
        """Return the attention layout of the queries in one rank's share."""
        if (ranks, rank) not in self._layouts:
            self._layouts[ranks, rank] = self.layout.shard(share_rows(self.spans, ranks)[rank])
        return self._layouts[ranks, rank]

    def sum_by_response(self, values: Tensor) -> Tensor:
        """Sum (M,) values to (R,) by response, in fp64: losses are small differences of sums."""
        zeros = torch.zeros(len(self.lengths), dtype=torch.float64, device=values.device)
        return zeros.index_add(0, self.response, values.double())

    @property
    def context(self) -> float:
        """Mean number of keys that a token sees, sliding windows ignored."""
        visible = 0
        for prompt, responses in self.spans:
            visible += prompt * (prompt + 1) // 2
            visible += sum(n * prompt + n * (n + 1) // 2 for n in responses)
        return visible / max(1, len(self.tokens))

    def to(self, device: torch.device) -> "TreeBatch":
        """Return the batch on another device; copies to a GPU are asynchronous."""

        moved: dict[str, Any] = {
            name: upload(value, device)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        for name in ("columns", "token_columns"):
            columns = getattr(self, name).items()
            moved[name] = {key: upload(value, device) for key, value in columns}
        layout = TreeLayout(self.spans, moved["kv_end"], moved["positions"], self.layout.rows)
        return replace(self, **moved, layout=layout, _shares={}, _layouts={})


def make_batch(
    dataset: Dataset, examples: list[int], share_prompts: bool = True, only: int | None = None
) -> TreeBatch:
    """Pack the trees of some examples into one flat row, in the order given.

    One tree, its prompt [5 6], its responses [7 8] and [9], every response token scored:

        place          0 1 | 2 3 | 4
        tokens         5 6 | 7 8 | 9
        positions      0 1 | 2 3 | 2      both responses continue from the prompt
        kv_end         5 5 | 4 4 | 5      prompt keys end with the tree, response keys with theirs

        logit_index    1 2 1              the 6 predicts 7, the 7 predicts 8, the 6 predicts 9 too
        target         7 8 9
        response       0 0 1

        lengths 2 1    tree 0 0    last 3 4    spans [(2, [2, 1])]

    share_prompts=False repeats the prompt for every response, two trees [5 6 | 7 8] and [5 6 | 9]:
    the usual packed layout, for comparison. Responses keep their order, and so do sums and columns.
    only=k takes response k of every tree and no other.
    """
    spans, parts, responses = _choose(dataset, examples, share_prompts, only)
    kv_end, positions = host_layout(spans)  # (T,) each

    # Every token of the flat row: its index in the data set.
    source, size = np.array(parts, np.int64).reshape(-1, 2).T  # of prompts and responses in order
    start = np.cumsum(size) - size
    index = np.repeat(source - start, size) + np.arange(len(positions))  # (T,)
    tokens = dataset.tokens[index]

    # Every response: a column of numbers each, (R,).
    number, tree, prompt_end, first, end = np.array(responses, np.int64).reshape(-1, 5).T

    # Every scored token, (M,). The place before it predicts it; for a response's first token, the
    # last place of the prompt.
    place = np.flatnonzero(dataset.scored[index])
    response = np.searchsorted(first, place, side="right") - 1
    logit_index = np.where(place == first[response], prompt_end[response], place) - 1
    target = tokens[place]

    flat_kv_end = torch.from_numpy(kv_end).int()
    flat_positions = torch.from_numpy(positions)
    return TreeBatch(
        tokens=torch.from_numpy(tokens).long(),
        positions=flat_positions,
        kv_end=flat_kv_end,
        logit_index=torch.from_numpy(logit_index),
        target=torch.from_numpy(target).long(),
        response=torch.from_numpy(response),
        lengths=torch.from_numpy(np.bincount(response, minlength=len(first))).float(),
        tree=torch.from_numpy(tree.copy()),
        last=torch.from_numpy(end - 1),
        columns={
            name: torch.from_numpy(values[number]) for name, values in dataset.columns.items()
        },
        token_columns={
            name: torch.from_numpy(values[index[place]])
            for name, values in dataset.token_columns.items()
        },
        spans=spans,
        layout=TreeLayout(spans, flat_kv_end, flat_positions),
        examples=[int(example) for example in examples],
        experts=None if dataset.experts is None else torch.from_numpy(dataset.experts[index]),
    )


class _Response(NamedTuple):
    """A response of a batch."""

    number: int  # in the data set
    tree: int  # in the batch
    prompt_end: int  # place after the prompt's last token
    first: int  # place of its first token
    end: int  # place after its last token


def _choose(
    dataset: Dataset, examples: list[int], share_prompts: bool, only: int | None
) -> tuple[Spans, list[tuple[int, int]], list[_Response]]:
    """Lay trees out one after another; return (spans, parts, responses) of the flat row.

    parts: (index of the first token in the data set, tokens) of every prompt and response.
    """
    spans: Spans = []
    parts: list[tuple[int, int]] = []
    responses: list[_Response] = []
    end = 0  # of the flat row so far
    for example in examples:
        first_number = int(dataset.response_start[example])
        sizes = dataset.response_len[first_number : dataset.response_start[example + 1]].tolist()
        prompt = int(dataset.tree_start[example])
        prompt_len = int(dataset.prompt_len[example])
        starts = list(accumulate(sizes, initial=prompt + prompt_len))  # of each response
        chosen = range(len(sizes))
        if only is not None:
            chosen = chosen[only : only + 1]
        for group in [chosen] if share_prompts else [[k] for k in chosen]:  # a tree each
            parts.append((prompt, prompt_len))
            end += prompt_len
            prompt_end = end
            for k in group:
                parts.append((starts[k], sizes[k]))
                place = end
                end += sizes[k]
                responses.append(_Response(first_number + k, len(spans), prompt_end, place, end))
            spans.append((prompt_len, [sizes[k] for k in group]))
    return spans, parts, responses


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Return the optimizer steps in one pass over n examples; the last one may be short."""
    return -(-n // batch_size)


def step_examples(n: int, batch_size: int, step: int, seed: int, shuffle: bool) -> np.ndarray:
    """Return the examples of optimizer step `step`, in order; steps count from 0 over all epochs.

    A function of (n, batch_size, seed, step) alone, so a resumed run sees the same rows.
    """
    epoch, step_in_epoch = divmod(step, steps_per_epoch(n, batch_size))
    part = slice(step_in_epoch * batch_size, (step_in_epoch + 1) * batch_size)
    return _order(n, seed, epoch)[part].copy() if shuffle else np.arange(n)[part]


@lru_cache(maxsize=2)
def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    """Return the shuffled examples of an epoch, (n,), not to be written to.

    Kept for the steps of the epoch: shuffling a million examples takes as long as a small step.
    """
    return np.random.default_rng([seed, epoch]).permutation(n)


def visited(n: int, batch_size: int, steps: int, seed: int, shuffle: bool) -> np.ndarray:
    """Return the examples that the first `steps` optimizer steps use, each once, ascending."""
    if steps >= steps_per_epoch(n, batch_size) or not shuffle:
        return np.arange(min(n, steps * batch_size))
    return np.sort(_order(n, seed, 0)[: steps * batch_size])


def check_longest(lengths: np.ndarray, budget: int) -> None:
    """ValueError: an example that is longer than a micro-batch of `budget` tokens."""
    longest = int(lengths.max()) if len(lengths) else 0
    if longest > budget:
        raise ValueError(
            f"an example has {longest} tokens, more than a micro-batch of {budget}: "
            f"raise --max-tokens to {longest} or lower --max-length"
        )


def pack(lengths: np.ndarray, budget: int, ranks: int = 1) -> list[list[int]]:
    """Pack items into bins of at most `budget` tokens, first-fit-decreasing; return items by bin.

    >>> pack(np.array([2, 5, 4]), budget=6)  # the 5 alone, the 4 with the 2
    [[0, 2], [1]]
    >>> pack(np.array([2, 5, 4]), budget=6, ranks=3)  # one bin a rank: the fullest is split
    [[1], [2], [0]]

    The number of bins is a multiple of `ranks` (bins with most items are split, empty ones added if
    need be), and they are sorted by size, largest first: rank r takes bins[r::ranks], as many as
    every other rank and about as many tokens.
    ValueError: an item is longer than the budget.
    """
    check_longest(lengths, budget)
    order = np.argsort(-lengths, kind="stable")
    bins = _first_fit(order.tolist(), lengths[order].tolist(), budget)
    if len(bins) % ranks:
        _split_fullest(bins, ranks)
    size = lengths.tolist()
    bins.sort(key=lambda items: -sum([size[i] for i in items]))
    return [sorted(items) for items in bins]


def _first_fit(items: list[int], sizes: list[int], budget: int) -> list[list[int]]:
    """Put each item into the first bin with room for it; return the items of each bin.

    sizes: of the items, largest first. Takes O(n log n): the room of all bins is kept in a binary
    tree, in which every node holds the largest room below it:

              9          An item of 4 finds too little room on the left (3), so it goes right, and
          3       9      there left (5). Bins that are not open yet have room `budget`, here 9, so
        0   3   5   9    they are opened in order.
    """
    # Any two bins hold more than `budget` together, which limits their number.
    most = min(len(items), 2 * sum(sizes) // max(1, budget) + 1)
    leaves = 1 << max(0, most - 1).bit_length()
    room = [budget] * (2 * leaves)  # children of node k: 2k and 2k + 1; bin b: leaves + b
    bins: list[list[int]] = []
    i = 0
    while i < len(items):
        size = sizes[i]
        node = 1
        while node < leaves:
            node *= 2
            if room[node] < size:
                node += 1
        if node - leaves == len(bins):
            bins.append([])
        members = bins[node - leaves]
        free = room[node]
        # Items of the same size follow into the same bin, as long as there is room.
        while i < len(items) and sizes[i] == size and free >= size:
            members.append(items[i])
            free -= size
            i += 1
        room[node] = free
        while node > 1:
            node //= 2
            largest = max(room[2 * node], room[2 * node + 1])
            if room[node] == largest:
                break
            room[node] = largest
    return bins


def _split_fullest(bins: list[list[int]], ranks: int) -> None:
    """Split bins with most items, the first of equals, until `ranks` divides their number."""
    fullest = [(-len(items), b) for b, items in enumerate(bins)]
    heapify(fullest)
    while len(bins) % ranks:
        b = fullest[0][1]
        bins.append(bins[b][1::2])
        bins[b] = bins[b][::2]
        heapreplace(fullest, (-len(bins[b]), b))
        heappush(fullest, (-len(bins[-1]), len(bins) - 1))


def micro_batches(
    lengths: np.ndarray, examples: np.ndarray, budget: int, rank: int = 0, ranks: int = 1
) -> list[list[int]]:
    """Pack the examples of one optimizer step; return this rank's micro-batches.

    lengths: tokens of every example of the data set (Dataset.tree_lengths).

    >>> lengths = np.array([5, 3, 4, 2])
    >>> micro_batches(lengths, np.array([3, 0, 2]), budget=6)  # 2 + 4 tokens, then 5
    [[3, 2], [0]]
    >>> micro_batches(lengths, np.array([3, 0, 2]), budget=6, rank=1, ranks=2)
    [[0]]
    """
    bins = pack(lengths[examples], budget, ranks)
    return [[int(examples[i]) for i in items] for items in bins[rank::ranks]]
