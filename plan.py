"""Which layout to train in: memory and time of every way to spread a model over some GPUs, MODELLED, not measured.

    python plan.py --model mistral-7b-sft --gpus 8 --gpu h100 --algorithm dpo
    python plan.py --width 8192 --layers 80 --heads 64 --kv-heads 8 --ffn 28672 --vocab 128256 --gpus 64 --nodes 8

Bytes of weights, gradients and optimizer, and bytes sent, are formulas that tests hold equal to what `parallel.py`
allocates and sends (`memory`, `sent`). Activations and logits are estimates; times are those bytes and the arithmetic
at assumed rates, nothing overlapping: good for putting layouts in order, not for a promise.

Letters as in model.py; of one rank: rows = its tokens of a micro-batch, h, g, f, v its heads, MLP and vocabulary.
"""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

import optimizer
from config import RunConfig, parse
from kernels.logprob import GPU_CHUNK, GPU_KEEP_BYTES
from model import GPT, GPTConfig, parameter_count
from optimizer import Kind, plan_buckets
from parallel import Mesh, split
from weights.config_json import read_config

GIB = 2**30


class Gpu(NamedTuple):
    """What a GPU is taken for: makers' data sheets, of the links 80 % of what they state for one direction."""

    gib: float  # memory that torch sees
    flops: float  # bf16, dense, a second
    node: float  # bytes a second to a GPU of the same node
    network: float  # bytes a second to another node, with an adapter of 200 (A100) or 400 Gb/s for each GPU


GPUS = {
    "h100": Gpu(79, 989e12, 360e9, 40e9),
    "h200": Gpu(139, 989e12, 360e9, 40e9),
    "a100": Gpu(79, 312e12, 240e9, 20e9),
}
RESERVE = 3.5  # GiB for CUDA, NCCL's buffers and what the allocator cannot use: a guess


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis, and what the optimizer shards: 1 its state, 2 gradients as well."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    dp: int = 1
    zero: int = 1

    @property
    def world(self) -> int:
        return self.tp * self.cp * self.pp * self.dp

    def mesh(self, rank: int) -> Mesh:
        """The place of a rank, without a process group."""
        return Mesh(rank, self.pp, self.dp, self.cp, self.tp)

    def rank(self, stage: int = 0, tp_rank: int = 0) -> int:
        """The first rank with these coordinates."""
        return stage * self.dp * self.cp * self.tp + tp_rank

    def flags(self) -> str:
        """As a command line has it; what is 1 anyway is left out."""
        return " ".join(
            f"--{name} {n}" for name in ("tp", "cp", "pp", "zero") if (n := getattr(self, name)) > 1
        )


# ---- what parallel.py does, counted ----------------------------------------------------------------------------------


@functools.cache
def _bucket_elements(
    c: GPTConfig, tp: int, tp_rank: int, pp: int, stage: int
) -> list[tuple[Kind, int]]:
    """Return kind and elements of every bucket of a rank, without padding."""
    mesh = Mesh(stage * tp + tp_rank, pp=pp, tp=tp)
    with torch.device("meta"):
        model = GPT(c, mesh)
    parameters = dict(model.named_parameters())
    return [
        (kind, sum(parameters[name].numel() for name in names))
        for kind, names in plan_buckets(model, mesh)
    ]


def buckets(c: GPTConfig, layout: Layout, rank: int) -> list[tuple[int, int]]:
    """Return (elements with padding, ranks that share them) of every bucket of a rank.

    ValueError: a layout that the model cannot take.
    """
    mesh = layout.mesh(rank)
    sizes = []
    for kind, used in _bucket_elements(c, mesh.tp, mesh.tp_rank, mesh.pp, mesh.pp_rank):
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
) -> dict[str, int]:
    """Bytes that a rank sends in one optimizer step, by purpose, whatever the backend's algorithm.

    Of n ranks: all-gather of O bytes in all (n-1)/n O each, reduce-scatter of I bytes (n-1)/n I, all-reduce of B bytes
    2 (n-1)/n B, a message its size. rows, scored: for every micro-batch of the rank's dp share the tokens (scored ones)
    that each context rank holds; a reward model's scored tokens are its responses.
    """
    mesh, tp, cp = layout.mesh(rank), layout.tp, layout.cp
    first, last = split(c.layers, layout.pp, mesh.pp_rank)
    layers, g = last - first, _part(c.kv_heads, mesh)
    size, exact, head = dtype.itemsize, max(4, dtype.itemsize), mesh.last_stage and not c.outputs
    # Of the four collectives of a block checkpointing repeats three: nothing in the backward needs the last one's sum.
    crossings = (11 if checkpointing else 8) * layers + 2 * (mesh.pp_rank == 0) + 2 * head
    gathers = (3 if checkpointing else 2) * layers * 2  # k and v: forward, repeated, backward
    total = dict.fromkeys(("tp", "cp", "pp", "dp", "logps", "control"), 0)
    for held, marked in zip(rows, scored, strict=True):
        shard = (
            -(-held[mesh.cp_rank] // tp) * c.width * size
        )  # a rank's piece of the residual stream
        total["tp"] += (tp - 1) * crossings * shard
        total["cp"] += (cp - 1) * gathers * max(held) * g * c.head_size * size
        total["pp"] += ((not mesh.last_stage) + (mesh.pp_rank > 0)) * shard
        if head:
            total["logps"] += (tp - 1) * marked[mesh.cp_rank] * 2 * exact + _reduced(
                sum(marked) * exact, cp
            )
        elif mesh.last_stage:
            total["logps"] += _reduced(sum(marked) * c.outputs * exact, cp * tp)
    for n, ranks in buckets(c, layout, rank):
        reduced = exact * (len(rows) if layout.zero == 2 else 1)
        total["dp"] += n // ranks * (ranks - 1) * (reduced + size)
    total["control"] = _reduced(16, layout.world)  # Σ gradient² and the wish to stop, fp64
    return total


def _reduced(size: int, n: int) -> int:
    return 2 * size * (n - 1) // n


def _part(total: int, mesh: Mesh) -> int:
    low, high = split(total, mesh.tp, mesh.tp_rank)
    return high - low


# ---- estimates -------------------------------------------------------------------------------------------------------


def memory(
    c: GPTConfig,
    layout: Layout,
    rank: int,
    tokens: int,
    scored: int,
    micro_batches: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
) -> dict[str, int]:
    """Bytes of a rank that trains on micro-batches of so many tokens, of which so many are scored.

    weights, gradients and optimizer are the flat buffers, exactly; activations (all that is kept for the backward, of
    every micro-batch under way, and what a backward needs besides) and logits are estimates for the GPU's kernels.
    """
    mesh, flat = layout.mesh(rank), buckets(c, layout, rank)
    size, exact = dtype.itemsize, max(4, dtype.itemsize)
    found = optimizer.memory(flat, 0, layout.zero, dtype)._asdict()
    first, last = split(c.layers, layout.pp, mesh.pp_rank)
    rows = -(-tokens // layout.cp)
    shard = -(-rows // layout.tp) * c.width  # elements of the residual stream
    g, f, v = (_part(n, mesh) for n in (c.kv_heads, c.ffn, c.vocab))
    h = g * c.heads // c.kv_heads
    # Kept of a block: what norms, q|k|v and gate|up read; q, k, v, attention's answer and log-sum; gate, up, product.
    stream = (1 if c.parallel_residual else 2) * shard + 2 * rows * c.width
    attention = (
        2 * rows * h + 2 * (tokens if layout.cp > 1 else rows) * g + rows * (h + g) * c.qk_norm
    ) * c.head_size
    block = (stream + attention + (3 if c.mlp == "swiglu" else 2) * rows * f) * size + 4 * rows * h
    under_way = min(layout.pp - mesh.pp_rank, micro_batches)
    found["activations"] = (last - first) * under_way * (shard * size if checkpointing else block)
    found["activations"] += (
        3 * rows * f + 2 * rows * c.width
    ) * size + block * checkpointing  # one block's backward
    if (
        layout.zero == 2
    ):  # gradients on their way: a bucket that fills, two at most that are being summed
        moving = sorted((n for n, ranks in flat if ranks > 1), reverse=True)
        found["activations"] += exact * (moving[0] + sum(moving[:2]))
    found["logits"] = 0
    if mesh.last_stage and not c.outputs:
        m = -(-scored // layout.cp)
        logits = m * v * exact
        logits = logits if logits <= GPU_KEEP_BYTES else m * min(GPU_CHUNK, v) * (exact + size)
        gathered = rows * c.width * size if layout.tp > 1 else 0
        found["logits"] = (
            logits + gathered + m * c.width * (2 * size + exact) + v * c.width * size
        )  # the last is dW
    return found


@dataclass
class Plan:
    """Flags of plan.py."""

    model: str = ""  # Hugging Face folder; or the sizes below
    width: int = 0  # of the residual stream
    layers: int = 0  # blocks
    heads: int = 0  # query heads
    kv_heads: int = 0  # key/value heads; 0 = as many as query heads
    ffn: int = 0  # MLP width; 0 = 8/3 of the width, rounded up to a multiple of 16
    vocab: int = 0  # tokens
    gpus: int = 8  # in all
    nodes: int = 1  # machines they are in
    gpu: Literal[tuple(GPUS)] = "h100"  # speeds that are assumed, and the memory
    memory: float = 0.0  # GiB a GPU; 0 = what --gpu has
    efficiency: float = 0.5  # share of the GPU's peak that the arithmetic is taken to reach
    algorithm: Literal["sft", "rm", "dpo", "kto", "ppo"] = (
        "dpo"  # ppo: a critic trains as well, a reference stays
    )
    batch_size: int = 64  # examples an optimizer step
    max_length: int = 2048  # tokens of a prompt with one response
    example_tokens: int = 0  # mean of an example with all its responses; 0 = half of --max-length
    max_tokens: int = 8192  # of a micro-batch; halves of it are tried too: no result depends on it
    checkpoint_activations: bool = False  # always recompute; without it, where nothing faster fits


class Row(NamedTuple):
    """A layout with what is expected of it."""

    layout: Layout
    max_tokens: int
    checkpointing: bool
    memory: dict[str, int]  # of the fullest rank, by kind
    total: int
    times: dict[str, float]  # of a step, by kind
    seconds: float

    def flags(self) -> str:
        """As a training script takes them."""
        recompute = "--checkpoint-activations" if self.checkpointing else ""
        return " ".join(
            filter(None, (self.layout.flags(), f"--max-tokens {self.max_tokens}", recompute))
        )


def candidates(c: GPTConfig, gpus: int) -> list[Layout]:
    """Every layout of so many ranks that the model can take."""
    found = []
    for tp in range(1, min(gpus, c.kv_heads) + 1):
        for pp in range(1, min(gpus // tp, c.layers) + 1):
            for cp in range(1, gpus // (tp * pp) + 1):
                if gpus % (tp * pp * cp) == 0:
                    dp = gpus // (tp * pp * cp)
                    found += [
                        Layout(tp, cp, pp, dp, zero) for zero in ((1, 2) if dp * cp > 1 else (1,))
                    ]
    return found


def estimate(
    c: GPTConfig, flags: Plan, layout: Layout, max_tokens: int, checkpointing: bool
) -> Row:
    """Memory of the fullest rank and time of a step of one layout."""
    gpu, per_node = GPUS[flags.gpu], flags.gpus // flags.nodes
    trained = 2 if flags.algorithm == "ppo" else 1
    share = -(-flags.batch_size // layout.dp) * _example(
        flags
    )  # tokens a step of the fullest dp rank
    count = -(-share // max_tokens)
    tokens = -(-share // count)
    rows, scored = ([[-(-n // layout.cp)] * layout.cp] for n in (tokens, tokens // 2))
    spans = {
        "tp": layout.tp,
        "cp": layout.tp * layout.cp,
        "logps": layout.tp * layout.cp,
        "pp": layout.world,
    }
    spans["dp"] = layout.world // (1 if c.tied else layout.pp)
    fullest, slowest, arithmetic, dp = {}, 0.0, 0.0, 0.0
    for stage in range(layout.pp):
        rank = layout.rank(
            stage, layout.tp - 1
        )  # of what does not divide the last tensor rank has the most
        here = memory(
            c, layout, rank, max_tokens, max_tokens // 2, count, checkpointing=checkpointing
        )
        here |= {kind: trained * here[kind] for kind in ("weights", "gradients", "optimizer")}
        here["weights"] += here["weights"] // 2 if flags.algorithm == "ppo" else 0
        fullest = max(fullest, here, key=lambda kinds: sum(kinds.values()))
        first, last = split(c.layers, layout.pp, stage)
        matmuls = c.width * (
            c.head_size * 2 * (c.heads + c.kv_heads) + c.ffn * (3 if c.mlp == "swiglu" else 2)
        )
        scores = (
            _example(flags) * c.heads * c.head_size
        )  # q k and p v, with half of the example in sight
        flops = (last - first) * (matmuls + scores) * (8 if checkpointing else 6) * tokens
        flops += 6 * (c.outputs or c.vocab) * c.width * tokens // 2 if stage == layout.pp - 1 else 0
        busy = flops * trained / (layout.tp * layout.cp * gpu.flops * flags.efficiency)
        links = {
            kind: trained / (gpu.node if span <= per_node else gpu.network)
            for kind, span in spans.items()
        }
        bytes_sent = sent(c, layout, rank, rows, scored, checkpointing=checkpointing)
        micro_batch = busy + sum(
            bytes_sent[kind] * links[kind] for kind in ("tp", "cp", "logps", "pp")
        )
        if micro_batch > slowest:
            slowest, arithmetic = micro_batch, busy
        dp = max(dp, sent(c, layout, rank, rows * count, scored * count)["dp"] * links["dp"])
    times = {"arithmetic": count * arithmetic, "sending": count * (slowest - arithmetic) + dp}
    times["bubble"] = (layout.pp - 1) * slowest
    return Row(
        layout, max_tokens, checkpointing, fullest, sum(fullest.values()), times, sum(times.values())
    )  # fmt: skip


def _example(flags: Plan) -> int:
    return flags.example_tokens or flags.max_length // 2


def plans(c: GPTConfig, flags: Plan) -> tuple[list[Row], list[Row]]:
    """Layouts that fit at their fastest settings, fastest first; the others at their leanest, leanest first."""
    room = ((flags.memory or GPUS[flags.gpu].gib) - RESERVE) * GIB
    longest = flags.max_length * (2 if flags.algorithm in ("dpo", "rm") else 1)  # tree
    budgets = [flags.max_tokens]
    while budgets[-1] // 2 >= longest:
        budgets.append(budgets[-1] // 2)
    fitting, others = [], []
    for layout in candidates(c, flags.gpus):
        recompute = (True,) if flags.checkpoint_activations else (False, True)
        rows = [
            estimate(c, flags, layout, budget, again) for budget in budgets for again in recompute
        ]
        if fits := [row for row in rows if row.total <= room]:
            fitting.append(min(fits, key=lambda row: row.seconds))
        else:
            others.append(min(rows, key=lambda row: row.total))
    return sorted(fitting, key=lambda row: row.seconds), sorted(others, key=lambda row: row.total)


def table(c: GPTConfig, flags: Plan) -> str:
    """What `python plan.py` prints. ValueError: nothing fits, and what would help."""
    (fitting, others), gpu = plans(c, flags), GPUS[flags.gpu]
    have = flags.memory or gpu.gib
    if not fitting:
        raise ValueError(
            f"nothing fits, as modelled: the leanest, {others[0].flags()}, takes {others[0].total / GIB:.1f} GiB and "
            f"{RESERVE} for CUDA, a GPU has {have:g}: take more GPUs, or a lower --max-tokens and --max-length"
        )
    lines = [
        f"MODELLED, NOT MEASURED: {flags.algorithm} of {parameter_count(c) / 1e9:.2f}B parameters in bf16 on {flags.gpus} "
        f"{flags.gpu} in {flags.nodes} node(s)",
        f"assumed: {have:g} GiB a GPU, {RESERVE} of them for CUDA and NCCL; examples of {_example(flags)} tokens, half "
        f"of them scored;",
        f"{flags.efficiency:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s; {gpu.node / 1e9:.0f} GB/s inside a node, "
        f"{gpu.network / 1e9:.0f} between nodes; nothing overlaps"
        + ("; rollouts not counted" if flags.algorithm == "ppo" else ""),
        "modelled GiB of the fullest GPU, modelled seconds of a step:",
    ]
    titles = (
        "tp",
        "cp",
        "pp",
        "dp",
        "zero",
        "max-tokens",
        "recompute",
        *fitting[0].memory,
        "all",
        *fitting[0].times,
    )
    cells = [[*titles, "seconds"]]
    for row in fitting[:12]:
        gib = [f"{n / GIB:.2f}" for n in (*row.memory.values(), row.total)]
        seconds = [f"{n:.3g}" for n in (*row.times.values(), row.seconds)]
        recompute = "yes" if row.checkpointing else "no"
        cells.append(
            [
                *map(str, dataclasses.astuple(row.layout)),
                str(row.max_tokens),
                recompute,
                *gib,
                *seconds,
            ]
        )
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    lines += ["".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells]
    lines += [
        f"{len(fitting)} of {len(fitting) + len(others)} layouts fit as modelled; the first line's command:",
        "",
    ]
    start = f"torchrun --nproc_per_node {flags.gpus}"
    if flags.nodes > 1:
        start = f"NODES={flags.nodes} HEAD=HOST:29500 RUN=NAME scripts/nodes.sh"
    return "\n".join(lines) + (
        f"\n{start} train_{flags.algorithm}.py --model {flags.model or 'DIR'} --data FILE --out DIR "
        f"--batch-size {flags.batch_size} --max-length {flags.max_length} {fitting[0].flags()}"
    )


def sizes(flags: Plan) -> GPTConfig:
    """The model that the flags describe. ValueError names the flag to mend."""
    for name in ("gpus", "nodes", "batch_size", "max_length", "max_tokens"):
        if getattr(flags, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least 1, not {getattr(flags, name)}"
            )
    if flags.gpus % flags.nodes:
        raise ValueError(
            f"--gpus {flags.gpus} is the number in all: a multiple of --nodes {flags.nodes}"
        )
    if not 0 < flags.efficiency <= 1:
        raise ValueError(
            f"--efficiency {flags.efficiency} is a share of the peak: above 0, up to 1"
        )
    if flags.model:
        return read_config(flags.model)[0]
    if missing := [
        name for name in ("width", "layers", "heads", "vocab") if getattr(flags, name) < 1
    ]:
        raise ValueError(
            f"--{missing[0]} is missing: --model DIR, or --width --layers --heads --vocab of a model"
        )
    if flags.width % flags.heads or flags.heads % (flags.kv_heads or flags.heads):
        raise ValueError(
            f"--width {flags.width} must be a multiple of --heads {flags.heads}, that of --kv-heads {flags.kv_heads}"
        )
    ffn = flags.ffn or -(-flags.width * 8 // 48) * 16
    return GPTConfig("llama", flags.vocab, flags.width, flags.layers, flags.heads, flags.kv_heads or flags.heads,
                     flags.width // flags.heads, ffn)  # fmt: skip


def suggest(config: RunConfig, world: int, gib: float) -> str:
    """What a run of `world` ranks that ran out of its GPUs' memory (GiB each) could do: one line, modelled.

    Never raises: it is called while an error is being reported.
    """
    plain = "lower --max-tokens or add --checkpoint-activations"
    try:
        c = read_config(config.model)[0]
        layout = Layout(
            config.tp,
            config.cp,
            config.pp,
            world // (config.tp * config.cp * config.pp),
            config.zero,
        )
        shared = ("batch_size", "max_length", "max_tokens", "checkpoint_activations")
        flags = Plan(gpus=world, memory=gib, **{name: getattr(config, name) for name in shared})
        now = estimate(c, flags, layout, config.max_tokens, config.checkpoint_activations)
        fitting = [row for row in plans(c, flags)[0] if row.total < 0.8 * now.total]
    except (ValueError, OSError):
        return plain
    if not fitting:
        return (
            f"{plain}, or take more GPUs: no layout of {world} is modelled to take much less memory"
        )
    return (
        f"try {fitting[0].flags()} (modelled, not measured: {fitting[0].total / GIB:.1f} GiB a GPU)"
    )


def main(argv: list[str] | None = None) -> None:
    flags = parse(Plan, __doc__, argv)
    try:
        print(table(sizes(flags), flags))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
