"""One step of sampling over all layers: places the tokens, keeps the caches, returns logits.

The mixers of the model own the caches (mixers.py). This file decides which row of them a token
belongs to: a row holds a prompt and its answer; or, where the n samples of long prompts share them,
its answer alone, while each prompt lies in a place that all its rows attend to.

PLUMB_DECODE=static pads every step to fixed shapes; PLUMB_DECODE=graphs also replays it as a CUDA
graph. The first is tested, the second has never run for want of a GPU and is off unless asked for.

Letters: R rows, P prompts, N rows of one prompt, V vocabulary.
"""

import os
from typing import cast

import numpy as np
import torch
from torch import Tensor

from kernels.device import upload
from layout import TreeLayout
from mixers import Extension, Mixer, NewPrompts, SamplingView, SharedPrompts, TreeView
from model import GPT
from parallel import ALONE
from routing import Routing

BUCKET = 128  # static shapes: lengths are rounded up to a multiple of this
NewPrompt = tuple[list[int], list[int]]  # token ids, and the rows or the [place] to keep them in


class Cache:
    """Memory of the answers in progress, a row each, and of their prompts.

    longest, new: tokens of the longest prompt and answer. places: prompts that are kept once, 0
    where rows hold their own; together: rows of one prompt at most. keep_experts: leave those of
    every token in `experts`.
    """

    def __init__(
        self,
        model: GPT,
        rows: int,
        longest: int,
        new: int,
        places: int,
        together: int,
        keep_experts: bool = False,
    ):
        self.keep_experts = keep_experts
        self.experts: Tensor | None = None  # of the last forward's tokens, (T, L, K)
        self.model, self.device = model, model.device
        self.mode = os.environ.get("PLUMB_DECODE", "")
        if self.mode not in ("", "static", "graphs"):
            raise ValueError(f"PLUMB_DECODE={self.mode} is not known: use static or graphs")
        if self.mode and (keep_experts or model.mesh.ep > 1):
            flag = "--replay-routing" if keep_experts else f"--ep {model.mesh.ep}"
            raise ValueError(f"{flag} does not go with PLUMB_DECODE={self.mode}")
        self.rows, self.shared = rows, places > 0
        length = new if self.shared else longest + new
        if self.mode:
            length = _round_up(length)
        mixers = {int(i): cast(Mixer, block.mixer) for i, block in model.blocks.items()}
        self.layers = {
            i: mixer.new_cache(rows, length, places, longest) for i, mixer in mixers.items()
        }
        self.begin = np.zeros(rows, np.int64)  # position of each row's first place in its text
        if self.shared:
            self.prompt_size = self._zeros(places)
            self.member = self._zeros(places * together)  # row in each seat of each place
            self.seat = self._zeros(rows)  # seat of each row
            self.start = self._zeros(rows)  # `begin` on the device
            self.extent = (places, together, longest)  # what a step has to look at
        self.inputs = torch.zeros(2, rows, dtype=torch.int64, device=self.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def _zeros(self, n: int) -> Tensor:
        return torch.zeros(n, dtype=torch.int64, device=self.device)

    def copy(self, source: int, row: int, size: int) -> None:
        """Copy the first `size` positions of a text from one row to another."""
        if source != row:
            for cache in self.layers.values():
                cache.copy(source, row, size - self.begin[source])

    def seat_rows(self, places: list[int], sizes: list[int]) -> None:
        """Set the place of every row's prompt (-1: an empty row) and the prompt's size."""
        self.begin[: len(sizes)] = sizes
        self.start.copy_(upload(self.begin, self.device))
        if not self.mode:
            together = np.bincount([place for place in places if place >= 0]).max()
            self.extent = (max(places) + 1, int(together), max(sizes))
        member = np.zeros(self.extent[:2], np.int64)
        seat = np.zeros(self.rows, np.int64)
        taken = [0] * len(member)  # seats of each place
        for row, place in enumerate(places):
            if place >= 0:
                member[place, taken[place]] = row
                seat[row] = place * self.extent[1] + taken[place]
                taken[place] += 1
        self.member[: member.size] = upload(member.ravel(), self.device)
        self.seat.copy_(upload(seat, self.device))

    def forward(
        self, tokens: np.ndarray, positions: np.ndarray, prompts: list[NewPrompt]
    ) -> tuple[Tensor, Tensor | None]:
        """Return logits of the next token: (R, V) of rows fed one token each, (P, V) of prompts.

        tokens, positions: (R,), or empty.
        """
        inputs = upload(np.stack((tokens, positions)), self.device)
        if self.mode and len(tokens):
            prefilled = self.forward(tokens[:0], positions[:0], prompts)[1] if prompts else None
            length = _round_up(self._reach(positions) + 1)
            self.inputs.copy_(inputs)
            if self.mode == "graphs":
                return self._replay(length), prefilled
            return self._step(self.inputs, length), prefilled
        rows, sizes = len(tokens), [len(ids) for ids, _ in prompts]
        extension = self._extension(inputs, self._reach(positions) + 1) if rows else None
        new = self._new_prompts(prompts, sizes) if prompts else None
        if prompts:
            ids = [token for ids, _ in prompts for token in ids]
            counted = np.concatenate([np.arange(n) for n in sizes])
            inputs = torch.cat((inputs, upload(np.stack((ids, counted)), self.device)), 1)
        view = SamplingView(inputs[1], extension, new, self.layers)
        if self.keep_experts:
            view.routing = Routing(None, chosen=[])
        hidden = self.model.run(inputs[0], view)
        if view.routing:
            self.experts = torch.stack(view.routing.chosen, 1)
        last = rows + np.cumsum(sizes, dtype=np.int64) - 1  # of each prompt in the flat row
        index = upload(np.concatenate((np.arange(rows), last)), self.device)
        return self.model.logits(hidden, index).split((rows, len(prompts)))

    def _reach(self, positions: np.ndarray) -> int:
        """Return the furthest place that a row writes to."""
        return int((positions - self.begin[: len(positions)]).max())

    def _new_prompts(self, prompts: list[NewPrompt], sizes: list[int]) -> NewPrompts:
        """Describe whole prompts side by side, and the rows or places that keep their tokens."""
        ends = np.repeat(np.cumsum(sizes), sizes)
        positions = np.concatenate([np.arange(n) for n in sizes])
        starts = np.cumsum([0, *sizes])
        # Every token goes to each of the rows that its prompt is for.
        sources, keepers = [], []
        for (_, rows), start, size in zip(prompts, starts, sizes):
            sources.append(np.tile(np.arange(start, start + size), len(rows)))
            keepers.append(np.repeat(rows, size))
        source = np.concatenate(sources)
        if self.shared:
            places = upload(np.array([rows[0] for _, rows in prompts]), self.device)
            self.prompt_size[places] = upload(np.array(sizes), self.device)
        layout = TreeLayout(
            [(n, []) for n in sizes],
            upload(ends.astype(np.int32), self.device),
            upload(positions, self.device),
        )
        return NewPrompts(
            layout=layout,
            source=upload(source, self.device),
            rows=upload(np.concatenate(keepers), self.device),
            at=upload(positions[source], self.device),
            each_once=len(source) == len(positions),
            in_places=self.shared,
        )

    def _extension(self, inputs: Tensor, length: int) -> Extension:
        """Describe R rows that go on with one token, inputs (2, R), and see `length` places."""
        count, at = inputs.shape[1], inputs[1]
        prompts = None
        if self.shared:
            at = at - self.start[:count]
            places, together, longest = self.extent
            beyond = torch.arange(longest, device=self.device) >= self.prompt_size[:places, None]
            prompts = SharedPrompts(
                places=places,
                together=together,
                longest=longest,
                member=self.member[: places * together],
                seat=self.seat[:count],
                hidden=beyond[:, None, None],
            )
        return Extension(torch.arange(count, device=self.device), at, length, prompts)

    def _step(self, inputs: Tensor, length: int) -> Tensor:
        """Return the logits of every row, (R, V), for inputs (2, R) of fixed shape."""
        view = SamplingView(inputs[1], self._extension(inputs, length), None, self.layers)
        hidden = self.model.run(inputs[0], view)
        return self.model.logits(hidden, torch.arange(inputs.shape[1], device=self.device))

    def _replay(self, length: int) -> Tensor:
        """Run `_step` as a CUDA graph, one for every length. It has never run: there was no GPU."""
        if length not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compile and allocate; writing the same keys is harmless
                self._step(self.inputs, length)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._step(self.inputs, length)
            self.graphs[length] = graph, logits
        graph, logits = self.graphs[length]
        graph.replay()
        return logits


class Mixture:
    """Caches of two models that see the same texts; logits of their geometric mixture.

    The softmax of (1-a) log p + a log q is p^(1-a) q^a, normalised, token by token.
    """

    experts = None  # not kept

    def __init__(self, first: Cache, second: Cache, share: float):
        self.both, self.share = (first, second), share
        self.model, self.mode = first.model, first.mode

    def copy(self, source: int, row: int, size: int) -> None:
        """Copy the first `size` positions of a text from one row to another."""
        for cache in self.both:
            cache.copy(source, row, size)

    def seat_rows(self, places: list[int], sizes: list[int]) -> None:
        """Set the place of every row's prompt, as Cache.seat_rows."""
        for cache in self.both:
            cache.seat_rows(places, sizes)

    def forward(
        self, tokens: np.ndarray, positions: np.ndarray, prompts: list[NewPrompt]
    ) -> tuple[Tensor, Tensor | None]:
        """Return mixed logits, in the shapes of Cache.forward."""
        (rows, first), (other_rows, other_first) = (
            cache.forward(tokens, positions, prompts) for cache in self.both
        )
        mixed = None
        if first is not None and other_first is not None:
            mixed = self._mix(first, other_first)
        return self._mix(rows, other_rows), mixed

    def _mix(self, one: Tensor, other: Tensor) -> Tensor:
        wide = torch.promote_types(one.dtype, torch.float32)
        return torch.lerp(one.to(wide), other.to(wide), self.share)


def idle(model: GPT) -> None:
    """Run all layers without a token, where other ranks of --ep run theirs with some."""
    nothing = torch.zeros(0, dtype=torch.int64, device=model.device)
    layout = TreeLayout([], nothing.int(), nothing)
    model.run(nothing, TreeView(nothing, layout, [], ALONE))


def _round_up(length: int) -> int:
    """Round up to a multiple of BUCKET."""
    return -(-length // BUCKET) * BUCKET
