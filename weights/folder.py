"""Hugging Face folder <-> model: weights are read one at a time and written atomically.

Every rank reads only its stage's weights, and of those only the slices it holds. An architecture,
an option or a weight that plumb does not know is refused by name: what is not computed exactly must
not be computed silently.
"""

import itertools
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from architecture import GPTConfig
from data.settings import read_json
from data.templates import Template
from data.tokenizer import NO_DUMMY_PREFIX, TOKENIZER_FILES, Tokenizer, load_tokenizer
from disk import replace_folder
from layers import Linear, gather_slices, is_finite
from model import ALONE, GPT
from parallel import Mesh
from sharding import part_of, shard
from weights.adapters import BaseDtype, frozen_linears
from weights.config_json import model_config, read_config, score_names, with_scores
from weights.files import DTYPES, SHARD_BYTES, fingerprint, open_weights, weight_files
from weights.shares import plan_files
from weights.table import HEADS, Stored, fuse, weight_table

__all__ = ["DTYPES", "fingerprint", "load_model", "save_model", "weight_files"]
NOT_FINITE = "a weight is not finite"
NEXT_LAYERS = "num_nextn_predict_layers"  # of config.json

# ---- reading -------------------------------------------------------------------------------------


def load_model(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    scores: tuple[str, ...] | None = None,
    mesh: Mesh = ALONE,
    base_dtype: BaseDtype = "none",
    sharded: bool = False,
) -> GPT:
    """Read a Hugging Face folder into a model of the given dtype on the given device.

    scores: None loads a language model; () a reward model with the outputs it has; names a reward
    model with just these, whose score head starts at zero where the folder is a language model's
    (so that every first score is 0). The model keeps the raw config.json as `hf_config`.
    base_dtype: format of kernels/quantized.py in which the linears are held, frozen; saving the
    model reads them again from the folder. sharded: each rank keeps a piece of what it reads, one
    part of the model after another (sharding.py); collective.
    ValueError names a weight that is missing, unknown or of the wrong shape, or says that the
    folder holds another kind of model.
    """
    c, raw = read_config(folder)
    _check_kind(folder, score_names(raw), scores)
    files = weight_files(folder)
    files = _without_next_layers(folder, c, raw, files, mesh)
    if scores:  # to be trained: the scores will be others than were measured
        raw.pop("reward_standard", None)
    fresh = bool(scores) and not score_names(raw)
    if fresh:
        raw = with_scores(raw, scores)
        c = model_config(raw, c.family)
        files = {name: file for name, file in files.items() if name not in HEADS}
    table = weight_table(c)
    if fresh:
        del table["score_head.weight"]
    _check_names(folder, c, table, set(files))
    with torch.device("meta"):
        model = GPT(c, mesh)
    handles = {path: open_weights(path) for path in sorted(set(files.values()))}
    _check_tied(folder, c, files, handles)
    quantised = {}
    if base_dtype != "none":
        quantised = {f"{path}.weight": linear for path, linear in frozen_linears(model).items()}
    declared = model.weights()
    tensors: dict[str, Tensor] = {}

    def fill() -> None:
        """Give the model the weights that were read since the last time."""
        model.load_state_dict(tensors, strict=False, assign=True)
        for name in tensors:
            p = model.get_parameter(name)
            p.requires_grad_(declared[name].trains and name not in quantised)
        tensors.clear()
        if sharded:
            shard(model)

    part = ""
    for name, p in list(model.named_parameters()):
        if part_of(name) != part:
            fill()
            part = part_of(name)
        if name not in table:  # a fresh score head
            tensors[name] = torch.zeros(p.shape, dtype=dtype, device=device)
            continue
        stored = table[name]
        on_disk = handles[files[stored.name]].get_slice(stored.name)
        if tuple(on_disk.get_shape()) != stored.shape:
            raise ValueError(
                f"{folder}: {stored.name} is {tuple(on_disk.get_shape())}, "
                f"but config.json makes it {stored.shape}"
            )
        if name in quantised and base_dtype != "none":
            whole = _read_slice(on_disk, stored, ALONE)
            _check_finite(folder, stored.name, whole)
            quantised[name].quantize(whole.to(device), base_dtype)
            tensors[name] = torch.empty(p.shape, dtype=dtype, device="meta")
            continue
        tensor = _read_slice(on_disk, stored, mesh)
        held = declared[name].held_in(dtype)
        tensors[name] = tensor.to(device=device, dtype=held, copy=True)
        _check_finite(folder, stored.name, tensors[name])
    fill()
    model.hf_config = raw

    def original(name: str) -> Tensor:
        stored = table[name]
        return _read_slice(handles[files[stored.name]].get_slice(stored.name), stored, mesh)

    if quantised:
        model.original = original
    return model


def _without_next_layers(
    folder: str | Path, c: GPTConfig, raw: dict, files: dict[str, Path], mesh: Mesh
) -> dict[str, Path]:
    """Return weight files without those of layers that predict further tokens (GLM-4.5), said once.

    They guess ahead when sampling and are no part of the model. raw: its config.json, which says
    afterwards that there are none.
    """
    layers = range(c.layers, c.layers + (raw.get(NEXT_LAYERS) or 0))
    ahead = tuple(f"model.layers.{i}." for i in layers)
    kept = {name: file for name, file in files.items() if not name.startswith(ahead)}
    if ahead:
        raw[NEXT_LAYERS] = 0
    if len(kept) < len(files) and mesh.main:
        print(
            f"{folder}: {len(files) - len(kept)} weights of {len(ahead)} layer(s) that predict "
            "further tokens are left out: training would make them stale"
        )
    return kept


def _check_kind(folder: str | Path, have: tuple[str, ...], wanted: tuple[str, ...] | None) -> None:
    """Raise ValueError where a folder holds another kind of model than is asked for."""
    if have and wanted is None:
        raise ValueError(
            f"{folder} is a reward model (of {', '.join(have)}): a language model is needed here"
        )
    if wanted == () and not have:
        raise ValueError(
            f"{folder} is a language model: a reward model is needed here; train_rm.py makes one"
        )
    if have and wanted and wanted != have and (len(have), len(wanted)) != (1, 1):
        raise ValueError(
            f"{folder} scores {', '.join(have)}, not {', '.join(wanted)}: "
            "give the model it was made from"
        )


def _check_names(
    folder: str | Path, c: GPTConfig, table: dict[str, Stored], present: set[str]
) -> None:
    """Raise ValueError for a weight that the folder lacks, or that the model does not have."""
    expected = {stored.name for stored in table.values()}
    if missing := [stored.name for stored in table.values() if stored.name not in present]:
        raise ValueError(f"{folder}: the weight {missing[0]} is missing ({len(missing)} in all)")
    unknown = present - expected - (set(HEADS) if c.tied else set())
    if unknown:
        raise ValueError(
            f"{folder}: plumb does not know the weight {min(unknown)} ({len(unknown)} in all)"
        )


def _check_tied(
    folder: str | Path, c: GPTConfig, files: dict[str, Path], handles: dict[Path, Any]
) -> None:
    """Raise ValueError where config.json ties a head that differs from the embedding."""
    table = weight_table(c)
    heads = [name for name in HEADS if name in files]
    if not c.tied or not heads:
        return
    one, other = table["embed.weight"].name, heads[0]
    tensors = [handles[files[name]].get_tensor(name) for name in (one, other)]
    if tensors[0].shape != tensors[1].shape or not torch.equal(*tensors):
        raise ValueError(
            f"{folder}/config.json ties the head to the embedding, but {other} differs from {one}: "
            "set tie_word_embeddings to false to use it, or remove it from the file"
        )


def _check_finite(folder: str | Path, name: str, tensor: Tensor) -> None:
    """Raise ValueError for a weight with NaN or infinity, in the dtype that it is used in."""
    if not is_finite(tensor):
        raise ValueError(
            f"{folder}: {name} has values that are not finite in {tensor.dtype}: fetch it again, "
            "or choose another --dtype"
        )


def _read_slice(on_disk: Any, stored: Stored, mesh: Mesh) -> Tensor:
    """Read this rank's slice of a weight, and no more of the file than that."""
    cut = stored.weight.slice(mesh)
    if stored.part:
        first, last = cut[1:] if cut and cut[0] == 0 else (0, stored.weight.shape[0])
        rows = stored.part.rows(first, last)
        if not len(rows):
            return on_disk[:0]
        low, high = int(rows[0]), int(rows[-1]) + 1
        tensor = on_disk[low:high]
        return tensor if high - low == len(rows) else tensor[rows - low]
    if cut is None:
        return on_disk[:]
    return on_disk[cut[1] : cut[2]] if cut[0] == 0 else on_disk[:, cut[1] : cut[2]]


# ---- writing -------------------------------------------------------------------------------------


def to_theirs(model: GPT, names: list[str] | None = None, keep: bool = True) -> dict[str, Tensor]:
    """Return whole weights under their names on disk, on the CPU: all of this stage, or `names`.

    Every tensor rank calls it, of a sharded model every rank. Slices are gathered one weight at a
    time; ranks with keep=False return nothing. Adapters are merged into
    the weights that they change.
    """
    tensors: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    here = dict(model.named_parameters())
    table = weight_table(model.c)
    wanted = [n for n in table if n in here and (names is None or table[n].name in names)]
    for part, members in itertools.groupby(wanted, part_of):
        with model.whole(part):
            for name in members:
                tensor = _whole(model, name, table[name])
                if not keep:
                    continue
                tensor, stored = tensor.cpu().contiguous(), table[name]
                if stored.part:
                    fused.setdefault(stored.name, {})[name] = tensor
                else:
                    tensors[stored.name] = tensor
    tensors |= {name: fuse(parts, table) for name, parts in fused.items()}
    return tensors


def _whole(model: GPT, name: str, stored: Stored) -> Tensor:
    """Return a weight of all tensor ranks, its adapter merged into it."""
    tensor, cut = _merged(model, name, model.get_parameter(name)).detach(), stored.weight.cut
    if cut:
        unit = stored.weight.shape[cut.dim] // cut.units
        tensor = gather_slices(tensor, cut.dim, cut.units, model.tp, unit)
    return tensor.clone() if model.shards else tensor  # the memory of gathered weights goes away


def _merged(model: GPT, name: str, p: Tensor) -> Tensor:
    """Return a parameter with what its linear's adapter adds to it."""
    path, _, last = name.rpartition(".")
    owner = model.get_submodule(path)
    if not isinstance(owner, Linear) or last != "weight":
        return p
    if owner.base is None:
        return owner.merged_weight()
    return owner.merged_weight(model.original(name).to(owner.device))


def save_model(
    model: GPT,
    folder: str | Path,
    tokenizer_from: str | Path | None = None,
    template: Template | None = None,
) -> None:
    """Write a Hugging Face folder that transformers and vLLM load; whole, or not at all.

    tokenizer_from: folder whose tokenizer files and generation_config.json are copied. template:
    the chat template of the training, so that whoever serves the folder uses it and stops where it
    does. Every rank calls it and writes its share of the files. OSError, the same on every rank:
    the fix.
    """
    folder = Path(folder)
    partial, mesh = folder.with_name(f".{folder.name}.partial"), model.mesh

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write_rest() -> None:
        _write_index(model, partial)
        _write_settings(model, partial, tokenizer_from, template)
        for file in partial.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())

    try:
        mesh.ask(begin)
        problem = next(filter(None, mesh.everyone(_write_weights(model, partial))), "")
        if problem.startswith(NOT_FINITE):
            mesh.ask(lambda: shutil.rmtree(partial, ignore_errors=True))
            raise ValueError(
                f"{folder} was not written: {problem}; lower --lr, or look for broken rows"
            )
        if problem:
            raise OSError(problem)
        mesh.ask(write_rest)
    except OSError as error:
        if mesh.main:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"could not write {folder} ({error}): free space on the disk; "
            "a folder that was there before is untouched"
        ) from None
    mesh.ask(lambda: replace_folder(partial, folder))


def _write_settings(
    model: GPT, folder: Path, tokenizer_from: str | Path | None, template: Template | None
) -> None:
    """Write config.json, the tokenizer, the chat template and generation_config.json."""
    raw = dict(model.hf_config)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(model.dtype).removeprefix("torch.")
    padding = None
    if model.c.outputs and tokenizer_from:
        padding = _padding(load_tokenizer(tokenizer_from), template)
    if padding:
        raw["pad_token_id"] = padding[0]
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    for name in (*TOKENIZER_FILES, "generation_config.json") if tokenizer_from else ():
        if (Path(tokenizer_from) / name).is_file():
            shutil.copyfile(Path(tokenizer_from) / name, folder / name)
    if padding:
        _update_json(folder / "tokenizer_config.json", pad_token=padding[1])
    if tokenizer_from:
        _name_tokenizer(folder, model.c.family)
    if template and not template.plain:
        (folder / "chat_template.jinja").write_text(template.source)
    if template and template.stop_ids:  # what was trained as the end, whatever the folder said
        _update_json(folder / "generation_config.json", eos_token_id=sorted(template.stop_ids))


def _name_tokenizer(folder: Path, family: str) -> None:
    """Write which class of transformers reads the tokenizer as it was read here.

    Of a tokenizer.model alone, LlamaTokenizer splits runs of spaces in another way, and for qwen2
    transformers takes Qwen2Tokenizer whatever the folder says, unless auto_map is there: without
    code to load, it then takes the class that is named.
    """
    config = read_json(folder / "tokenizer_config.json")
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast")
    model, twin = folder / "tokenizer.model", folder / "tokenizer.json"
    changes: dict[str, Any] = {}
    if model.is_file() and not twin.is_file():
        changes["tokenizer_class"] = "PreTrainedTokenizerFast"
        if config.get("add_prefix_space") is False:
            content = model.read_bytes()
            if not content.endswith(NO_DUMMY_PREFIX):
                model.write_bytes(content + NO_DUMMY_PREFIX)
    if family == "qwen2" and (changes or name not in ("", "Qwen2Tokenizer")):
        changes["tokenizer_class"] = "PreTrainedTokenizerFast"
        changes["auto_map"] = {"AutoTokenizer": [None, None]}
    if changes:
        tokenizer = load_tokenizer(folder)
        for key, text in (("bos_token", tokenizer.bos_token), ("eos_token", tokenizer.eos_token)):
            if text and config.get(key) is None:
                changes[key] = text
        _update_json(folder / "tokenizer_config.json", **changes)


def _update_json(path: Path, **values: Any) -> None:
    """Set some keys of a JSON file, which need not be there yet."""
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**before, **values}, indent=2, ensure_ascii=False) + "\n")


def _write_weights(model: GPT, folder: Path) -> str:
    """Write this rank's share of the weight files. Return an error message, "" if all went well."""
    mesh, problem = model.mesh, ""
    for i, ((stage, owner), names, file) in enumerate(plan_files(model, SHARD_BYTES)):
        # A file is gathered by the tensor ranks of one replica, and written by one of them.
        replicas = range(mesh.dp * mesh.cp)
        if owner >= 0:
            replicas = replicas[owner :: mesh.ep]
        mine = mesh.replica == replicas[i % len(replicas)]
        writer = i // len(replicas) % mesh.tp
        # Of a sharded model all replicas gather together.
        if stage != mesh.pp_rank or mesh.replica not in replicas:
            continue
        if not mine and model.shards is None:
            continue
        keep = mine and writer == mesh.tp_rank
        tensors = to_theirs(model, names, keep)
        if not keep or problem:
            continue
        broken = [name for name in names if not is_finite(tensors[name])]
        if broken:
            problem = f"{NOT_FINITE}: {broken[0]}"
            continue
        try:
            ordered = {name: tensors[name] for name in names}
            save_file(ordered, folder / file, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            problem = f"rank {mesh.rank}: {error}" if mesh.world > 1 else str(error)
    return problem


def _write_index(model: GPT, folder: Path) -> None:
    """Write which weight is in which file, where there are several."""
    plan = plan_files(model, SHARD_BYTES)
    if len(plan) == 1:
        return
    stored = {stored.name: stored for stored in weight_table(model.c).values()}
    total = sum(
        math.prod(s.shape) * s.weight.held_in(model.dtype).itemsize for s in stored.values()
    )
    weight_map = {name: file for _, names, file in plan for name in names}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text)


def _padding(tokenizer: Tokenizer, template: Template | None) -> tuple[int, str] | None:
    """Return (id, text) of a padding token that ends no answer, None if the vocabulary has none.

    transformers reads a score at the last token that is not padding: padding with the end token, as
    is common, would move it to the token before the end.
    """
    ends = tokenizer.stops | (template.stop_ids if template else set())
    ids = {text: i for text, i in tokenizer.special.items() if i not in ends}
    named_pad = [text for text, i in ids.items() if i == tokenizer.pad]
    like_pad = [text for text in ids if "pad" in text.lower()]
    rest = [text for text in ids if "unk" in text.lower() or ids[text] == tokenizer.bos]
    return next(((ids[text], text) for text in named_pad + like_pad + rest), None)
