"""Models whose weights are sharded over the ranks that share them, gathered part by part (ZeRO 3).

    shard(model)                        every rank keeps a piece of each weight
    x = model.open("blocks.3", x)       gather a part before its use, and start on the next
    y = model.close("blocks.3", y)      free it; the backward gathers it once more, and frees it
    with shards.whole(): ...            all parts at once, to sample with

    forward     part      gather 0 | use 0, gather 1 | free 0, use 1, gather 2 | ...
    backward    part      ... | use 2, gather 1 | free 2, use 1, gather 0 | free 1, use 0 | free 0

Parts are the embedding, each block, and the head with its norm. At most two neighbours are in
memory at once. The parameters stay views of flat buffers whose storage comes and goes, so that what
autograd has saved of a weight is there again in the backward. A recomputed block runs between the
gather and the free of its backward. Every rank has to run the same parts in the same order.

Letters: m elements of a flat buffer, n ranks that share it.
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from model import GPT
from parallel import Group, Mesh

EMBED, HEAD = "embed", "head"


def part_of(name: str) -> str:
    """Return the part of the model that a parameter belongs to: embed, blocks.N or head."""
    words = name.split(".")
    if words[0] == "blocks":
        return f"blocks.{words[1]}"
    return EMBED if words[0] == EMBED else HEAD


class Flat:
    """Parameters side by side in one flat buffer, of which each rank of a group owns a piece.

    weights  (m,) in the model's dtype, m a multiple of n; the parameters are views of it. Where
             they are sharded it has memory only between `gather` and `free`
    piece    (m / n,) this rank's: a view of `weights`, or where they are sharded its only copy
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], group: Group, sharded: bool):
        self.named, self.group, self.sharded = named, group, sharded and group.n > 1
        first = named[0][1]
        used = sum(p.numel() for _, p in named)
        size = -(-used // group.n) * group.n
        self.own = slice(size // group.n * group.place, size // group.n * (group.place + 1))
        self.weights = torch.zeros(size, dtype=first.dtype, device=first.device)
        for (_, p), weights in zip(named, self.views(self.weights)):
            weights.copy_(p.data)
            p.data = weights
        self.piece = self.weights[self.own]
        self.gathering: Any = None  # the all-gather that is running
        self.here = True  # whether `weights` has memory
        if self.sharded:
            self.piece = self.piece.clone()
            self.free()

    def views(self, flat: Tensor) -> list[Tensor]:
        """Cut a flat buffer into the shapes of the parameters."""
        sizes = [p.numel() for _, p in self.named]
        parts = flat[: sum(sizes)].split(sizes)
        return [part.view(p.shape) for part, (_, p) in zip(parts, self.named)]

    def gather(self) -> None:
        """Begin to gather the weights from all ranks, unless they are here."""
        if self.here:
            return
        self.weights.untyped_storage().resize_(self.weights.nbytes)
        self.here = True
        self.gathering = self.group.all_gather(self.piece, "dp", out=self.weights, wait=False)

    def arrive(self) -> None:
        """Wait until the weights are gathered."""
        if self.gathering is not None:
            self.gathering.wait()
            self.gathering = None

    def free(self) -> None:
        """Give the memory of the gathered weights back."""
        if self.sharded and self.here:
            self.arrive()
            self.weights.untyped_storage().resize_(0)
            self.here = False


class Shards:
    """The flat buffers of a sharded model, part by part."""

    def __init__(self, model: GPT):
        c = model.c
        self.tied = c.tied and not c.outputs  # the head multiplies with the embedding
        self.order = [EMBED, *(f"blocks.{i}" for i in model.blocks), HEAD]
        self.own: dict[str, list[Flat]] = {part: [] for part in self.order}
        self.held = False  # whether all parts stay gathered
        self.due: Counter[str] = Counter()  # backwards to come that gather a part again

    def flats(self, part: str) -> list[Flat]:
        """Return the flat buffers that a part needs."""
        shared = self.own[EMBED] if part == HEAD and self.tied else []
        return self.own[part] + shared

    def neighbour(self, part: str, step: int) -> str | None:
        """Return the part that comes `step` places after another one, None at the ends."""
        at = self.order.index(part) + step
        return self.order[at] if 0 <= at < len(self.order) else None

    def take(self, part: str, following: str | None) -> None:
        """Gather a part, and begin to gather the one that is used next."""
        for flat in self.flats(part):
            flat.gather()
        for flat in self.flats(part):
            flat.arrive()
        for flat in self.flats(following) if following else ():
            flat.gather()

    def release(self, part: str) -> None:
        """Free a part."""
        for flat in () if self.held else self.flats(part):
            flat.free()

    def release_all(self) -> None:
        """Free every part: after an update the gathered weights are old."""
        self.due.clear()
        for part in self.order:
            self.release(part)

    def open(self, part: str, x: Tensor) -> Tensor:
        """Return x, which goes into a part, once its weights are here.

        backward: the part is done with, and freed.
        """
        self.take(part, self.neighbour(part, 1))
        if torch.is_grad_enabled() and x.requires_grad:
            return _Open.apply(x, self, part)
        return x

    def close(self, part: str, y: Tensor) -> Tensor:
        """Return y, which comes out of a part, and free its weights. backward: gather them again.

        The embedding's backward reads no weights. The head's comes next, so it stays.
        """
        backward = torch.is_grad_enabled() and y.requires_grad
        if part != HEAD or not backward:
            self.release(part)
        if not backward or part == EMBED:
            return y
        self.due[part] += 1
        return _Close.apply(y, self, part)

    @contextlib.contextmanager
    def whole(self, part: str | None = None) -> Iterator[None]:
        """Hold a part, or all of the model, for the block. Collective."""
        before = self.held
        for name in [part] if part else self.order:
            self.take(name, None)
        self.held = True
        try:
            yield
        finally:
            self.held = before
            if not before:
                self.release_all()

    def remove(self, names: set[str]) -> None:
        """Take some parameters out of the flat buffers: they are whole afterwards. Collective."""
        for part, flats in self.own.items():
            for flat in list(flats):
                if not names & {name for name, _ in flat.named}:
                    continue
                flat.gather()
                flat.arrive()
                flats.remove(flat)
                rest = [(name, p) for name, p in flat.named if name not in names]
                if rest:
                    self.own[part].append(Flat(rest, flat.group, sharded=True))

    def shared_with(self, model: GPT) -> "Shards":
        """Return those of another model over the same tensors: the flat buffers that it needs."""
        shards, names = Shards(model), set(model.weights())
        for part, flats in self.own.items():
            shards.own[part] = [f for f in flats if any(name in names for name, _ in f.named)]
        return shards


class _Open(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shards, part):
        ctx.shards, ctx.part = shards, part
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.shards.release(ctx.part)
        return grad, None, None


class _Close(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, shards, part):
        ctx.shards, ctx.part = shards, part
        return y.view_as(y)

    @staticmethod
    def backward(ctx, grad):
        shards = ctx.shards
        shards.due[ctx.part] -= 1
        before = shards.neighbour(ctx.part, -1)
        shards.take(ctx.part, before if shards.due[before] > 0 else None)
        return grad, None, None


def shard(model: GPT) -> Shards:
    """Shard every weight of a model that is not sharded yet.

    A quantised one stays whole, and so does one of another dtype, which is small.

    Weights lie side by side with those of their part that the same ranks hold. Collective.
    """
    if model.shards is None:
        model.shards = Shards(model)
    shards: Shards = model.shards
    done = {name for flats in shards.own.values() for flat in flats for name, _ in flat.named}
    parameters = dict(model.named_parameters())
    whole = {name for name, weight in model.weights().items() if weight.exact}
    whole |= {name for name, p in parameters.items() if p.is_meta}
    fresh = parameters.keys() - done - whole
    for part, replicas, names in plan_flats(model, model.mesh, fresh):
        named = [(name, parameters[name]) for name in names]
        shards.own[part].append(Flat(named, model.mesh.group(replicas), sharded=True))
    return shards


def plan_flats(model: GPT, mesh: Mesh, only: set[str]) -> list[tuple[str, str, list[str]]]:
    """Return (part, axes of the ranks that share it, names) of the flat buffers of some weights."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, weight in model.weights().items():
        if name in only:
            kinds.setdefault((part_of(name), weight.replicas(mesh)), []).append(name)
    return [(part, replicas, names) for (part, replicas), names in kinds.items()]
