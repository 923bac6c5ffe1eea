"""Mixture of experts against a loop over tokens and experts, written out again in float64.

Faults that were put in one by one and made a test here fail:
  experts   the next expert's weights used; weights normalised twice, or normalised where the family
            does not; rows returned by the order in place of its inverse
  balance   the loss of each micro-batch by itself, counted for every tensor rank, a shared prompt
            counted once (tests/ranks/test_parallel.py); first choices alone; entropy in bits
"""

import math
from pathlib import Path

import pytest
import torch
from conftest import dataset_of
from published import published_config

import train_sft
from architecture import GPTConfig
from data.trees import make_batch
from hf import New, new_model
from kernels.quantized import FORMATS
from model import ALONE, GPT, active_count, parameter_count
from moe import Experts, route
from parallel import Mesh
from routing import Routing, Tally, metrics
from weights.adapters import TARGETS, Lora, adapters_of, attach
from weights.config_json import model_config
from weights.folder import load_model, save_model

SIZES = dict(vocab=50, width=8, layers=2, heads=2, kv_heads=2, head_size=4, ffn=12)


def layer_of(normalised: bool, dtype: torch.dtype = torch.float64) -> Experts:
    """Return a layer of 5 experts, 2 a token, with random weights."""
    c = GPTConfig(
        "qwen3_moe",
        **SIZES,
        experts=5,
        active=2,
        expert_ffn=6,
        normalised=normalised,
    )
    layer = Experts(c, 0, ALONE).to(dtype)
    generator = torch.Generator().manual_seed(0)
    for p in layer.parameters():
        p.data.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layer


def token_by_token(layer: Experts, x: torch.Tensor, normalised: bool) -> torch.Tensor:
    """Return the output of a layer: one token and one expert at a time, by the formula."""
    rows = []
    for token in x:
        scores = torch.exp(layer.router.weight @ token)
        p = scores / scores.sum()
        chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[:2]
        total = sum(p[e] for e in chosen) if normalised else 1.0
        y = torch.zeros_like(token)
        for e in chosen:
            expert = layer.experts[str(e)]
            z = expert.gate.weight @ token
            hidden = z / (1 + torch.exp(-z)) * (expert.up.weight @ token)
            y = y + p[e] / total * (expert.down.weight @ hidden)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("normalised", [True, False])
def test_experts_equal_a_loop_over_tokens(normalised: bool):
    """Outputs and all gradients, of many tokens, of one and of none, are those of the formula."""
    layer = layer_of(normalised)
    for tokens in (23, 1, 0):
        x = torch.randn(tokens, 8, dtype=torch.float64, requires_grad=True)
        inputs = [x, *layer.parameters()]
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


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral"])
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
