"""Sampling with a KV cache: `generate` draws n responses to each prompt.

A sample depends on its prompt and its seed alone: not on the batch that it is computed in, nor on
the rank. A fixed number of rows is computed at a time. A row whose response ends takes the next
sample at once, and that sample's prompt is computed in the same forward as the other rows' next
token. The n samples of a prompt share its computation; long prompts are also stored only once
(sampling/cache.py).

Letters: R rows (samples in progress), P prompts, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.device import upload
from model import GPT
from parallel import Group
from sampling.cache import Cache, Mixture, idle
from sampling.chosen import ExpertLog
from sampling.draw import ends_too_early, sample

# Mean prompt length from which prompts are stored once for their n samples and attended to
# together; shorter ones are copied to every row. One CPU thread, 4 key/value heads of size 32, ms a
# layer stored once / copied: 4 samples of 20 tokens 0.54 / 0.35, 4 of 200 tokens 0.66 / 1.07, 8 of
# 500 tokens 2.9 / 4.9.
SHARE_FROM = 64
EMPTY = -1  # a row without a sample


class Sample(NamedTuple):
    """One response.

    tokens        the end token included
    logps         log-prob of each token under the sampling distribution: temperature, top-k, top-p
    policy_logps  log-prob of each token under the policy itself: temperature 1, no filters
    experts, prompt_experts  those that sparse layers chose for each token (sampling/chosen.py), and
                  for the prompt's, with the first of its samples; None: not kept
    ended         True if an end token or a stop text ended it, False if it was cut: by
                  max_new_tokens or for repeating itself
    scored        1 for each token that the policy chose, 0 for others (tool output); None: all 1
    """

    tokens: list[int]
    logps: list[float]
    policy_logps: list[float]
    ended: bool
    scored: list[int] | None = None
    experts: np.ndarray | None = None
    prompt_experts: np.ndarray | None = None


# ---- rows and the samples in them ----------------------------------------------------------------


class _Prefilled(NamedTuple):
    """A prompt in the cache whose next samples are still in the queue."""

    prompt: int
    row: int  # a row that began with it
    logits: Tensor  # (V,) of its first response token


class _Batch:
    """The samples in progress, a row each, and the queue of those that wait for a row.

    Sample s belongs to prompt s // n. Each step is refill, logits, append, and finish for the rows
    that ended. With two prompts A (samples 0, 1) and B (samples 2, 3) in three rows:

        step  row_sample  queue  prefills          first logits of
        1     [0, 1, 2]   [3]    {A: [0, 1]        A and B, each computed once; B's are kept in
                                  B: [2]}          `prefilled`, since sample 3 waits for them
        2     [0, 1, 2]   [3]    {}                nothing: every row feeds its last token
                                                   sample 0 ends
        3     [3, 1, 2]   []     {}                row 0, from `prefilled`: rows_prefilled = [0]
                                                   sample 1 ends
        4     [3, 2]      []     {}                nothing: row 2 moved to row 1

    Prompts are either copied into the rows of the cache or stored once in a place (`shared`).
    """

    def __init__(
        self,
        model: GPT,
        prompts: list[list[int]],
        n: int,
        rows: int,
        max_new_tokens: int,
        seeds: Sequence,
        keep_experts: bool,
        mixed: tuple[GPT, float] | None,
    ):
        self.prompts, self.n, self.seeds = prompts, n, seeds
        self.lengths = [len(prompt) for prompt in prompts]
        models = [model, mixed[0]] if mixed else [model]
        # Rows of one length leave few masked positions, and samples of one prompt are neighbours.
        order = sorted(range(len(prompts)), key=self.lengths.__getitem__)
        self.queue = deque(prompt * n + j for prompt in order for j in range(n))
        long = sum(self.lengths) >= SHARE_FROM * len(prompts)
        windows = any(size for one in models for size in one.c.windows)
        self.shared = n > 1 and not windows and long
        # A slow sample keeps its prompt's place, so there are twice as many places as prompts that
        # fill the rows. Rows stay empty where that is not enough.
        places = min(len(prompts), rows, 2 * -(-rows // n)) if self.shared else 0
        longest, together = max(self.lengths), min(n, rows)
        sizes = (rows, longest, max_new_tokens, places, together)
        self.cache: Cache | Mixture = Cache(model, *sizes, keep_experts)
        if mixed:
            self.cache = Mixture(self.cache, Cache(mixed[0], *sizes), mixed[1])
        self.log = ExpertLog(self.lengths) if keep_experts else None
        self.shares_experts = model.mesh.ep > 1
        self.fixed_shapes = bool(self.cache.mode)
        self.rows = rows  # at most: without fixed shapes only len(row_sample) rows are computed

        # By row.
        self.row_sample: list[int] = [EMPTY] * rows if self.fixed_shapes else []
        self.next_token = np.zeros(rows, np.int64)  # drawn last, not in the cache yet
        self.position = np.zeros(rows, np.int64)  # of next_token in its text
        self.drawn = np.zeros(rows, np.int64)  # tokens of the sample so far
        self.uniform = np.zeros((rows, max_new_tokens))  # numbers that draw its tokens

        # By prompt.
        self.unfinished = [n] * len(prompts)  # samples that have not ended, also those that wait
        self.place: dict[int, int] = {}  # where each prompt in progress is stored, if shared
        self.free_places = set(range(places))

        # Of the current step.
        self.prefills: dict[int, list[int]] = {}  # prompts to compute -> rows that begin with them
        self.rows_prefilled: list[int] = []  # rows that begin with the prompt of `prefilled`
        self.prefilled: _Prefilled | None = None  # kept from one step to the next

    def refill(self) -> bool:
        """Give every empty row the next sample. Return False if no sample is left."""
        self.rows_prefilled, self.prefills = [], {}
        before = list(self.row_sample)
        rows = range(self.rows)
        empty = [r for r in rows if r >= len(self.row_sample) or self.row_sample[r] == EMPTY]
        for row in empty:
            if not self.queue or not self._admit(row):
                break
        if not self.fixed_shapes:
            self._compact()
        if self.shared and self.row_sample != before and self.any_sample():
            self._seat_rows()
        return self.any_sample()

    def any_sample(self) -> bool:
        """Return whether any row holds a sample."""
        return any(sample != EMPTY for sample in self.row_sample)

    def _admit(self, row: int) -> bool:
        """Put the next sample of the queue into a row. Return False if its prompt has no place."""
        prompt = self.queue[0] // self.n
        if self.shared and prompt not in self.place:
            if not self.free_places:
                return False
            self.place[prompt] = min(self.free_places)
            self.free_places.remove(self.place[prompt])
        sample = self.queue.popleft()
        if row == len(self.row_sample):
            self.row_sample.append(sample)
        self.row_sample[row] = sample
        self.next_token[row] = 0
        self.position[row] = self.lengths[prompt]
        self.drawn[row] = 0
        generator = np.random.default_rng(self.seeds[sample])
        self.uniform[row] = generator.random(self.uniform.shape[1])
        if self.prefilled is None or self.prefilled.prompt != prompt:
            self.prefills.setdefault(prompt, []).append(row)
            return True
        self.rows_prefilled.append(row)
        if not self.shared:
            # The row of the earlier sample still holds the prompt, even if that sample has ended.
            self.cache.copy(self.prefilled.row, row, self.lengths[prompt])
        return True

    def _compact(self) -> None:
        """Move the last rows into empty ones, so that a step costs only rows in progress.

        Rows are empty here only if no sample could be admitted, so no row that moves is new.
        """
        for row in reversed(range(len(self.row_sample))):
            if self.row_sample[row] != EMPTY:
                continue
            last = len(self.row_sample) - 1
            if row != last:
                self.cache.copy(last, row, self.position[last])
                self.row_sample[row] = self.row_sample[last]
                for of_row in (self.next_token, self.position, self.drawn, self.uniform):
                    of_row[row] = of_row[last]
            self.row_sample.pop()

    def _seat_rows(self) -> None:
        """Tell the cache in which place the prompt of every row is stored."""
        places, lengths = [], []
        for row, index in enumerate(self.row_sample):
            prompt = index // self.n
            places.append(EMPTY if index == EMPTY else self.place[prompt])
            lengths.append(self.position[row] if index == EMPTY else self.lengths[prompt])
        self.cache.seat_rows(places, lengths)

    def logits(self) -> Tensor:
        """Return the logits of each row's next token, (R, V). One forward, if there is any to do.

        Also keep the first logits of a prompt whose other samples are still in the queue.
        """
        rows = len(self.row_sample)
        continuing = any(s != EMPTY and n for s, n in zip(self.row_sample, self.drawn))
        fed = rows if continuing else 0  # rows that feed their last token: all of them, or none
        prompts = []
        for prompt, first_rows in self.prefills.items():
            keepers = [self.place[prompt]] if self.shared else first_rows
            prompts.append((self.prompts[prompt], keepers))
        logits = first = None  # (R, V), and (P, V) of the prompts of `prefills`
        if fed or prompts:
            logits, first = self.cache.forward(self.next_token[:fed], self.position[:fed], prompts)
            if self.log:
                tokens = (self.drawn[:fed] - 1).tolist()
                self.log.note(
                    self.cache.experts, list(zip(self.row_sample, tokens)), list(self.prefills)
                )
        elif self.shares_experts:
            idle(self.cache.model)
        if not fed:
            some = first if prompts else self.prefilled.logits
            logits = some.new_zeros(rows, some.shape[-1])
        if self.rows_prefilled:
            index = upload(np.array(self.rows_prefilled), logits.device)
            logits[index] = self.prefilled.logits
        if self.prefills:
            beginning = [row for first_rows in self.prefills.values() for row in first_rows]
            copies = [len(first_rows) for first_rows in self.prefills.values()]
            source = upload(np.repeat(np.arange(len(copies)), copies), logits.device)
            logits[upload(np.array(beginning), logits.device)] = first[source]
        if self.queue and (prompt := self.queue[0] // self.n) in self.prefills:
            row = self.prefills[prompt][0]
            self.prefilled = _Prefilled(prompt, row, logits[row].clone())
        return logits

    def uniforms(self) -> np.ndarray:
        """Return the uniform number that draws each row's next token, (R,)."""
        rows = len(self.row_sample)
        return self.uniform[np.arange(rows), self.drawn[:rows]]

    def append(self, tokens: list[float]) -> None:
        """Add a token to every row's response, (R,)."""
        rows = len(tokens)
        in_progress = np.not_equal(self.row_sample, EMPTY)
        self.position[:rows] += in_progress & (self.drawn[:rows] > 0)
        self.next_token[:rows] = tokens
        self.drawn[:rows] += in_progress

    def finish(self, row: int) -> None:
        """Empty a row whose response is complete."""
        prompt = self.row_sample[row] // self.n
        self.row_sample[row] = EMPTY
        self.drawn[row] = 0
        self.unfinished[prompt] -= 1
        if self.shared and not self.unfinished[prompt]:
            self.free_places.add(self.place.pop(prompt))


# ---- the loop ------------------------------------------------------------------------------------


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
    seeds: Sequence[int | list[int]] | None = None,
    stop_texts: Collection[str] = (),
    decode: Callable[[list[int]], str] | None = None,
    no_repeat: int = 0,
    on_token: Callable[[int, int], None] | None = None,
    min_new_tokens: int = 0,
    keep_experts: bool = False,
    mixed: tuple[GPT, float] | None = None,
) -> list[Sample]:
    """Sample n responses to each prompt of token ids; those of prompt i are [i * n : (i + 1) * n].

    temperature  0 takes the likeliest token
    seeds        one for each sample; None: (seed, index of the sample). A sample is the same for
                 every batch_size, up to the rounding of sums
    batch_size   samples in progress at a time; their cache holds at most
                 batch_size * (longest prompt + max_new_tokens) positions
    stop_texts   a response ends when its text, decode(tokens), contains one of them
    no_repeat    a response is cut when its last no_repeat tokens repeat one cycle of at most half
                 their number; 0 = never
    on_token     called with (index of the sample, token) for every token as it is drawn
    min_new_tokens  tokens before an end token may be drawn: until then the other tokens share its
                 probability; nor does a stop text end a response before
    keep_experts  return the experts of every token, of a mixture of experts
    mixed        (q, a): draw from the geometric mixture p^(1-a) q^a of this model p and another

    ValueError: an empty prompt, or a setting out of range.
    """
    _validate(prompts, max_new_tokens, temperature, top_k, top_p, batch_size, n, seeds, no_repeat)
    if not 0 <= min_new_tokens < max_new_tokens:
        raise ValueError(
            f"min_new_tokens {min_new_tokens} must be at least 0 and below max_new_tokens "
            f"{max_new_tokens}"
        )
    if stop_texts and (decode is None or not all(stop_texts)):
        raise ValueError(
            "stop_texts are looked for in decode(tokens): give a decode, and no empty text"
        )
    ep = model.mesh.group("ep")
    if not prompts and ep.n == 1:
        return []
    samples = [Sample([], [], [], False) for _ in range(len(prompts) * n)]
    if seeds is None:
        seeds = [[seed, i] for i in range(len(samples))]
    rows, batch = min(batch_size, len(samples)), None
    if prompts:
        batch = _Batch(model, prompts, n, rows, max_new_tokens, seeds, keep_experts, mixed)
    stop_ids = set(stop_ids)
    # Last tokens in which a stop text is looked for: a character has 4 tokens at most.
    window = 8 + 4 * max(map(len, stop_texts), default=0)
    while _anyone(bool(batch and batch.refill()), ep):
        if not (batch and batch.any_sample()):
            idle(model)
            continue
        logits = batch.logits()
        uniform = upload(batch.uniforms(), logits.device)
        forbidden = None
        if stop_ids and (batch.drawn[: len(logits)] < min_new_tokens).any():
            forbidden = ends_too_early(batch.drawn[: len(logits)], min_new_tokens, stop_ids, logits)
        draws = sample(logits, uniform, temperature, top_k, top_p, forbidden)
        # One copy from the device a step: all that the host waits for.
        tokens, logps, policy_logps = torch.stack([x.double() for x in draws]).tolist()
        batch.append(tokens)
        for row, i in enumerate(batch.row_sample):
            if i == EMPTY:
                continue
            token = int(tokens[row])
            response = samples[i]
            response.tokens.append(token)
            response.logps.append(logps[row])
            response.policy_logps.append(policy_logps[row])
            if on_token:
                on_token(i, token)
            ended = token in stop_ids
            if stop_texts and not ended and len(response.tokens) >= min_new_tokens:
                text = decode(response.tokens[-window:])
                ended = any(stop in text for stop in stop_texts)
            if ended:
                samples[i] = response._replace(ended=True)
            full = len(response.tokens) == max_new_tokens
            if ended or full or (no_repeat and repeats(response.tokens, no_repeat)):
                batch.finish(row)
    if batch and batch.log:
        prompt_experts, experts = batch.log.arrays([len(s.tokens) for s in samples])
        samples = [s._replace(experts=own) for s, own in zip(samples, experts)]
        for i, own in enumerate(prompt_experts):
            samples[i * n] = samples[i * n]._replace(prompt_experts=own)
    return samples


def _anyone(busy: bool, ranks: Group) -> bool:
    """Return whether any rank has something to do: with --ep none runs a layer alone."""
    return ranks.all_reduce(torch.tensor(float(busy)), "control").item() > 0


def _validate(
    prompts: list[list[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    batch_size: int,
    n: int,
    seeds: Sequence[int | list[int]] | None,
    no_repeat: int,
) -> None:
    """Raise ValueError for the first argument of `generate` that is out of range."""
    if any(len(prompt) == 0 for prompt in prompts):
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


def repeats(tokens: list[int], last: int) -> bool:
    """Return True if the last `last` tokens repeat one cycle of at most half their number.

    [7, 1, 2, 1, 2], last 4 -> True;  [7, 1, 2, 3, 1], last 4 -> False
    """
    tail = tokens[-last:]
    if len(tail) < last:
        return False
    return any(tail[-1] == tail[-1 - p] and tail[p:] == tail[:-p] for p in range(1, last // 2 + 1))
