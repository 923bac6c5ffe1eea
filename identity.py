"""Describe a run: script, code, packages, and the content of the files that its flags name.

    mine = describe(config)
    compare_ranks(mesh.everyone(mine))        ValueError: which rank differs in what
    check_resumed(folder, saved, mine, False) ValueError: another script, other data or model

Two processes with equal descriptions compute the same run. A checkpoint keeps the description of
the run that wrote it.
"""

import functools
import hashlib
import importlib.metadata
import os
import platform
import sys
import tomllib
from pathlib import Path
from typing import Any

import sources
from config import RunConfig
from data.tokenizer import TOKENIZER_FILES
from disk import file_sha256
from weights.files import fingerprint

ROOT = Path(__file__).parent
CODE_FOLDERS = (".", "data", "data/toy", "kernels", "sampling", "weights")
PACKAGES = "torch triton numpy safetensors sentencepiece tokenizers jinja2".split()
# Flags that name files; what is in them belongs to the run.
DATA_FLAGS = ("data", "eval_data")
MODEL_FLAGS = ("model", "adapter", "ref", "teacher", "critic", "predictor", "prior", "reward")
# Flags that may differ between ranks (a local disk), and between a run and its continuation.
LOCAL_FLAGS = ("cache",)
NOT_COMPARED = ("resume", "resume_changed", "config")

Description = dict[str, dict[str, str]]  # "run", "flags", "files", "packages" -> name -> value


def version() -> str:
    """Return plumb's version, as pyproject.toml has it; "unknown" without that file."""
    path = ROOT / "pyproject.toml"
    return tomllib.loads(path.read_text())["project"]["version"] if path.is_file() else "unknown"


def script_of(config: RunConfig) -> str:
    """Return the name of the script whose flags these are, such as "train_dpo"."""
    module = type(config).__module__
    if module == "__main__":
        module = Path(getattr(sys.modules["__main__"], "__file__", "") or "a shell").stem
    return module


@functools.cache
def code_hash() -> str:
    """Return the hash of every source file that a run can read."""
    digest = hashlib.sha256()
    for folder in CODE_FOLDERS:
        for path in sorted((ROOT / folder).glob("*.py")):
            digest.update(f"{folder}/{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def describe(config: RunConfig) -> Description:
    """Return what decides a run's numbers.

    The ranks of a node share its disks: the first one hashes the files, the others leave them out.
    """
    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    return {
        "run": {"script": script_of(config), "version": version(), "code": code_hash()},
        "flags": {name: repr(value) for name, value in vars(config).items()},
        "files": file_hashes(config) if first else {},
        "packages": package_versions(),
    }


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute; "absent" for others."""
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    return versions


def file_hashes(config: RunConfig) -> dict[str, str]:
    """Return the hash of what each flag's files hold; flags that name no file are left out.

    Missing and damaged files count as such: who reads them says what is wrong.
    """
    hashes = {}
    for name in DATA_FLAGS:
        paths = [Path(path) for path in sources.paths(getattr(config, name), name)]
        if paths:
            hashes[name] = _joined([_content(path) for path in paths])
    for name in MODEL_FLAGS:
        path = str(getattr(config, name, "")).removeprefix("judge:")
        file = Path(path.partition(":")[0])
        folder, _, template = path.rpartition(":")
        if path and Path(path).is_dir():
            hashes[name] = _model(Path(path))
        elif folder and Path(folder).is_dir() and Path(template).is_file():  # of a judge
            hashes[name] = _joined([_model(Path(folder)), _content(Path(template))])
        elif path and file.is_file():  # file.py:function
            hashes[name] = _content(file)
    return hashes


def _joined(hashes: list[str]) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _content(path: Path) -> str:
    """Return the hash of a file, or of all files under a folder."""
    try:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            return _joined([f"{file.relative_to(path)} {file_sha256(file)}" for file in files])
        return file_sha256(path)
    except OSError as error:
        return f"{path.name}: {error.strerror}"


def _model(folder: Path) -> str:
    """Return the hash of a model's weights, sizes and tokenizer."""
    try:
        weights = fingerprint(folder)
    except (OSError, ValueError) as error:
        weights = type(error).__name__
    present = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    return _joined([weights, *(f"{path.name} {file_sha256(path)}" for path in present)])


# ---- ranks ---------------------------------------------------------------------------------------


def compare_ranks(descriptions: list[Description]) -> None:
    """Raise ValueError where a rank differs from rank 0; the same message on every rank."""
    first = descriptions[0]
    problems = []
    for rank, other in enumerate(descriptions[1:], 1):
        differences = [
            _difference(kind, name, other[kind][name], first[kind].get(name, "none"))
            for kind in first
            for name in other[kind]
            if name not in LOCAL_FLAGS and other[kind][name] != first[kind].get(name)
        ]
        if other["files"]:
            missing = first["files"].keys() - other["files"].keys()
            differences += [f"no files of --{_flag(name)}" for name in sorted(missing)]
        if differences:
            problems.append(f"rank {rank} has {', '.join(differences)}")
    if problems:
        raise ValueError(
            f"the ranks do not agree: {'; '.join(problems)}: start all with the same flags, files, "
            "code and packages"
        )


def _difference(kind: str, name: str, value: str, first: str) -> str:
    """Return words for a value that is not that of rank 0."""
    if kind == "flags":
        return f"--{_flag(name)} {value} (rank 0: {first})"
    if kind == "files":
        return f"other files of --{_flag(name)} than rank 0"
    if kind == "packages":
        return f"{name} {value} (rank 0: {first})"
    return f"another {name} than rank 0" if name == "code" else f"{name} {value} (rank 0: {first})"


def _flag(name: str) -> str:
    return name.replace("_", "-")


# ---- checkpoints ---------------------------------------------------------------------------------


def check_resumed(folder: Path, saved: Description, mine: Description, changed: bool) -> list[str]:
    """Compare the run that wrote a checkpoint with this one; return warnings to print.

    changed: go on with other files (--resume-changed). ValueError: another script, or other files.
    """
    script = saved["run"].get("script", "")
    if script != mine["run"]["script"]:
        raise ValueError(
            f"{folder} was written by {script}.py, not by {mine['run']['script']}.py: start that "
            "script, or choose another --out"
        )
    common = [name for name in saved["files"] if name in mine["files"]]
    other = [name for name in common if saved["files"][name] != mine["files"][name]]
    names = ", ".join(f"--{_flag(name)}" for name in other)
    if other and not changed:
        raise ValueError(
            f"the files of {names} are not those that {folder} was trained with: restore them, "
            "choose another --out, or go on with them by --resume-changed"
        )
    warnings = [f"resuming with other files of {names}"] if other else []
    if saved["run"].get("code") != mine["run"]["code"]:
        warnings.append(
            f"the code has changed since {folder.name} was written (by version "
            f"{saved['run'].get('version')}): numbers may differ"
        )
    return warnings


def changed_flags(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a warning for each flag that differs from an earlier config.json."""
    return [
        f"resuming with another --{_flag(name)}: {value}, it was {before[name]}"
        for name, value in now.items()
        if name not in NOT_COMPARED and name in before and before[name] != value
    ]
