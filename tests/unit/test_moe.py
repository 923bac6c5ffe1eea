"""Mixture of experts against a loop over tokens and experts, written out again in float64.

Faults that were put in one by one and made a test here fail:
  experts   the next expert's weights used; weights normalised twice, or normalised where the family
            does not; rows returned by the order in place of its inverse
  balance   the loss of each micro-batch by itself, counted for every tensor rank, a shared prompt
            counted once (tests/ranks/test_parallel.py); first choices alone; entropy in bits
"""

import json
import math
from pathlib import Path

import pytest
import torch
from conftest import dataset_of
from published import published_config
from safetensors.torch import load_file, save_file

import train_sft
from architecture import GPTConfig
from data.trees import make_batch
from hf import New, new_model
from kernels.quantized import FORMATS
from model import ALONE, GPT, active_count, parameter_count
from moe import Experts, route
from optimizer import AdamW
from parallel import Mesh
from routing import Routing, Tally, correct, metrics
from sharding import shard
from weights.adapters import TARGETS, Lora, adapters_of, attach
from weights.config_json import model_config, read_config
from weights.folder import load_model, save_model
from weights.table import weight_table

SIZES = dict(vocab=50, width=8, layers=2, heads=2, kv_heads=2, head_size=4, ffn=12)


def layer_of(normalised: bool, router: str = "softmax", **options) -> Experts:
    """Return a layer of 5 experts, 2 a token, with random weights, in float64."""
    c = GPTConfig(
        "qwen3_moe",
        **SIZES,
        experts=5,
        active=2,
        expert_ffn=6,
        normalised=normalised,
        router=router,
        **options,
    )
    layer = Experts(c, 0, ALONE).double()
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layer


def token_by_token(layer: Experts, x: torch.Tensor, normalised: bool) -> torch.Tensor:
    """Return the output of a layer: one token and one expert at a time, by the formula."""
    rows = []
    for token in x:
        scores = torch.exp(layer.router.weight @ token)
        p, correction = scores / scores.sum(), layer.router.correction
        if correction is not None:
            p = scores / (1 + scores)
        rank = p if correction is None else p + correction
        chosen = sorted(range(len(p)), key=lambda e: -rank[e].item())[:2]
        total = sum(p[e] for e in chosen) if normalised else 1.0
        total = total / layer.scale
        y = torch.zeros_like(token)
        for e in chosen:
            expert = layer.experts[str(e)]
            z = expert.gate.weight @ token
            hidden = z / (1 + torch.exp(-z)) * (expert.up.weight @ token)
            y = y + p[e] / total * (expert.down.weight @ hidden)
        if layer.shared is not None:
            z = layer.shared.gate.weight @ token
            hidden = z / (1 + torch.exp(-z)) * (layer.shared.up.weight @ token)
            y = y + layer.shared.down.weight @ hidden
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("router", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalised", [True, False])
def test_experts_equal_a_loop_over_tokens(normalised: bool, router: str):
    """Outputs and all gradients, of many tokens, of one and of none, are those of the formula."""
    options = {"routed_scale": 2.5, "shared_ffn": 7, "shared_gated": False}
    layer = layer_of(normalised, router, **(options if router == "sigmoid" else {}))
    for tokens in (23, 1, 0):
        x = torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
        inputs = [x, *(p for p in layer.parameters() if p.requires_grad)]
        y = layer(x, tokens)
        wanted = token_by_token(layer, x, normalised) if tokens else torch.zeros_like(x)
        assert torch.allclose(y, wanted, rtol=0, atol=1e-12)
        d_y = torch.randn_like(y)
        ours = torch.autograd.grad(y, inputs, d_y)  # an expert without tokens has a gradient too
        theirs = [torch.zeros_like(p) for p in inputs]
        if tokens:
            theirs = torch.autograd.grad(
                wanted, inputs, d_y, allow_unused=True, materialize_grads=True
            )
        for mine, other in zip(ours, theirs):
            assert torch.allclose(mine, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "glm4_moe"])
def test_a_new_sparse_model_comes_back_from_its_folder(family: str, tmp_path: Path):
    """hf.py new, save, load: the same weights, and the counts of all and of active parameters."""
    sizes = dict(vocab=50, width=8, layers=2, heads=2, ffn=6, experts=5, active=3)
    model = new_model(New(family=family, **sizes))
    c = model.c
    assert (c.experts, c.active, c.expert_ffn) == (5, 3, 6)
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model", torch.float32)
    for name, p in model.named_parameters():
        assert torch.equal(p, again.get_parameter(name))
    assert parameter_count(c) == sum(p.numel() for p in model.parameters())
    skipped = {".experts.0.", ".experts.1."}  # any two of the five
    active = [p for n, p in model.named_parameters() if not any(s in n for s in skipped)]
    assert active_count(c) == sum(p.numel() for p in active)


def test_adapters_on_experts_merge_into_them(tmp_path: Path):
    """Adapters on all linears give what the merged folder gives."""
    model = new_model(New(family="qwen3_moe", vocab=50, width=8, layers=2, heads=2, std=0.5))
    attach(model, Lora(rank=2, alpha=4.0, targets=TARGETS["all"]), seed=1)
    for linear in adapters_of(model).values():
        linear.adapter.b.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    batch = make_batch(dataset_of([([5, 6, 7], [[8, 9], [10]])]), [0])
    save_model(model, tmp_path / "merged")
    merged = load_model(tmp_path / "merged", torch.float32)
    assert torch.allclose(model(batch), merged(batch), atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_a_quantised_base_computes_with_experts_without_tokens(format: str, tmp_path: Path):
    """Frozen experts in fewer bits: a row of one token, which most experts never see."""
    model = new_model(New(family="mixtral", vocab=50, width=64, layers=1, heads=2))
    save_model(model, tmp_path / "model")
    held = load_model(tmp_path / "model", torch.float32, base_dtype=format)
    batch = make_batch(dataset_of([([5], [[8]])]), [0])
    with torch.no_grad():
        difference = (held(batch) - model(batch)).norm() / model(batch).norm()
    assert difference < 0.2
    assert all(e.gate.base is not None for e in held.blocks["0"].mlp.experts.values())


@pytest.mark.parametrize(
    ("name", "change", "named"),
    [
        ("Qwen3-30B-A3B", {"num_experts_per_tok": 7}, "more than the 6 experts"),
        ("Qwen3-30B-A3B", {"num_local_experts": 5}, "say different things"),
        ("Qwen3-30B-A3B", {"num_experts": 0}, "num_experts = 0"),
        ("Qwen3-30B-A3B", {"shared_expert_intermediate_size": 8}, "shared_expert"),
        ("OLMoE-1B-7B-0924-Instruct", {"clip_qkv": 8.0}, "clip_qkv"),
        ("Mixtral-8x7B-Instruct-v0.1", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
    ],
)
def test_sparse_models_that_are_not_computed_are_refused(name: str, change: dict, named: str):
    """A key that would change the arithmetic is named."""
    raw = {**published_config(name), **change}
    with pytest.raises(ValueError, match=named):
        model_config(raw, raw["model_type"])


def test_router_losses_are_those_of_transformers():
    """With one sparse layer, whose tokens all are real, at 3 of 7 experts a token."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
    from transformers.models.switch_transformers import modeling_switch_transformers as switch

    logits = 2 * torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = logits.clone().requires_grad_()
    tally = Tally(7)
    tally.balance, tally.z = 0.3, 0.2
    weights, chosen = torch.softmax(ours, -1).topk(3, -1)
    attached = tally.observe(weights, ours, chosen, torch.ones(50, dtype=torch.float64), 1)
    (0 * attached).sum().backward()
    theirs = logits.clone().requires_grad_()
    balance = load_balancing_loss_func((theirs,), 7, 3)
    z = switch.router_z_loss_func(theirs[None])
    (0.3 * balance + 0.2 * z).backward()
    row = metrics({0: tally}, 1, 7, ALONE)
    assert row["router/balance_loss"] == pytest.approx(balance.item(), rel=1e-6)
    assert row["router/z_loss"] == pytest.approx(z.item(), rel=1e-12)
    assert torch.allclose(ours.grad, theirs.grad, rtol=0, atol=1e-8)  # theirs counts in fp32


def test_metrics_of_balance_are_counted_by_hand():
    """Two layers of three experts, one a token; the last token of four counts twice."""
    times = torch.tensor([1.0, 1.0, 1.0, 2.0], dtype=torch.float64)
    even = torch.zeros(4, 3, dtype=torch.float64)
    first, second = Tally(3), Tally(3)
    weights = torch.ones(4, 1, requires_grad=True)
    first.observe(weights, even, torch.tensor([[0], [1], [2], [2]]), times, 1)
    second.observe(weights, even, torch.tensor([[0], [0], [0], [0]]), times, 1)
    with torch.no_grad():  # evaluation: not counted
        first.observe(weights, even, torch.tensor([[0], [0], [0], [0]]), times, 1)
    assert metrics({0: first, 2: second}, 3, 3, ALONE) == pytest.approx(
        {
            "router/max_load": 3.0,  # all 5 tokens, 5 / 3 on average
            "router/dead_experts": 2,
            "router/entropy": math.log(3),
            "router/balance_loss": 1.0,
            "router/z_loss": math.log(3) ** 2,
        },
        rel=1e-12,
    )
    assert metrics({0: first, 2: second}, 3, 3, ALONE) == {}


def test_router_losses_are_refused_without_experts(toy: Path, tmp_path: Path):
    """The flag is named."""
    words = f"--model {toy / 'model'} --data {toy / 'world' / 'sft.jsonl'} --out {tmp_path}".split()
    with pytest.raises(ValueError, match="--balance-loss: .* has no experts"):
        train_sft.main([*words, "--balance-loss", "0.01", "--device", "cpu"])


def test_the_bias_of_a_router_moves_by_the_loads_of_a_step():
    """Algorithm 1 of 2408.15664 by hand: 8 choices of 4 experts; one of even load stays."""
    tally = Tally(4, "sigmoid")
    tally.rate = 0.25
    bias = torch.zeros(4)
    even = torch.zeros(2, 4)
    times = torch.tensor([1.0, 2.0], dtype=torch.float64)
    weights = torch.ones(2, 2, requires_grad=True)
    tally.observe(weights, even, torch.tensor([[0, 1], [0, 2]]), times, 1)  # 3, 1, 2, 0
    with torch.no_grad():  # evaluation, sampling: not counted
        tally.observe(weights, even, torch.tensor([[3, 2], [3, 2]]), times, 1)
    tally.observe(weights[:1], even[:1], torch.tensor([[2, 1]]), times[:1], 1)  # and 0, 1, 1, 0
    correct([(bias, tally)], ALONE.group("dp cp"))
    assert bias.tolist() == [-0.25, 0.0, -0.25, 0.25]


def test_a_bias_stays_where_a_step_had_no_update():
    """A step without an update moves no bias, and its tokens do not count for the next one."""
    model = new_model(New(family="glm4_moe", vocab=50, width=16, layers=2, heads=2))
    batch = make_batch(dataset_of([([5, 6, 7], [[8, 9], [10]])]), [0])
    optimizer = AdamW(model, (0.9, 0.95), 1e-8, 0.0)
    for tally in model.tallies.values():
        tally.rate = 0.1
    bias = model.blocks["1"].mlp.router.correction
    for factor, moved in ((float("nan"), False), (1.0, True)):
        (model.logps(model(batch), batch).sum() * factor).backward()
        optimizer.step(1e-3, 1.0)
        assert bool(bias.any()) == moved
        assert all(tally.load is None for tally in model.tallies.values())


def test_a_bias_is_held_and_saved_in_fp32(tmp_path: Path):
    """A model in bf16: 0.001 added to 1 a hundred times is 1.1, in memory and on disk."""
    model = new_model(New(family="glm4_moe", vocab=50, width=16, layers=2, heads=2, dtype="bf16"))
    save_model(model, tmp_path / "new")
    assert router_dtypes(tmp_path / "new")["gate.e_score_correction_bias"] == torch.float32
    model = load_model(tmp_path / "new", torch.bfloat16)
    router = model.blocks["0"].mlp.router
    assert (router.weight.dtype, router.correction.dtype) == (torch.bfloat16, torch.float32)
    router.correction.fill_(1.0)
    for _ in range(100):
        router.correction += 0.001
    save_model(model, tmp_path / "model")
    assert router_dtypes(tmp_path / "model")["gate.e_score_correction_bias"] == torch.float32
    again = load_model(tmp_path / "model", torch.bfloat16)
    correction = again.blocks["0"].mlp.router.correction
    assert torch.equal(correction, router.correction)
    assert correction[0].item() == pytest.approx(1.1, rel=1e-5)
    shard(again)  # --zero 3 puts weights side by side, in one dtype
    assert again.get_parameter("blocks.0.mlp.router.correction").dtype == torch.float32


def router_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Return the dtypes of the first layer's router on disk, by the end of their names."""
    tensors = load_file(folder / "model.safetensors")
    start = "model.layers.0.mlp."
    return {n.removeprefix(start): x.dtype for n, x in tensors.items() if n.startswith(start)}


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path, capsys):
    """GLM-4.5's last layer is not the model's: it is named, and what is saved has none."""
    model = new_model(New(family="glm4_moe", vocab=50, width=16, layers=2, heads=2))
    save_model(model, tmp_path / "model")
    tensors = load_file(tmp_path / "model/model.safetensors")
    tensors |= {f"model.layers.2.{name}": torch.ones(3) for name in ("eh_proj.weight", "enorm")}
    save_file(tensors, tmp_path / "model/model.safetensors")
    with pytest.raises(ValueError, match="does not know the weight model.layers.2"):
        load_model(tmp_path / "model", torch.float32)
    raw = json.loads((tmp_path / "model/config.json").read_text())
    text = json.dumps({**raw, "num_nextn_predict_layers": 1})
    (tmp_path / "model/config.json").write_text(text)
    again = load_model(tmp_path / "model", torch.float32)
    assert "2 weights of 1 layer(s) that predict further tokens" in capsys.readouterr().out
    save_model(again, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["num_nextn_predict_layers"] == 0
    assert load_file(tmp_path / "again/model.safetensors").keys() == model_names(tmp_path / "again")


def model_names(folder: Path) -> set[str]:
    """Return the names that the weight table gives a folder's weights."""
    return {stored.name for stored in weight_table(read_config(folder)[0]).values()}


@pytest.mark.parametrize(
    ("family", "words", "named"),
    [
        ("qwen3_moe", [], "routers of .* have no bias"),
        ("glm4_moe", ["--lora", "2"], "--balance-bias moves a weight of the router"),
    ],
)
def test_a_bias_that_cannot_move_is_refused(
    family: str, words: list[str], named: str, toy: Path, tmp_path: Path
):
    """A router without a bias, and adapters, which leave the router alone."""
    tokenizer = str(toy / "world" / "tokenizer")
    new = New(family=family, tokenizer=tokenizer, width=16, layers=1, heads=2)
    save_model(new_model(new), tmp_path / "model", tokenizer)
    words = [*words, "--model", str(tmp_path / "model"), "--data", str(toy / "world/sft.jsonl")]
    words += ["--out", str(tmp_path / "out"), "--balance-bias", "0.001", "--device", "cpu"]
    with pytest.raises(ValueError, match=named):
        train_sft.main(words)


def test_experts_that_ranks_cannot_share_evenly_are_refused():
    c = GPTConfig("mixtral", **SIZES, experts=6, active=2, expert_ffn=4)
    with pytest.raises(ValueError, match="--ep 4: the model has 6 experts a layer, use one of 1, "):
        GPT(c, Mesh(dp=4, ep=4))


def test_fixed_experts_have_the_weights_of_the_router():
    """The formula with other experts than the likeliest: each keeps its own probability."""
    layer = layer_of(True)
    x = torch.randn(6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    fixed = torch.tensor([[0, 4], [2, 1], [-1, -1], [3, 0], [1, 4], [4, 3]], dtype=torch.int16)
    y = layer(x, 6, Routing(None, fixed[:, None]))
    free = layer(x, 6)
    for token, chosen, ours, own in zip(x, fixed.tolist(), y, free):
        if chosen[0] < 0:
            assert torch.equal(ours, own)
            continue
        p = torch.softmax(layer.router.weight @ token, 0)
        wanted = sum(p[e] / p[chosen].sum() * layer.experts[str(e)](token[None])[0] for e in chosen)
        assert (ours - wanted).abs().max() < 1e-12
    logits = torch.randn(6, 5, dtype=torch.float64)
    for normalised in (True, False):  # the likeliest, said again, change nothing
        weights, chosen = route(logits, 2, normalised)
        assert torch.equal(route(logits, 2, normalised, chosen.short())[0], weights)
