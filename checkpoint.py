"""Training state on disk: a folder step_N that is whole or not there at all.

    OUT/step_120/state-00001-of-00004.safetensors   a rank's pieces of master weights and moments
    OUT/step_120/state.json                         step, best evaluation, what the script carries
    OUT/step_120/manifest.json                      size and SHA-256 of the others, written last

Each piece is flat and knows its place in the whole weight, so any layout can read it. Files are
written to a hidden folder, flushed to the disk and renamed; a folder without a manifest does not
count. Reading checks the manifest: a damaged newest checkpoint is named in a warning, and the one
before it is used. Only safetensors and JSON: a checkpoint cannot run code.
"""

import json
import math
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

import lock
from disk import replace_folder, sha256_of
from layers import Weight, is_finite
from model import GPT
from optimizer import AdamW
from parallel import Mesh

ALONE = Mesh()
FORMAT = 3  # of a checkpoint; raise it when weights are named or laid out in another way


@dataclass
class State:
    """Progress of a run, besides weights and optimizer."""

    step: int = 0  # optimizer steps done; the data order follows from it
    tokens: int = 0  # real tokens trained on so far
    best: float | None = None  # lowest evaluation loss so far
    best_step: int = 0
    skipped: int = 0  # steps without an update because their gradient was not finite
    extra: dict[str, float] = field(default_factory=dict)  # sums that a loss carries along


def _numbered(optimizers: AdamW | tuple[AdamW, ...]) -> list[tuple[str, AdamW]]:
    """Return (prefix of its tensors, optimizer) of each: a run may train several models."""
    if isinstance(optimizers, AdamW):
        return [("", optimizers)]
    return [(f"{i}/", optimizer) for i, optimizer in enumerate(optimizers)]


class Snapshot(NamedTuple):
    """The state of a rank, as its file has it."""

    tensors: dict[str, Tensor]  # key -> flat piece
    places: dict[str, list]  # key -> its first element, shape of the whole weight, slice of it
    updates: list[int]  # of each optimizer


class Written(NamedTuple):
    """Seals of what a rank has written, or why it could not."""

    seals: dict[str, dict]  # size and SHA-256 by file name
    updates: list[int]
    problem: str = ""
    broken: str = ""  # name of a tensor that is not finite


def save(
    out: str | Path,
    state: State,
    optimizer: AdamW | tuple[AdamW, ...],
    keep: int,
    run: dict[str, Any] | None = None,
) -> Path:
    """Write OUT/step_N and remove all but the newest `keep`.

    run: what `description` returns later. Every rank calls it and writes its own file.
    OSError, the same on every rank: the fix; older checkpoints are untouched. background.py does
    the same while training goes on.
    """
    out, mesh = Path(out), first_model(optimizer).mesh
    values = state_values(state, run)
    snapshot = collect(optimizer)
    broken = next(filter(None, mesh.everyone(not_finite(snapshot))), "")
    if broken:
        raise ValueError(not_finite_words(broken, state.step, out, mesh))
    partial = partial_folder(out, state.step)
    try:
        mesh.ask(lambda: begin(partial))
        answers = mesh.everyone(write_rank(partial, snapshot, mesh))
        return mesh.ask(lambda: commit(partial, values, answers, keep))
    except OSError as error:
        raise OSError(unwritten_words(error, state.step, out, mesh)) from None


def first_model(optimizer: AdamW | tuple[AdamW, ...]) -> GPT:
    """Return the model of an optimizer, of several the first one's."""
    return _numbered(optimizer)[0][1].model


def state_values(state: State, run: dict[str, Any] | None) -> dict[str, Any]:
    """Return what state.json says, besides the numbers of updates: a copy."""
    return {**asdict(state), "updates": [], "format": FORMAT, "run": dict(run or {})}


def partial_folder(out: Path, step: int) -> Path:
    """Return the hidden folder in which a checkpoint is written."""
    return out / f".step_{step}.partial"


def begin(partial: Path) -> None:
    """Make the hidden folder of a checkpoint, and remove what other ones left."""
    lock.check()
    for path in partial.parent.glob(".step_*.partial"):  # of this or of a killed run
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir(parents=True)


def collect(
    optimizer: AdamW | tuple[AdamW, ...], host: dict[str, Tensor] | None = None
) -> Snapshot:
    """Return the state of this rank. Its tensors are those of the optimizer, or copies.

    host: buffers for copies in host memory, by name, which a later call takes again; {} at first.
    A GPU may still be copying when this returns.
    """
    tensors, places, updates = {"rng": torch.get_rng_state()}, {}, []
    for prefix, each in _numbered(optimizer):
        model = each.model
        declared = model.weights()
        model.wait()
        pieces, done = each.state(prefix, host)
        updates.append(done)
        for key, (first, piece) in pieces.items():
            weight = declared[key.partition("/")[2]]
            tensors[prefix + key] = piece
            places[prefix + key] = [first, weight.shape, weight.slice(model.mesh)]
    return Snapshot(tensors, places, updates)


def not_finite(snapshot: Snapshot) -> str:
    """Return the name of a tensor with an element that is not finite, "" if there is none."""
    floats = {key: x for key, x in snapshot.tensors.items() if x.is_floating_point()}
    return next((key for key, x in floats.items() if not is_finite(x)), "")


def not_finite_words(broken: str, step: int, out: Path, mesh: Mesh) -> str:
    """Return the error for a step whose state is not finite. Collective."""
    return (
        f"{broken} is not finite after step {step}, so that step is not saved: lower "
        f"--lr, or look for broken rows; {last_good(out, mesh)}"
    )


def unwritten_words(error: object, step: int, out: Path, mesh: Mesh) -> str:
    """Remove the hidden folder and return the error for a step that was not saved. Collective."""
    if mesh.main:
        shutil.rmtree(partial_folder(out, step), ignore_errors=True)
    kept = newest(out, mesh=mesh)
    start = kept.name if kept else "the start"
    return (
        f"could not write {out / f'step_{step}'} ({error}): free space on the disk, "
        f"then --resume auto goes on from {start}"
    )


def last_good(out: str | Path, mesh: Mesh = ALONE) -> str:
    """Return words for the checkpoint that a run can go on from. Collective."""
    kept = newest(out, mesh=mesh)
    return f"{kept} is good" if kept else "there is no checkpoint to go back to"


def write_rank(folder: Path, snapshot: Snapshot, mesh: Mesh) -> Written:
    """Write this rank's file."""
    name = f"state-{mesh.rank + 1:05d}-of-{mesh.world:05d}.safetensors"
    try:
        tensors = {key: x.cpu().contiguous() for key, x in snapshot.tensors.items()}
        save_file(tensors, folder / name, metadata={"places": json.dumps(snapshot.places)})
        return Written({name: _seal(folder / name)}, snapshot.updates)
    except (OSError, SafetensorError) as error:
        problem = f"rank {mesh.rank}: {error}" if mesh.world > 1 else str(error)
        return Written({}, [], problem)


def commit(partial: Path, values: dict[str, Any], answers: list[Written], keep: int) -> Path:
    """Make a checkpoint of the files that all ranks have written; return its folder.

    Remove all but the newest `keep`. OSError: a rank could not write, or this one cannot.
    """
    out, final = partial.parent, partial.parent / f"step_{values['step']}"
    if problem := next(filter(None, (written.problem for written in answers)), ""):
        raise OSError(problem)
    files = {name: seal for written in answers for name, seal in written.seals.items()}
    # A rank on whose stage nothing trains has made no updates.
    updates = [max(done) for done in zip(*(written.updates for written in answers))]
    (partial / "state.json").write_text(json.dumps({**values, "updates": updates}, indent=2))
    files["state.json"] = _seal(partial / "state.json")
    (partial / "manifest.json").write_text(json.dumps(files, indent=2))
    _flush(partial / "manifest.json")
    _flush(partial)
    replace_folder(partial, final)
    _flush(out)
    for path in all_steps(out)[keep:] if keep else []:
        shutil.rmtree(path, ignore_errors=True)
    return final


def _seal(path: Path) -> dict[str, Any]:
    """Flush a file to the disk and return its size and SHA-256."""
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _read_state(folder: Path) -> dict[str, Any]:
    """Return what state.json says besides its format. ValueError: another version wrote it."""
    values = json.loads((folder / "state.json").read_text())
    written, run = values.pop("format", 1), values.pop("run", {})
    if written != FORMAT:
        version = run.get("run", {}).get("version", "an earlier version")
        raise ValueError(
            f"{folder} was written by {version} of plumb (format {written}, this one reads "
            f"{FORMAT}): finish the run with that version, or start it again with another --out"
        )
    return values


def description(folder: Path) -> dict[str, Any]:
    """Return the description of the run that wrote a checkpoint, {} where it says nothing.

    ValueError: another version wrote it.
    """
    try:
        _read_state(folder)
        run = json.loads((folder / "state.json").read_text()).get("run", {})
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, AttributeError, RecursionError):
        return {}  # `load` says what is damaged
    return run if isinstance(run, dict) else {}


class _Piece(NamedTuple):
    """Some elements of one weight: their place in the slice of the rank that wrote them."""

    file: Any
    first: int
    last: int
    shape: tuple[int, ...]  # of the whole weight
    cut: tuple[int, int, int] | None  # (dimension, first, last + 1) of that slice


def load(folder: str | Path, optimizer: AdamW | tuple[AdamW, ...]) -> State:
    """Restore a checkpoint into the optimizer and its model, whatever layout it was written under.

    A rank reads the pieces that it needs, one weight at a time. ValueError names what is damaged,
    does not fit, or was written by another version.
    """
    folder, named = Path(folder), _numbered(optimizer)
    mesh = named[0][1].model.mesh
    if problem := damage(folder, mesh):
        raise ValueError(f"{folder} {problem}")
    values = _read_state(folder)
    pieces, rng = _index(folder)
    torch.set_rng_state(rng)
    updates = values.pop("updates")
    if len(updates) != len(named):
        raise ValueError(
            f"{folder} holds {len(updates)} model(s), this script trains {len(named)}: "
            "was it written by another script?"
        )
    for (prefix, each), done in zip(named, updates):
        declared, own_mesh = each.model.weights(), each.model.mesh

        def read(
            kind: str,
            name: str,
            first: int,
            last: int,
            prefix: str = prefix,
            declared: dict[str, Weight] = declared,
            own_mesh: Mesh = own_mesh,
        ) -> Tensor:
            key, weight = f"{prefix}{kind}/{name}", declared[name]
            fitting = [piece for piece in pieces.get(key, []) if piece.shape == weight.shape]
            if not fitting:
                raise ValueError(
                    f"{folder} has no {kind} {name} {weight.shape}: was it written with another "
                    "--model, or with other weights frozen?"
                )
            return _assemble(key, fitting, weight.slice(own_mesh), first, last)

        each.load_state(read, done)
    return State(**values)


def _index(folder: Path) -> tuple[dict[str, list[_Piece]], Tensor]:
    """Return the pieces of every key in all files of a checkpoint, and a rank's random state."""
    pieces: dict[str, list[_Piece]] = {}
    listed = json.loads((folder / "manifest.json").read_text())
    for name in sorted(name for name in listed if name.endswith(".safetensors")):
        file = safe_open(folder / name, framework="pt")
        for key, (first, shape, cut) in json.loads(file.metadata()["places"]).items():
            size = file.get_slice(key).get_shape()[0]
            piece = _Piece(file, first, first + size, tuple(shape), cut and tuple(cut))
            pieces.setdefault(key, []).append(piece)
    return pieces, file.get_tensor("rng")


def _assemble(
    key: str, pieces: list[_Piece], cut: tuple[int, int, int] | None, first: int, last: int
) -> Tensor:
    """Return elements first..last of a slice of a weight, from pieces of the same or other slices.

    ValueError: a gap.
    """
    cuts = {piece.cut for piece in pieces}
    if cut in cuts:
        return _from_slice(key, [piece for piece in pieces if piece.cut == cut], first, last)
    shape = list(pieces[0].shape)
    dim, low, high = cut
    parts = []
    for _, start, end in sorted(cuts):
        if max(low, start) < min(high, end):
            shape[dim] = end - start
            theirs = [piece for piece in pieces if piece.cut[1] == start]
            whole = _from_slice(key, theirs, 0, math.prod(shape)).view(shape)
            inside = min(high, end) - max(low, start)
            parts.append(whole.narrow(dim, max(low, start) - start, inside))
    return torch.cat(parts, dim).flatten()[first:last]


def _from_slice(key: str, pieces: list[_Piece], first: int, last: int) -> Tensor:
    """Return elements first..last of one rank's slice of a weight."""
    parts, at = [], first
    for piece in sorted(pieces, key=lambda piece: piece.first):
        if piece.first <= at < min(piece.last, last):
            end = min(piece.last, last) - piece.first
            parts.append(piece.file.get_slice(key)[at - piece.first : end])
            at = min(piece.last, last)
    if at < last:
        raise ValueError(
            f"the checkpoint lacks elements {at} to {last} of {key}: a file of it is missing"
        )
    return torch.cat(parts)


# ---- finding one ---------------------------------------------------------------------------------


def find(out: str | Path, resume: str, mesh: Mesh = ALONE) -> Path | None:
    """Return the checkpoint that --resume names, or None.

    "" is none, "auto" the newest whole checkpoint of OUT if there is one, anything else a folder.
    """
    if resume == "auto":
        return newest(out, mesh=mesh)
    if resume and not Path(resume).is_dir():
        raise FileNotFoundError(
            f"--resume {resume}: no such folder; auto takes the newest in --out"
        )
    return Path(resume) if resume else None


def newest(out: str | Path, log=print, mesh: Mesh = ALONE) -> Path | None:
    """Return the newest checkpoint that is whole, the same on all ranks; warn of damaged ones."""
    for folder in mesh.ask(lambda: all_steps(out)):
        if not (problem := damage(folder, mesh)):
            return folder
        log(f"warning: {folder} {problem}; trying the checkpoint before it")
    return None


def all_steps(out: str | Path) -> list[Path]:
    """Checkpoint folders of a run, newest first."""
    folders = [path for path in Path(out).glob("step_*") if re.fullmatch(r"step_\d+", path.name)]
    return sorted(folders, key=lambda path: -int(path.name[5:]))


def steps_begun(out: str | Path) -> list[int]:
    """Return the steps of all checkpoints, also of one that is being written."""
    names = [path.name for path in Path(out).glob(".step_*.partial")]  # first: it may be renamed
    names += [path.name for path in all_steps(out)]
    return [int(re.search(r"\d+", name)[0]) for name in names]


def damage(folder: Path, mesh: Mesh = ALONE) -> str:
    """Say what is wrong with a checkpoint, "" if it is whole.

    Every rank calls it and checks a share of the files.
    """
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
        if sha256_of(path) != digest:
            return f"is damaged: {name} does not match its SHA-256"
    return ""


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
