"""Weight files of a Hugging Face folder: single or sharded safetensors, which cannot run code."""

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from disk import file_sha256
from weights.config_json import read_json

HASH_THREADS = 8
SHARD_BYTES = 5 << 30  # of one file, as transformers splits them
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
# Buffers that old folders carry along: masks, and angles that are computed here.
NOT_WEIGHTS = ("rotary_emb.inv_freq", "attention.bias", "attention.masked_bias")


def weight_files(folder: str | Path) -> dict[str, Path]:
    """Return the name of every weight on disk -> the safetensors file that holds it.

    FileNotFoundError: no weights. ValueError: an index that does not fit its files.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        files = _indexed(folder, index)
        if single.is_file() and single not in files.values():
            raise ValueError(
                f"{folder} holds {single.name} and the shards of {index.name}, and they may be two "
                "models: remove the older ones"
            )
    elif single.is_file():
        files = dict.fromkeys(open_weights(single).keys(), single)
    else:
        raise FileNotFoundError(_no_weights(folder))
    return {name: file for name, file in files.items() if not name.endswith(NOT_WEIGHTS)}


def _no_weights(folder: Path) -> str:
    """Return what is wrong with a folder without safetensors, and the fix."""
    if not folder.is_dir():
        return f"{folder}: no such folder: give one in Hugging Face's format"
    other = next(folder.glob("*.bin"), None)
    if other:
        fix = "load it in transformers and save_pretrained() again"
        return f"{folder} has no model.safetensors, only {other.name}: {fix}"
    return f"{folder} has no model.safetensors: give a folder in Hugging Face's format"


def _indexed(folder: Path, index: Path) -> dict[str, Path]:
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not all(
        isinstance(file, str) and file == Path(file).name for file in listed.values()
    ):
        raise ValueError(
            f"{index} must hold a weight_map from names to files in the same folder: fetch it again"
        )
    files = {name: folder / file for name, file in listed.items()}
    for path in set(files.values()):
        present = set(open_weights(path).keys())
        missing = {name for name in files if files[name] == path} - present
        if missing:
            raise ValueError(
                f"{path} lacks {min(missing)}, which {index.name} says it holds: fetch both again"
            )
    return files


def open_weights(path: Path) -> Any:
    """Open a safetensors file. FileNotFoundError, or ValueError naming what is wrong with it."""
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


def write_weights(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write named weights in files of at most SHARD_BYTES, with an index where there are several.

    Holds the weights of one file at a time. OSError: no space.
    """
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        try:
            save_file(held, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(
                f"could not write to {folder} ({error}): free space on the disk"
            ) from None
        shards.append(list(held))
        held.clear()

    for name, tensor in weights:
        if held and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return
    weight_map = {}
    for i, names in enumerate(shards):
        shard = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.safetensors").rename(folder / shard)
        weight_map |= dict.fromkeys(names, shard)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / "model.safetensors.index.json").write_text(text)


def fingerprint(folder: str | Path) -> str:
    """Return a SHA-256 over config.json and every weight file: the same one, the same model.

    Of an adapter's folder: over its own two files.
    """
    folder, digest = Path(folder), hashlib.sha256()
    if (folder / "adapter_config.json").is_file():
        paths = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    else:
        paths = [folder / "config.json", *sorted(set(weight_files(folder).values()))]
    with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashing lets other threads run
        for content in pool.map(file_sha256, paths):
            digest.update(bytes.fromhex(content))
    return digest.hexdigest()
