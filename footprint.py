"""Bytes that each rank of a layout holds and sends, computed without running it.

    layout = Layout(tp=2, dp=4)
    memory(c, layout, rank, tokens=8192, scored=4096)  -> {"weights": ..., "activations": ..., ...}
    sent(c, layout, rank, rows, scored)                -> {"tp": ..., "dp": ..., ...}

Bytes of weights, gradients and optimizer, and bytes sent, are exact: tests hold them equal to what
the optimizer allocates and parallel.py sends. Activations and logits are estimates for the GPU
kernels. plan.py turns these bytes into times and compares layouts.

Letters of the formulas: rows = tokens of a micro-batch on one rank, h query heads, g key/value
heads, f MLP width and v vocabulary of one tensor rank.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import optimizer
from kernels.logprob import GPU_CHUNK, GPU_KEEP_BYTES
from layers import frozen_bytes
from model import GPT, GPTConfig
from optimizer import Kind, plan_buckets
from parallel import Mesh, split
from sharding import EMBED, HEAD
from weights.adapters import Lora, attach, quantize_linears

# ---- a layout ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis, and the ZeRO stage.

    1 shards the optimizer, 2 gradients as well, 3 also weights.
    """

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 1
    ep: int = 1

    @property
    def world(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def mesh(self, rank: int) -> Mesh:
        """Return the mesh of a rank, without process groups."""
        return Mesh(rank, self.pp, self.dp, self.cp, self.tp, ep=self.ep)

    def rank(self, stage: int = 0, tp_rank: int = 0) -> int:
        """Return the first rank with these coordinates."""
        return stage * self.dp * self.cp * self.tp + tp_rank

    def flags(self) -> str:
        """Return the flags of a training script, without those that are 1."""
        sizes = {"tp": self.tp, "cp": self.cp, "pp": self.pp, "ep": self.ep, "zero": self.zero}
        return " ".join(f"--{name} {n}" for name, n in sizes.items() if n > 1)


# ---- exact: buckets and bytes sent ---------------------------------------------------------------


@functools.cache
def bucket_elements(
    c: GPTConfig,
    tp: int,
    tp_rank: int,
    pp: int,
    stage: int,
    lora: Lora | None = None,
    dtype: torch.dtype = torch.bfloat16,
    ep: int = 1,
) -> tuple[list[tuple[Kind, int]], int]:
    """Return kind and elements of every bucket of a rank, without padding; and frozen bytes."""
    mesh = Mesh(stage * ep * tp + tp_rank, pp=pp, dp=ep, tp=tp, ep=ep)
    model = _without_memory(c, mesh, lora)
    parameters = dict(model.named_parameters())
    sizes = [
        (kind, sum(parameters[name].numel() for name in names))
        for kind, names in plan_buckets(model, mesh)
    ]
    return sizes, frozen_bytes(model, dtype)


def _without_memory(c: GPTConfig, mesh: Mesh, lora: Lora | None) -> GPT:
    """Return the model of a rank on the meta device."""
    with torch.device("meta"):
        model = GPT(c, mesh)
        if lora:
            quantize_linears(model, lora.base_dtype)
            attach(model, lora)
    return model


@functools.cache
def sharded_flats(
    c: GPTConfig, layout: Layout, tp_rank: int, lora: Lora | None = None
) -> list[tuple[str, bool, int, int]]:
    """Return (part, whether it trains, elements with padding, ranks) of the flat buffers of ZeRO-3.

    ValueError: the layout is impossible.
    """
    if layout.pp > 1:
        raise ValueError("--zero 3 is not supported with --pp: use --tp")
    if lora and lora.base_dtype != "none":
        raise ValueError("--zero 3 does not shard a quantised base")
    mesh = layout.mesh(tp_rank)
    return optimizer.flat_sizes(_without_memory(c, mesh, lora), mesh, 3)


def gathered_peak(
    c: GPTConfig,
    layout: Layout,
    tp_rank: int,
    dtype: torch.dtype = torch.bfloat16,
    lora: Lora | None = None,
) -> int:
    """Return the most bytes of weights that ZeRO-3 holds gathered: two neighbouring parts."""
    parts = [EMBED, *(f"blocks.{i}" for i in range(c.layers)), HEAD]
    held = dict.fromkeys(parts, 0)
    for part, _, elements, ranks in sharded_flats(c, layout, tp_rank, lora):
        if ranks > 1:
            held[part] += elements
    if c.tied and not c.outputs:
        held[HEAD] += held[EMBED]
    pairs = zip(parts, parts[1:])
    return max(held[one] + held[other] for one, other in pairs) * dtype.itemsize


def buckets(
    c: GPTConfig, layout: Layout, rank: int, lora: Lora | None = None
) -> list[tuple[int, int]]:
    """Return (elements with padding, ranks that share them) of every bucket of a rank.

    ValueError: the layout is impossible for this model.
    """
    mesh = layout.mesh(rank)
    if layout.zero == 3:
        flats = sharded_flats(c, layout, mesh.tp_rank, lora)
        return [(elements, ranks) for _, trains, elements, ranks in flats if trains]
    sizes = []
    place = (mesh.tp, mesh.tp_rank, mesh.pp, mesh.pp_rank)
    elements, _ = bucket_elements(c, *place, lora, ep=mesh.ep)
    for kind, used in elements:
        ranks = mesh.size(kind.replicas)
        sizes.append((-(-used // ranks) * ranks, ranks))
    return sizes


def sent(
    c: GPTConfig,
    layout: Layout,
    rank: int,
    rows: Sequence[Sequence[int]],
    scored: Sequence[Sequence[int]],
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    lora: Lora | None = None,
    half_grads: bool = False,
) -> dict[str, int]:
    """Return the bytes that a rank sends in one optimizer step, by purpose (the keys of SENT).

    half_grads: gradients are summed in bf16.
    rows, scored: for every micro-batch the tokens, and the scored tokens, on each context rank; the
    scored tokens of a reward model are the last ones of its responses.
    "ep", the rows of experts on other ranks, is exact in the sum over ranks where all experts are
    taken equally often, and on each rank where all have as many rows.
    Among n ranks an all-gather of O bytes of output sends (n-1)/n O, a reduce-scatter of I bytes of
    input (n-1)/n I, an all-reduce of B bytes 2 (n-1)/n B, whatever the backend's algorithm.
    """
    mesh, tp, cp = layout.mesh(rank), layout.tp, layout.cp
    layers = layers_of(c, mesh)
    size = dtype.itemsize
    exact = max(4, size)  # bytes of a number that is kept in fp32 at least
    has_head = mesh.last_stage and not c.outputs
    # A block has four collectives, forward and backward. Checkpointing repeats three of them: no
    # backward needs the output of the last one, unless a norm follows it.
    repeated = checkpointing * (3 if c.norms == "before" else 4)
    crossings = (8 + repeated) * layers + 2 * (mesh.pp_rank == 0) + 2 * has_head
    gathers = (3 if checkpointing else 2) * layers * 2  # of k and v: forward, (repeated,) backward
    key_size = _share(c.kv_heads, mesh) * c.head_size * size
    sparse = sum(map(c.sparse, range(*split(c.layers, mesh.pp, mesh.pp_rank))))
    if c.shared_ffn:  # an MLP beside the experts has an enter and an exit of its own
        crossings += sparse * (4 + checkpointing * (2 + (c.norms == "before")))
    total = dict.fromkeys(("tp", "cp", "pp", "dp", "ep", "logps", "control"), 0)
    for tokens, marked in zip(rows, scored, strict=True):
        stream = -(-tokens[mesh.cp_rank] // tp) * c.width * size  # this rank's residual stream
        total["tp"] += (tp - 1) * crossings * stream
        gathered = -(-tokens[mesh.cp_rank] // tp) * c.experts * size  # logits of the router
        total["tp"] += (tp - 1) * sparse * (3 if checkpointing else 2) * gathered
        if layout.ep > 1:
            routed = tokens[mesh.cp_rank] * c.active * c.width * size // layout.ep
            passes = 6 if checkpointing else 4  # there and back: forward, (repeated,) backward
            counted = (2 if checkpointing else 1) * c.experts * 8
            total["ep"] += sparse * (layout.ep - 1) * (passes * routed + counted)
        if c.qk_norm == "whole":  # a number a token of q and of k
            squares = _all_reduced(tokens[mesh.cp_rank] * exact, tp)
            total["tp"] += layers * (6 if checkpointing else 4) * squares
        total["cp"] += (cp - 1) * gathers * max(tokens) * key_size
        total["pp"] += ((not mesh.last_stage) + (mesh.pp_rank > 0)) * stream
        if has_head:
            total["logps"] += (tp - 1) * marked[mesh.cp_rank] * 2 * exact
            total["logps"] += _all_reduced(sum(marked) * exact, cp)
        elif mesh.last_stage:
            total["logps"] += _all_reduced(sum(marked) * c.outputs * exact, cp * tp)
    count = len(rows)
    grad = optimizer.grad_dtype(dtype, half_grads).itemsize
    for elements, ranks in buckets(c, layout, rank, lora):
        sums = count if layout.zero > 1 else 1
        total["dp"] += elements // ranks * (ranks - 1) * grad * sums
        if layout.zero < 3:
            total["dp"] += elements // ranks * (ranks - 1) * size
    for part, _, elements, ranks in (
        sharded_flats(c, layout, mesh.tp_rank, lora) if layout.zero == 3 else ()
    ):
        # A block is gathered forward and backward, the head once; a tied head is the embedding.
        twice = part not in (EMBED, HEAD) or part == EMBED and c.tied and not c.outputs
        total["dp"] += elements // ranks * (ranks - 1) * size * count * (2 if twice else 1)
    total["control"] = _all_reduced(16, layout.world)  # Σ gradient² and the stop flag, fp64
    return total


def _all_reduced(size: int, n: int) -> int:
    return 2 * size * (n - 1) // n


def _share(total: int, mesh: Mesh) -> int:
    """Return this tensor rank's share of some heads or columns."""
    low, high = split(total, mesh.tp, mesh.tp_rank)
    return high - low


def layers_of(c: GPTConfig, mesh: Mesh) -> int:
    """Return the number of blocks of this pipeline stage."""
    first, last = split(c.layers, mesh.pp, mesh.pp_rank)
    return last - first


# ---- memory --------------------------------------------------------------------------------------


def memory(
    c: GPTConfig,
    layout: Layout,
    rank: int,
    tokens: int,
    scored: int,
    micro_batches: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
    lora: Lora | None = None,
    offload: bool = False,
    half_grads: bool = False,
) -> dict[str, int]:
    """Return the bytes of a rank whose micro-batches have `tokens` tokens, `scored` of them scored.

    weights, gradients, optimizer and host (memory of the host, with offload) are exact. activations
    (kept for the backward of all micro-batches in flight, and the buffers of one backward) and
    logits are estimates for the GPU kernels.
    """
    mesh, flat = layout.mesh(rank), buckets(c, layout, rank, lora)
    if layout.zero == 3:
        flats = sharded_flats(c, layout, mesh.tp_rank, lora)
        frozen = sum(m // ranks for _, trains, m, ranks in flats if not trains) * dtype.itemsize
    else:
        place = (mesh.tp, mesh.tp_rank, mesh.pp, mesh.pp_rank)
        _, frozen = bucket_elements(c, *place, lora, dtype, mesh.ep)
    held = optimizer.memory(flat, frozen, layout.zero, dtype, offload, half_grads)
    total = held._asdict()
    rows = -(-tokens // layout.cp)
    total["activations"] = _activations(c, mesh, tokens, micro_batches, dtype, checkpointing)
    if layout.zero == 3:
        total["activations"] += gathered_peak(c, layout, mesh.tp_rank, dtype, lora)
    if layout.zero > 1:  # one bucket that fills, and at most two that are being reduced
        moving = sorted((n for n, ranks in flat if ranks > 1), reverse=True) or [0]
        grad = optimizer.grad_dtype(dtype, half_grads).itemsize
        total["activations"] += grad * (moving[0] + sum(moving[:2]))
    total["logits"] = 0
    if mesh.last_stage and not c.outputs:
        total["logits"] = _logits(c, mesh, rows, -(-scored // layout.cp), dtype, lora is None)
    return total


def saved_copy(
    c: GPTConfig,
    layout: Layout,
    rank: int,
    lora: Lora | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Return the bytes of host memory in which --async-save keeps a copy of a rank's state."""
    return optimizer.saved_bytes(buckets(c, layout, rank, lora), dtype)


def _activations(
    c: GPTConfig,
    mesh: Mesh,
    tokens: int,
    micro_batches: int,
    dtype: torch.dtype,
    checkpointing: bool,
) -> int:
    """Estimate the bytes of activations, with the buffers of one block's backward."""
    size = dtype.itemsize
    rows = -(-tokens // mesh.cp)
    stream = -(-rows // mesh.tp) * c.width  # elements of this rank's residual stream
    widest = max(c.mlp_width(layer) for layer in range(c.layers))
    g, f = _share(c.kv_heads, mesh), _share(widest, mesh)
    h = g * c.heads // c.kv_heads
    # Elements kept of a block: the inputs of norms, q|k|v and gate|up; q, k, v and the output of
    # attention, whose fp32 logsumexp comes on top; gate, up and their product.
    norms = {"before": 2, "after": 2, "both": 4}[c.norms] - c.parallel_residual
    inputs = norms * stream + 2 * rows * c.width
    heads = (
        2 * rows * h + 2 * (tokens if mesh.cp > 1 else rows) * g + rows * (h + g) * bool(c.qk_norm)
    )
    mlp = (3 if c.gated else 2) * rows * f
    block = (inputs + heads * c.head_size + mlp) * size + 4 * rows * h
    in_flight = min(mesh.pp - mesh.pp_rank, micro_batches)
    kept = layers_of(c, mesh) * in_flight * (stream * size if checkpointing else block)
    backward = (3 * rows * f + 2 * rows * c.width) * size
    return kept + backward + (block if checkpointing else 0)


def _logits(
    c: GPTConfig, mesh: Mesh, rows: int, scored: int, dtype: torch.dtype, trains: bool
) -> int:
    """Estimate the bytes of the head: logits or chunks of them, its inputs, and dW if it trains."""
    size, exact = dtype.itemsize, max(4, dtype.itemsize)
    v = _share(c.vocab, mesh)
    logits = scored * v * exact
    if logits > GPU_KEEP_BYTES:
        logits = scored * min(GPU_CHUNK, v) * (exact + size)
    gathered = rows * c.width * size if mesh.tp > 1 else 0
    d_w = v * c.width * size if trains else 0
    return logits + gathered + scored * c.width * (2 * size + exact) + d_w
