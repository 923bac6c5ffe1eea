"""AdamW whose gradients, master weights and moments are sharded over the ranks (ZeRO 1 to 3).

    optimizer = AdamW(model, betas, eps, weight_decay, zero)
    norm, stopping = optimizer.step(lr, clip, stop)        one update, the same on every rank

Parameters that train and are held by the same ranks lie side by side in flat buckets; a bucket's
gradients are reduce-scattered while backward still runs, and its new weights are all-gathered while
the next forward runs. Frozen parameters are unknown here: they have no buffer and cannot move. The
corrections of routers have none either: they move with a step, and are saved with it.

Letters: m elements of a bucket, n ranks that hold it.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kernels.device import copy_to_host
from layers import frozen_bytes
from master import Master
from model import GPT
from parallel import Group, Mesh
from sharding import Flat, part_of, plan_flats, shard

BUCKET = 1 << 25  # elements: large enough for full bandwidth, small enough to start early
NORM_ROW = 1 << 12  # elements whose squares are added up in fp32


class Kind(NamedTuple):
    """Properties that all parameters of a bucket share."""

    replicas: str  # axes of the ranks that hold the same piece
    decays: bool

    @property
    def crosses_stages(self) -> bool:
        """True for a tied embedding, which the first and the last pipeline stage hold."""
        return "ends" in self.replicas


def plan_buckets(model: GPT, mesh: Mesh, zero: int = 1) -> list[tuple[Kind, list[str]]]:
    """Group the names of this rank's trained parameters into buckets, in the order they fill.

    Gradients arrive about in reverse, and so do the buckets; those of a tied embedding, which two
    pipeline stages sum, come last. Under ZeRO-3 a bucket has parameters
    of one part of the model. `model` may lie on the meta device.
    """
    parameters = dict(model.named_parameters())
    kinds: dict[tuple[Kind, str], list[list[str]]] = {}
    for name, weight in reversed(model.weights().items()):
        if not parameters[name].requires_grad:
            continue
        kind = Kind(weight.replicas(mesh), weight.decays)
        buckets = kinds.setdefault((kind, part_of(name) if zero == 3 else ""), [[]])
        held = sum(parameters[other].numel() for other in buckets[-1])
        if buckets[-1] and held + parameters[name].numel() > BUCKET and zero < 3:
            buckets.append([])
        buckets[-1].append(name)
    planned = [(kind, names) for (kind, _), buckets in kinds.items() for names in buckets]
    return sorted(planned, key=lambda bucket: bucket[0].crosses_stages)


class Bucket(Flat):
    """Parameters of one kind with their gradients and master weights, all in flat buffers.

    weights  (m,) in the model's dtype; under ZeRO-3 only while a part of the model is gathered
    master   (m / n,) this rank's piece in fp32 at least, updated by AdamW (master.py)
    grad     (m,) fp32 at least, or bf16 (--grad-dtype), summed over ranks into
    shard    (m / n,) this rank's piece (ZeRO-1); under ZeRO-2 only `shard` lasts, and the gradients
             of a micro-batch live no longer than its reduce-scatter
    """

    def __init__(
        self,
        named: list[tuple[str, nn.Parameter]],
        group: Group,
        zero: int,
        half_grads: bool,
        master: Callable[[Tensor], Master],
    ):
        super().__init__(named, group, sharded=zero == 3)
        self.keeps_grad = zero < 2 or group.n == 1
        self.grad_dtype = grad_dtype(self.piece.dtype, half_grads)
        kept = len(self.weights) if self.keeps_grad else 0
        self.grad = self.piece.new_zeros(kept, dtype=self.grad_dtype)
        for _, p in named:
            p.grad_dtype = self.grad_dtype  # fp32: gradients of many micro-batches add up in fp32
        if self.keeps_grad:
            for (_, p), grad in zip(named, self.views(self.grad)):
                p.grad = grad
            self.shard = self.grad[self.own]
        else:
            self.shard = torch.zeros_like(self.piece, dtype=self.grad_dtype)
        self.master = master(self.piece)
        self.missing = len(named)  # parameters whose gradient this micro-batch still owes
        self.work: Any = None  # the reduce-scatter or all-gather that is running
        self.incoming: tuple[Tensor, ...] = ()  # ZeRO-2: input and output of the reduce-scatter

    def pieces(self, flat: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """Yield (name, first element, piece) of each parameter in this rank's part of a buffer."""
        at = 0
        for name, p in self.named:
            low, high = max(at, self.own.start), min(at + p.numel(), self.own.stop)
            if low < high:
                yield name, low - at, flat[low - self.own.start : high - self.own.start]
            at += p.numel()

    def start_reduce(self) -> None:
        """Begin to sum the gradients over the ranks."""
        if self.group.n == 1:
            return
        if self.keeps_grad:
            self.work = self.group.reduce_scatter(self.grad, "dp", out=self.shard, wait=False)
            return
        grads = []
        for _, p in self.named:
            grads.append(torch.zeros_like(p, dtype=self.grad_dtype) if p.grad is None else p.grad)
            p.grad = None
        padding = len(self.weights) - sum(grad.numel() for grad in grads)
        flat = torch.cat([*(grad.flatten() for grad in grads), self.shard.new_zeros(padding)])
        out = torch.empty_like(self.shard)
        self.work = self.group.reduce_scatter(flat, "dp", out=out, wait=False)
        self.incoming = (flat, out)

    def finish_reduce(self) -> None:
        """Wait for the sum, and under ZeRO-2 add it to those of earlier micro-batches."""
        self.wait()
        if self.incoming:
            self.shard.add_(self.incoming[1])
            self.incoming = ()

    def publish(self) -> None:
        """Take over the new weights, and begin to send them unless whoever needs them gathers."""
        self.master.write_back()
        if self.sharded:
            self.free()
        else:
            self.work = self.group.all_gather(self.piece, "dp", out=self.weights, wait=False)

    def wait(self) -> None:
        """Wait for the collective that is running, if any."""
        if self.work is not None:
            self.work.wait()
            self.work = None


def grad_dtype(weights: torch.dtype, half: bool) -> torch.dtype:
    """Return the dtype in which gradients add up: fp32 at least, or with `half` bf16 for bf16."""
    exact = torch.promote_types(weights, torch.float32)
    return weights if half and weights == torch.bfloat16 else exact


def square_sum(flat: Tensor) -> Tensor:
    """Return Σ x² in fp64 without an fp64 copy: rows are summed as they are, their sums widened."""
    body = flat[: flat.numel() // NORM_ROW * NORM_ROW].view(-1, NORM_ROW)
    tail = flat[body.numel() :]
    exact = torch.promote_types(flat.dtype, torch.float32)
    norms = [
        torch.linalg.vector_norm(body, dim=1, dtype=exact),
        torch.linalg.vector_norm(tail, dtype=exact)[None],
    ]
    return torch.cat(norms).double().square().sum()


class AdamW:
    """AdamW (arXiv 1711.05101) on flat fp32 master weights; the arithmetic is torch's.

    Ranks that hold the same weights share the work (ZeRO, arXiv 1910.02054): each owns a piece of
    the master weights and of both moments. zero=1 keeps whole gradients and sums them once a step,
    while the last backward still runs; zero=2 sums them after every micro-batch and keeps a piece;
    zero=3 shards the weights as well, frozen ones included (sharding.py).
    offload: master weights and moments lie in host memory, and the CPU updates them (master.py).
    half_grads: gradients of bf16 weights add up, over micro-batches and ranks, in bf16.
    New weights are sent while the next forward runs: call `model.wait()` before reading them
    elsewhere, or under zero=3 hold `model.shards.whole()`. ValueError: no parameter of any rank's
    model trains, zero=3 with pipeline stages, or half_grads of weights that are not bf16.
    """

    def __init__(
        self,
        model: GPT,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        zero: int = 1,
        offload: bool = False,
        half_grads: bool = False,
    ):
        self.model, self.zero, mesh = model, zero, model.mesh
        self.world = mesh.group("world")
        if zero == 3 and mesh.pp > 1:
            raise ValueError(f"--zero 3 is not supported with --pp {mesh.pp}: use --tp or --zero 2")
        if half_grads and model.dtype != torch.bfloat16:
            raise ValueError(
                f"--grad-dtype bf16 is for weights in bf16, not {model.dtype}: drop it"
            )
        self.shards = shard(model) if zero == 3 else None
        parameters = dict(model.named_parameters())
        self.buckets = []
        planned = plan_buckets(model, mesh, zero)
        for kind, names in planned:
            if self.shards:
                self.shards.remove(set(names))
            named = [(name, parameters[name]) for name in names]
            master = functools.partial(
                Master,
                betas=betas,
                eps=eps,
                weight_decay=weight_decay if kind.decays else 0.0,
                offload=offload,
            )
            bucket = Bucket(named, mesh.group(kind.replicas), zero, half_grads, master)
            if self.shards:
                self.shards.own[part_of(names[0])].append(bucket)
            self.buckets.append(bucket)
        if not any(mesh.everyone(bool(self.buckets))):
            raise ValueError("nothing to train: every weight of the model is frozen")
        self.parts: dict[str, list[Bucket]] = {}  # part of the model -> buckets that it waits for
        for b in self.buckets:
            for name, _ in b.named:
                buckets = self.parts.setdefault(part_of(name), [])
                if b not in buckets:
                    buckets.append(b)
        self.early = False  # whether buckets are reduced as soon as they are full
        self.next = 0  # bucket to reduce next: one order for all ranks, however gradients arrive
        # Buckets that may be reduced before a backward ends. The others wait for another stage,
        # which may wait for a message from this one: that comes first.
        self.n_early = sum(not kind.crosses_stages for kind, _ in planned)
        self.collected = False
        if any(b.group.n > 1 for b in self.buckets):  # one that is not summed holds up no other
            for b in self.buckets:
                for _, p in b.named:
                    p.register_post_accumulate_grad_hook(lambda p, b=b: self._gradient_ready(b))

    def expect(self, last: bool) -> None:
        """Announce a backward; last: that of the step's last micro-batch."""
        self.early = last or self.zero > 1
        self.collected = False

    def _gradient_ready(self, bucket: Bucket) -> None:
        bucket.missing -= 1
        while self.early and self.next < self.n_early:
            if self.buckets[self.next].missing:
                break
            self.buckets[self.next].start_reduce()
            # At most two sums run at once, or ZeRO-2 and 3 would hold whole gradients after all.
            if self.zero > 1 and self.next > 1:
                self.buckets[self.next - 2].finish_reduce()
            self.next += 1

    def collect(self) -> None:
        """End a backward: start the sums over ranks that are still due, and wait for all."""
        if self.early:
            for b in self.buckets[self.next :]:
                b.start_reduce()
            for b in self.buckets:
                b.finish_reduce()
        for b in self.buckets:
            b.missing = len(b.named)
        if self.shards:
            self.shards.release_all()
        self.next, self.collected = 0, self.early

    @torch.no_grad()
    def step(self, lr: float, clip: float, stop: object = False) -> tuple[float, bool]:
        """Update once from the accumulated gradients, which are zero afterwards.

        stop: true where this rank wants to stop. Returns the gradient norm before clipping and
        whether any rank wants to stop. Where the norm is not finite (on any rank) only the
        gradients change: the caller sees it in the result.
        """
        if not self.collected:
            self.early = True
            self.collect()
        # One sum carries all that ranks must agree on. The host waits for it, so it is on the CPU.
        squares = torch.zeros((), dtype=torch.float64)
        if self.buckets:
            squares = torch.stack([square_sum(b.shard) for b in self.buckets]).sum().cpu()
        control = torch.stack((squares, squares.new_tensor(bool(stop))))
        squares, stopping = self.world.all_reduce(control, "control")
        norm = math.sqrt(squares.item())
        if math.isfinite(norm):
            shrink = clip / (norm + 1e-6) if clip else 1.0  # as torch.nn.utils.clip_grad_norm_
            for b in reversed(self.buckets):  # in the order of the next forward
                b.master.fetch(b.shard)
            for b in reversed(self.buckets):
                b.master.update(lr, shrink)
                b.publish()
            if not self.shards:
                self.model.pending = {part: list(buckets) for part, buckets in self.parts.items()}
        self.model.correct_routers(math.isfinite(norm))
        for b in self.buckets:
            b.grad.zero_()
            b.shard.zero_()
        self.collected = False
        return norm, bool(stopping)

    def state(
        self, prefix: str = "", host: dict[str, Tensor] | None = None
    ) -> tuple[dict[str, tuple[int, Tensor]], int]:
        """Return what this rank saves: "kind/parameter" -> (first element, piece); and the updates.

        kind: master, exp_avg or exp_avg_sq, or fixed of a weight that no gradient moves. With
        `host` the pieces are copies, in buffers that it keeps under names that open with the
        prefix: see kernels.device.copy_to_host.
        """
        pieces: dict[str, tuple[int, Tensor]] = {}
        updates = 0
        for number, b in enumerate(self.buckets):
            buffers, updates = b.master.state()
            for kind, buffer in buffers.items():
                if host is not None:
                    buffer = copy_to_host(host, f"{prefix}{number}/{kind}", buffer)
                for name, at, piece in b.pieces(buffer):
                    pieces[f"{kind}/{name}"] = (at, piece)
        for name, tensor in self.fixed():
            if host is not None:
                tensor = copy_to_host(host, f"{prefix}{name}", tensor)
            pieces[f"fixed/{name}"] = (0, tensor)
        return pieces, updates

    def fixed(self) -> list[tuple[str, Tensor]]:
        """Return the flat weights that no gradient moves, of every rank that holds them."""
        declared = self.model.weights().items()
        names = [name for name, weight in declared if not weight.trains]
        return [(name, self.model.get_parameter(name).data.flatten()) for name in names]

    @torch.no_grad()
    def load_state(self, read: Callable[[str, str, int, int], Tensor], updates: int) -> None:
        """Restore what `state` returned, under any layout.

        read(kind, parameter, first, last + 1) returns that flat piece.
        """
        for b in self.buckets:
            for kind, buffer in b.master.buffers(updates).items():
                for name, at, piece in b.pieces(buffer):
                    piece.copy_(read(kind, name, at, at + len(piece)))
            b.publish()
            b.wait()
        for name, tensor in self.fixed():
            tensor.copy_(read("fixed", name, 0, len(tensor)))


# ---- bytes, for plan.py and the line that a run prints at the start ------------------------------


class Memory(NamedTuple):
    """Bytes of one rank, exactly as its buckets and frozen weights take them."""

    weights: int
    gradients: int
    optimizer: int  # both moments, and master weights where they are no view of the weights
    host: int  # the same in host memory, with buffers for gradients and weights on their way


def bucket_sizes(model: GPT, mesh: Mesh, zero: int = 1) -> list[tuple[int, int]]:
    """Return (elements with padding, ranks that share them) of each bucket of a rank."""
    return [(m, ranks) for _, trains, m, ranks in flat_sizes(model, mesh, zero) if trains]


def flat_sizes(model: GPT, mesh: Mesh, zero: int) -> list[tuple[str, bool, int, int]]:
    """Return (part, whether it trains, elements with padding, ranks) of each flat buffer of a rank.

    Frozen weights lie in flat buffers under ZeRO-3 alone. Part: see sharding.part_of; of a bucket
    under other stages that of its first weight.
    """
    parameters = dict(model.named_parameters())
    planned = [
        (part_of(names[0]), True, kind.replicas, names)
        for kind, names in plan_buckets(model, mesh, zero)
    ]
    if zero == 3:
        declared = model.weights()
        frozen = {n for n, p in parameters.items() if declared[n].trains and not p.requires_grad}
        planned += [
            (part, False, axes, names) for part, axes, names in plan_flats(model, mesh, frozen)
        ]
    sizes = []
    for part, trains, replicas, names in planned:
        used, ranks = sum(parameters[name].numel() for name in names), mesh.size(replicas)
        sizes.append((part, trains, -(-used // ranks) * ranks, ranks))
    return sizes


def memory(
    sizes: list[tuple[int, int]],
    frozen: int,
    zero: int,
    dtype: torch.dtype,
    offload: bool = False,
    half_grads: bool = False,
) -> Memory:
    """Count the bytes of `bucket_sizes` under a ZeRO stage, and of the frozen weights it keeps.

    offload, half_grads: as of AdamW.
    """
    exact = max(4, dtype.itemsize)
    grad = grad_dtype(dtype, half_grads).itemsize
    padded = sum(n for n, _ in sizes)
    owned = sum(n // ranks for n, ranks in sizes)
    moments = 2 * exact
    master, passing = exact, grad + dtype.itemsize
    if dtype.itemsize == exact:  # exact weights are their own master copy
        master, passing = 0, grad + exact
    return Memory(
        weights=(owned if zero == 3 else padded) * dtype.itemsize + frozen,
        gradients=(padded if zero == 1 else owned) * grad,
        optimizer=0 if offload else owned * (moments + master),
        host=owned * (moments + master + passing) if offload else 0,
    )


def saved_bytes(sizes: list[tuple[int, int]], dtype: torch.dtype) -> int:
    """Return the bytes of the copy in host memory that --async-save writes a checkpoint from."""
    return sum(n // ranks for n, ranks in sizes) * max(4, dtype.itemsize) * 3  # and both moments


def frozen_memory(model: GPT, mesh: Mesh, zero: int, dtype: torch.dtype) -> int:
    """Return the bytes of the frozen weights that a rank keeps under a ZeRO stage."""
    if zero < 3:
        return frozen_bytes(model, dtype)
    sizes = flat_sizes(model, mesh, zero)
    return sum(m // ranks for _, trains, m, ranks in sizes if not trains) * dtype.itemsize
