"""Hugging Face folder <-> model: one table row a weight, used in both directions.

    python hf.py check DIR        reads the folder as a training script would, and says what it holds
    python hf.py new --out DIR --family llama --width 96 --layers 2 --heads 4 --tokenizer DIR
                                  a new folder of random weights, for tests, benchmarks and training from scratch

An architecture, an option or a weight that plumb does not know is refused by name: what is not computed exactly must
not be computed silently. Weights are read from safetensors only, which cannot run code.
"""

import hashlib
import json
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.templates import Template
from data.tokenizer import TOKENIZER_FILES, Tokenizer, load_tokenizer
from model import GPT, GPTConfig, shapes, shard
from parallel import Mesh, split
from weights.config_json import _json, _take, _with_scores, read_config, score_names
from weights.table import NOT_WEIGHTS, weight_table

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
SHARD_BYTES = 5 << 30  # of one weight file, as transformers splits them

# ---- the table: every weight, ours | theirs --------------------------------------------------------------------------


# ---- config.json -----------------------------------------------------------------------------------------------------


# ---- weights ---------------------------------------------------------------------------------------------------------


def weight_files(folder: str | Path) -> dict[str, Path]:
    """their name of every weight -> the safetensors file that holds it; single file or sharded index."""
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        listed = _json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(
            isinstance(f, str) and f == Path(f).name for f in listed.values()
        ):
            raise ValueError(
                f"{index} must hold a weight_map from names to files in the same folder: fetch it again"
            )
        files = {name: folder / file for name, file in listed.items()}
        for path in set(files.values()):
            with _open(path) as file:
                lacks = {name for name in files if files[name] == path} - set(file.keys())
            if lacks:
                raise ValueError(
                    f"{path} lacks {min(lacks)}, which {index.name} says it holds: fetch both again"
                )
    elif single.is_file():
        with _open(single) as file:
            files = dict.fromkeys(file.keys(), single)
    else:
        other = next(folder.glob("*.bin"), None)
        raise FileNotFoundError(
            f"{folder} has no model.safetensors"
            + (
                f", only {other.name}: load it in transformers and save_pretrained() again"
                if other
                else ""
            )
        )
    return {name: file for name, file in files.items() if not name.endswith(NOT_WEIGHTS)}


def _open(path: Path):
    try:
        file = safe_open(path, framework="pt")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is missing: the folder is incomplete, fetch it again"
        ) from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}): fetch it again") from None
    for name in file.keys():  # noqa: SIM118 - no dict
        kind = file.get_slice(name).get_dtype()
        if kind not in ("F64", "F32", "F16", "BF16") and not name.endswith(NOT_WEIGHTS):
            raise ValueError(
                f"{path}: {name} is {kind}: plumb reads F64, F32, F16 and BF16, nothing quantized"
            )
    return file


def fingerprint(folder: str | Path) -> str:
    """SHA-256 over config.json and every weight file: two folders with the same one hold the same model."""
    digest = hashlib.sha256()
    for path in (Path(folder) / "config.json", *sorted(set(weight_files(folder).values()))):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_model(
    folder: str | Path,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    scores: tuple[str, ...] | None = None,
    mesh: Mesh = Mesh(),  # noqa: B008 - a mesh of one never changes
) -> GPT:
    """Reads a Hugging Face folder into a model of the given type on the given device, one weight at a time: of the
    stage and the slices that are this rank's, so that no rank ever holds the whole model.

    scores: None loads a language model; () a reward model with whatever outputs it has; names a reward model with just
    these, whose score head starts at zero where the folder is a language model's (so every first score is 0).
    The model keeps the raw config.json as `hf_config`, for save_model. ValueError names a weight that is missing, too
    many or of the wrong shape, or says that the folder holds another kind of model.
    """
    c, raw = read_config(folder)
    have = score_names(raw)
    if have and scores is None:
        raise ValueError(
            f"{folder} is a reward model (of {', '.join(have)}): a language model is needed here"
        )
    if scores == () and not have:
        raise ValueError(
            f"{folder} is a language model: a reward model is needed here; train_rm.py makes one of it"
        )
    if have and scores and scores != have and (len(have), len(scores)) != (1, 1):
        raise ValueError(
            f"{folder} scores {', '.join(have)}, not {', '.join(scores)}: give the model it was made from"
        )
    files = weight_files(folder)
    fresh = bool(scores) and not have
    if fresh:
        raw = _with_scores(raw, scores)
        c = _take(raw, c.family)
        files = {
            name: file
            for name, file in files.items()
            if name not in ("lm_head.weight", "embed_out.weight")
        }
    table = weight_table(c)
    if fresh:
        del table["score_head.weight"]
    if missing := [row.theirs for row in table.values() if row.theirs not in files]:
        raise ValueError(f"{folder}: the weight {missing[0]} is missing ({len(missing)} in all)")
    spare = set(files) - {row.theirs for row in table.values()}
    if c.tied:
        spare -= {"lm_head.weight", "embed_out.weight"}
    if spare:
        raise ValueError(
            f"{folder}: plumb does not know the weight {min(spare)} ({len(spare)} in all)"
        )
    with torch.device("meta"):
        model = GPT(c, mesh)
    handles = {path: _open(path) for path in sorted(set(files.values()))}
    weights = {}
    for name, p in model.named_parameters():
        if fresh and name == "score_head.weight":
            weights[name] = torch.zeros(p.shape, dtype=dtype, device=device)
            continue
        row = table[name]
        stored, cut = handles[files[row.theirs]].get_slice(row.theirs), shard(c, name, mesh)
        if tuple(stored.get_shape()) != row.shape:
            raise ValueError(
                f"{folder}: {row.theirs} is {tuple(stored.get_shape())}, but config.json makes it {row.shape}"
            )
        # Of a weight that is shared out only this rank's slice is ever read.
        if cut is None:
            tensor = stored[:]
        elif cut[0] == 0:
            tensor = stored[3 * cut[1] : 3 * cut[2]] if row.part else stored[cut[1] : cut[2]]
        else:
            tensor = stored[:, cut[1] : cut[2]]
        tensor = _unfuse(tensor, row.part, c) if row.part else tensor
        weights[name] = tensor.to(device=device, dtype=dtype, copy=True)
    model.load_state_dict(weights, assign=True)
    model.requires_grad_(True)
    model.hf_config = raw
    return model


def _unfuse(fused: Tensor, part: str, c: GPTConfig) -> Tensor:
    """q, k or v out of GPT-NeoX's query_key_value, or some heads of it: rows lie as (head, q|k|v, head size)."""
    rows = fused.view(-1, 3, c.head_size, *fused.shape[1:])
    return rows[:, "qkv".index(part)].flatten(0, 1)


def _fuse(parts: list[Tensor], c: GPTConfig) -> Tensor:
    rows = [p.view(c.heads, c.head_size, *p.shape[1:]) for p in parts]
    return torch.stack(rows, 1).reshape(3 * c.heads * c.head_size, *parts[0].shape[1:])


def to_theirs(model: GPT, names: list[str] | None = None, keep: bool = True) -> dict[str, Tensor]:
    """The weights under Hugging Face's names (all of this rank's stage, or some), whole, on the CPU.

    Every tensor rank calls it, slices are gathered one weight at a time; those with keep=False get nothing for it.
    """
    model.wait()
    weights, fused = {}, {}
    here, c = dict(model.named_parameters()), model.c
    for name, row in weight_table(c).items():
        if name not in here or names is not None and row.theirs not in names:
            continue
        tensor, cut = here[name].detach(), shard(c, name, model.mesh)
        if cut:
            total = shapes(c)[name][cut[0]]
            units = c.kv_heads if name.split(".")[-2] in ("q", "k", "v", "out") else total
            tensor = model.whole(tensor, cut[0], units, total // units)
        if not keep:
            continue
        if row.part:
            fused.setdefault(row.theirs, {})[row.part] = tensor.cpu().contiguous()
        else:
            weights[row.theirs] = tensor.cpu().contiguous()
    weights.update({name: _fuse([parts[p] for p in "qkv"], c) for name, parts in fused.items()})
    return weights


def save_model(
    model: GPT,
    folder: str | Path,
    tokenizer_from: str | Path | None = None,
    template: Template | None = None,
) -> None:
    """Writes a Hugging Face folder that transformers and vLLM load as it is; atomically: whole, or not at all.

    tokenizer_from: the folder whose tokenizer files and generation_config.json go along. template: the chat template
    that the model was trained with, so that whoever serves the folder uses it too, and stops where it stops.
    Every rank calls it, and writes its share of the files. OSError, the same on every rank: what to do.
    """
    folder = Path(folder)
    partial, mesh = folder.with_name(f".{folder.name}.partial"), model.mesh

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def write_rest() -> None:
        _write_index(model, partial)
        raw = dict(model.hf_config)
        raw["dtype" if "dtype" in raw else "torch_dtype"] = str(model.dtype).removeprefix("torch.")
        padding = (
            _padding(load_tokenizer(tokenizer_from), template)
            if model.c.outputs and tokenizer_from
            else None
        )
        if padding:
            raw["pad_token_id"] = padding[0]
        (partial / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        for name in (*TOKENIZER_FILES, "generation_config.json") if tokenizer_from else ():
            if (Path(tokenizer_from) / name).is_file():
                shutil.copyfile(Path(tokenizer_from) / name, partial / name)
        if padding:
            path = partial / "tokenizer_config.json"
            settings = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(
                json.dumps({**settings, "pad_token": padding[1]}, indent=2, ensure_ascii=False)
                + "\n"
            )
        if template and not template.plain:
            (partial / "chat_template.jinja").write_text(template.source)
            path = partial / "generation_config.json"
            generation = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(
                json.dumps({**generation, "eos_token_id": sorted(template.stop_ids)}, indent=2)
                + "\n"
            )
        for file in partial.iterdir():
            with open(file, "rb") as f:
                os.fsync(f.fileno())

    def commit() -> None:
        old = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    try:
        mesh.ask(begin)
        problem = next(filter(None, mesh.everyone(_write_weights(model, partial))), None)
        if problem:
            raise OSError(problem)
        mesh.ask(write_rest)
    except OSError as error:
        if mesh.main:
            shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            f"could not write {folder} ({error}): free space on the disk; the old one is untouched"
        ) from None
    mesh.ask(commit)


def _weight_plan(model: GPT) -> list[tuple[int, list[str], str]]:
    """(stage, names, file) of every weight file, the same on every rank: whole weights, no more than SHARD_BYTES."""
    c, stages = model.c, model.mesh.pp
    files: list[tuple[int, list[str]]] = []
    size = 0
    for name, row in weight_table(c).items():
        if files and row.theirs in files[-1][1]:
            continue
        words = name.split(".")
        stage = 0 if words[0] == "embed" else stages - 1
        if words[0] == "blocks":
            stage = next(i for i in range(stages) if int(words[1]) < split(c.layers, stages, i)[1])
        nbytes = math.prod(row.shape) * model.dtype.itemsize
        if not files or files[-1][0] != stage or size + nbytes > SHARD_BYTES:
            files.append((stage, []))
            size = 0
        files[-1][1].append(row.theirs)
        size += nbytes
    if len(files) == 1:
        return [(0, files[0][1], "model.safetensors")]
    return [
        (s, names, f"model-{i + 1:05d}-of-{len(files):05d}.safetensors")
        for i, (s, names) in enumerate(files)
    ]


def _write_weights(model: GPT, folder: Path) -> str:
    """Writes this rank's share of the files. Returns what went wrong, "" if nothing."""
    mesh, problem = model.mesh, ""
    for i, (stage, names, file) in enumerate(_weight_plan(model)):
        # A file is gathered by the tensor ranks of one replica, and written by one of them.
        replica, writer = i % (mesh.dp * mesh.cp), i // (mesh.dp * mesh.cp) % mesh.tp
        if (stage, replica) != (mesh.pp_rank, mesh.dp_rank * mesh.cp + mesh.cp_rank):
            continue
        weights = to_theirs(model, names, keep=writer == mesh.tp_rank)
        try:
            if writer == mesh.tp_rank and not problem:
                save_file(
                    {name: weights[name] for name in names},
                    folder / file,
                    metadata={"format": "pt"},
                )
        except (OSError, SafetensorError) as error:
            problem = f"rank {mesh.rank}: {error}" if mesh.world > 1 else str(error)
    return problem


def _write_index(model: GPT, folder: Path) -> None:
    """The table of which weight is in which file, where there are several."""
    plan = _weight_plan(model)
    if len(plan) == 1:
        return
    sizes = {
        row.theirs: math.prod(row.shape) * model.dtype.itemsize
        for row in weight_table(model.c).values()
    }
    weight_map = {name: file for _, names, file in plan for name in names}
    text = json.dumps(
        {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}, indent=2
    )
    (folder / "model.safetensors.index.json").write_text(text)


def _padding(tokenizer: Tokenizer, template: Template | None) -> tuple[int, str] | None:
    """(id, text) of a padding token that ends no answer, None if the vocabulary has none.

    transformers reads a score at the last token that is not padding: padding with the end token, as is common, would
    move it to the token before the end.
    """
    ends = tokenizer.stops | (template.stop_ids if template else set())
    ids = {text: i for text, i in tokenizer.special.items() if i not in ends}
    own = [text for text, i in ids.items() if i == tokenizer.pad]
    named = [text for text in ids if "pad" in text.lower()]
    rest = [text for text in ids if "unk" in text.lower() or ids[text] == tokenizer.bos]
    return next(((ids[text], text) for text in own + named + rest), None)


# ---- the command -----------------------------------------------------------------------------------------------------
