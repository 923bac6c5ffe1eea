"""The weight table: one row a module, our path | its path in a Hugging Face folder, read both ways.

A weight's name on disk is the row of the longest prefix of its own name, followed by the rest:
under ("blocks.{i}.mixer", "model.layers.{i}.self_attn") the weight blocks.3.mixer.scale is
model.layers.3.self_attn.scale. So a weight that a layer newly declares needs no row of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from architecture import GPTConfig
from layers import Weight
from model import declared_weights


class Row(NamedTuple):
    """A module under both names, {i} the layer."""

    ours: str
    theirs: str
    part: str = ""  # q, k or v: which part it is of a fused tensor on disk


LLAMA = [
    Row("embed", "model.embed_tokens"),
    Row("blocks.{i}", "model.layers.{i}"),
    Row("blocks.{i}.norm1", "model.layers.{i}.input_layernorm"),
    Row("blocks.{i}.mixer", "model.layers.{i}.self_attn"),
    Row("blocks.{i}.mixer.q", "model.layers.{i}.self_attn.q_proj"),
    Row("blocks.{i}.mixer.k", "model.layers.{i}.self_attn.k_proj"),
    Row("blocks.{i}.mixer.v", "model.layers.{i}.self_attn.v_proj"),
    Row("blocks.{i}.mixer.out", "model.layers.{i}.self_attn.o_proj"),
    Row("blocks.{i}.norm2", "model.layers.{i}.post_attention_layernorm"),
    Row("blocks.{i}.mlp", "model.layers.{i}.mlp"),
    Row("blocks.{i}.mlp.gate", "model.layers.{i}.mlp.gate_proj"),
    Row("blocks.{i}.mlp.up", "model.layers.{i}.mlp.up_proj"),
    Row("blocks.{i}.mlp.down", "model.layers.{i}.mlp.down_proj"),
    Row("norm", "model.norm"),
    Row("head", "lm_head"),
    Row("score_head", "score"),
]
# Norms after attention and MLP.
OLMO = [
    *LLAMA,
    Row("blocks.{i}.norm1", "model.layers.{i}.post_attention_layernorm"),
    Row("blocks.{i}.norm2", "model.layers.{i}.post_feedforward_layernorm"),
]
GPT_NEOX = [
    Row("embed", "gpt_neox.embed_in"),
    Row("blocks.{i}", "gpt_neox.layers.{i}"),
    Row("blocks.{i}.norm1", "gpt_neox.layers.{i}.input_layernorm"),
    Row("blocks.{i}.mixer", "gpt_neox.layers.{i}.attention"),
    Row("blocks.{i}.mixer.q", "gpt_neox.layers.{i}.attention.query_key_value", "q"),
    Row("blocks.{i}.mixer.k", "gpt_neox.layers.{i}.attention.query_key_value", "k"),
    Row("blocks.{i}.mixer.v", "gpt_neox.layers.{i}.attention.query_key_value", "v"),
    Row("blocks.{i}.mixer.out", "gpt_neox.layers.{i}.attention.dense"),
    Row("blocks.{i}.norm2", "gpt_neox.layers.{i}.post_attention_layernorm"),
    Row("blocks.{i}.mlp", "gpt_neox.layers.{i}.mlp"),
    Row("blocks.{i}.mlp.up", "gpt_neox.layers.{i}.mlp.dense_h_to_4h"),
    Row("blocks.{i}.mlp.down", "gpt_neox.layers.{i}.mlp.dense_4h_to_h"),
    Row("norm", "gpt_neox.final_layer_norm"),
    Row("head", "embed_out"),
    Row("score_head", "score"),
]
TABLES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "smollm3": LLAMA,
    "olmo2": OLMO,
    "olmo3": OLMO,
    "nemotron": LLAMA,
    "granite": LLAMA,
    "stablelm": LLAMA,
    "gpt_neox": GPT_NEOX,
}
HEADS = ("lm_head.weight", "embed_out.weight")  # on disk; a tied or a reward model does without


class Stored(NamedTuple):
    """A weight as a folder holds it."""

    name: str
    part: str  # of a fused tensor, or ""
    shape: tuple[int, ...]  # of the whole tensor on disk
    weight: Weight


def weight_table(c: GPTConfig) -> dict[str, Stored]:
    """Return our name of every weight of the model -> where and how it lies on disk."""
    rows = {row.ours: row for row in TABLES[c.family]}
    table = {}
    for name, weight in declared_weights(c).items():
        words = name.split(".")
        layer = ""
        if words[0] == "blocks":
            layer, words[1] = words[1], "{i}"
        length = next(n for n in range(len(words), 0, -1) if ".".join(words[:n]) in rows)
        row = rows[".".join(words[:length])]
        theirs = ".".join([row.theirs.replace("{i}", layer), *words[length:]])
        shape = (3 * weight.shape[0], *weight.shape[1:]) if row.part else weight.shape
        table[name] = Stored(theirs, row.part, shape, weight)
    return table


def part_of(fused: Tensor, part: str, head_size: int) -> Tensor:
    """Take q, k or v out of GPT-NeoX's query_key_value (or some heads of it).

    Its rows lie as (head, q | k | v, head size).
    """
    rows = fused.view(-1, 3, head_size, *fused.shape[1:])
    return rows[:, "qkv".index(part)].flatten(0, 1)


def fuse(parts: dict[str, Tensor], head_size: int) -> Tensor:
    """Put whole q, k and v together as query_key_value."""
    rows = [parts[part].view(-1, head_size, *parts[part].shape[1:]) for part in "qkv"]
    return torch.stack(rows, 1).reshape(-1, *parts["q"].shape[1:])
