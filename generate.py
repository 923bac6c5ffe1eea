"""Sampling with a KV cache: rollouts for the scripts, a prompt or a chat for a person.

    python generate.py --model DIR --prompt "Where does Ada live?"
    python generate.py --model DIR --data prompts.jsonl --out answers.jsonl --temperature 0.7 --n 4
    python generate.py --model steerlm/final --prompt "Where does Ada live?" --attributes "helpfulness:4,verbosity:1"
    python generate.py --model DIR --chat

The file form reads {"prompt": text or messages} rows (other keys stay) and writes each with a "response", or with
"responses" where --n asks for several. A sample is a function of its prompt and its seed: not of the batch it was
computed in, nor of the rank.

A fixed number of rows is computed at a time; a row whose answer ends takes the next sample at once, whose prompt rides
along with the other rows' next token. The n samples of a prompt share its computation, and long prompts are kept once.

PLUMB_DECODE=static pads every step to fixed shapes, PLUMB_DECODE=graphs also replays it as a CUDA graph. The first is
tested; the second has NEVER RUN, for want of a GPU, and is therefore off unless asked for.

Letters: R rows, P prompts in the cache, N rows of one prompt, L length, V vocabulary, H query heads, G key/value heads,
E head size.
"""

import functools
import os
import sys
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import parse
from data import attributes
from data.dataset import read_rows, write_rows
from data.templates import Template
from data.tokenizer import load_tokenizer
from hf import DTYPES, load_model
from kernels.attention import TreeLayout, tree_attention
from model import GPT

# Prompts of at least this mean length are kept once for their n samples and attended to together, shorter ones copied
# to every row. On one CPU thread, 4 key/value heads of 32: 4 samples of 20 tokens 0.54 against 0.35 ms a layer, 4 of
# 200 tokens 0.66 against 1.07, 8 of 500 tokens 2.9 against 4.9.
SHARE_FROM = 64
BUCKET = 128  # static shapes: lengths are rounded up to a multiple of this


class Sample(NamedTuple):
    """One answer.

    tokens        the end token included
    logps         log-prob of each under what was sampled from: temperature, top-k and top-p included
    policy_logps  log-prob of each under the plain policy: temperature 1, no filters
    ended         by an end token or a stop text, not by max_new_tokens or for going round in circles
    """

    tokens: list[int]
    logps: list[float]
    policy_logps: list[float]
    ended: bool


# ---- the cache -------------------------------------------------------------------------------------------------------


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


# ---- the loop --------------------------------------------------------------------------------------------------------


class _Batch:
    """The samples in progress, a row each, and those that wait for a row."""

    def __init__(
        self, model: GPT, prompts: list[list[int]], n: int, rows: int, new: int, seeds: Sequence
    ):
        self.prompts, self.n, self.seeds = prompts, n, seeds
        self.sizes = [len(prompt) for prompt in prompts]
        # Prompts of one length share the cache with little to skip over; samples of one prompt are neighbours.
        order = sorted(range(len(prompts)), key=self.sizes.__getitem__)
        self.waiting = deque(prompt * n + j for prompt in order for j in range(n))
        self.shared = (
            n > 1 and not any(model.c.windows) and sum(self.sizes) >= SHARE_FROM * len(prompts)
        )
        # A straggler keeps its prompt, so there are more places than prompts that fill the rows; rows wait beyond that.
        places = min(len(prompts), rows, 2 * -(-rows // n)) if self.shared else 0
        self.cache = Cache(model, rows, max(self.sizes), new, places, min(n, rows))
        self.fixed = bool(self.cache.mode)
        self.rows, self.free = rows, set(range(places))
        self.holds: list[int] = (
            [-1] * rows if self.fixed else []
        )  # the sample in each row, -1 = none
        self.place: dict[int, int] = {}  # of each prompt in progress, where prompts are shared
        self.undone = [n] * len(prompts)  # samples of each prompt that have not ended
        self.told: list[int] = []  # rows with a new sample of a prompt whose first logits are known
        self.new: dict[int, list[int]] = {}  # prompts to compute, and the rows that begin with them
        self.known: tuple[int, int, Tensor] | None = (
            None  # prompt with samples waiting: itself, a row of it, logits
        )
        self.fed, self.at, self.drawn = np.zeros(
            (3, rows), np.int64
        )  # next token, its position, tokens drawn so far
        self.uniform = np.zeros((rows, new))

    def refill(self) -> bool:
        """Gives every free row the next sample; False when nothing is left to do."""
        self.told, self.new, before = [], {}, list(self.holds)
        for row in [
            row for row in range(self.rows) if row >= len(self.holds) or self.holds[row] < 0
        ]:
            if not self.waiting or not self._admit(self.waiting[0] // self.n, row):
                break
        if not self.fixed:
            self._close_gaps()
        if self.shared and self.holds != before and any(i >= 0 for i in self.holds):
            prompts = [i // self.n if i >= 0 else -1 for i in self.holds]
            sizes = [self.sizes[p] if p >= 0 else self.at[row] for row, p in enumerate(prompts)]
            self.cache.seats([self.place[p] if p >= 0 else -1 for p in prompts], sizes)
        return any(i >= 0 for i in self.holds)

    def _admit(self, prompt: int, row: int) -> bool:
        """Puts the next sample, which is one of `prompt`, into a row; False if the prompt has no place."""
        if self.shared and prompt not in self.place:
            if not self.free:
                return False
            self.place[prompt] = min(self.free)
            self.free.remove(self.place[prompt])
        if row == len(self.holds):
            self.holds.append(-1)
        self.holds[row] = i = self.waiting.popleft()
        self.fed[row], self.at[row], self.drawn[row] = 0, self.sizes[prompt], 0
        self.uniform[row] = np.random.default_rng(self.seeds[i]).random(self.uniform.shape[1])
        if not (self.known and self.known[0] == prompt):
            self.new.setdefault(prompt, []).append(row)
            return True
        self.told.append(row)
        if (
            not self.shared
        ):  # what was computed for the sample before it, in progress or just ended, is still there
            self.cache.copy(self.known[1], row, self.sizes[prompt])
        return True

    def _close_gaps(self) -> None:
        """Moves the last rows to where nothing is, so that a step costs what lives. None of them is new."""
        for row in [row for row in reversed(range(len(self.holds))) if self.holds[row] < 0]:
            last = len(self.holds) - 1
            if row != last:
                self.cache.copy(last, row, self.at[last])
                for x in (self.holds, self.fed, self.at, self.drawn, self.uniform):
                    x[row] = x[last]
            self.holds.pop()

    def logits(self) -> Tensor:
        """What each row's next token is drawn from, (R, V)."""
        rows = len(self.holds)
        new = [(row, k) for k, (_, to) in enumerate(self.new.items()) for row in to]
        going = rows if any(i >= 0 and self.drawn[row] for row, i in enumerate(self.holds)) else 0
        prompts = [
            (self.prompts[p], [self.place[p]] if self.shared else to) for p, to in self.new.items()
        ]
        logits = first = None
        if going or prompts:
            logits, first = self.cache.forward(self.fed[:going], self.at[:going], prompts)
        if not going:
            some = first if prompts else self.known[2]
            logits = some.new_zeros(rows, some.shape[-1])
        if self.told:
            logits[self.told] = self.known[2]
        if new:
            logits[[row for row, _ in new]] = first[[k for _, k in new]]
        if self.waiting and (prompt := self.waiting[0] // self.n) in self.new:
            row = self.new[prompt][0]
            self.known = prompt, row, logits[row].clone()
        return logits

    def numbers(self) -> Tensor:
        """The uniform number that each row draws with, (R,)."""
        rows = len(self.holds)
        return torch.from_numpy(self.uniform[np.arange(rows), self.drawn[:rows]])

    def feed(self, tokens: list[float]) -> None:
        """Every row's answer goes on with a token."""
        rows, going = len(tokens), np.greater_equal(self.holds, 0)
        self.at[:rows] += going & (self.drawn[:rows] > 0)
        self.fed[:rows] = tokens
        self.drawn[:rows] += going

    def end(self, row: int) -> None:
        """A row's answer has come to its end."""
        prompt = self.holds[row] // self.n
        self.holds[row], self.drawn[row] = -1, 0
        self.undone[prompt] -= 1
        if self.shared and not self.undone[prompt]:
            self.free.add(self.place.pop(prompt))


@torch.no_grad()
def generate(
    model: GPT,
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    stop_ids: Collection[int] = (),
    seed: int = 0,
    batch_size: int = 64,
    n: int = 1,
    seeds: Sequence[int] | None = None,
    stop_texts: Collection[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    no_repeat: int = 0,
    on_token: Callable[[int, int], None] | None = None,
) -> list[Sample]:
    """n answers to each prompt of token ids: those of prompt i are [i * n : (i + 1) * n]. temperature 0 takes the
    likeliest token.

    seeds       one a sample, to draw with; (seed, place in the list) where there are none. A sample is the same
                whatever batch_size is, but for the rounding of sums
    batch_size  answers in progress at a time; their cache holds batch_size × (longest prompt + max_new_tokens) at most
    stop_texts  an answer ends when its text, decode(tokens), holds one of them
    no_repeat   an answer is cut when its last no_repeat tokens are one cycle of at most half their number; 0 = never
    on_token    called with (place in the list, token) as tokens come

    ValueError: an empty prompt, or settings that cannot be.
    """
    if any(len(p) == 0 for p in prompts):
        raise ValueError("a prompt has no token to go on from: give it a bos or some text")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 1:
        raise ValueError(
            "sampling needs temperature >= 0, 0 < top_p <= 1, top_k >= 0 and max_new_tokens >= 1"
        )
    if n < 1 or batch_size < 1 or no_repeat < 0 or no_repeat == 1:
        raise ValueError(
            "sampling needs n >= 1, batch_size >= 1 and no_repeat of 0 (off) or at least 2"
        )
    if seeds is not None and len(seeds) != len(prompts) * n:
        raise ValueError(
            f"{len(seeds)} seeds for {len(prompts) * n} samples: give one to each of a prompt's n"
        )
    if stop_texts and (decode is None or not all(stop_texts)):
        raise ValueError(
            "stop_texts are looked for in decode(tokens): give a decode, and no empty text"
        )
    if not prompts:
        return []
    answers = [Sample([], [], [], False) for _ in range(len(prompts) * n)]
    own = [[seed, i] for i in range(len(answers))] if seeds is None else seeds
    batch = _Batch(model, prompts, n, min(batch_size, len(answers)), max_new_tokens, own)
    stop_ids, window = (
        set(stop_ids),
        8 + 4 * max(map(len, stop_texts), default=0),
    )  # a character has 4 tokens at most
    while batch.refill():
        logits = batch.logits()
        found = sample(logits, batch.numbers().to(logits.device), temperature, top_k, top_p)
        drawn = torch.stack(
            [x.double() for x in found]
        ).tolist()  # one copy from the device a step, no tensor a row
        batch.feed(drawn[0])
        for row, (token, logp, policy_logp) in enumerate(zip(*drawn)):
            i, token = batch.holds[row], int(token)
            if i < 0:
                continue
            answer = answers[i]
            answer.tokens.append(token)
            answer.logps.append(logp)
            answer.policy_logps.append(policy_logp)
            if on_token:
                on_token(i, token)
            ended = token in stop_ids
            if stop_texts and not ended:
                text = decode(answer.tokens[-window:])
                ended = any(stop in text for stop in stop_texts)
            if ended:
                answers[i] = answer._replace(ended=True)
            if (
                ended
                or len(answer.tokens) == max_new_tokens
                or no_repeat
                and circles(answer.tokens, no_repeat)
            ):
                batch.end(row)
    return answers


def circles(tokens: list[int], last: int) -> bool:
    """Whether the last tokens, so many of them, are one cycle of at most half their number, over and over."""
    tail = tokens[-last:]
    if len(tail) < last:
        return False
    return any(tail[-1] == tail[-1 - p] and tail[p:] == tail[:-p] for p in range(1, last // 2 + 1))


def sample(
    logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Draws one token a row, (B,), from logits (B, V) with uniform numbers (B,); its log-prob under the draw, (B,), and
    under the softmax of the logits themselves, (B,).

    The order is Hugging Face's: temperature, then the top_k likeliest, then the smallest set with probability top_p.
    """
    if temperature == 0:
        top, best = logits.max(-1)
        return best, torch.zeros_like(top), top - logits.logsumexp(-1)
    top = logits.amax(-1, keepdim=True)
    filtered = 0 < top_k < logits.shape[1] or top_p < 1
    weights, total = logits - top, None  # in place from here on: (B, V) is large
    if temperature != 1 or filtered:
        heated = weights / temperature
        total = weights.exp_().sum(-1, keepdim=True)  # (B, 1)
        weights = heated
    draw = functools.partial(_draw_filtered, top_k=top_k, top_p=top_p) if filtered else _draw
    token, share = draw(weights.exp_(), uniform)
    chosen = logits.gather(1, token) - top
    total = share if total is None else total
    return token[:, 0], (chosen / temperature - share.log())[:, 0], (chosen - total.log())[:, 0]


def _draw(weights: Tensor, uniform: Tensor, block: int = 256) -> tuple[Tensor, Tensor]:
    """The token whose share of [0, 1) a number falls into, (B, 1), and the sum of all weights, (B, 1).

    First the block of tokens, then the token: a running sum over a whole vocabulary, in fp64 so that no token's share
    is rounded away, took longer than the rest of the step.
    """
    vocabulary = weights.shape[1]
    whole = vocabulary // block * block
    sums = [weights[:, :whole].unflatten(1, (-1, block)).sum(-1)] if whole else []
    sums += [weights[:, whole:].sum(-1, keepdim=True)] if whole < vocabulary else []
    edges = torch.cat(sums, 1).double().cumsum(-1)  # (B, V / block)
    aim = uniform.double()[:, None] * edges[:, -1:]
    found = torch.searchsorted(edges, aim, right=True).clamp_(max=edges.shape[1] - 1)  # (B, 1)
    size = edges.diff(dim=1, prepend=torch.zeros_like(aim)).gather(1, found)
    rest = 1 - (edges.gather(1, found) - aim) / size
    tokens = found * block + torch.arange(block, device=weights.device)  # (B, block)
    inside = (
        weights.gather(1, tokens.clamp(max=vocabulary - 1))
        .double()
        .masked_fill_(tokens >= vocabulary, 0)
    )
    inside = inside.cumsum(-1)
    place = torch.searchsorted(inside, rest * inside[:, -1:], right=True)
    return (found * block + place).clamp_(max=vocabulary - 1), edges[:, -1:]


def _draw_filtered(
    weights: Tensor, uniform: Tensor, top_k: int, top_p: float
) -> tuple[Tensor, Tensor]:
    """_draw among the top_k likeliest, and of these the fewest that make up top_p."""
    vocabulary = weights.shape[1]
    total = (
        None if top_k and top_k < vocabulary else weights.sum(-1, keepdim=True, dtype=torch.float64)
    )
    size = min(top_k or 512, vocabulary)
    while True:
        ordered, index = weights.topk(size)
        edges = ordered.double().cumsum(-1)
        # To sort a whole vocabulary is slow, and top_p seldom asks for it.
        if total is None or size == vocabulary or bool((edges[:, -1:] >= top_p * total).all()):
            break
        size = min(8 * size, vocabulary)
    before = edges - ordered
    limit = top_p * (edges[:, -1:] if total is None else total)
    kept = (
        (before < limit).sum(-1, keepdim=True).clamp_(min=1)
        if top_p < 1
        else torch.full_like(index[:, :1], size)
    )
    share = edges.gather(1, kept - 1)
    place = torch.minimum(
        torch.searchsorted(edges, uniform.double()[:, None] * share, right=True), kept - 1
    )
    return index.gather(1, place), share


# ---- the command -----------------------------------------------------------------------------------------------------


@dataclass
class Flags:
    """Flags of generate.py."""

    model: str = ""  # Hugging Face folder
    prompt: str = ""  # one prompt, answered on the screen
    data: str = ""  # or a JSONL file of rows with a "prompt"
    out: str = ""  # where the rows go, each with a "response", or "responses" with --n
    chat: bool = False  # or a conversation on the screen; an empty line ends it
    template: Literal["auto", "plain", "chatml", "zephyr", "llama2", "llama3"] = (
        "auto"  # as in training
    )
    attributes: str = (
        ""  # for a model of train_steerlm.py: the answer to ask for, "helpfulness:4,verbosity:1"
    )
    n: int = 1  # answers to each prompt
    temperature: float = 0.7  # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int = 0  # only the k likeliest tokens; 0 = all
    top_p: float = 1.0  # only the likeliest tokens that make up this much probability
    max_new_tokens: int = 256  # longest answer
    stop: list[str] = field(
        default_factory=list
    )  # texts that end an answer, and are left out of it
    no_repeat: int = (
        0  # cut an answer whose last so many tokens go round in circles, 32 is careful; 0 = never
    )
    batch_size: int = 64  # answers in progress at a time: lower it when memory runs out
    seed: int = 0  # of the samples
    limit: int = 0  # only the first rows; 0 = all
    dtype: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # auto: bf16 on GPUs, else fp32


def steered(prompt: str | list, flags: Flags) -> str | list:
    """The prompt with its attribute line, where one is asked for. ValueError: the model knows none, or not this one."""
    if not flags.attributes:
        return prompt
    trained = attributes.load(flags.model)
    if not trained:
        raise ValueError(
            f"--attributes: {flags.model} was not trained with any: train_steerlm.py does that"
        )
    return attributes.condition(
        prompt, attributes.read_line(flags.attributes, trained[1]), trained[0]
    )


def before(text: str, stops: Collection[str]) -> str:
    """A text up to the first of some others in it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


class Stream:
    """Prints an answer as its tokens come, up to the first stop text."""

    def __init__(self, decode: Callable[[list[int]], str], stops: Collection[str]):
        self.decode, self.stops, self.ids, self.text, self.shown = decode, stops, [], "", 0

    def __call__(self, _: int, token: int) -> None:
        self.ids.append(token)
        self.text = before(self.decode(self.ids), self.stops)
        if not self.text.endswith("\ufffd"):  # the rest of the character is still to come
            self.flush()

    def flush(self) -> None:
        print(self.text[self.shown :], end="", flush=True)
        self.shown = len(self.text)


def chat(answer: Callable[..., list[Sample]], template: Template, flags: Flags) -> None:
    """A conversation on the screen: answer(prompts, seed=, on_token=) is asked at every turn."""
    plain = (
        " The template is plain and has no turns: every question stands alone."
        if template.plain
        else ""
    )
    print(f"An empty line ends the chat.{plain}")
    messages = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            question = ""
        if not question:
            return
        messages = [*([] if template.plain else messages), {"role": "user", "content": question}]
        stream = Stream(template.tokenizer.decode, flags.stop)
        answer(
            [template.prompt(steered(messages, flags))],
            seed=flags.seed + len(messages),
            on_token=stream,
        )
        stream.flush()
        print()
        messages.append({"role": "assistant", "content": stream.text.strip()})


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, __doc__, argv)
    if (
        not flags.model
        or bool(flags.prompt) + bool(flags.data) + flags.chat != 1
        or bool(flags.data) != bool(flags.out)
    ):
        raise ValueError(
            "generate.py needs --model, and one of --prompt TEXT, --data FILE with --out FILE, and --chat"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[flags.dtype if flags.dtype != "auto" else "bf16" if device == "cuda" else "fp32"]
    tokenizer = load_tokenizer(flags.model)
    template = Template(flags.template, tokenizer)
    rows = [{"prompt": flags.prompt}] if flags.prompt else []
    if flags.data:
        rows = list(read_rows(flags.data))[: flags.limit or None]
    if lacking := [i for i, row in enumerate(rows, 1) if not row.get("prompt")]:
        raise ValueError(f"row {lacking[0]} of {flags.data} has no prompt")
    prompts = [template.prompt(steered(row["prompt"], flags)) for row in rows]
    model = load_model(flags.model, dtype, device)
    answer = functools.partial(
        generate, model, max_new_tokens=flags.max_new_tokens, temperature=flags.temperature, top_k=flags.top_k,
        top_p=flags.top_p, stop_ids=template.stop_ids, batch_size=flags.batch_size, stop_texts=flags.stop,
        decode=tokenizer.decode, no_repeat=flags.no_repeat,
    )  # fmt: skip
    if flags.chat:
        chat(answer, template, flags)
        return
    answers = answer(prompts, seed=flags.seed, n=flags.n)
    texts = [before(tokenizer.decode(found.tokens), flags.stop).strip() for found in answers]
    if flags.prompt:
        print("\n\n".join(texts))
        return
    groups = [texts[i : i + flags.n] for i in range(0, len(texts), flags.n)]
    found = ({"response": group[0]} if flags.n == 1 else {"responses": group} for group in groups)
    write_rows(flags.out, ({**row, **more} for row, more in zip(rows, found)))
    ended = sum(found.ended for found in answers)
    print(f"{len(texts)} answers in {flags.out}, {ended} of them ended by themselves")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
