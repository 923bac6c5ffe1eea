"""Models and data sets of the Hugging Face hub, by name, through the package huggingface_hub.

    --model org/name                    a folder of the hub's cache, downloaded once
    --data org/name org/name:test       the files of its split train, and of test

A path on this disk comes first. Cache, token and mirror are those of the package (HF_HOME,
HF_TOKEN, HF_ENDPOINT). Every process asks for itself; the cache has locks.
"""

import re
from pathlib import Path
from typing import Any

import sources

NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt"]
ROW_FILES = re.compile(r"\.(jsonl|json|parquet|csv|tsv|arrow)(\.gz)?$")
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")


def resolve(config: Any, models: tuple[str, ...], data: tuple[str, ...] = ()) -> None:
    """Put folders and files of this disk in the place of the hub's names in some flags.

    ValueError or ImportError: what could not be had, and the commands that help.
    """
    for name in models:
        value = getattr(config, name, "")
        if value and isinstance(value, str):
            setattr(config, name, model_folder(value))
    for name in data:
        words = []
        for source in (sources.read(word, name) for word in getattr(config, name, [])):
            files = row_files(source.path)
            if source.weight and len(files) > 1:
                pattern = f"{Path(files[0]).parent}/*{Path(files[0]).suffix}:{source.weight}"
                raise ValueError(
                    f"{source.path} has {len(files)} files and one weight: name them by one "
                    f"pattern, such as '{pattern}'"
                )
            words += [str(source._replace(path=file)) for file in files]
        if words:
            setattr(config, name, words)


def model_folder(name: str) -> str:
    """Return the folder of a model: the path itself if it is one, else that of the hub's cache.

    ValueError: the folder is a run's, not a model's, or the hub does not give it.
    """
    path = Path(name)
    if path.is_dir():
        has_model = any((path / f).is_file() for f in ("config.json", "adapter_config.json"))
        is_run = not has_model or (path / "metrics.jsonl").is_file()  # a run keeps its flags there
        if is_run and (path / "final" / "config.json").is_file():
            raise ValueError(f"{name} is the folder of a run: its model is {path / 'final'}")
        return name
    if path.exists() or not NAME.fullmatch(name) or name.endswith(".py"):
        return name
    return _ask("model", name, lambda hub: hub.snapshot_download(name, allow_patterns=MODEL_FILES))


def row_files(name: str) -> list[str]:
    """Return the files of rows that a name stands for: itself, or those of a split on the hub."""
    repo, _, split = name.partition(":")
    if sources.is_there(name) or not NAME.fullmatch(repo) or ROW_FILES.search(name):
        return [name]

    def download(hub: Any) -> str:
        inside = sorted(hub.list_repo_files(repo, repo_type="dataset"))
        rows = [f for f in inside if ROW_FILES.search(f) and Path(f).name not in NOT_ROWS]
        wanted = _of_split(rows, split or "train")
        if not wanted and not split:
            wanted = rows
        if not wanted:
            shown = ", ".join(rows[:8]) or "no file of rows"
            raise ValueError(f"{name}: no split {split!r} among its files ({shown})")
        folder = hub.snapshot_download(repo, repo_type="dataset", allow_patterns=wanted)
        return "\n".join(str(Path(folder) / file) for file in wanted)

    files = _ask("dataset", repo, download).split("\n")
    return files


def _of_split(files: list[str], split: str) -> list[str]:
    """Return the files whose name or folder is a split's: data/train-00000-of-00001.parquet."""
    pattern = re.compile(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)")
    return [file for file in files if pattern.search(file)]


def _ask(kind: str, name: str, download: Any) -> str:
    """Return download(huggingface_hub). ValueError or ImportError: one line with what helps."""
    more = " --repo-type dataset" if kind == "dataset" else ""
    fetch = f"hf download {name}{more} --local-dir DIR"
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"{name} is nothing on this disk; for a {kind} of the hub: pip install "
            f"huggingface_hub, or where there is a network: {fetch}"
        ) from None
    try:
        return download(huggingface_hub)
    except Exception as error:  # of the package, its client, or the network
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} is nothing on this disk, and the hub does not give a {kind} of that name "
            f"({type(error).__name__}: {said}): hf auth login, or where there is a network: {fetch}"
        ) from None
