"""Planned bytes equal allocated and sent bytes exactly; estimates are ordered right."""

import dataclasses
import multiprocessing
import shlex
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import dataset_of
from torch.testing._internal.distributed.fake_pg import FakeStore

import footprint
import parallel
import pipeline
import plan
import train_dpo
from commandline import parse
from data.trees import make_batch
from footprint import Layout
from model import GPT, GPTConfig, parameter_count
from optimizer import AdamW, Bucket
from plan import Plan

GIB = 2**30
ROOT = Path(__file__).parents[2]
# Nothing divides: 101 tokens, 3 key/value heads, 50 columns of MLP, 5 layers.
ODD = GPTConfig("llama", vocab=101, width=24, layers=5, heads=6, kv_heads=3, head_size=4, ffn=50)
SMALL = {"width": 16, "heads": 4}
TIED = GPTConfig(
    "qwen2", vocab=60, layers=3, kv_heads=2, head_size=4, ffn=30, tied=True, qkv_bias=True, **SMALL
)
BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
NEOX = GPTConfig(
    "gpt_neox",
    vocab=50,
    layers=2,
    kv_heads=4,
    head_size=4,
    ffn=32,
    norm="layer",
    mlp="gelu",
    parallel_residual=True,
    **SMALL,
    **BIASES,
)
REWARD = GPTConfig(
    "qwen3", vocab=50, layers=3, kv_heads=2, head_size=6, ffn=30, outputs=2, qk_norm="head", **SMALL
)
OLMO = GPTConfig(
    "olmo2", vocab=50, layers=2, kv_heads=2, head_size=4, ffn=30, qk_norm="whole", **SMALL
)
EXPERTS = GPTConfig(  # every token takes all of them, so that their bytes are known beforehand
    "qwen2_moe",
    vocab=50,
    layers=3,
    kv_heads=2,
    head_size=4,
    ffn=30,
    experts=4,
    active=4,
    **SMALL,
    expert_ffn=5,
    shared_ffn=6,
    dense_layers=(1,),
)
SEVEN = GPTConfig(
    "llama", vocab=32000, width=4096, layers=32, heads=32, kv_heads=32, head_size=128, ffn=11008
)  # Llama 2 7B
SEVENTY = GPTConfig(
    "llama", vocab=32000, width=8192, layers=80, heads=64, kv_heads=8, head_size=128, ffn=28672
)  # Llama 2 70B


@pytest.fixture
def small_buckets(monkeypatch):
    """Set buckets to 1152 elements: tiny models fill several, and out, v and k of ODD just one."""
    monkeypatch.setattr("optimizer.BUCKET", 1152)


def pretend(layout: Layout, rank: int):
    """Return the mesh of one rank in a single process; a fake backend stands in for the others."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world)
    return parallel.grid(rank, layout.pp, layout.dp, layout.cp, layout.tp, ep=layout.ep)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    ("c", "layout"),
    [
        (ODD, Layout()),
        (ODD, Layout(dp=5)),
        (ODD, Layout(dp=4, zero=2)),
        (ODD, Layout(tp=3, dp=2)),
        (ODD, Layout(tp=2, cp=2, pp=2, dp=2, zero=2)),
        (TIED, Layout(pp=2, dp=3)),
        (TIED, Layout(tp=2, pp=3, zero=2, dp=2)),
        (NEOX, Layout(tp=4, dp=2)),
        (NEOX, Layout(tp=2, pp=2, cp=2)),
        (REWARD, Layout(tp=2, dp=2, zero=2)),
        (REWARD, Layout(pp=3, cp=2)),
        (ODD, Layout(dp=5, zero=3)),
        (TIED, Layout(tp=2, dp=2, zero=3)),
        (REWARD, Layout(cp=2, zero=3)),
        (EXPERTS, Layout(tp=2, dp=2, cp=2, ep=2)),
        (EXPERTS, Layout(dp=4, ep=2, zero=3)),
        (EXPERTS, Layout(dp=2, ep=2, pp=2, zero=2)),
    ],
)
@pytest.mark.parametrize("offload", [False, True])
def test_planned_memory_equals_the_optimizer_buffers(
    c: GPTConfig, layout: Layout, dtype: torch.dtype, offload: bool, small_buckets
):
    """Weights, gradients and optimizer of every rank equal the bytes of AdamW's buffers.

    With them, those in host memory: every offloaded buffer, and the copy of an asynchronous save.
    """
    how = {"offload": offload, "half_grads": offload and dtype == torch.bfloat16}
    for rank in range(layout.world):
        mesh = pretend(layout, rank)
        try:
            model = GPT(c, mesh).to(dtype)
            optimizer = AdamW(model, (0.9, 0.95), 1e-8, 0.1, layout.zero, **how)
            for b in optimizer.buckets:
                b.shard.fill_(1e-3)
            optimizer.collected = True
            optimizer.step(1e-3, 1.0)
            seen = {"weights": 0, "gradients": 0, "optimizer": 0, "host": 0}
            for b in optimizer.buckets:
                if b.sharded:
                    seen["weights"] += b.weights.untyped_storage().nbytes()
                weights = b.piece if b.sharded else b.weights
                storage = {weights.untyped_storage().data_ptr(): "weights"}
                storage |= {
                    g.untyped_storage().data_ptr(): "gradients"
                    for g in (b.grad, b.shard)
                    if g.numel()
                }
                kept = [weights, b.grad, b.shard, *b.master.state()[0].values()]
                if offload:
                    kept += [b.master.incoming, b.master.outgoing]
                stored = {
                    x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                    for x in kept
                    if x.numel()
                }
                for pointer, size in stored.items():  # storage that two views share counts once
                    seen[storage.get(pointer, "host" if offload else "optimizer")] += size
            copies: dict[str, torch.Tensor] = {}
            optimizer.state(host=copies)
        finally:
            dist.destroy_process_group()
        copied = sum(copy.nbytes for copy in copies.values())
        assert copied == footprint.saved_copy(c, layout, rank, dtype=dtype), f"rank {rank}"
        expected = footprint.memory(c, layout, rank, 64, 32, dtype=dtype, **how)
        assert seen == {kind: expected[kind] for kind in seen}, f"rank {rank}"


def test_zero_2_never_holds_all_gradients(small_buckets, monkeypatch):
    """At most two buckets are being reduced while a third fills, as footprint.memory assumes."""
    mesh, held = pretend(Layout(dp=2, zero=2), 0), []
    try:
        model = GPT(ODD, mesh)
        model.init_weights(0)
        optimizer = AdamW(model, (0.9, 0.95), 1e-8, 0.1, 2)
        start = Bucket.start_reduce

        def watched(bucket: Bucket) -> None:
            start(bucket)
            held.append(sum(bool(b.incoming) for b in optimizer.buckets))

        monkeypatch.setattr(Bucket, "start_reduce", watched)
        for batch, hidden in pipeline.pipeline(
            model, [make_batch(dataset_of(TREES), [0, 1])], optimizer
        ):
            model.logps(hidden, batch).sum().backward()
            assert len(held) == len(optimizer.buckets) > 6
        assert max(held) <= 3 and not any(b.incoming for b in optimizer.buckets)
        assert all(p.grad is None for p in model.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("c", [ODD, TIED, NEOX, REWARD, OLMO, SEVEN])
def test_ranks_together_hold_every_parameter_once(c: GPTConfig):
    """The sum over all ranks, without replicas, is the model's number of parameters."""
    for tp, pp in ((1, 1), (2, 1), (1, 2), (2, 2)):
        total = 0.0
        for rank in range(tp * pp):
            sizes, _ = footprint.bucket_elements(c, tp, rank % tp, pp, rank // tp)
            for (replicas, _), n in sizes:
                total += n / (tp if "tp" in replicas else 1) / (2 if "ends" in replicas else 1)
        assert total == parameter_count(c)


# ---- bytes sent ----------------------------------------------------------------------------------

TREES = [
    ([1, 2, 3], [[4, 5], [6, 7, 8]]),
    ([9, 10, 11, 12, 13, 14], [[15], [16, 17, 18, 19]]),
    ([20], [[21, 22, 23, 24, 25, 26, 27], [28, 29]]),
    ([30, 31], [[32, 33, 34], [35]]),
    ([36, 37, 38, 39], [[40, 41], [42, 43, 44]]),
]


def one_step(
    c: GPTConfig, layout: Layout, checkpointing: bool, rank: int, store: str, answers
) -> None:
    """Take a step on real collectives; put (rank, bytes sent, bytes planned) in `answers`."""
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", store=dist.FileStore(store, layout.world), rank=rank, world_size=layout.world
        )
        mesh = parallel.grid(rank, layout.pp, layout.dp, layout.cp, layout.tp, ep=layout.ep)
        model = GPT(c, mesh)
        model.init_weights(0)
        model.checkpoint_activations = checkpointing
        optimizer = AdamW(model, (0.9, 0.95), 1e-8, 0.1, layout.zero)
        data = dataset_of(TREES)
        bins = [[0, 1], [2]] if mesh.dp_rank == 0 else [[3], [4]]
        batches = [make_batch(data, items) for items in bins]
        before = dict(parallel.SENT)
        for batch, hidden in pipeline.pipeline(model, batches, optimizer):
            values = (
                model.score(hidden, batch, batch.last) if c.outputs else model.logps(hidden, batch)
            )
            values.float().square().mean().backward()
        optimizer.step(1e-3, 1.0)
        model.wait()
        seen = {kind: n - before.get(kind, 0) for kind, n in parallel.SENT.items()}
        rows, scored = [], []
        for batch in batches:
            shares = batch.shares(layout.cp) if layout.cp > 1 else [torch.arange(len(batch.tokens))]
            index = batch.last if c.outputs else batch.logit_index
            rows.append([len(share) for share in shares])
            scored.append([int(torch.isin(index, share).sum()) for share in shares])
        answers.put(
            (
                rank,
                seen,
                footprint.sent(c, layout, rank, rows, scored, torch.float32, checkpointing),
            )
        )
        dist.destroy_process_group()
    except BaseException:
        answers.put((rank, traceback.format_exc(), None))


@pytest.mark.parametrize(
    ("c", "layout", "checkpointing"),
    [
        (ODD, Layout(tp=2), False),
        (ODD, Layout(tp=2), True),
        (ODD, Layout(dp=2), False),
        (ODD, Layout(dp=2, zero=2), False),
        (ODD, Layout(cp=2), False),
        (ODD, Layout(cp=2), True),
        (ODD, Layout(pp=2), False),
        (TIED, Layout(pp=2), True),
        (NEOX, Layout(tp=2), True),
        (OLMO, Layout(tp=2), False),
        (replace(OLMO, norms="after"), Layout(tp=2, cp=2), True),
        (REWARD, Layout(tp=2), False),
        (TIED, Layout(tp=2, pp=2), False),
        (ODD, Layout(tp=2, cp=2), True),
        (REWARD, Layout(cp=2, dp=2, zero=2), False),
        (ODD, Layout(dp=2, zero=3), False),
        (TIED, Layout(dp=2, zero=3), True),
        (NEOX, Layout(tp=2, dp=2, zero=3), True),
        (REWARD, Layout(cp=2, dp=2, zero=3), False),
        (EXPERTS, Layout(tp=2), True),
        (EXPERTS, Layout(tp=2, dp=2, ep=2), True),
        (EXPERTS, Layout(cp=2, dp=2, ep=2, zero=2), False),
        (EXPERTS, Layout(dp=2, ep=2, zero=3), True),
    ],
)
def test_bytes_sent_equal_the_planned_bytes(
    c: GPTConfig, layout: Layout, checkpointing: bool, tmp_path, small_buckets
):
    """Every collective of a step on real processes, by purpose and rank: exactly equal.

    A rank returns the rows of the others, who have more or fewer: "ep" is equal in sum.
    """
    warm = torch.nn.Parameter(torch.ones(2))
    warm.grad = torch.ones(2)
    # The first step initialises torch's optimizer: once here, not in every forked process.
    torch.optim.AdamW([warm], fused=True).step()
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    processes = [
        fork.Process(
            target=one_step, args=(c, layout, checkpointing, rank, str(tmp_path / "store"), answers)
        )
        for rank in range(layout.world)
    ]
    for process in processes:
        process.start()
    results = [answers.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert all(expected is not None for _, _, expected in results), results
    routed = [(seen.pop("ep", 0), expected.pop("ep")) for _, seen, expected in results]
    assert sum(sent for sent, _ in routed) == sum(planned for _, planned in routed)
    for rank, seen, expected in results:
        assert {kind: n for kind, n in seen.items() if n} == {
            kind: n for kind, n in expected.items() if n
        }, rank


# ---- estimates -----------------------------------------------------------------------------------


def test_memory_matches_published_numbers():
    """Bytes a parameter as in ZeRO (arXiv 1910.02054, figure 1, fp32 gradients); known fits."""

    def bytes_a_parameter(layout: Layout) -> float:
        kinds = footprint.memory(SEVEN, layout, 0, 8192, 4096)
        resident = kinds["weights"] + kinds["gradients"] + kinds["optimizer"]
        return resident / parameter_count(SEVEN)

    assert bytes_a_parameter(Layout(dp=64)) == pytest.approx(2 + 4 + 12 / 64, rel=1e-3)
    assert bytes_a_parameter(Layout(dp=64, zero=2)) == pytest.approx(2 + (4 + 12) / 64, rel=1e-3)
    fitting, _ = plan.plans(SEVEN, Plan(gpus=8, memory=80))
    assert Layout(dp=8) in [row.layout for row in fitting]
    assert not plan.plans(SEVEN, Plan(gpus=1, memory=80))[0]  # 18 bytes a parameter are 121 GB
    fitting, others = plan.plans(SEVENTY, Plan(gpus=8, memory=80))
    assert not fitting and others[0].total > 100 * GIB
    assert plan.plans(SEVENTY, Plan(gpus=32, nodes=4, memory=80))[0]


def test_every_layout_is_considered_once():
    """All possible ways to write 8 as tp x cp x pp x dp; with both ZeRO stages if dp x cp > 1."""
    layouts = plan.candidates(SEVEN, 8)
    assert len(layouts) == len(set(layouts))
    assert {(at.tp, at.cp, at.pp, at.dp) for at in layouts} == {
        (tp, cp, pp, 8 // (tp * cp * pp))
        for tp in (1, 2, 4, 8)
        for cp in (1, 2, 4, 8)
        for pp in (1, 2, 4, 8)
        if 8 % (tp * cp * pp) == 0
    }
    assert all(at.world == 8 and (at.zero == 1 or at.dp * at.cp > 1) for at in layouts)
    assert max(at.tp for at in plan.candidates(dataclasses.replace(SEVEN, kv_heads=2), 8)) == 2
    assert max(at.pp for at in plan.candidates(dataclasses.replace(SEVEN, layers=3), 8)) == 2


def test_more_ranks_hold_less():
    """Each axis, ZeRO-2 and checkpointing lower the memory of a rank; twice the tokens raise it."""

    def total(layout: Layout, tokens: int = 8192, checkpointing: bool = False) -> int:
        kinds = footprint.memory(SEVEN, layout, 0, tokens, tokens // 2, checkpointing=checkpointing)
        return sum(kinds.values())

    alone = total(Layout())
    for layout in (Layout(tp=2), Layout(cp=2), Layout(pp=2), Layout(dp=2), Layout(tp=2, cp=2)):
        assert total(layout) < alone
    assert total(Layout(dp=8, zero=2)) < total(Layout(dp=8))
    assert total(Layout(), checkpointing=True) < alone < total(Layout(), tokens=16384)


def test_times_are_in_order():
    """Checkpointing is slower, more micro-batches shrink the bubble, slow networks slow traffic."""
    flags = Plan(gpus=16, nodes=2)

    def estimate(layout: Layout, tokens: int, again: bool = False, flags: Plan = flags) -> plan.Row:
        return plan.estimate(SEVEN, flags, layout, tokens, again)

    once = estimate(Layout(dp=16), 4096)
    twice = estimate(Layout(dp=16), 4096, again=True)
    assert once.seconds < twice.seconds < 1.4 * once.seconds
    few, many = (estimate(Layout(pp=4, dp=4), tokens) for tokens in (8192, 2048))
    assert many.times["bubble"] < few.times["bubble"]
    one_node = estimate(Layout(dp=16), 4096, flags=Plan(gpus=16, nodes=1))
    assert one_node.times["sending"] < once.times["sending"] / 5


def test_the_table_says_that_it_is_modelled_and_its_command_parses(capsys):
    """Header, the best layouts in order, and a command whose flags train_dpo.py takes."""
    words = "--width 512 --layers 4 --heads 8 --kv-heads 4 --vocab 1000 --gpus 4 --memory 24"
    plan.main(shlex.split(words))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("MODELLED, NOT MEASURED")
    seconds = [
        float(line.split()[-1])
        for line in lines
        if len(line.split()) == 18 and line.split()[0].isdigit()
    ]
    assert len(seconds) >= 8 and seconds == sorted(seconds)
    words = shlex.split(lines[-1])
    assert words[:4] == ["torchrun", "--nproc_per_node", "4", "train_dpo.py"]
    config = parse(train_dpo.Config, "", words[4:])
    assert config.tp * config.cp * config.pp <= 4


def test_every_card_holds_what_its_memory_allows():
    """A 1B model trains whole on one card of 24 GB, a 7B only on those of 139 GiB and more."""
    small = GPTConfig(
        "llama", vocab=32000, width=2048, layers=16, heads=16, kv_heads=16, head_size=128, ffn=5504
    )
    for name, gpu in plan.GPUS.items():
        flags = Plan(gpus=1, gpu=name, max_length=1024)
        assert plan.plans(small, flags)[0], name
        assert bool(plan.plans(SEVEN, flags)[0]) == (gpu.gib > 130), name


def test_the_tables_of_known_models_name_what_fits(monkeypatch, capsys):
    """More GPUs fit more; every MFU is below the assumed efficiency; LoRA and NF4 fit more."""
    sizes = {"1.1B": plan.MODELS["1.1B"], "7B": plan.MODELS["7B"]}
    monkeypatch.setattr(plan, "MODELS", sizes)
    lines = plan.models_table(Plan(algorithm="sft"), ("1.1B",)).splitlines()
    assert lines[0].startswith("MODELLED, NOT MEASURED") and len(lines) == 8
    for line in lines[4:]:
        cells = [cell.strip() for cell in line.split("|")]
        assert 0 < int(cells[-2].rstrip("%")) <= 50 and cells[4].startswith("`--")
    plan.main(shlex.split("--show memory --gpus 1 --max-length 1024"))
    table = [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines()[4:]]
    assert [cell.partition(":")[0] for cell in table] == ["1.1B", "7B", "7B"]


def test_zero_3_is_no_candidate_over_a_quantised_base():
    """Two GPUs with an NF4 base are planned with ZeRO 1 and 2, which is what the scripts take."""
    flags = Plan(gpus=2, lora=16, base_dtype="nf4")
    fitting, others = plan.plans(SEVEN, flags)
    assert {row.layout.zero for row in fitting + others} == {1, 2}


def test_rollouts_need_the_whole_model_for_a_while():
    """Under --zero 3 a script that samples holds all weights; references are counted."""
    layout = Layout(dp=64, zero=3)
    held = {
        name: plan.estimate(SEVENTY, Plan(gpus=64, algorithm=name), layout, 4096, True).memory
        for name in ("dpo", "reinforce", "ppo", "distill", "steerlm")
    }
    assert held["dpo"]["activations"] < 2 * parameter_count(SEVENTY)
    assert held["reinforce"]["activations"] == 2 * parameter_count(SEVENTY)
    weights = {name: kinds["weights"] / held["dpo"]["weights"] for name, kinds in held.items()}
    assert weights == {"dpo": 1, "reinforce": 2, "ppo": 3, "distill": 2, "steerlm": 1}


def test_every_script_can_be_planned():
    """--algorithm takes the name of every train_*.py."""
    names = Plan.__dataclass_fields__["algorithm"].type.__args__
    assert {f"train_{name}.py" for name in names} == {p.name for p in ROOT.glob("train_*.py")}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--gpus 8", "--width is missing"),
        ("--width 64 --layers 2 --heads 4 --vocab 0", "--vocab is missing"),
        (
            "--width 65 --layers 2 --heads 4 --vocab 100",
            "--width 65 must be a multiple of --heads 4",
        ),
        ("--width 64 --layers 2 --heads 4 --kv-heads 3 --vocab 100", "--kv-heads 3"),
        ("--width 64 --layers 2 --heads 4 --vocab 100 --gpus 8 --nodes 3", "--gpus 8 counts all"),
        ("--model /nowhere", "/nowhere"),
        ("--width 8192 --layers 80 --heads 64 --vocab 32000 --gpus 2", "nothing fits, as modelled"),
    ],
)
def test_bad_input_is_refused_in_one_line(words: str, complaint: str):
    """The message names the flag to change."""
    with pytest.raises(SystemExit) as stopped:
        plan.main(shlex.split(words))
    assert complaint in str(stopped.value) and "\n" not in str(stopped.value)


def test_out_of_memory_gets_a_suggestion(toy: Path):
    """A leaner layout as flags that the script takes, labelled; plain advice if there is none."""
    config = train_dpo.Config(model=str(toy / "model"), max_tokens=1 << 20)
    line = plan.suggest(config, 2, 8.0)
    assert line.startswith("try ") and "modelled, not measured" in line and "\n" not in line
    flags = parse(train_dpo.Config, "", shlex.split(line.partition("try ")[2].partition(" (")[0]))
    assert (
        flags.max_tokens < 1 << 20
        or flags.checkpoint_activations
        or flags.tp * flags.cp * flags.pp > 1
    )
    assert "--max-tokens" in plan.suggest(train_dpo.Config(model="/nowhere"), 2, 8.0)
    small = train_dpo.Config(
        model=str(toy / "model"), max_length=64, max_tokens=64, checkpoint_activations=True
    )
    assert "more GPUs" in plan.suggest(small, 1, 8.0)
