"""Adapters as folders in PEFT's format: adapter_config.json and adapter_model.safetensors.

save_adapter(model, "OUT/adapter", "base", lora)   as peft and vLLM --enable-lora load it
load_adapter(model, "OUT/adapter")                 whoever trained it
check_base("OUT/adapter", "base")                  refuses an adapter of another base
"""

import dataclasses
import json
import math
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from config import RunConfig
from disk import replace_folder
from layers import Adapter, Linear, gather_slices, is_finite
from model import GPT
from sharding import part_of
from weights.adapters import Lora, adapters_of, target_names
from weights.config_json import score_names
from weights.files import fingerprint, open_weights
from weights.table import Stored, weight_table

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


def lora_of(config: RunConfig) -> Lora:
    """Return the size and place of adapters that the flags, or the folder of --adapter, say."""
    if config.adapter:
        lora = read_adapter_config(config.adapter)[0]
        return dataclasses.replace(lora, base_dtype=config.base_dtype)
    alpha = config.lora_alpha or 2.0 * config.lora
    targets = target_names(config.lora_targets)
    dropout, dtype = config.lora_dropout, config.base_dtype
    return Lora(config.lora, alpha, targets, dropout, config.rslora, dtype)


def save_adapter(model: GPT, folder: str | Path, base: str, lora: Lora) -> None:
    """Write the adapters in PEFT's format, atomically. Every rank calls it; rank 0 writes.

    base: folder that the adapter belongs to. lora: what most adapters are like; those of another
    rank or scale are written as exceptions. Where several linears are one tensor on disk (q, k and
    v of GPT-NeoX), their adapters become one of the sum of their ranks, which is the same product.
    """
    folder, mesh = Path(folder), model.mesh
    here: dict[str, Tensor] = {}
    scales = {}
    for path, linear in adapters_of(model).items():
        scales[path] = linear.adapter.scale
        with model.whole(part_of(path)):
            for part in ("a", "b"):
                here[f"{path}.{part}"] = _whole(linear.adapter, part, model)
    if "score_head.weight" in dict(model.named_parameters()):
        with model.whole("head"):
            here["score_head"] = model.score_head.weight.detach().cpu().clone()
    if mesh.replica >= mesh.ep or mesh.tp_rank:  # --ep's ranks have different experts
        here = {}
    parts = mesh.everyone({name: tensor.numpy() for name, tensor in _exact(here).items()})
    scales = {path: scale for part in mesh.everyone(scales) for path, scale in part.items()}
    dtype = model.dtype
    tensors = {
        name: torch.from_numpy(array).to(dtype) for part in parts for name, array in part.items()
    }

    broken = [name for name, tensor in tensors.items() if not is_finite(tensor)]
    if broken:
        raise ValueError(f"{folder} was not written: {broken[0]} is not finite; lower --lr")

    def write() -> None:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        on_disk, settings = _to_peft(tensors, scales, model, base, lora)
        metadata = {"format": "pt"}
        if model.c.outputs:  # PEFT's settings have no place for the names of scores
            metadata["scores"] = json.dumps(score_names(model.hf_config))
        save_file(on_disk, partial / "adapter_model.safetensors", metadata=metadata)
        text = json.dumps(settings, indent=2) + "\n"
        (partial / "adapter_config.json").write_text(text)
        replace_folder(partial, folder)

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
    return tensor.cpu().clone()


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
            fused.setdefault(module, {})[f"{path}.weight"] = pair
        else:
            _put(on_disk, module, *pair)
    for module, parts in fused.items():
        _put(on_disk, module, *_fuse(parts, table))
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


def _fuse(
    parts: dict[str, tuple[Tensor, Tensor]], table: dict[str, Stored]
) -> tuple[Tensor, Tensor]:
    """Stack the A of linears that are one tensor on disk; lay their B out as its rows lie there.

    parts: our names -> A and B.
    """
    stacked = torch.cat([a for a, _ in parts.values()])
    stored = table[next(iter(parts))]
    whole = stacked.new_zeros(stored.shape[0], len(stacked))
    column = 0
    for name, (a, b) in parts.items():
        whole[table[name].part.rows(0, len(b)), column : column + len(a)] = b
        column += len(a)
    return stacked, whole


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

    An adapter of several linears that are one tensor on disk becomes several with the same A.
    ValueError: it does not fit the model.
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
            if len(b) != stored.shape[0]:
                raise ValueError(_misfit(f"{folder}: {name}", a, b, *stored.shape[::-1]))
            b = b[stored.part.rows(0, stored.weight.shape[0])]
        scale = _scale_of(raw, lora, stored.name.removesuffix(".weight"), a.shape[0])
        _attach_tensors(linear, a, b, scale, lora.dropout, f"{folder}: {name}")
    score = tensors.get(SCORE)
    if score is not None and hasattr(model, "score_head"):
        if model.shards:
            model.shards.remove({"score_head.weight"})
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
        raise ValueError(_misfit(name, a, b, inputs, outputs))
    with torch.device(linear.device):
        linear.adapter = Adapter(linear, a.shape[0], scale, dropout).to(linear.weight.dtype)
    for part, tensor in (("a", a), ("b", b)):
        if cut := linear.adapter.declared[part].slice(linear.mesh):
            tensor = tensor.narrow(cut[0], cut[1], cut[2] - cut[1])
        getattr(linear.adapter, part).data.copy_(tensor)


def _misfit(name: str, a: Tensor, b: Tensor, inputs: int, outputs: int) -> str:
    return (
        f"{name}: A {tuple(a.shape)} and B {tuple(b.shape)} do not fit a linear of {inputs} "
        f"inputs and {outputs} outputs: does the adapter belong to another base?"
    )


def _elsewhere(tensors: dict[str, Tensor], model: GPT) -> set[str]:
    """Return the names of tensors that belong to other pipeline stages or experts."""
    if model.mesh.pp == 1 and model.mesh.ep == 1:
        return set()
    modules = {stored.name.removesuffix(".weight") for stored in weight_table(model.c).values()}
    prefix = len("base_model.model.")
    return {name for name in tensors if name[prefix:].split(".lora_")[0] in modules} | {SCORE}
