"""LoRA adapters: attached to a model, and models that share a frozen base.

    attach(model, Lora(rank=16, alpha=32), seed)     only adapters (and a score head) train
    base = without_adapters(model)                   the start, over the same frozen tensors
    critic = without_adapters(model, ("value",))     another head on the same frozen tensors

The base is frozen, so the same tensors without adapters are the model as it was before training, to
the bit: a reference costs no memory.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Literal

import torch

from layers import Adapter, Linear
from model import GPT
from weights.config_json import model_config, with_scores

ATTENTION = ("q", "k", "v", "out")
MLP = ("gate", "up", "down")
TARGETS = {"all": (*ATTENTION, *MLP), "attention": ATTENTION, "mlp": MLP}
# Names on disk that users know -> ours.
KNOWN = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "out",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "query_key_value": "q k v",
    "qkv_proj": "q k v",
    "gate_up_proj": "gate up",
    "dense": "out",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
}
BaseDtype = Literal["none", "bf16", "fp8", "int8", "nf4"]


@dataclass(frozen=True)
class Lora:
    """Size and place of the adapters of a model."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS["all"]  # names of linears: q, k, v, out, gate, up, down
    dropout: float = 0.0
    rank_stabilised: bool = False  # scale α/√r instead of α/r (rsLoRA, arXiv 2312.03732)
    base_dtype: BaseDtype = "none"  # of the frozen linears; none: the model's

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


def target_names(words: list[str]) -> tuple[str, ...]:
    """Return the linears that --lora-targets names, in our names.

    ["attention"] -> q, k, v, out; ["q_proj", "down"] -> q, down. ValueError: an unknown name.
    """
    names: list[str] = []
    for word in words:
        linears = TARGETS.get(word) or KNOWN.get(word, word).split()
        for name in linears:
            if name not in TARGETS["all"]:
                raise ValueError(
                    f"--lora-targets: there is no linear {word!r}: use all, attention, mlp or some "
                    f"of {', '.join(TARGETS['all'])}"
                )
        names += [name for name in linears if name not in names]
    return tuple(names)


def attach(model: GPT, lora: Lora, seed: int = 0) -> GPT:
    """Freeze a model and give its linears fresh adapters, B = 0: every output stays what it was.

    A score head keeps training whole. The same seed draws the same adapters under every layout.
    ValueError: no linear of the model is a target.
    """
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("score_head"))
    adapted = 0
    for path, linear in model.named_modules():
        if isinstance(linear, Linear) and path.rpartition(".")[2] in lora.targets:
            with torch.device(linear.device):
                linear.adapter = Adapter(linear, lora.rank, lora.scale, lora.dropout)
            linear.adapter.to(linear.weight.dtype)
            if linear.device.type != "meta":
                _draw(linear.adapter, f"{path}.adapter", seed)
            adapted += 1
    if not adapted:
        raise ValueError(f"--lora-targets {' '.join(lora.targets)}: the model has none of them")
    return model


@torch.no_grad()
def _draw(adapter: Adapter, name: str, seed: int) -> None:
    """Draw A uniform within 1/√inputs (as PEFT does) and set B to 0."""
    weight = adapter.declared["a"]
    generator = torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(name.encode()))
    whole = torch.rand(weight.shape, generator=generator, dtype=torch.float64) * 2 - 1
    if cut := weight.slice(adapter.mesh):
        whole = whole.narrow(cut[0], cut[1], cut[2] - cut[1])
    adapter.a.copy_(whole / math.sqrt(weight.shape[1]))
    adapter.b.zero_()


def frozen_linears(model: GPT) -> dict[str, Linear]:
    """Return path -> linear of every linear on this rank's stage that adapters leave frozen."""
    return {
        path: linear
        for path, linear in model.named_modules()
        if isinstance(linear, Linear) and path != "score_head"
    }


def quantize_linears(model: GPT, base_dtype: BaseDtype) -> None:
    """Set the sizes of quantised linears of a model on the meta device; "none" changes nothing."""
    if base_dtype == "none":
        return
    for linear in frozen_linears(model).values():
        linear.quantize(torch.empty(linear.declared["weight"].shape, device="meta"), base_dtype)


def without_adapters(model: GPT, scores: tuple[str, ...] = ()) -> GPT:
    """Return a model over the same frozen tensors without adapters: the model before training.

    scores: outputs of a new score head, which gives 0, in place of the language model's head.
    ValueError: a weight of it trains, so it would move.
    """
    tensors = {n: p for n, p in model.named_parameters() if ".adapter." not in n}
    if moving := [n for n, p in tensors.items() if p.requires_grad and "score_head" not in n]:
        raise ValueError(f"{moving[0]} trains: the base of a shared model has to be frozen")
    c, raw = model.c, model.hf_config
    if scores:
        raw = with_scores(raw, scores)
        c = model_config(raw, c.family)
    with torch.device("meta"):
        base = GPT(c, model.mesh)
    held = {}
    for name, p in base.named_parameters():
        if name in tensors:
            held[name] = tensors[name].data
        else:  # the new score head
            held[name] = torch.zeros(p.shape, dtype=model.dtype, device=model.device)
    base.load_state_dict(held, assign=True)
    base.requires_grad_(False)
    for path, linear in frozen_linears(model).items():
        frozen_linears(base)[path].base = linear.base
    base.hf_config, base.original = raw, model.original
    base.checkpoint_activations = model.checkpoint_activations
    if model.shards:
        base.shards = model.shards.shared_with(base)
    return base


def adapters_of(model: GPT) -> dict[str, Linear]:
    """Return path -> linear of every linear with an adapter on this rank's stage."""
    return {
        path: linear
        for path, linear in model.named_modules()
        if isinstance(linear, Linear) and linear.adapter is not None
    }
