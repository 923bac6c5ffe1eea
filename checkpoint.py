"""Training state on disk: a folder step_N that is whole or not there at all.

    OUT/step_120/state.safetensors   fp32 master weights and AdamW's means, a tensor a parameter, under plain names
    OUT/step_120/state.json          step, best evaluation so far, random state, what else the script carries
    OUT/step_120/manifest.json       size and SHA-256 of the others, written last: without it the folder does not count

Writing goes to a hidden folder, is flushed to the disk and renamed. Reading checks the manifest; a damaged newest
checkpoint is named in a warning and the one before is taken. Only safetensors and JSON: a checkpoint cannot run code.
"""

import hashlib
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from parallel import AdamW


@dataclass
class State:
    """Where a run stands, besides weights and optimizer."""

    step: int = 0  # optimizer steps done; the data order follows from it
    tokens: int = 0  # real tokens trained on so far
    best: float | None = None  # lowest evaluation loss so far
    best_step: int = 0
    skipped: int = 0  # steps left out because their gradient was not finite
    extra: dict[str, float] = field(default_factory=dict)  # what a loss carries from step to step


def save(out: str | Path, state: State, optimizer: AdamW, keep: int) -> Path:
    """Writes OUT/step_N and removes all but the newest `keep`. OSError: what to do; older checkpoints are untouched."""
    out = Path(out)
    final, partial = out / f"step_{state.step}", out / f".step_{state.step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    tensors, updates = optimizer.state()
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    tensors["rng"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng_cuda"] = torch.cuda.get_rng_state()
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / "state.safetensors")
        (partial / "state.json").write_text(json.dumps({**asdict(state), "updates": updates}, indent=2))
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in partial.iterdir()}
        (partial / "manifest.json").write_text(json.dumps(files, indent=2))
        for path in (*partial.iterdir(), partial):
            _flush(path)
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        _flush(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        kept = newest(out)
        raise OSError(
            f"could not write {final} ({error}): free space on the disk, then --resume auto goes on from "
            + (kept.name if kept else "the start")
        ) from None
    for old in all_steps(out)[keep:] if keep else []:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(folder: str | Path, optimizer: AdamW) -> State:
    """Puts a checkpoint back into the optimizer (and so the model) and the random generators."""
    folder = Path(folder)
    if problem := damage(folder):
        raise ValueError(f"{folder} {problem}")
    tensors = load_file(folder / "state.safetensors")
    values = json.loads((folder / "state.json").read_text())
    optimizer.load_state(tensors, values.pop("updates"))
    torch.set_rng_state(tensors["rng"])
    if torch.cuda.is_available() and "rng_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng_cuda"])
    return State(**values)


def find(out: str | Path, resume: str, log=print) -> Path | None:
    """What --resume means: "" nothing, "auto" the newest good checkpoint of OUT (None without one), else a folder."""
    if resume == "auto":
        return newest(out, log)
    if resume and not Path(resume).is_dir():
        raise FileNotFoundError(f"--resume {resume}: no such folder; auto takes the newest in --out")
    return Path(resume) if resume else None


def newest(out: str | Path, log=print) -> Path | None:
    """The newest checkpoint that is whole; those that are not are named in a warning."""
    for folder in all_steps(out):
        if not (problem := damage(folder)):
            return folder
        log(f"warning: {folder} {problem}; trying the checkpoint before it")
    return None


def all_steps(out: str | Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    folders = [path for path in Path(out).glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(folders, key=lambda path: -int(path.name[5:]))


def damage(folder: Path) -> str:
    """What is wrong with a checkpoint, "" if it is whole."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return "is no checkpoint: manifest.json is missing or unreadable"
    for name, wanted in manifest.items():
        path = folder / name
        if not path.is_file():
            return f"is damaged: {name} is missing"
        if path.stat().st_size != wanted["bytes"]:
            return f"is damaged: {name} has {path.stat().st_size} bytes, not {wanted['bytes']}"
        if _digest(path) != wanted["sha256"]:
            return f"is damaged: {name} does not match its SHA-256"
    return ""


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
