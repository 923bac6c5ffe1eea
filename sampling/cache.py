import os
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.attention import tree_attention
from layout import TreeLayout
from model import GPT

BUCKET = 128  # static shapes: lengths are rounded up to a multiple of this


class Cache:
    """Keys and values of the answers in progress, a row each, and of their prompts.

    A row holds its prompt and its answer; or, with `places`, its answer alone, and prompts lie in places of their own,
    which all their rows attend to. Whatever is beyond a row's position is never seen.
    """

    def __init__(self, model: GPT, rows: int, longest: int, new: int, places: int, together: int):
        self.model, self.shared = model, places > 0
        self.device = model.device
        self.mode = os.environ.get("PLUMB_DECODE", "")
        if self.mode not in ("", "static", "graphs"):
            raise ValueError(f"PLUMB_DECODE={self.mode} is none of static, graphs")
        self.rows = rows
        length = new if self.shared else longest + new
        self.length = -(-length // BUCKET) * BUCKET if self.mode else length
        self.keys, self.values = self._store(rows, self.length)
        self.begin = np.zeros(rows, np.int64)  # where a row begins in its text
        if self.shared:
            self.prompt_keys, self.prompt_values = self._store(places, longest)
            self.prompt_size = torch.zeros(places, dtype=torch.int64, device=self.device)
            self.member = torch.zeros(
                places * together, dtype=torch.int64, device=self.device
            )  # rows of each place
            self.seat = torch.zeros(
                rows, dtype=torch.int64, device=self.device
            )  # where a row is in `member`
            self.start = torch.zeros(
                rows, dtype=torch.int64, device=self.device
            )  # `begin` on the device
            self.extent = (
                places,
                together,
                longest,
            )  # P, N and the longest prompt that a step has to do with
        self.inputs = torch.zeros(2, rows, dtype=torch.int64, device=self.device)
        self.graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def _store(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        weight = next(self.model.parameters())
        shape = (self.model.c.layers, rows, self.model.kv_heads, length, self.model.c.head_size)
        keys = torch.zeros(shape, dtype=weight.dtype, device=self.device)
        return keys, torch.zeros_like(keys)

    def copy(self, source: int, row: int, size: int) -> None:
        """The first `size` positions of a text from one row to another."""
        if source != row:
            size -= self.begin[source]
            for x in (self.keys, self.values):
                x[:, row, :, :size] = x[:, source, :, :size]

    def seats(self, places: list[int], sizes: list[int]) -> None:
        """Tells the place of every row's prompt (-1: an empty row) and its size."""
        self.begin[: len(sizes)] = sizes
        self.start.copy_(torch.from_numpy(self.begin))
        if not self.mode:
            together = np.bincount([place for place in places if place >= 0]).max()
            self.extent = (max(places) + 1, int(together), max(sizes))
        member, seat, taken = np.zeros(self.extent[:2], np.int64), np.zeros(self.rows, np.int64), {}
        for row, place in enumerate(places):
            if place >= 0:
                rank = taken[place] = taken.get(place, -1) + 1
                member[place, rank] = row
                seat[row] = place * self.extent[1] + rank
        self.member[: member.size] = torch.from_numpy(member.ravel())
        self.seat.copy_(torch.from_numpy(seat))

    def forward(
        self, tokens: np.ndarray, positions: np.ndarray, prompts: list[tuple]
    ) -> tuple[Tensor, Tensor]:
        """Logits of the next token: of R rows that are fed one token each, (R, V), and of P new prompts, (P, V).

        tokens, positions: (R,), or empty; prompts: (token ids, rows or [place] to keep them in) each.
        """
        inputs = torch.from_numpy(np.stack((tokens, positions)))
        if self.mode and len(tokens):
            prefilled = self.forward(tokens[:0], positions[:0], prompts)[1] if prompts else None
            length = -(-(self._reach(positions) + 1) // BUCKET) * BUCKET
            self.inputs.copy_(inputs)
            return self._replay(length) if self.mode == "graphs" else self._step(
                self.inputs, length
            ), prefilled
        rows, sizes = len(tokens), [len(ids) for ids, _ in prompts]
        inputs = inputs.to(self.device)
        last = rows + np.cumsum(sizes, dtype=np.int64) - 1
        decode = self._decoding(inputs, self._reach(positions) + 1) if rows else None
        prefill = self._prefilling(prompts, sizes) if prompts else None
        if prompts:
            new = [
                torch.tensor([t for ids, _ in prompts for t in ids]),
                torch.cat([torch.arange(n) for n in sizes]),
            ]
            inputs = torch.cat((inputs, torch.stack(new).to(self.device)), 1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = []
            if decode:
                parts.append(decode(layer, q[:rows], k[:rows], v[:rows]))
            if prefill:
                parts.append(prefill(layer, q[rows:], k[rows:], v[rows:]))
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        hidden = self.model.run(inputs[0], inputs[1], attend)
        index = torch.from_numpy(np.concatenate((np.arange(rows), last))).to(self.device)
        return self.model.logits(hidden, index).split((rows, len(prompts)))

    def _reach(self, positions: np.ndarray) -> int:
        """The furthest position that a row writes to."""
        return int((positions - self.begin[: len(positions)]).max())

    def _prefilling(self, prompts: list[tuple], sizes: list[int]) -> Callable:
        """What attends over new prompts, a flat row, and keeps their keys and values."""
        ends = np.repeat(np.cumsum(sizes), sizes)
        positions = np.concatenate([np.arange(n) for n in sizes])
        kv_end, places = (
            torch.from_numpy(x).to(self.device) for x in (ends.astype(np.int32), positions)
        )
        layout = TreeLayout([(n, []) for n in sizes], kv_end, places)
        # Every token goes to each of the rows that its prompt is for.
        first = np.cumsum([0, *sizes])
        taken = np.concatenate(
            [np.tile(np.arange(a, a + n), len(to)) for a, n, (_, to) in zip(first, sizes, prompts)]
        )
        given = np.concatenate([np.repeat(to, n) for n, (_, to) in zip(sizes, prompts)])
        source, rows, at = (
            torch.from_numpy(x).to(self.device) for x in (taken, given, positions[taken])
        )
        whole = len(source) == len(positions)
        stores = (self.prompt_keys, self.prompt_values) if self.shared else (self.keys, self.values)
        if self.shared:
            self.prompt_size[[to[0] for _, to in prompts]] = torch.tensor(sizes, device=self.device)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for store, x in zip(stores, (k, v)):
                store[layer][rows, :, at] = x if whole else x[source]
            return tree_attention(q, k, v, layout, self.model.c.window(layer))

        return attend

    def _decoding(self, inputs: Tensor, length: int) -> Callable:
        """What attends from R rows at their positions, inputs (2, R), to what they hold, of which `length` is seen."""
        model, count, positions = self.model, inputs.shape[1], inputs[1]
        rows = torch.arange(count, device=self.device)
        heads = (count, model.kv_heads, model.heads // model.kv_heads, -1)
        at = positions - self.start[:count] if self.shared else positions  # (R,)
        ago = at[:, None] - torch.arange(length, device=self.device)  # (R, length)
        seen = {
            w: ((ago >= 0) & (ago < w) if w else ago >= 0)[:, None, None]
            for w in {0, *model.c.windows}
        }
        if self.shared:
            places, together, longest = self.extent
            member, seat = self.member[: places * together], self.seat[:count]
            hidden = torch.arange(longest, device=self.device) >= self.prompt_size[:places, None]
            hidden = hidden[:, None, None]  # (P, 1, 1, longest)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer][rows, :, at] = k
            self.values[layer][rows, :, at] = v
            # The query heads of one key/value head are rows of one small matrix: (R, G, H/G, E).
            keys, values = (
                self.keys[layer, :count, :, :length],
                self.values[layer, :count, :, :length],
            )
            if not self.shared:
                mask = seen[model.c.window(layer)]
                out = F.scaled_dot_product_attention(q.view(heads), keys, values, attn_mask=mask)
                return out.reshape(q.shape)
            own, own_weight = _part(q.view(heads), keys, values, ~seen[0])
            # Those of all rows of one prompt, too: (P, G, N · H/G, E).
            grouped = q[member].view(places, together, *heads[1:]).transpose(1, 2)
            grouped = grouped.reshape(places, heads[1], together * heads[2], -1)
            keys, values = (
                x[layer, :places, :, :longest] for x in (self.prompt_keys, self.prompt_values)
            )
            found = _part(grouped, keys, values, hidden)
            out, weight = (
                x.view(places, heads[1], together, heads[2], -1)
                .transpose(1, 2)
                .reshape(len(member), *heads[1:])[seat]
                for x in found
            )
            # Both parts of one softmax, each weighted by its share of the sum.
            return (
                torch.lerp(out, own, torch.sigmoid(own_weight - weight))
                .reshape(q.shape)
                .to(q.dtype)
            )

        return attend

    def _step(self, inputs: Tensor, length: int) -> Tensor:
        hidden = self.model.run(inputs[0], inputs[1], self._decoding(inputs, length))
        return self.model.logits(hidden, torch.arange(inputs.shape[1], device=self.device))

    def _replay(self, length: int) -> Tensor:
        """_step as a CUDA graph, one for every length. Never run: there was no GPU."""
        if length not in self.graphs:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(
                side
            ):  # compiles and allocates; to write the same keys twice changes nothing
                self._step(self.inputs, length)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                logits = self._step(self.inputs, length)
            self.graphs[length] = graph, logits
        graph, logits = self.graphs[length]
        graph.replay()
        return logits


def _part(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to a part of the keys, and the logarithm of the part's sum in the softmax, (..., 1)."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2)).to(
        torch.promote_types(q.dtype, torch.float32)
    )
    scores.masked_fill_(hidden, float("-inf"))
    top = scores.amax(-1, keepdim=True).clamp_(
        min=-1e30
    )  # a part of which nothing is seen weighs nothing
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    out = torch.matmul(weights.to(v.dtype), v).to(total.dtype) / total.clamp(min=1e-30)
    return out, top + total.log()
