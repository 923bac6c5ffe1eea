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
    """A module under both names, {i} the layer, {e} the expert."""

    ours: str
    theirs: str
    # One of several weights that are one tensor on disk, in the order of the model's declarations:
    # heads (a head of each in turn, GPT-NeoX) or blocks (one after the other, Phi-3).
    fused: str = ""


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
GEMMA = [
    *LLAMA,
    Row("blocks.{i}.after1", "model.layers.{i}.post_attention_layernorm"),
    Row("blocks.{i}.norm2", "model.layers.{i}.pre_feedforward_layernorm"),
    Row("blocks.{i}.after2", "model.layers.{i}.post_feedforward_layernorm"),
]
GPT_NEOX = [
    Row("embed", "gpt_neox.embed_in"),
    Row("blocks.{i}", "gpt_neox.layers.{i}"),
    Row("blocks.{i}.norm1", "gpt_neox.layers.{i}.input_layernorm"),
    Row("blocks.{i}.mixer", "gpt_neox.layers.{i}.attention"),
    Row("blocks.{i}.mixer.q", "gpt_neox.layers.{i}.attention.query_key_value", "heads"),
    Row("blocks.{i}.mixer.k", "gpt_neox.layers.{i}.attention.query_key_value", "heads"),
    Row("blocks.{i}.mixer.v", "gpt_neox.layers.{i}.attention.query_key_value", "heads"),
    Row("blocks.{i}.mixer.out", "gpt_neox.layers.{i}.attention.dense"),
    Row("blocks.{i}.norm2", "gpt_neox.layers.{i}.post_attention_layernorm"),
    Row("blocks.{i}.mlp", "gpt_neox.layers.{i}.mlp"),
    Row("blocks.{i}.mlp.up", "gpt_neox.layers.{i}.mlp.dense_h_to_4h"),
    Row("blocks.{i}.mlp.down", "gpt_neox.layers.{i}.mlp.dense_4h_to_h"),
    Row("norm", "gpt_neox.final_layer_norm"),
    Row("head", "embed_out"),
    Row("score_head", "score"),
]
PHI3 = [
    *LLAMA,
    *(
        Row(f"blocks.{{i}}.mixer.{x}", "model.layers.{i}.self_attn.qkv_proj", "blocks")
        for x in "qkv"
    ),
    Row("blocks.{i}.mlp.gate", "model.layers.{i}.mlp.gate_up_proj", "blocks"),
    Row("blocks.{i}.mlp.up", "model.layers.{i}.mlp.gate_up_proj", "blocks"),
]
EXPERT = "model.layers.{i}.block_sparse_moe.experts.{e}"
# Mixtures of experts.
ROUTED = [
    *LLAMA,
    Row("blocks.{i}.mlp.router", "model.layers.{i}.mlp.gate"),
    *(
        Row(f"blocks.{{i}}.mlp.experts.{{e}}.{x}", f"model.layers.{{i}}.mlp.experts.{{e}}.{x}_proj")
        for x in ("gate", "up", "down")
    ),
]
SPARSE = [
    *ROUTED,
    Row("blocks.{i}.mlp.shared_gate", "model.layers.{i}.mlp.shared_expert_gate"),
    *(
        Row(f"blocks.{{i}}.mlp.shared.{x}", f"model.layers.{{i}}.mlp.shared_expert.{x}_proj")
        for x in ("gate", "up", "down")
    ),
]
GLM4 = [
    *ROUTED,
    Row("blocks.{i}.mlp.router.correction", "model.layers.{i}.mlp.gate.e_score_correction_bias"),
    *(
        Row(f"blocks.{{i}}.mlp.shared.{x}", f"model.layers.{{i}}.mlp.shared_experts.{x}_proj")
        for x in ("gate", "up", "down")
    ),
]
MIXTRAL = [
    *LLAMA,
    Row("blocks.{i}.mlp.router", "model.layers.{i}.block_sparse_moe.gate"),
    *(
        Row(f"blocks.{{i}}.mlp.experts.{{e}}.{ours}", f"{EXPERT}.{theirs}")
        for ours, theirs in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    ),
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
    "ministral3": LLAMA,
    "phi3": PHI3,
    "gemma": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "gpt_neox": GPT_NEOX,
    "mixtral": MIXTRAL,
    "qwen2_moe": SPARSE,
    "qwen3_moe": SPARSE,
    "olmoe": SPARSE,
    "glm4_moe": GLM4,
}
HEADS = ("lm_head.weight", "embed_out.weight")  # on disk; a tied or a reward model does without


class Part(NamedTuple):
    """The rows that a weight has in a tensor on disk that several weights share.

    They lie in runs of `run` rows, the first at `first`, one every `step` rows.
    """

    first: int
    run: int
    step: int

    def rows(self, first: int, last: int) -> Tensor:
        """Return where rows first ... last - 1 of the weight lie on disk, ascending."""
        row = torch.arange(first, last)
        return self.first + row // self.run * self.step + row % self.run


class Stored(NamedTuple):
    """A weight as a folder holds it."""

    name: str
    part: Part | None  # None: it is the whole tensor
    shape: tuple[int, ...]  # of the whole tensor on disk
    weight: Weight


def weight_table(c: GPTConfig) -> dict[str, Stored]:
    """Return our name of every weight of the model -> where and how it lies on disk."""
    rows = {row.ours: row for row in TABLES[c.family]}
    declared = declared_weights(c)
    places = {name: _place(name, rows) for name in declared}
    together: dict[str, list[str]] = {}
    for name, (theirs, _) in places.items():
        together.setdefault(theirs, []).append(name)
    table = {}
    for name, (theirs, fused) in places.items():
        weight, part = declared[name], None
        sizes = [declared[sibling].shape[0] for sibling in together[theirs]]
        at = together[theirs].index(name)
        if fused == "heads":
            part = Part(at * c.head_size, c.head_size, len(sizes) * c.head_size)
        if fused == "blocks":
            part = Part(sum(sizes[:at]), sizes[at], sizes[at])
        table[name] = Stored(theirs, part, (sum(sizes), *weight.shape[1:]), weight)
    return table


def _place(name: str, rows: dict[str, Row]) -> tuple[str, str]:
    """Return the name on disk of a weight, and how it is fused with others there."""
    words = name.split(".")
    layer = expert = ""
    if words[0] == "blocks":
        layer, words[1] = words[1], "{i}"
    if "experts" in words:
        at = words.index("experts") + 1
        expert, words[at] = words[at], "{e}"
    length = next(n for n in range(len(words), 0, -1) if ".".join(words[:n]) in rows)
    row = rows[".".join(words[:length])]
    theirs = row.theirs.replace("{i}", layer).replace("{e}", expert)
    return ".".join([theirs, *words[length:]]), row.fused


def fuse(parts: dict[str, Tensor], table: dict[str, Stored]) -> Tensor:
    """Put whole weights together, by our names, as the one tensor that they are on disk."""
    stored = next(table[name] for name in parts)
    fused = next(iter(parts.values())).new_empty(stored.shape)
    for name, tensor in parts.items():
        fused[table[name].part.rows(0, len(tensor))] = tensor
    return fused
