"""Law 3: every layout trains exactly what one process trains, in float64 on gloo.

Faults that were put in one by one and made a test here fail:
  tensor    gradients of norms, or of Qwen3's q and k norms, not summed over tp; the embedding's or
            the log-probs' vocabulary range off by one; tokens of another rank's range not masked; a
            bias added on every rank; `enter` without its reduce-scatter in backward; the score
            head's gradient counted tp times; one rank's logits taken for all
  norm      norm of the whole local gradient instead of the shard; replicated weights counted tp
            times; no clipping
  loss      mean over a micro-batch (SFT, DPO); aot sorted within a rank; KTO's z of one rank; sums
            over dp that leave out the stages, or sum over no rank
  sharding  ZeRO-2: accumulation lost, a bucket not waited for, sums in bf16; ZeRO-1 reduced after
            every micro-batch; buckets that did not fill left out; new weights not gathered, bf16
            ones not copied from their masters; gradients kept after a step; decay on norms; slices
            cut in wrong units
  pipeline  the two stages of a tied embedding not summed; a collect that deadlocks them; backward
            of the newest micro-batch first; metrics that stay on the last stage
  context   wrong rows in the gather, forward and backward; angles of the wrong rows
Not seen here: ZeRO-2 that reduces once a step is as exact, only larger; test_plan.py counts bytes.
A bug that these tests found: a rank without examples broke on reshaping zero tokens.
"""

import json
import math
import re
from collections import Counter
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import dataset_of, read_metrics
from launch import RankFailed, launch, weights_in
from plain import encode, five_steps
from torch import nn

import hf
import parallel
import train_dpo
import train_kto
import train_rm
import train_sft
from data.dataset import load_dataset
from data.rows import read_rows
from data.templates import Template
from data.tokenizer import load_tokenizer
from data.trees import make_batch, micro_batches
from optimizer import AdamW
from parallel import init_mesh
from pipeline import pipeline
from sampling import sampler
from weights.folder import load_model, save_model

NEAR = 1e-10
SMALL = {"width": 16, "layers": 2, "heads": 4, "kv_heads": 2}
MODELS = {
    # Nothing divides by 2: layers, key/value heads, MLP, vocabulary.
    "uneven": {"width": 24, "layers": 3, "heads": 6, "kv_heads": 3, "ffn": 37},
    "llama": {"width": 16, "layers": 4, "heads": 4, "kv_heads": 2},
    "mistral": {"family": "mistral", **SMALL, "sliding_window": 9},
    "qwen2": {"family": "qwen2", **SMALL, "tied": True},
    "qwen3": {"family": "qwen3", **SMALL, "head_size": 6},
    "qwen3_moe": {"family": "qwen3_moe", **SMALL, "head_size": 6, "experts": 5, "expert_ffn": 9},
    "qwen2_moe": {"family": "qwen2_moe", **SMALL, "experts": 4, "active": 3, "expert_ffn": 7},
    "experts": {"family": "qwen3_moe", **SMALL, "head_size": 6, "experts": 6, "expert_ffn": 9},
    "glm4_moe": {"family": "glm4_moe", **SMALL, "head_size": 8, "experts": 6, "expert_ffn": 9},
    "gpt_neox": {"family": "gpt_neox", "width": 32, "layers": 2, "heads": 4, "ffn": 33},
}


class Bench:
    """Models and data of these tests, and the results of one process, each computed once."""

    def __init__(self, toy: Path, folder: Path):
        self.world, self.folder, self.tokenizer = toy / "world", folder, toy / "world" / "tokenizer"
        self.known: dict[tuple, tuple] = {}

    def model(self, name: str) -> Path:
        """Return a Hugging Face folder of random float64 weights, norms and biases included."""
        path = self.folder / name
        if not path.exists():
            # The second of two ranks begins with a frequent token, so a range off by one is seen.
            vocab = 2 * self.common_token() + 1
            flags = hf.New(
                **MODELS[name], std=0.3, dtype="fp64", tokenizer=str(self.tokenizer), vocab=vocab
            )
            model = hf.new_model(flags)
            generator = torch.Generator().manual_seed(1)
            for p in model.parameters():
                if p.dim() == 1:
                    p.data += 0.2 * torch.randn(p.shape, generator=generator)
            save_model(model, path, self.tokenizer)
        return path

    def common_token(self) -> int:
        """Return the most frequent token of the second half of the vocabulary."""
        trees = chain.from_iterable(self.trees(script, 15) for script in (train_sft, train_dpo))
        seen = Counter(
            token for _, responses in trees for response in responses for token in response
        )
        return max(
            range(load_tokenizer(self.tokenizer).size // 2 + 1, max(seen) + 1), key=seen.__getitem__
        )

    def data(self, script) -> Path:
        return self.world / ("preferences.jsonl" if script is train_dpo else "sft.jsonl")

    def trees(self, script, n: int = 10**9) -> list[tuple]:
        """Return (prompt, responses) of the first n rows."""
        keys = ["chosen", "rejected"] if script is train_dpo else ["response"]
        return encode(
            self.tokenizer / "tokenizer.model", list(read_rows(self.data(script)))[:n], keys
        )

    def plain(self, script, name: str, batch: int, router: tuple[float, float, float]) -> tuple:
        """Return [(loss, norm)] and weights after five steps of the independent loop."""
        key = (script.__name__, name, batch, router)
        if key not in self.known:
            trees = self.trees(script, 5 * batch)
            self.known[key] = five_steps(
                self.model(name), trees, batch, script is train_dpo, router
            )
        return self.known[key]

    def alone(self, case: str, script, words: list[str]) -> tuple:
        """Return metrics and final weights of the same script in one process."""
        if case not in self.known:
            out = self.folder / f"alone {case}"
            launch(1, script.main, [*words, "--out", str(out)])
            self.known[case] = read_metrics(out), weights_in(out / "final")
        return self.known[case]


@pytest.fixture(scope="module")
def bench(toy: Path, tmp_path_factory) -> Bench:
    return Bench(toy, tmp_path_factory.mktemp("bench"))


def sizes_of(layout: str) -> dict[str, int]:
    """Parse a layout: "tp2 dp2" -> {"tp": 2, "dp": 2}."""
    return {word.rstrip("0123456789"): int(re.search(r"\d+", word)[0]) for word in layout.split()}


def run(
    script, words: list[str], layout: str, out: Path
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Run a script under a layout; return its metrics and final weights."""
    sizes = sizes_of(layout)
    world = math.prod(n for axis, n in sizes.items() if axis not in ("zero", "ep"))
    flags = [word for axis, n in sizes.items() if axis != "dp" for word in (f"--{axis}", str(n))]
    launch(world, script.main, [*words, *flags, "--out", str(out)])
    return read_metrics(out), weights_in(out / "final")


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Return the largest difference between two sets of weights with the same names."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


# ---- law 3 ---------------------------------------------------------------------------------------

FIVE_STEPS = [
    # layout, model, variation: 1 or 3 examples a step, small micro-batches, unshared prompts,
    # activation checkpointing (recompute), many buckets, both losses of the router (balance), its
    # bias moved (bias)
    ("dp2", "uneven", ""),
    ("dp2 zero2", "llama", "small buckets"),
    ("dp4", "qwen2", "three"),  # a step of three trees leaves one rank an empty micro-batch
    ("dp4 zero2", "gpt_neox", "three buckets"),
    ("tp2", "uneven", "small"),
    ("tp2", "gpt_neox", "unshared recompute"),
    ("tp3", "uneven", "buckets"),
    ("tp2 dp2", "qwen3", "one buckets"),
    ("tp2 dp2 zero2", "gpt_neox", "small buckets"),
    ("cp2", "uneven", "small"),
    ("cp2", "mistral", "unshared"),
    ("cp2 tp2", "qwen3", "small recompute"),
    ("cp2 dp2 zero2", "qwen2", "one"),
    ("pp2", "uneven", "small recompute"),
    ("pp2", "qwen2", "unshared"),  # the embedding is the head: it lives on both stages
    ("pp4", "llama", "small"),
    ("pp4", "llama", "unshared"),  # one micro-batch, fewer than stages
    ("pp2 tp2", "qwen2", "small buckets"),
    ("pp2 dp2", "gpt_neox", "one"),
    ("pp2 dp2 zero2", "qwen2", "small buckets"),
    ("pp2 cp2", "qwen2", "small buckets"),
    ("dp2 zero3", "uneven", "small"),
    ("dp4 zero3", "qwen2", "three recompute"),
    ("tp2 dp2 zero3", "gpt_neox", "small"),
    ("cp2 zero3", "qwen3", "small recompute"),
    ("dp2 zero2", "qwen3_moe", "one buckets"),
    ("tp2 dp2 zero3", "qwen3_moe", "one"),
    ("dp1", "qwen3_moe", "one unshared balance"),  # the micro-batch is the step
    ("dp2 zero2", "qwen3_moe", "small buckets balance"),
    ("tp2", "qwen2_moe", "small recompute balance"),
    ("pp2", "qwen2_moe", "small balance"),
    ("pp2 cp2", "qwen3_moe", "small balance"),
    ("dp2 zero3", "qwen3_moe", "small balance"),
    ("dp2 ep2", "qwen2_moe", "small buckets balance"),
    ("dp2 tp2 ep2", "experts", "one"),
    ("pp2 dp2 ep2", "qwen2_moe", "small recompute balance"),
    ("cp2 ep2", "experts", "small"),
    ("cp2 dp2 ep2 zero2", "qwen2_moe", "buckets"),
    ("dp4 ep2 zero3", "experts", "three"),
    ("dp2 zero2", "glm4_moe", "small buckets bias"),
    ("tp2", "glm4_moe", "small recompute balance bias"),
    ("pp2", "glm4_moe", "small bias"),
    ("cp2 dp2 ep2", "glm4_moe", "small bias"),
    ("tp2 dp2 ep2", "glm4_moe", "bias"),
    ("dp2 ep2 zero3", "glm4_moe", "small balance bias"),
]


@pytest.mark.parametrize("script", [train_sft, train_dpo], ids=["sft", "dpo"])
@pytest.mark.parametrize(
    ("layout", "model", "how"), FIVE_STEPS, ids=[" ".join(case).strip() for case in FIVE_STEPS]
)
def test_five_steps_equal_a_plain_loop(
    script, layout: str, model: str, how: str, bench: Bench, tmp_path: Path, monkeypatch
):
    """Loss, gradient norm and weights after five AdamW steps are within 1e-10 of plain.py."""
    if "buckets" in how:
        monkeypatch.setattr("optimizer.BUCKET", 700)
    batch = {"one": 1, "three": 3, "small": 6}.get(how.partition(" ")[0], 4)
    lengths = np.array(
        [len(prompt) + sum(map(len, responses)) for prompt, responses in bench.trees(script)]
    )
    budget = lengths.max() if "small" in how else 8192
    if "small" in how:
        assert (
            len(micro_batches(lengths, np.arange(batch), budget, 0, sizes_of(layout).get("dp", 1)))
            > 1
        )
    router = (0.5, 0.1) if "balance" in how else (0.0, 0.0)
    router = (*router, 0.05 if "bias" in how else 0.0)
    losses, weights = bench.plain(script, model, batch, router)
    words = f"--model {bench.model(model)} --data {bench.data(script)} --batch-size {batch}".split()
    words += f"--max-tokens {budget} --max-steps 5 --lr 1e-2 --warmup 0.25".split()
    words += "--weight-decay 0.1 --no-shuffle --dtype fp64 --template plain --device cpu".split()
    if "balance" in how:
        words += ["--balance-loss", str(router[0]), "--router-z-loss", str(router[1])]
    if "bias" in how:
        words += ["--balance-bias", str(router[2])]
    if "unshared" in how:
        words.append("--no-share-prompts")
    if "recompute" in how:
        words.append("--checkpoint-activations")
    rows, mine = run(script, words, layout, tmp_path / "out")
    for row, (loss, norm) in zip([row for row in rows if row["step"]], losses, strict=True):
        assert row["loss"] == pytest.approx(loss, abs=NEAR)
        assert row["grad_norm"] == pytest.approx(norm, rel=NEAR)
    assert furthest(mine, weights) < NEAR


@pytest.mark.parametrize(("model", "bias"), [("experts", 0.0), ("glm4_moe", 0.05)])
def test_a_run_moves_between_expert_ranks_and_one_process(
    model: str, bias: float, bench: Bench, tmp_path: Path
):
    """ep2 to step 2, one process to step 4, ep2 tp2 to step 5: the weights of the plain loop."""
    words = f"--model {bench.model(model)} --data {bench.data(train_sft)} --batch-size 4".split()
    words += ["--balance-bias", str(bias)]
    words += "--max-steps 5 --lr 1e-2 --warmup 0.25 --weight-decay 0.1 --no-shuffle".split()
    words += "--dtype fp64 --template plain --device cpu --save-every 2".split()
    out = tmp_path / "out"
    run(train_sft, words, "dp2 ep2", out)
    for step, layout in ((2, "dp1"), (4, "dp2 tp2 ep2")):
        _, mine = run(train_sft, [*words, "--resume", str(out / f"step_{step}")], layout, out)
        assert furthest(mine, bench.plain(train_sft, model, 4, (0.0, 0.0, bias))[1]) < NEAR


# ---- the other scripts ---------------------------------------------------------------------------

PAIRS = ("preferences", "preferences_test")
SCRIPTS = {  # script, model, training rows, held-out rows, flags
    "sft": (train_sft, "uneven", "sft", "sft", ""),
    "sft experts": (train_sft, "qwen3_moe", "sft", "sft", "--balance-loss 0.1"),
    "sft samples": (train_sft, "uneven", "sft", "sft", "--samples 2"),
    "dpo aot": (train_dpo, "uneven", *PAIRS, "--loss aot --sft-weight 0.1"),
    "dpo aot_unpaired": (train_dpo, "gpt_neox", *PAIRS, "--loss aot_unpaired"),
    "dpo bco_pair": (train_dpo, "uneven", *PAIRS, "--loss bco_pair --ref {llama}"),
    "dpo moving": (
        train_dpo,
        "uneven",
        *PAIRS,
        "--mix aot:0.5 bco_pair:0.3 --ld-alpha 0.4 --ref-every 2 --ref-mix 0.6 --sft-weight 0.1",
    ),
    "rm pairs": (train_rm, "uneven", *PAIRS, "--centering 0.01"),
    "rm samples": (train_rm, "qwen3", *PAIRS, "--samples 2"),
    "rm tied": (train_rm, "qwen2", *PAIRS, ""),
    "rm regression": (train_rm, "uneven", "attributes", "attributes_test", "--loss regression"),
    "kto": (train_kto, "uneven", "labels", "preferences_test", ""),
    "kto bco": (train_kto, "qwen2", "labels", "preferences_test", "--loss bco --zero 2"),
    "sft adapters of experts": (train_sft, "experts", "sft", "sft", "--lora 3"),
    "sft attributes": (train_sft, "uneven", "attributes", "attributes_test", "--attributes"),
}
TOGETHER = [
    ("sft", "dp2 pp2"),
    ("sft experts", "dp2 pp2", "tp2 cp2"),
    ("sft samples", "tp2 cp2", "dp2 zero3"),
    ("dpo aot", "dp2", "tp2", "pp2", "cp2"),
    ("dpo aot_unpaired", "dp2 pp2"),
    ("dpo bco_pair", "dp2", "tp2", "pp2", "dp2 zero3"),
    ("dpo moving", "dp2", "tp2", "pp2", "cp2", "dp2 zero3"),
    ("rm pairs", "dp2", "tp2", "pp2", "cp2"),
    ("rm samples", "tp2 cp2"),
    ("rm tied", "pp2", "cp2 zero3"),
    ("rm regression", "dp2 pp2", "tp2 cp2"),
    ("kto", "dp2", "tp2", "pp2", "cp2", "dp2 zero3"),
    ("kto bco", "dp2 pp2"),
    ("sft adapters of experts", "dp2 ep2"),
    ("sft attributes", "dp2 pp2", "tp2"),
]


@pytest.mark.parametrize(
    ("case", "layout"), [(case, layout) for case, *layouts in TOGETHER for layout in layouts]
)
def test_scripts_do_not_depend_on_the_layout(case: str, layout: str, bench: Bench, tmp_path: Path):
    """All metrics, evaluations included, and the final weights are those of one process."""
    script, model, data, heldout, flags = SCRIPTS[case]
    words = f"--model {bench.model(model)} --data {bench.world / data}.jsonl".split()
    words += f"--eval-data {bench.world / heldout}.jsonl --eval-every 2 --max-tokens 300".split()
    words += "--max-steps 3 --batch-size 9 --lr 1e-2 --dtype fp64 --template plain".split()
    words += ["--device", "cpu", *flags.format(llama=bench.model("llama")).split()]
    wanted, weights = bench.alone(case, script, words)
    rows, mine = run(script, words, layout, tmp_path / "out")
    assert sum(any(key.startswith("eval/") for key in row) for row in wanted) == 2
    for row, one in zip(rows, wanted, strict=True):
        if one["step"] == 1:  # every reward is 0 but for rounding, which side of 0 is chance
            row, one = (
                {k: v for k, v in r.items() if k != "rewards/accuracies"} for r in (row, one)
            )
        assert row == pytest.approx(one, abs=NEAR)
    assert furthest(mine, weights) < NEAR


@pytest.mark.parametrize("zero", [1, 2])
def test_bf16_shares_of_the_optimizer_are_bit_for_bit(zero: int, bench: Bench, tmp_path: Path):
    """Two ranks with a micro-batch each have the weights of one process with both, bit for bit.

    The fp32 masters are sharded; the sums are the same because a + b = b + a.
    """
    rows = list(read_rows(bench.data(train_sft)))[:8]
    lengths = [len(prompt) + len(response) for prompt, (response,) in bench.trees(train_sft, 8)]
    longest = max(lengths)
    assert all(
        a + b > longest for a, b in zip(lengths[::2], lengths[1::2])
    )  # so that one process takes two as well
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"--model {bench.model('llama')} --data {tmp_path / 'rows.jsonl'}".split()
    words += f"--batch-size 2 --max-tokens {longest} --lr 1e-2 --no-shuffle".split()
    words += "--dtype bf16 --template plain --device cpu".split()
    rows, mine = run(train_sft, words, f"dp2 zero{zero}", tmp_path / "two")
    wanted, weights = bench.alone("bf16", train_sft, words)
    assert [row["loss"] for row in rows] == pytest.approx(
        [row["loss"] for row in wanted], rel=1e-12
    )
    assert mine.keys() == weights.keys() and all(
        torch.equal(mine[name], weights[name]) for name in mine
    )


# ---- samples, scores, entropies, logits ----------------------------------------------------------


def sampled(folder: Path, tp: int) -> list[tuple]:
    """Sample on one rank, with prompts stored once and copied; some samples end early."""
    model = load_model(folder, torch.float64, mesh=init_mesh(tp, device="cpu"))
    prompts = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16, 17], [20, 21, 22, 23, 24]]
    samples = []
    for share_from in (1, 64):
        sampler.SHARE_FROM = share_from
        settings = {"temperature": 0.9, "top_p": 0.95, "stop_ids": set(range(0, 1200, 5))}
        samples += sampler.generate(model, prompts, 10, seed=1, batch_size=3, n=2, **settings)
    return [tuple(answer) for answer in samples]


@pytest.mark.parametrize("name", ["uneven", "gpt_neox", "mistral"])
def test_samples_do_not_depend_on_tensor_ranks(name: str, bench: Bench):
    """Every rank of tp2 draws the tokens of one process, with the same log-probs."""
    (alone,) = launch(1, sampled, bench.model(name), 1)
    assert len({len(answer[0]) for answer in alone}) > 2
    for samples in launch(2, sampled, bench.model(name), 2):
        assert [answer[0] for answer in samples] == [answer[0] for answer in alone]
        for answer, one in zip(samples, alone):
            assert np.allclose(answer[1:3], one[1:3], rtol=0, atol=NEAR) and answer[3] == one[3]


def read_off(folder: Path, layout: str) -> tuple[list, ...]:
    """Return scores, log-probs, entropies, a gradient norm and logits of a model on one rank.

    Log-probs and entropies are at temperature 0.7, and the gradient goes through both.
    """
    sizes = sizes_of(layout)
    mesh = init_mesh(sizes.get("tp", 1), sizes.get("cp", 1), device="cpu")
    scorer = load_model(folder, torch.float64, scores=("a", "b"), mesh=mesh)
    rng = np.random.default_rng(0)
    trees = [
        ([rng.integers(3, scorer.c.vocab, n).tolist() for n in lengths])
        for lengths in ((5, 4, 7), (1, 1, 3))
    ]
    batch = make_batch(dataset_of([(prompt, responses) for prompt, *responses in trees]), [0, 1])
    nn.init.normal_(scorer.score_head.weight, generator=torch.Generator().manual_seed(0))
    scores = scorer.score(scorer(batch), batch, batch.last)
    model = load_model(folder, torch.float64, mesh=mesh)
    optimizer = AdamW(model, (0.9, 0.95), 1e-8, 0.0)
    for _, hidden in pipeline(model, [batch], optimizer):
        logps, entropy = model.logps(hidden, batch, temperature=0.7, entropy=True)
        weight = torch.arange(len(logps)) / len(logps)
        (weight * logps + (1 - weight) * entropy).sum().backward()
    norm, _ = optimizer.step(0.0, 0.0)
    logits = []
    if mesh.cp == 1:
        with torch.no_grad():
            logits = model.logits(model(batch), torch.tensor([0, 7, 12])).tolist()
    return scores.tolist(), logps.tolist(), entropy.tolist(), norm, logits


@pytest.mark.parametrize("layout", ["tp2", "cp2", "cp2 tp2"])
def test_model_outputs_do_not_depend_on_the_layout(layout: str, bench: Bench):
    """Scores, log-probs, entropies, logits and gradients of every rank are those of one process."""
    (alone,) = launch(1, read_off, bench.model("uneven"), "")
    world = math.prod(sizes_of(layout).values())
    for outputs in launch(world, read_off, bench.model("uneven"), layout):
        for mine, one in zip(outputs, alone):
            assert mine == [] or np.allclose(mine, one, rtol=0, atol=NEAR)


# ---- oracles -------------------------------------------------------------------------------------


class Whole(nn.Module):
    """Forward and log-probs in one call: DDP and FSDP2 wrap a module's forward."""

    def __init__(self, folder: Path):
        super().__init__()
        self.model = load_model(folder, torch.float64)

    def forward(self, batch) -> torch.Tensor:
        return self.model.logps(self.model(batch), batch)


def by_torch(kind: str, folder: Path, files: list[Path], cache: Path) -> tuple[list, dict]:
    """Take three steps of SFT sharded by torch; return [(loss, norm)] and weights on one rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_mesh(device="cpu")
    data = load_dataset(
        files, "sft", Template("plain", load_tokenizer(folder)), cache=cache, log=lambda _: None
    )
    whole = Whole(folder)
    if kind == "ddp":
        trained = nn.parallel.DistributedDataParallel(whole)
    else:
        ranks = init_device_mesh("cpu", (mesh.world,))
        for block in whole.model.blocks.values():
            fully_shard(block, mesh=ranks)
        trained = fully_shard(whole, mesh=ranks)
    weights = list(trained.parameters())
    matrices, rest = [p for p in weights if p.dim() > 1], [p for p in weights if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    seen = []
    for step in range(3):
        examples = np.arange(step * 6, step * 6 + 6)
        scored = int(data.scored_len[data.responses_of(examples)].sum())
        (items,) = micro_batches(data.tree_lengths(), examples, 8192, mesh.rank, mesh.world)
        loss = -trained(make_batch(data, items)).sum() / scored
        (loss * mesh.world).backward()  # both take the mean over the ranks
        norm = nn.utils.clip_grad_norm_(weights, 1.0)
        norm = norm.full_tensor() if kind == "fsdp2" else norm
        adam.step()
        adam.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        seen.append((total.item(), norm.item()))
    full = {
        name: p.full_tensor() if kind == "fsdp2" else p
        for name, p in whole.model.named_parameters()
    }
    return seen, {name: p.detach().clone().numpy() for name, p in full.items()}


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_torch_agrees(kind: str, bench: Bench, tmp_path: Path):
    """DistributedDataParallel and fully_shard take the same three steps as dp2, within 1e-10."""
    folder, file = bench.model("llama"), bench.data(train_sft)
    by_rank = launch(2, by_torch, kind, folder, [file], tmp_path / "cache")
    words = f"--model {folder} --data {file} --batch-size 6 --max-steps 3 --lr 1e-2".split()
    words += "--warmup 0 --schedule constant --weight-decay 0.1 --no-shuffle".split()
    words += "--dtype fp64 --template plain".split()
    rows, _ = run(train_sft, [*words, "--device", "cpu"], "dp2", tmp_path / "out")
    ours = load_model(tmp_path / "out" / "final", torch.float64)
    for seen, weights in by_rank:
        for row, (loss, norm) in zip(rows, seen, strict=True):
            assert row["loss"] == pytest.approx(loss, abs=NEAR)
            assert row["grad_norm"] == pytest.approx(norm, rel=NEAR)
        theirs = {name: torch.from_numpy(w) for name, w in weights.items()}
        assert furthest(theirs, {name: p.detach() for name, p in ours.named_parameters()}) < NEAR


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "words", "complaint"),
    [
        (1, "--tp 2", "torchrun --nproc_per_node 2"),
        (1, "--tp 2 --pp 3", "torchrun --nproc_per_node 6"),
        (3, "--tp 2", "multiple of 2 processes, torchrun started 3: start 4 or lower one of them"),
        (4, "--tp 4", "--tp 4: the model has 3 key/value heads, use at most that many"),
        (4, "--pp 4", "--pp 4: the model has 3 layers, use at most that many stages"),
        (2, "--pp 2 --zero 3", "--zero 3 is not supported with --pp 2"),
        (1, "--zero 3 --lora 4 --base-dtype int8", "--zero 3 does not shard a base of"),
        (3, "--ep 2", "--ep 2 must divide the 3 ranks of data and context parallelism: use one"),
        (2, "--ep 2", "--ep 2 shares experts, and"),
        (2, "--pp 2 --samples 1", "--samples is not supported with --pp > 1"),
        (2, "--ep 2 --samples 1", "--samples is not supported with --ep > 1"),
    ],
)
def test_impossible_layouts_are_refused(
    world: int, words: str, complaint: str, bench: Bench, tmp_path: Path
):
    """Every rank gives the same message, with the numbers that would work."""
    flags = ["--model", str(bench.model("uneven")), "--data", str(bench.data(train_sft))]
    flags += ["--out", str(tmp_path / "out")]
    with pytest.raises(RankFailed) as failed:
        launch(world, train_sft.main, [*flags, "--device", "cpu", *words.split()])
    assert len(failed.value.ranks) == world
    for said in failed.value.ranks.values():
        assert "ValueError" in said and complaint in said


def fails_on_one(rank_of: str) -> None:
    mesh = init_mesh(device="cpu")
    if mesh.rank == 1 and rank_of == "raises":
        raise ValueError("rank 1 has had enough")
    if mesh.rank == 1:
        parallel.os._exit(7)
    dist.barrier()


@pytest.mark.parametrize(
    ("how", "said"), [("raises", "rank 1 has had enough"), ("dies", "died without a traceback")]
)
def test_launch_reports_the_rank_that_failed(how: str, said: str):
    """A rank that raises or dies is named, although the other one waits for it."""
    with pytest.raises(RankFailed) as failed:
        launch(2, fails_on_one, how)
    assert said in failed.value.ranks[1]
