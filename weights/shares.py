"""Plan of the files of a folder: the weights in each, and the ranks that write it."""

import math

from model import GPT
from parallel import split
from weights.table import weight_table


def plan_files(model: GPT, most: int) -> list[tuple[tuple[int, int], list[str], str]]:
    """Return (holders, names, file) of every weight file, the same on every rank.

    A file holds whole weights of the same holders, at most `most` bytes of them. See _holders.
    """
    files: list[tuple[tuple[int, int], list[str]]] = []
    size = 0
    table = weight_table(model.c)
    for name in sorted(table, key=lambda name: _holders(name, model)):  # which keeps their order
        stored = table[name]
        if files and stored.name in files[-1][1]:
            continue  # another part of a fused tensor
        holders = _holders(name, model)
        nbytes = math.prod(stored.shape) * model.dtype.itemsize
        if not files or files[-1][0] != holders or size + nbytes > most:
            files.append((holders, []))
            size = 0
        files[-1][1].append(stored.name)
        size += nbytes
    if len(files) == 1:
        return [(*files[0], "model.safetensors")]
    total = len(files)
    return [
        (holders, names, f"model-{i + 1:05d}-of-{total:05d}.safetensors")
        for i, (holders, names) in enumerate(files)
    ]


def _holders(name: str, model: GPT) -> tuple[int, int]:
    """Return the pipeline stage that writes a weight, and which of --ep's ranks; -1 is any."""
    words, mesh = name.split("."), model.mesh
    if mesh.ep == 1 or "experts" not in words:
        return _stage_of(name, model), -1
    expert = int(words[words.index("experts") + 1])
    return _stage_of(name, model), expert // (model.c.experts // mesh.ep)


def _stage_of(name: str, model: GPT) -> int:
    """Return the pipeline stage that writes a weight."""
    words, stages = name.split("."), model.mesh.pp
    if words[0] == "embed":
        return 0
    if words[0] != "blocks":
        return stages - 1
    layer = int(words[1])
    return next(i for i in range(stages) if layer < split(model.c.layers, stages, i)[1])
