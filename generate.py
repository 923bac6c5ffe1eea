"""Sampling with a KV cache: rollouts for the scripts, a prompt for a person.

    python generate.py --model DIR --prompt "Where does Ada live?"
    python generate.py --model DIR --data prompts.jsonl --out answers.jsonl --temperature 0.7
    python generate.py --model steerlm/final --prompt "Where does Ada live?" --attributes "helpfulness:4,verbosity:1"

The file form reads {"prompt": text or messages} rows (other keys stay) and writes each with a "response". A sample is a
function of its prompt, its seed and its place in the file: not of the batch it was computed in.

Letters: B prompts in a batch, L cache length, V vocabulary, H query heads, G key/value heads, E head size.
"""

import json
import os
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import parse
from data import attributes
from data.dataset import read_rows
from data.templates import Template
from data.tokenizer import load_tokenizer
from hf import DTYPES, load_model
from kernels.attention import TreeLayout, tree_attention
from model import GPT


class Sample(NamedTuple):
    """One answer: its tokens (the end token included), their log-probs under what was sampled from, did it end."""

    tokens: list[int]
    logps: list[float]
    policy_logps: list[float]
    ended: bool


class Cache:
    """Keys and values of B prompts and what was sampled after them, a row each, from position 0 on."""

    def __init__(self, model: GPT, rows: int, length: int):
        c, weight = model.c, model.embed.weight
        shape = (c.layers, rows, c.kv_heads, length, c.head_size)
        self.model = model
        self.keys = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.values = torch.zeros_like(self.keys)

    def keep(self, rows: Tensor) -> None:
        """Drops all other rows."""
        self.keys, self.values = self.keys[:, rows], self.values[:, rows]

    def prefill(self, prompts: list[list[int]]) -> Tensor:
        """Runs all prompts as one flat row and fills the cache. Returns the last hidden state of each, (B, D)."""
        device = self.keys.device
        sizes = [len(p) for p in prompts]
        ends = np.cumsum(sizes)
        tokens = torch.tensor([t for p in prompts for t in p], device=device)
        positions = torch.cat([torch.arange(n) for n in sizes]).to(device)
        rows = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
        kv_end = torch.repeat_interleave(torch.tensor(ends), torch.tensor(sizes)).to(device, torch.int32)
        layout = TreeLayout([(n, []) for n in sizes], kv_end, positions)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer, rows, :, positions] = k
            self.values[layer, rows, :, positions] = v
            return tree_attention(q, k, v, layout, self.model.c.window(layer))

        return self.model.run(tokens, positions, attend)[torch.tensor(ends - 1, device=device)]

    def step(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Runs one token a row, (B,), at its position, (B,). Returns hidden states, (B, D)."""
        length = int(positions.max()) + 1
        slots = torch.arange(length, device=positions.device)
        rows = torch.arange(len(tokens), device=positions.device)
        group = self.model.c.heads // self.model.c.kv_heads

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.keys[layer, rows, :, positions] = k
            self.values[layer, rows, :, positions] = v
            ago = positions[:, None] - slots  # (B, length)
            window = self.model.c.window(layer)
            seen = (ago >= 0) & (ago < window) if window else ago >= 0
            # The query heads of one key/value head are rows of one small matrix: (B, G, H/G, E).
            q = q.view(len(tokens), self.model.c.kv_heads, group, -1)
            keys, values = self.keys[layer, :, :, :length], self.values[layer, :, :, :length]
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])
            return out.reshape(len(tokens), self.model.c.heads, -1)

        return self.model.run(tokens, positions, attend)


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
    seeds: list[int] | None = None,
) -> list[Sample]:
    """Answers to prompts of token ids, in their order. temperature 0 takes the likeliest token.

    Sample i is drawn with numbers of its own, from (seed, i): it is the same whatever batch_size is, but for the
    rounding of sums. ValueError: an empty prompt, or settings that cannot be.
    """
    prompts = [p for p in prompts for _ in range(n)]
    if any(len(p) == 0 for p in prompts):
        raise ValueError("a prompt has no token to go on from: give it a bos or some text")
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0 or max_new_tokens < 1:
        raise ValueError("sampling needs temperature >= 0, 0 < top_p <= 1, top_k >= 0 and max_new_tokens >= 1")
    samples: list[Sample | None] = [None] * len(prompts)
    # Prompts of one length share a batch with little to skip over.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        draws = np.stack([np.random.default_rng([seed, i] if seeds is None else seeds[i]).random(max_new_tokens)
                          for i in batch])  # fmt: skip
        answers = _generate_batch(
            model, [prompts[i] for i in batch], max_new_tokens, temperature, top_k, top_p, set(stop_ids), draws
        )
        for i, answer in zip(batch, answers):
            samples[i] = answer
    return samples


def _generate_batch(model, prompts, max_new_tokens, temperature, top_k, top_p, stop_ids, draws) -> list[Sample]:
    device = model.embed.weight.device
    cache = Cache(model, len(prompts), max(map(len, prompts)) + max_new_tokens)
    answers = [Sample([], [], [], False) for _ in prompts]
    alive = list(range(len(prompts)))  # which prompt each row of the cache belongs to
    positions = torch.tensor([len(p) for p in prompts], device=device)
    hidden = cache.prefill(prompts)
    for i in range(max_new_tokens):
        uniform = torch.tensor(draws[alive, i], device=device)
        tokens, logps = sample(model.logits(hidden), uniform, temperature, top_k, top_p)
        going = []
        for row, (token, logp) in enumerate(zip(tokens.tolist(), logps.tolist())):
            answer = answers[alive[row]]
            answer.tokens.append(token)
            answer.logps.append(logp)
            answer.policy_logps.append(logp)
            if token in stop_ids:
                answers[alive[row]] = answer._replace(ended=True)
            else:
                going.append(row)
        if not going or i + 1 == max_new_tokens:
            break
        if len(going) < len(alive):
            rows = torch.tensor(going, device=device)
            cache.keep(rows)
            tokens, positions, alive = tokens[rows], positions[rows], [alive[row] for row in going]
        hidden = cache.step(tokens, positions)
        positions = positions + 1
    return answers


def sample(logits: Tensor, uniform: Tensor, temperature: float, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Draws one token a row, (B,), from logits (B, V) with uniform numbers (B,); and its log-prob under the draw, (B,).

    The order is Hugging Face's: temperature, then the top_k likeliest, then the smallest set with probability top_p.
    """
    if temperature == 0:
        logps, tokens = logits.log_softmax(-1).max(-1)
        return tokens, logps
    logits = logits / temperature
    if top_k and top_k < logits.shape[1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        spare = ordered.cumsum(-1) - ordered >= top_p  # what lies wholly beyond the set; the likeliest never does
        logits = logits.masked_fill(spare.scatter(1, index, spare), float("-inf"))
    logps = logits.log_softmax(-1)
    # The token whose share of [0, 1) the number falls into; in fp64, so that no token's share is rounded away.
    edges = logps.double().exp().cumsum(-1)
    tokens = torch.searchsorted(edges, (uniform.double() * edges[:, -1])[:, None], right=True)[:, 0]
    tokens = tokens.clamp(max=logits.shape[1] - 1)
    return tokens, logps.gather(1, tokens[:, None])[:, 0]


@dataclass
class Flags:
    """Flags of generate.py."""

    model: str = ""  # Hugging Face folder
    prompt: str = ""  # one prompt, answered on the screen
    data: str = ""  # or a JSONL file of rows with a "prompt"
    out: str = ""  # where the rows go, each with a "response"
    template: Literal["auto", "plain", "chatml", "zephyr", "llama2", "llama3"] = "auto"  # as in training
    attributes: str = ""  # for a model of train_steerlm.py: the answer to ask for, "helpfulness:4,verbosity:1"
    temperature: float = 0.7  # 0 = always the likeliest token; 1 = the model's own distribution
    top_k: int = 0  # only the k likeliest tokens; 0 = all
    top_p: float = 1.0  # only the likeliest tokens that make up this much probability
    max_new_tokens: int = 256  # longest answer
    batch_size: int = 64  # prompts at a time: lower it when memory runs out
    seed: int = 0  # of the samples
    limit: int = 0  # only the first rows; 0 = all
    dtype: Literal["auto", "bf16", "fp32", "fp64"] = "auto"  # auto: bf16 on GPUs, else fp32


def steered(prompt: str | list, flags: Flags) -> str | list:
    """The prompt with its attribute line, where one is asked for. ValueError: the model knows none, or not this one."""
    if not flags.attributes:
        return prompt
    trained = attributes.load(flags.model)
    if not trained:
        raise ValueError(f"--attributes: {flags.model} was not trained with any: train_steerlm.py does that")
    return attributes.condition(prompt, attributes.read_line(flags.attributes, trained[1]), trained[0])


def main(argv: list[str] | None = None) -> None:
    flags = parse(Flags, __doc__, argv)
    if not flags.model or bool(flags.prompt) == bool(flags.data) or bool(flags.data) != bool(flags.out):
        raise ValueError("generate.py needs --model, and either --prompt TEXT or --data FILE with --out FILE")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = DTYPES[flags.dtype if flags.dtype != "auto" else "bf16" if device == "cuda" else "fp32"]
    tokenizer = load_tokenizer(flags.model)
    template = Template(flags.template, tokenizer)
    rows = [{"prompt": flags.prompt}] if flags.prompt else list(read_rows(flags.data))[: flags.limit or None]
    if lacking := [i for i, row in enumerate(rows, 1) if not row.get("prompt")]:
        raise ValueError(f"row {lacking[0]} of {flags.data} has no prompt")
    prompts = [template.prompt(steered(row["prompt"], flags)) for row in rows]
    model = load_model(flags.model, dtype, device)
    answers = generate(
        model, prompts, flags.max_new_tokens, flags.temperature, flags.top_k, flags.top_p, template.stop_ids,
        flags.seed, flags.batch_size,
    )  # fmt: skip
    texts = [tokenizer.decode(answer.tokens).strip() for answer in answers]
    if flags.prompt:
        print(texts[0])
        return
    partial = Path(flags.out + ".partial")
    with open(partial, "w") as file:
        for row, text in zip(rows, texts):
            file.write(json.dumps({**row, "response": text}, ensure_ascii=False) + "\n")
    os.replace(partial, flags.out)
    ended = sum(answer.ended for answer in answers)
    print(f"{len(rows)} answers in {flags.out}, {ended} of them ended by themselves")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
