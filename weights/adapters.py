"""LoRA adapters: attached to a model, shared bases, and folders in PEFT's format.

    attach(model, Lora(rank=16, alpha=32), seed)     only adapters (and a score head) train
    base = without_adapters(model)                   the start, over the same frozen tensors
    critic = without_adapters(model, ("value",))     another head on the same frozen tensors
    save_adapter(model, "OUT/adapter", "base")       as peft and vLLM --enable-lora load it
    load_adapter(model, "OUT/adapter")               whoever trained it

The base is frozen, so the same tensors without adapters are the model as it was before training, to
the bit: a reference costs no memory.
"""

import json
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from layers import Adapter, Linear, gather_slices
from model import GPT
from weights.config_json import model_config, score_names, with_scores
from weights.files import fingerprint, open_weights
from weights.table import weight_table

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
    "dense": "out",
    "dense_h_to_4h": "up",
    "dense_4h_to_h": "down",
}
SCORE = "base_model.model.score.weight"  # a score head, in adapter_model.safetensors
# Options of PEFT that change the arithmetic, with the values that plumb computes.
ONLY = {
    "use_dora": (False, None),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "layers_to_transform": (None,),
    "lora_bias": (False, None),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "exclude_modules": (None,),
    "megatron_config": (None,),
    "corda_config": (None,),
    "eva_config": (None,),
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
    return base


def adapters_of(model: GPT) -> dict[str, Linear]:
    """Return path -> linear of every linear with an adapter on this rank's stage."""
    return {
        path: linear
        for path, linear in model.named_modules()
        if isinstance(linear, Linear) and linear.adapter is not None
    }


# ---- folders -------------------------------------------------------------------------------------


def save_adapter(model: GPT, folder: str | Path, base: str, lora: Lora) -> None:
    """Write the adapters in PEFT's format, atomically. Every rank calls it; rank 0 writes.

    base: folder that the adapter belongs to. lora: what most adapters are like; those of another
    rank or scale are written as exceptions. GPT-NeoX's q, k and v are one tensor on disk, so their
    three adapters become one of three times the rank, which is the same product.
    """
    folder, mesh = Path(folder), model.mesh
    model.wait()
    here: dict[str, Tensor] = {}
    scales = {}
    for path, linear in adapters_of(model).items():
        scales[path] = linear.adapter.scale
        for part in ("a", "b"):
            here[f"{path}.{part}"] = _whole(linear.adapter, part, model)
    if "score_head.weight" in dict(model.named_parameters()):
        here["score_head"] = model.score_head.weight.detach().cpu().contiguous()
    if mesh.dp_rank or mesh.cp_rank or mesh.tp_rank:
        here = {}
    parts = mesh.everyone({name: tensor.numpy() for name, tensor in _exact(here).items()})
    scales = {path: scale for part in mesh.everyone(scales) for path, scale in part.items()}
    dtype = model.dtype
    tensors = {
        name: torch.from_numpy(array).to(dtype) for part in parts for name, array in part.items()
    }

    def write() -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        on_disk, settings = _to_peft(tensors, scales, model, base, lora)
        metadata = {"format": "pt"}
        if model.c.outputs:  # PEFT's settings have no place for the names of scores
            metadata["scores"] = json.dumps(score_names(model.hf_config))
        save_file(on_disk, partial / "adapter_model.safetensors", metadata=metadata)
        text = json.dumps(settings, indent=2) + "\n"
        (partial / "adapter_config.json").write_text(text)
        if folder.exists():
            for old in folder.iterdir():
                old.unlink()
            folder.rmdir()
        partial.rename(folder)

    mesh.ask(write)


def _exact(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Widen bf16, which numpy does not know; narrowing it again gives the same bits."""
    return {n: t.float() if t.dtype == torch.bfloat16 else t for n, t in tensors.items()}


def _whole(adapter: Adapter, part: str, model: GPT) -> Tensor:
    """Return A or B of all tensor ranks, on the CPU."""
    tensor, weight = getattr(adapter, part).detach(), adapter.declared[part]
    if weight.cut:
        unit = weight.shape[weight.cut.dim] // weight.cut.units
        tensor = gather_slices(tensor, weight.cut.dim, weight.cut.units, model.tp, unit)
    return tensor.cpu().contiguous()


def _to_peft(
    tensors: dict[str, Tensor], scales: dict[str, float], model: GPT, base: str, lora: Lora
) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors under PEFT's names, and adapter_config.json.

    scales: s of every adapter.
    """
    table = weight_table(model.c)
    on_disk: dict[str, Tensor] = {}
    modules: dict[str, float] = {}  # module -> s
    fused: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for path in sorted({name.rpartition(".")[0] for name in tensors if name != "score_head"}):
        stored = table[f"{path}.weight"]
        module = stored.name.removesuffix(".weight")
        pair = (tensors[f"{path}.a"], tensors[f"{path}.b"])
        modules[module] = scales[path]
        if stored.part:
            fused.setdefault(module, {})[stored.part] = pair
        else:
            _put(on_disk, module, *pair)
    for module, parts in fused.items():
        _put(on_disk, module, *_fuse(parts, model.c.head_size, model.c.heads))
    ranks, alphas = {}, {}  # of modules that differ from most
    for module, scale in modules.items():  # s = α/r, or α/√r
        rank = len(on_disk[f"base_model.model.{module}.lora_A.weight"])
        alpha = scale * (math.sqrt(rank) if lora.rank_stabilised else rank)
        if rank != lora.rank:
            ranks[module] = rank
        if not math.isclose(alpha, lora.alpha):
            alphas[module] = alpha
    settings = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS" if model.c.outputs else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilised,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted({module.rpartition(".")[2] for module in modules}),
        "modules_to_save": ["score"] if model.c.outputs else None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
    }
    if "score_head" in tensors:
        on_disk[SCORE] = tensors["score_head"]
    return on_disk, settings


def _put(on_disk: dict[str, Tensor], module: str, a: Tensor, b: Tensor) -> None:
    on_disk[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
    on_disk[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()


def _fuse(parts: dict[str, tuple[Tensor, Tensor]], size: int, heads: int) -> tuple[Tensor, Tensor]:
    """Stack the A of q, k and v, and lay their B out as rows (head, q|k|v, size) of the fused B."""
    names = [part for part in "qkv" if part in parts]
    a = torch.cat([parts[part][0] for part in names])
    rank = a.shape[0] // len(names)
    b = a.new_zeros(heads, 3, size, a.shape[0])
    for i, part in enumerate(names):
        rows = parts[part][1].view(heads, size, rank)
        b[:, "qkv".index(part), :, i * rank : (i + 1) * rank] = rows
    return a, b.reshape(3 * heads * size, a.shape[0])


def read_adapter_config(folder: str | Path) -> tuple[Lora, dict]:
    """Return the adapter's size and its adapter_config.json.

    FileNotFoundError; ValueError names an option that plumb does not compute.
    """
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: --adapter takes a folder in PEFT's format")
    try:
        raw = json.loads(path.read_text())
        if raw.get("peft_type") != "LORA":
            raise ValueError(f"peft_type {raw.get('peft_type')!r}: only LORA is known")
        for key, values in ONLY.items():
            if raw.get(key, values[0]) not in values:
                raise ValueError(f"{key} = {raw[key]!r} is not supported, only {values[0]!r}")
        modules = raw["target_modules"]
        names = target_names([modules] if isinstance(modules, str) else list(modules))
        lora = Lora(
            int(raw["r"]),
            float(raw["lora_alpha"]),
            names,
            float(raw.get("lora_dropout", 0.0)),
            bool(raw.get("use_rslora", False)),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no adapter_config.json of PEFT ({error!r})") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return lora, raw


def check_base(folder: str | Path, base: str | Path) -> None:
    """Check that an adapter was trained on a base. ValueError: on another one; or it is a model."""
    if not (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"--shared-base: {folder} is no adapter: give the one that was trained on {base}, such "
            "as rm/adapter of train_rm.py --lora"
        )
    own = read_adapter_config(folder)[1].get("base_model_name_or_path") or ""
    if own == str(base):
        return
    if not Path(own).is_dir() or fingerprint(own) != fingerprint(base):
        raise ValueError(
            f"the adapter {folder} was trained on {own or 'an unnamed model'}, not on {base}: its "
            "sums would mean nothing there"
        )


def adapter_scores(folder: str | Path) -> tuple[str, ...]:
    """Return the names of the outputs of an adapter with a score head; () without one."""
    with open_weights(Path(folder) / "adapter_model.safetensors") as file:
        if SCORE not in file.keys():  # noqa: SIM118 - no dictionary
            return ()
        names = (file.metadata() or {}).get("scores")
        outputs = file.get_slice(SCORE).get_shape()[0]
    if names:
        return tuple(json.loads(names))
    return ("reward",) if outputs == 1 else tuple(f"LABEL_{i}" for i in range(outputs))


def load_adapter(model: GPT, folder: str | Path) -> Lora:
    """Attach the adapter of a folder in PEFT's format, whoever trained it; return its size.

    An adapter of GPT-NeoX's query_key_value becomes three with the same A. ValueError: it does not
    fit the model.
    """
    lora, raw = read_adapter_config(folder)
    path = Path(folder) / "adapter_model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: save the adapter as safetensors")
    tensors = load_file(path)
    table = weight_table(model.c)
    for p in model.parameters():
        p.requires_grad_(False)
    used = set()
    for linear_path, linear in model.named_modules():
        stored = table.get(f"{linear_path}.weight")
        if not isinstance(linear, Linear) or stored is None:
            continue
        name = f"base_model.model.{stored.name.removesuffix('.weight')}"
        a, b = tensors.get(f"{name}.lora_A.weight"), tensors.get(f"{name}.lora_B.weight")
        if a is None or b is None:
            continue
        used |= {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
        if stored.part:
            rows = b.view(model.c.heads, 3, model.c.head_size, b.shape[1])
            b = rows[:, "qkv".index(stored.part)].reshape(-1, b.shape[1])
        scale = _scale_of(raw, lora, stored.name.removesuffix(".weight"), a.shape[0])
        _attach_tensors(linear, a, b, scale, lora.dropout, f"{folder}: {name}")
    score = tensors.get(SCORE)
    if score is not None and hasattr(model, "score_head"):
        model.score_head.weight.data.copy_(score)
        used.add(SCORE)
    if hasattr(model, "score_head"):
        model.score_head.weight.requires_grad_(True)
    if unknown := sorted(set(tensors) - used - _elsewhere(tensors, model)):
        raise ValueError(
            f"{folder}: the model has no place for {unknown[0]} ({len(unknown)} in all)"
        )
    return lora


def _scale_of(raw: dict, lora: Lora, module: str, rank: int) -> float:
    """Return s of one module: PEFT's patterns, the ends of module names, overrule alpha."""
    patterns = raw.get("alpha_pattern") or {}
    fitting = (a for key, a in patterns.items() if re.match(rf"(.*\.)?({key})$", module))
    alpha = next(fitting, lora.alpha)
    return alpha / (math.sqrt(rank) if lora.rank_stabilised else rank)


def _attach_tensors(
    linear: Linear, a: Tensor, b: Tensor, scale: float, dropout: float, name: str
) -> None:
    """Attach this rank's slices of A and B. ValueError: their shapes do not fit the linear."""
    outputs, inputs = linear.declared["weight"].shape
    if a.shape[1] != inputs or b.shape != (outputs, a.shape[0]):
        raise ValueError(
            f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit a linear of {inputs} "
            f"inputs and {outputs} outputs: does the adapter belong to another base?"
        )
    with torch.device(linear.device):
        linear.adapter = Adapter(linear, a.shape[0], scale, dropout).to(linear.weight.dtype)
    for part, tensor in (("a", a), ("b", b)):
        if cut := linear.adapter.declared[part].slice(linear.mesh):
            tensor = tensor.narrow(cut[0], cut[1], cut[2] - cut[1])
        getattr(linear.adapter, part).data.copy_(tensor)


def _elsewhere(tensors: dict[str, Tensor], model: GPT) -> set[str]:
    """Return the names of tensors that belong to other pipeline stages."""
    if model.mesh.pp == 1:
        return set()
    modules = {stored.name.removesuffix(".weight") for stored in weight_table(model.c).values()}
    prefix = len("base_model.model.")
    return {name for name in tensors if name[prefix:].split(".lora_")[0] in modules} | {SCORE}
