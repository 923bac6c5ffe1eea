"""Training state on disk: a folder step_N that is whole or not there at all.

    OUT/step_120/state-00001-of-00004.safetensors   a rank's pieces of fp32 master weights and AdamW's means: flat, each
                                                    with its place in the whole weight, so that any layout can read it
    OUT/step_120/state.json                         step, best evaluation so far, what else the script carries
    OUT/step_120/manifest.json                      size and SHA-256 of the others, written last: without it the folder
                                                    does not count

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
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import shapes, shard
from optimizer import AdamW
from parallel import Mesh

ALONE = Mesh()


@dataclass
class State:
    """Where a run stands, besides weights and optimizer."""

    step: int = 0  # optimizer steps done; the data order follows from it
    tokens: int = 0  # real tokens trained on so far
    best: float | None = None  # lowest evaluation loss so far
    best_step: int = 0
    skipped: int = 0  # steps left out because their gradient was not finite
    extra: dict[str, float] = field(default_factory=dict)  # what a loss carries from step to step


def _numbered(optimizers: AdamW | tuple[AdamW, ...]) -> list[tuple[str, AdamW]]:
    """(prefix of its tensors, optimizer): a run may train several models."""
    if isinstance(optimizers, AdamW):
        return [("", optimizers)]
    return [(f"{i}/", optimizer) for i, optimizer in enumerate(optimizers)]


def save(out: str | Path, state: State, optimizer: AdamW | tuple[AdamW, ...], keep: int) -> Path:
    """Writes OUT/step_N and removes all but the newest `keep`. Every rank calls it and writes its own file.

    OSError, the same on every rank: what to do; older checkpoints are untouched.
    """
    out, named = Path(out), _numbered(optimizer)
    mesh = named[0][1].model.mesh
    final, partial = out / f"step_{state.step}", out / f".step_{state.step}.partial"

    def begin() -> None:
        for path in out.glob(".step_*.partial"):  # of this or of a killed run
            shutil.rmtree(path, ignore_errors=True)
        partial.mkdir(parents=True)

    def commit(files: dict[str, dict], updates: list[int]) -> None:
        (partial / "state.json").write_text(
            json.dumps({**asdict(state), "updates": updates}, indent=2)
        )
        files["state.json"] = _seal(partial / "state.json")
        (partial / "manifest.json").write_text(json.dumps(files, indent=2))
        _flush(partial / "manifest.json")
        _flush(partial)
        old = out / f".step_{state.step}.old.partial"
        if final.exists():
            final.rename(old)
        partial.rename(final)
        _flush(out)
        shutil.rmtree(old, ignore_errors=True)
        for path in all_steps(out)[keep:] if keep else []:
            shutil.rmtree(path, ignore_errors=True)

    try:
        mesh.ask(begin)
        files, updates, problem = {}, [], ""
        name = f"state-{mesh.rank + 1:05d}-of-{mesh.world:05d}.safetensors"
        try:
            updates = _write_state(partial / name, named)
            files = {name: _seal(partial / name)}
        except (OSError, SafetensorError) as error:
            problem = f"rank {mesh.rank}: {error}" if mesh.world > 1 else str(error)
        answers = mesh.everyone((files, problem))
        for _, problem in answers:
            if problem:
                raise OSError(problem)
        mesh.ask(
            lambda: commit(
                {name: seal for files, _ in answers for name, seal in files.items()}, updates
            )
        )
    except OSError as error:
        if mesh.main:
            shutil.rmtree(partial, ignore_errors=True)
        kept = newest(out, mesh=mesh)
        raise OSError(
            f"could not write {final} ({error}): free space on the disk, then --resume auto goes on from "
            + (kept.name if kept else "the start")
        ) from None
    return final


def _write_state(path: Path, named: list[tuple[str, AdamW]]) -> list[int]:
    """This rank's pieces and where they belong. Returns the number of updates of each optimizer."""
    tensors, places, updates = {"rng": torch.get_rng_state()}, {}, []
    for prefix, optimizer in named:
        c, mesh = optimizer.model.c, optimizer.model.mesh
        optimizer.model.wait()
        pieces, done = optimizer.state()
        updates.append(done)
        for key, (first, piece) in pieces.items():
            weight = key.partition("/")[2]
            tensors[prefix + key] = piece.cpu().contiguous()
            places[prefix + key] = [first, shapes(c)[weight], shard(c, weight, mesh)]
    save_file(tensors, path, metadata={"places": json.dumps(places)})
    return updates


def _seal(path: Path) -> dict[str, Any]:
    """Flushes a file to the disk; its size and SHA-256."""
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


class _Piece(NamedTuple):
    """Of one weight: where its elements are in the slice that its rank held, and which slice that was."""

    file: Any
    first: int
    last: int
    shape: tuple[int, ...]
    cut: tuple[int, int, int] | None


def load(folder: str | Path, optimizer: AdamW | tuple[AdamW, ...]) -> State:
    """Puts a checkpoint back into the optimizer (and so the model), written under this layout or another.

    A rank reads the pieces that it needs, one weight at a time. ValueError names what is damaged or does not fit.
    """
    folder, named = Path(folder), _numbered(optimizer)
    mesh = named[0][1].model.mesh
    if problem := damage(folder, mesh):
        raise ValueError(f"{folder} {problem}")
    values = json.loads((folder / "state.json").read_text())
    pieces: dict[str, list[_Piece]] = {}
    for path in sorted(folder.glob("state-*.safetensors")):
        file = safe_open(path, framework="pt")
        for key, (first, shape, cut) in json.loads(file.metadata()["places"]).items():
            size = file.get_slice(key).get_shape()[0]
            pieces.setdefault(key, []).append(
                _Piece(file, first, first + size, tuple(shape), cut and tuple(cut))
            )
    torch.set_rng_state(file.get_tensor("rng"))
    updates = values.pop("updates")
    if len(updates) != len(named):
        raise ValueError(
            f"{folder} holds {len(updates)} model(s), this script trains {len(named)}: another script's?"
        )
    for (prefix, each), done in zip(named, updates):
        model = each.model

        def read(
            kind: str, name: str, first: int, last: int, prefix: str = prefix, model: Any = model
        ) -> Tensor:
            key = f"{prefix}{kind}/{name}"
            found = [piece for piece in pieces.get(key, []) if piece.shape == shapes(model.c)[name]]
            if not found:
                raise ValueError(
                    f"the checkpoint has no {kind} {name} {shapes(model.c)[name]}: another --model?"
                )
            return _assemble(key, found, shard(model.c, name, model.mesh), first, last)

        each.load_state(read, done)
    return State(**values)


def _assemble(
    key: str, pieces: list[_Piece], cut: tuple[int, int, int] | None, first: int, last: int
) -> Tensor:
    """Elements first..last of a slice of a weight, from pieces of the same or of other slices. ValueError: a gap."""
    cuts = {piece.cut for piece in pieces}
    if cut in cuts:
        return _from_slice(key, [piece for piece in pieces if piece.cut == cut], first, last)
    shape = list(pieces[0].shape)
    dim, low, high = cut
    parts = []
    for _, start, end in sorted(cuts):
        if max(low, start) < min(high, end):
            shape[dim] = end - start
            size = torch.Size(shape).numel()
            theirs = _from_slice(
                key, [piece for piece in pieces if piece.cut[1] == start], 0, size
            ).view(shape)
            parts.append(
                theirs.narrow(dim, max(low, start) - start, min(high, end) - max(low, start))
            )
    return torch.cat(parts, dim).flatten()[first:last]


def _from_slice(key: str, pieces: list[_Piece], first: int, last: int) -> Tensor:
    """Elements first..last of one rank's slice of a weight."""
    parts, at = [], first
    for piece in sorted(pieces, key=lambda piece: piece.first):
        if piece.first <= at < min(piece.last, last):
            parts.append(
                piece.file.get_slice(key)[at - piece.first : min(piece.last, last) - piece.first]
            )
            at = min(piece.last, last)
    if at < last:
        raise ValueError(
            f"the checkpoint lacks elements {at} to {last} of {key}: a file of it is missing"
        )
    return torch.cat(parts)


def find(out: str | Path, resume: str, mesh: Mesh = ALONE) -> Path | None:
    """What --resume means: "" nothing, "auto" the newest good checkpoint of OUT (None without one), else a folder."""
    if resume == "auto":
        return newest(out, mesh=mesh)
    if resume and not Path(resume).is_dir():
        raise FileNotFoundError(
            f"--resume {resume}: no such folder; auto takes the newest in --out"
        )
    return Path(resume) if resume else None


def newest(out: str | Path, log=print, mesh: Mesh = ALONE) -> Path | None:
    """The newest checkpoint that is whole; those that are not are named in a warning. All ranks agree on it."""
    for folder in mesh.ask(lambda: all_steps(out)):
        if not (problem := damage(folder, mesh)):
            return folder
        log(f"warning: {folder} {problem}; trying the checkpoint before it")
    return None


def all_steps(out: str | Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    folders = [path for path in Path(out).glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(folders, key=lambda path: -int(path.name[5:]))


def damage(folder: Path, mesh: Mesh = ALONE) -> str:
    """What is wrong with a checkpoint, "" if it is whole. Every rank calls it and checks a share of the files."""
    return next(filter(None, mesh.everyone(_damage(folder, mesh.rank, mesh.world))), "")


def _damage(folder: Path, share: int, shares: int) -> str:
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        seals = [(name, wanted["bytes"], wanted["sha256"]) for name, wanted in manifest.items()]
    except (OSError, ValueError, RecursionError, AttributeError, LookupError, TypeError):
        return "is no checkpoint: manifest.json is missing or unreadable"
    if "state.json" not in manifest:
        return "is no checkpoint: manifest.json lists no state.json"
    for name, size, digest in seals[share::shares]:
        path = folder / name
        if "\0" in name or not path.is_file():
            return f"is damaged: {name!r} is missing"
        if path.stat().st_size != size:
            return f"is damaged: {name} has {path.stat().st_size} bytes, not {size}"
        if _digest(path) != digest:
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
