from typing import NamedTuple

from model import GPTConfig, shapes


class Row(NamedTuple):
    """One weight under both names, {i} the layer. `part`: which of q, k, v it is inside a fused tensor of theirs.
    `shape`: of the whole tensor on disk, once the table is that of a model."""

    ours: str
    theirs: str
    part: str = ""
    shape: tuple[int, ...] = ()


LLAMA = [
    Row("embed.weight", "model.embed_tokens.weight"),
    Row("blocks.{i}.norm1.weight", "model.layers.{i}.input_layernorm.weight"),
    Row("blocks.{i}.q.*", "model.layers.{i}.self_attn.q_proj.*"),
    Row("blocks.{i}.k.*", "model.layers.{i}.self_attn.k_proj.*"),
    Row("blocks.{i}.v.*", "model.layers.{i}.self_attn.v_proj.*"),
    Row("blocks.{i}.q_norm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
    Row("blocks.{i}.k_norm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
    Row("blocks.{i}.out.*", "model.layers.{i}.self_attn.o_proj.*"),
    Row("blocks.{i}.norm2.weight", "model.layers.{i}.post_attention_layernorm.weight"),
    Row("blocks.{i}.gate.*", "model.layers.{i}.mlp.gate_proj.*"),
    Row("blocks.{i}.up.*", "model.layers.{i}.mlp.up_proj.*"),
    Row("blocks.{i}.down.*", "model.layers.{i}.mlp.down_proj.*"),
    Row("norm.weight", "model.norm.weight"),
    Row("head.weight", "lm_head.weight"),
    Row("score_head.weight", "score.weight"),
]


GPT_NEOX = [
    Row("embed.weight", "gpt_neox.embed_in.weight"),
    Row("blocks.{i}.norm1.*", "gpt_neox.layers.{i}.input_layernorm.*"),
    Row("blocks.{i}.q.*", "gpt_neox.layers.{i}.attention.query_key_value.*", "q"),
    Row("blocks.{i}.k.*", "gpt_neox.layers.{i}.attention.query_key_value.*", "k"),
    Row("blocks.{i}.v.*", "gpt_neox.layers.{i}.attention.query_key_value.*", "v"),
    Row("blocks.{i}.out.*", "gpt_neox.layers.{i}.attention.dense.*"),
    Row("blocks.{i}.norm2.*", "gpt_neox.layers.{i}.post_attention_layernorm.*"),
    Row("blocks.{i}.up.*", "gpt_neox.layers.{i}.mlp.dense_h_to_4h.*"),
    Row("blocks.{i}.down.*", "gpt_neox.layers.{i}.mlp.dense_4h_to_h.*"),
    Row("norm.*", "gpt_neox.final_layer_norm.*"),
    Row("head.weight", "embed_out.weight"),
    Row("score_head.weight", "score.weight"),
]


# Buffers that old folders carry along: they are computed here, or masks.
NOT_WEIGHTS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


def weight_table(c: GPTConfig) -> dict[str, Row]:
    """our name of every weight the model has -> its row with the layer and the shape filled in."""
    table = {}
    rows = {row.ours: row for row in (GPT_NEOX if c.family == "gpt_neox" else LLAMA)}
    for name, shape in shapes(c).items():
        words = name.split(".")
        layer = words[1] if words[0] == "blocks" else ""
        generic = ".".join(["blocks", "{i}", *words[2:]]) if layer else name
        row = rows.get(generic) or rows[generic.rpartition(".")[0] + ".*"]
        theirs = row.theirs.replace("{i}", layer).replace("*", words[-1])
        table[name] = Row(name, theirs, row.part, (3 * shape[0], *shape[1:]) if row.part else shape)
    return table
