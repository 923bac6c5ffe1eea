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
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from model import GPT
from sampling.cache import Cache

# Prompts of at least this mean length are kept once for their n samples and attended to together, shorter ones copied
# to every row. On one CPU thread, 4 key/value heads of 32: 4 samples of 20 tokens 0.54 against 0.35 ms a layer, 4 of
# 200 tokens 0.66 against 1.07, 8 of 500 tokens 2.9 against 4.9.
SHARE_FROM = 64


class Sample(NamedTuple):
    """One answer.

    tokens        the end token included
    logps         log-prob of each under what was sampled from: temperature, top-k and top-p included
    policy_logps  log-prob of each under the plain policy: temperature 1, no filters
    ended         by an end token or a stop text, not by max_new_tokens or for going round in circles
    scored        1 for each token that the policy chose, 0 for others (tool output); None = all 1
    """

    tokens: list[int]
    logps: list[float]
    policy_logps: list[float]
    ended: bool
    scored: list[int] | None = None


# ---- the cache -------------------------------------------------------------------------------------------------------


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
            self.cache.seat_rows([self.place[p] if p >= 0 else -1 for p in prompts], sizes)
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
