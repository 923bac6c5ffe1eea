"""Compare layouts: modelled memory and time of every way to spread a model over some GPUs.

    python plan.py --model mistral-7b-sft --gpus 8 --gpu h100 --algorithm dpo
    python plan.py --width 8192 --layers 80 --heads 64 --kv-heads 8 --ffn 28672 --vocab 128256 \\
        --gpus 64 --nodes 8
    python plan.py --show models                 four well-known sizes on 1, 8, 64 and 512 GPUs
    python plan.py --show memory --gpus 1        the largest model that 24, 48 and 80 GB hold

The bytes are those of footprint.py: exact for weights, gradients, optimizer and messages, estimates
for activations and logits. Times are those bytes and the arithmetic at assumed rates, without
overlap: they rank layouts, they promise nothing.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import torch

import hub
from cards import GPUS, MODELS
from commandline import Range, check_ranges, parse
from config import Amount, Count, Number, RunConfig
from footprint import Layout, layers_of, memory, saved_copy, sent
from model import GPTConfig, active_count, parameter_count
from weights.adapters import Lora
from weights.config_json import read_config

GIB = 2**30


SAMPLED = ("ppo", "reinforce", "online_dpo", "nash")  # algorithms that sample, and hold a reference
RESERVE = 3.5  # GiB for CUDA, NCCL's buffers and fragmentation: a guess


# ---- layouts and their times ---------------------------------------------------------------------


@dataclass
class Plan:
    """Flags of plan.py."""

    model: str = ""  # Hugging Face folder; or give the sizes below
    width: Count = 0  # of the residual stream
    layers: Count = 0  # blocks
    heads: Count = 0  # query heads
    kv_heads: Count = 0  # key/value heads; 0 = as many as query heads
    ffn: Count = 0  # MLP width; 0 = 8/3 of the width, rounded up to a multiple of 16
    vocab: Count = 0  # tokens
    gpus: Number = 8  # in all nodes together
    nodes: Number = 1  # machines
    gpu: Literal[tuple(GPUS)] = "h100"  # assumed speeds and memory
    memory: Amount = 0.0  # GiB a GPU; 0 = that of --gpu
    efficiency: Annotated[float, Range(0, 1, above=True)] = 0.5  # share of the GPU's peak FLOPs
    # that is reached
    algorithm: Literal[
        "sft", "rm", "dpo", "kto", "steerlm", "distill", "ppo", "reinforce", "online_dpo", "nash"
    ] = "dpo"  # ppo adds a critic; it and those after it a reference (not with --lora); distill a
    # teacher of the student's size. Rollouts' caches and the time of sampling are not counted
    show: Literal["layouts", "models", "memory"] = "layouts"  # or tables of well-known models: on
    # 1 to 512 GPUs of --gpu; the largest that --gpus of 24, 48 and 80 GB hold
    lora: Count = 0  # rank of adapters on all linears (training scripts' --lora); 0 = all weights
    base_dtype: Literal["none", "bf16", "fp8", "int8", "nf4"] = "none"  # of the frozen linears,
    # with --lora; none: bf16
    offload: Literal["none", "optimizer"] = "none"  # to host memory; the time of the CPU's update
    # is not counted
    grad_dtype: Literal["fp32", "bf16"] = "fp32"  # in which gradients add up
    async_save: bool = False  # count the copy in host memory that checkpoints are written from
    batch_size: Number = 64  # examples an optimizer step
    max_length: Number = 2048  # tokens of a prompt with one response
    example_tokens: Count = 0  # mean of an example with all its responses; 0 = half of --max-length
    max_tokens: Number = 8192  # of a micro-batch; halves are tried too, which changes no result
    checkpoint_activations: bool = False  # always recompute; else where nothing faster fits


class Row(NamedTuple):
    """A layout and its estimates."""

    layout: Layout
    max_tokens: int
    checkpointing: bool
    memory: dict[str, int]  # bytes of the fullest rank, by kind
    total: int  # their sum
    host: int  # bytes of host memory for it
    times: dict[str, float]  # seconds of a step, by kind
    seconds: float  # their sum

    def flags(self) -> str:
        """Return the flags of a training script."""
        words = [self.layout.flags(), f"--max-tokens {self.max_tokens}"]
        words += ["--checkpoint-activations"] if self.checkpointing else []
        return " ".join(filter(None, words))


def candidates(c: GPTConfig, gpus: int) -> list[Layout]:
    """Return every layout of `gpus` ranks that is possible for the model."""
    layouts = []
    for tp in _divisors(gpus, c.kv_heads):
        for pp in _divisors(gpus // tp, c.layers):
            for cp in _divisors(gpus // (tp * pp), gpus):
                dp = gpus // (tp * pp * cp)
                stages = [1]
                if dp * cp > 1:
                    stages = [1, 2] if pp > 1 else [1, 2, 3]
                for ep in _divisors(math.gcd(dp * cp, c.experts), c.experts or 1):
                    layouts += [Layout(tp, cp, pp, dp, zero, ep) for zero in stages]
    return layouts


def _divisors(n: int, largest: int) -> list[int]:
    return [i for i in range(1, min(n, largest) + 1) if n % i == 0]


def estimate(
    c: GPTConfig, flags: Plan, layout: Layout, max_tokens: int, checkpointing: bool
) -> Row:
    """Return the memory of the fullest rank and the time of a step of one layout."""
    trained = 2 if flags.algorithm == "ppo" else 1
    per_step = -(-flags.batch_size // layout.dp) * mean_tokens(flags)  # on the fullest dp rank
    count = -(-per_step // max_tokens)  # micro-batches
    tokens = -(-per_step // count)  # of each
    rows = [[-(-tokens // layout.cp)] * layout.cp]
    scored = [[-(-(tokens // 2) // layout.cp)] * layout.cp]
    lora = None
    if flags.lora:
        lora = Lora(flags.lora, 2.0 * flags.lora, base_dtype=flags.base_dtype)
    links = {kind: trained / rate for kind, rate in _link_rates(c, flags, layout).items()}
    peak = layout.tp * layout.cp * GPUS[flags.gpu].flops * flags.efficiency
    offload, half_grads = flags.offload == "optimizer", flags.grad_dtype == "bf16"
    fullest: dict[str, int] = {}
    host = 0
    slowest = arithmetic = 0.0  # seconds of a micro-batch in the slowest stage, and its arithmetic
    dp = 0.0  # seconds of a step
    for stage in range(layout.pp):
        rank = layout.rank(stage, layout.tp - 1)  # the last tensor rank has the largest shares
        scored_most = max_tokens // 2
        sizes = (c, layout, rank, max_tokens, scored_most, count, torch.bfloat16)
        kinds = memory(*sizes, checkpointing, lora, offload, half_grads)
        copied = saved_copy(c, layout, rank, lora) if flags.async_save else 0
        host = max(host, (kinds.pop("host") + copied) * trained)
        for kind in ("weights", "gradients", "optimizer"):
            kinds[kind] *= trained
        if flags.algorithm == "distill" or (flags.algorithm in SAMPLED and not lora):
            kinds["weights"] += kinds["weights"] // trained  # the teacher; the reference
        if flags.algorithm in SAMPLED and layout.zero == 3:  # rollouts hold whole weights
            whole = 2 * parameter_count(c) // layout.tp
            kinds["activations"] = max(kinds["activations"], whole)
        fullest = max(fullest, kinds, key=lambda kinds: sum(kinds.values()))
        busy = _flops(c, flags, layout, stage, tokens, checkpointing) * trained / peak
        moved = sent(c, layout, rank, rows, scored, torch.bfloat16, checkpointing, lora)
        micro_batch = busy + sum(
            moved[kind] * links[kind] for kind in ("tp", "cp", "ep", "logps", "pp")
        )
        if micro_batch > slowest:
            slowest, arithmetic = micro_batch, busy
        summed = sent(c, layout, rank, rows * count, scored * count, half_grads=half_grads)["dp"]
        dp = max(dp, summed * links["dp"])
    times = {
        "arithmetic": count * arithmetic,
        "sending": count * (slowest - arithmetic) + dp,
        "bubble": (layout.pp - 1) * slowest,
    }
    total, seconds = sum(fullest.values()), sum(times.values())
    return Row(layout, max_tokens, checkpointing, fullest, total, host, times, seconds)


def _link_rates(c: GPTConfig, flags: Plan, layout: Layout) -> dict[str, float]:
    """Return the bytes a second of each kind of traffic: its ranks are in one node, or not."""
    gpu, per_node = GPUS[flags.gpu], flags.gpus // flags.nodes
    spans = {  # neighbouring ranks that the traffic crosses
        "tp": layout.tp,
        "cp": layout.tp * layout.cp,
        "ep": layout.tp * layout.ep,
        "logps": layout.tp * layout.cp,
        "pp": layout.world,
        "dp": layout.world // (1 if c.tied else layout.pp),
    }
    return {kind: gpu.node if n <= per_node else gpu.network for kind, n in spans.items()}


def _flops(
    c: GPTConfig, flags: Plan, layout: Layout, stage: int, tokens: int, checkpointing: bool
) -> int:
    """Return the FLOPs of a micro-batch in a stage, its tensor and context ranks together."""
    mlp = sum(map(c.mlp_width, range(c.layers))) / c.layers * (3 if c.gated else 2)
    matmuls = c.width * (c.head_size * 2 * (c.heads + c.kv_heads) + mlp)
    # q k and p v: 2 * heads * head size * keys, and a token sees half of its example.
    attention = mean_tokens(flags) * c.heads * c.head_size
    blocks = layers_of(c, layout.mesh(layout.rank(stage)))
    # 2 FLOPs each forward, 2 for the gradient of the inputs, 2 for that of weights that train.
    passes = 8 if checkpointing else 6
    unneeded = 2 if flags.lora else 0
    flops = blocks * (matmuls * (passes - unneeded) + attention * passes) * tokens
    if stage == layout.pp - 1:
        flops += (6 - unneeded) * (c.outputs or c.vocab) * c.width * tokens // 2
    return int(flops)


def mean_tokens(flags: Plan) -> int:
    """Return the assumed mean tokens of an example."""
    return flags.example_tokens or flags.max_length // 2


def plans(c: GPTConfig, flags: Plan) -> tuple[list[Row], list[Row]]:
    """Return the layouts that fit, each at its fastest settings, fastest first; and the others.

    The others have their leanest settings, leanest first.
    """
    room = ((flags.memory or GPUS[flags.gpu].gib) - RESERVE) * GIB
    pairs = flags.algorithm in ("dpo", "rm", "online_dpo")
    tree = flags.max_length * (2 if pairs else 1)  # tokens at most
    budgets = [flags.max_tokens]
    while budgets[-1] // 2 >= tree:
        budgets.append(budgets[-1] // 2)
    recompute = (True,) if flags.checkpoint_activations else (False, True)
    fitting, others = [], []
    for layout in candidates(c, flags.gpus):
        if flags.base_dtype != "none" and layout.zero == 3:
            continue
        rows = [estimate(c, flags, layout, n, again) for n in budgets for again in recompute]
        fits = [row for row in rows if row.total <= room]
        if fits:
            fitting.append(min(fits, key=lambda row: row.seconds))
        else:
            others.append(min(rows, key=lambda row: row.total))
    return sorted(fitting, key=lambda row: row.seconds), sorted(others, key=lambda row: row.total)


# ---- the command ---------------------------------------------------------------------------------


def table(c: GPTConfig, flags: Plan) -> str:
    """Return the printed answer: assumptions, the best layouts, a command.

    ValueError: nothing fits; it says what would help.
    """
    fitting, others = plans(c, flags)
    gpu = GPUS[flags.gpu]
    gib = flags.memory or gpu.gib
    if not fitting:
        raise ValueError(
            f"nothing fits, as modelled: the leanest layout, {others[0].flags()}, takes "
            f"{others[0].total / GIB:.1f} GiB and {RESERVE} for CUDA, a GPU has {gib:g}: take more "
            f"GPUs, or lower --max-tokens and --max-length"
        )
    active = f", {active_count(c) / 1e9:.2f}B active," if c.experts else ""
    rollouts = "; rollouts not counted" if flags.algorithm in SAMPLED else ""
    start = f"torchrun --nproc_per_node {flags.gpus}"
    if flags.nodes > 1:
        start = f"NODES={flags.nodes} HEAD=HOST:29500 RUN=NAME scripts/nodes.sh"
    lines = [
        f"MODELLED, NOT MEASURED: {flags.algorithm} of {parameter_count(c) / 1e9:.2f}B "
        f"parameters{active} in bf16 on {flags.gpus} {flags.gpu} in {flags.nodes} node(s)",
        f"assumed: {gib:g} GiB a GPU, {RESERVE} of them for CUDA and NCCL; examples of "
        f"{mean_tokens(flags)} tokens, half of them scored;",
        f"{flags.efficiency:.0%} of {gpu.flops / 1e12:.0f} TFLOP/s; {gpu.node / 1e9:.0f} GB/s "
        f"inside a node, {gpu.network / 1e9:.0f} between nodes; no overlap{rollouts}",
        "modelled GiB of the fullest GPU, modelled seconds of a step:",
        *_aligned(fitting[:12]),
        f"{len(fitting)} of {len(fitting) + len(others)} layouts fit as modelled; "
        "the first line's command:",
        "",
        f"{start} train_{flags.algorithm}.py --model {flags.model or 'DIR'} --data FILE "
        f"--out DIR --batch-size {flags.batch_size} --max-length {flags.max_length} "
        f"{other_flags(flags)}{fitting[0].flags()}",
    ]
    return "\n".join(lines)


def known_model(name: str) -> GPTConfig:
    """Return a model of MODELS."""
    width, layers, heads, kv_heads, ffn, vocab = MODELS[name]
    return GPTConfig("llama", vocab, width, layers, heads, kv_heads, width // heads, ffn)


def models_table(flags: Plan, names: tuple[str, ...] = ("7B", "13B", "70B", "405B")) -> str:
    """Return a Markdown table of the fastest layout of each model on 1, 8, 64 and 512 GPUs."""
    lines = [
        f"MODELLED, NOT MEASURED: {flags.algorithm} in bf16 on {flags.gpu}, {mean_tokens(flags)} "
        f"tokens an example, {flags.efficiency:.0%} of peak in matmuls, no overlap",
        "",
        "| model | GPUs | examples a step | fastest layout | GiB a GPU | tokens/s a GPU | MFU |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        c = known_model(name)
        for gpus in (1, 8, 64, 512):
            batch = max(flags.batch_size, 2 * gpus)
            own = dataclasses.replace(flags, gpus=gpus, nodes=-(-gpus // 8), batch_size=batch)
            fitting, _ = plans(c, own)
            if not fitting:
                lines.append(f"| {name} | {gpus} | {batch} | does not fit | | | |")
                continue
            best = fitting[0]
            rate = batch * mean_tokens(own) / best.seconds / gpus
            flops = _flops(c, own, Layout(), 0, 2, False) / 2  # half of the tokens are scored
            lines.append(
                f"| {name} | {gpus} | {batch} | `{best.flags()}` | {best.total / GIB:.0f} | "
                f"{rate:,.0f} | {rate * flops / GPUS[flags.gpu].flops:.0%} |"
            )
    return "\n".join(lines)


def memory_table(flags: Plan) -> str:
    """Return a Markdown table of the largest model of MODELS that cards of 24 to 80 GB hold."""
    ways: list[tuple[str, dict[str, object]]] = [
        ("all weights", {}),
        ("`--lora 16`", {"lora": 16}),
        ("`--lora 16 --base-dtype nf4`", {"lora": 16, "base_dtype": "nf4"}),
    ]
    lines = [
        f"MODELLED, NOT MEASURED: {flags.algorithm} in bf16 on {flags.gpus} GPU(s), rows of at "
        f"most {flags.max_length} tokens",
        "",
        "| trains | 24 GB | 48 GB | 80 GB |",
        "|---|---|---|---|",
    ]
    for label, changes in ways:
        cells = [label]
        for gpu in ("4090", "l40s", "h100"):
            own = dataclasses.replace(flags, gpu=gpu, **changes)  # type: ignore[arg-type]
            fits = {name: plans(known_model(name), own)[0] for name in MODELS}
            fits = {name: rows for name, rows in fits.items() if rows}
            cell = "none"
            if fits:
                name, (best, *_) = fits.popitem()  # the largest: MODELS is in order
                cell = f"{name}: `{best.flags()}`, {best.total / GIB:.0f} GiB"
            cells.append(cell)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def other_flags(flags: Plan) -> str:
    """Return the flags of a training script that no layout has, with a space after each."""
    words = [f"--lora {flags.lora}"] if flags.lora else []
    words += [] if flags.base_dtype == "none" else [f"--base-dtype {flags.base_dtype}"]
    words += [] if flags.offload == "none" else [f"--offload {flags.offload}"]
    words += [] if flags.grad_dtype == "fp32" else [f"--grad-dtype {flags.grad_dtype}"]
    words += ["--async-save"] if flags.async_save else []
    return "".join(f"{word} " for word in words)


def _aligned(rows: list[Row]) -> list[str]:
    """Return a title line and one line a row, in aligned columns."""
    axes = [field.name for field in dataclasses.fields(Layout)]
    first = rows[0]
    kinds = [*first.memory, "all", *(["host"] if first.host else [])]
    cells = [[*axes, "max-tokens", "recompute", *kinds, *first.times, "seconds"]]
    for row in rows:
        settings = [row.max_tokens, "yes" if row.checkpointing else "no"]
        held = [*row.memory.values(), row.total, *([row.host] if first.host else [])]
        gib = [f"{n / GIB:.2f}" for n in held]
        seconds = [f"{n:.3g}" for n in (*row.times.values(), row.seconds)]
        line = [*dataclasses.astuple(row.layout), *settings, *gib, *seconds]
        cells.append([str(cell) for cell in line])
    widths = [max(map(len, column)) + 2 for column in zip(*cells)]
    return ["".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells]


def sizes(flags: Plan) -> GPTConfig:
    """Return the model that the flags describe. ValueError names the flag to change."""
    check_ranges(flags)
    if flags.gpus % flags.nodes:
        raise ValueError(
            f"--gpus {flags.gpus} counts all nodes: it must be a multiple of --nodes {flags.nodes}"
        )
    if flags.base_dtype != "none" and not flags.lora:
        raise ValueError(f"--base-dtype {flags.base_dtype} is for frozen weights: add --lora 16")
    if flags.model:
        return read_config(hub.model_folder(flags.model))[0]
    for name in ("width", "layers", "heads", "vocab"):
        if getattr(flags, name) < 1:
            raise ValueError(
                f"--{name} is missing: give --model DIR, or --width --layers --heads --vocab"
            )
    kv_heads = flags.kv_heads or flags.heads
    if flags.width % flags.heads or flags.heads % kv_heads:
        raise ValueError(
            f"--width {flags.width} must be a multiple of --heads {flags.heads}, and --heads "
            f"a multiple of --kv-heads {kv_heads}"
        )
    return GPTConfig(
        family="llama",
        vocab=flags.vocab,
        width=flags.width,
        layers=flags.layers,
        heads=flags.heads,
        kv_heads=kv_heads,
        head_size=flags.width // flags.heads,
        ffn=flags.ffn or -(-flags.width * 8 // 48) * 16,
    )


def suggest(config: RunConfig, world: int, gib: float) -> str:
    """Return one line of advice for a run of `world` ranks that ran out of memory, `gib` a GPU.

    Never raises: it is called while an error is being reported.
    """
    plain = "lower --max-tokens or add --checkpoint-activations"
    shared = ["batch_size", "max_length", "max_tokens", "checkpoint_activations", "lora"]
    shared += ["offload", "grad_dtype", "async_save"]
    try:
        c = read_config(config.model)[0]
        dp = world // (config.tp * config.cp * config.pp)
        layout = Layout(config.tp, config.cp, config.pp, dp, config.zero, config.ep)
        own = {name: getattr(config, name) for name in shared}
        flags = Plan(gpus=world, memory=gib, base_dtype=config.base_dtype, **own)
        now = estimate(c, flags, layout, config.max_tokens, config.checkpoint_activations)
        leaner = [row for row in plans(c, flags)[0] if row.total < 0.8 * now.total]
    except (ValueError, OSError):
        return plain
    if not leaner:
        return f"{plain}, or take more GPUs: no layout of {world} is modelled to take much less"
    best = leaner[0]
    return f"try {best.flags()} (modelled, not measured: {best.total / GIB:.1f} GiB a GPU)"


def main(argv: list[str] | None = None) -> None:
    flags = parse(Plan, __doc__, argv)
    try:
        if flags.show == "layouts":
            print(table(sizes(flags), flags))
            return
        check_ranges(flags)
        print(models_table(flags) if flags.show == "models" else memory_table(flags))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
