"""Ranks, process groups and collectives: everything that is sent is sent from here.

    mesh = init_mesh(tp=2, cp=1, pp=2, device="cuda")   the grid of ranks; the rest is data parallel
    mesh.group("tp").all_gather(x, "tp")                a collective over one axis of the grid
    y = enter(x, rows, mesh.group("tp"))                a collective with a backward

    rank = ((pp * DP + dp) * CP + cp) * TP + tp         tensor ranks are neighbours: they talk most

The matrix equations that need these collectives stand where the linears are, in layers.py; the
messages between pipeline stages are in pipeline.py, those of the optimizer in optimizer.py, rows
of context and expert parallelism in exchange.py. One process is a mesh of one: every group has one
rank, and nothing is ever sent. Runs on gloo (CPU) and NCCL (GPUs); all of it is tested on gloo in
float64, and it has never run on more than one GPU.

Letters: T tokens of a flat row, D width, n ranks of a group, k rows of one rank.
"""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Bytes that this rank has sent, by purpose. plan.py predicts them, and a test compares the two.
SENT: Counter[str] = Counter()
START_MINUTES = 10.0  # least time that ranks have to start, read and tokenise

# torch 2.13 renamed them; both names do the same.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_from = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# ---- groups and collectives ----------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Ranks that communicate with each other, and this rank's place among them.

    A collective of one rank returns its input and sends nothing. `purpose` is a key of SENT. With
    wait=False a collective returns the work to wait for, None for one rank, and fills `out`.
    """

    ranks: tuple[int, ...] = (0,)
    place: int = 0
    handle: Any = None  # c10d's group; None where there is one rank

    @property
    def n(self) -> int:
        return len(self.ranks)

    def all_gather(
        self, x: Tensor, purpose: str, out: Tensor | None = None, wait: bool = True
    ) -> Any:
        """Concatenate the (k, ...) of all ranks in order, (n k, ...). A rank sends (n-1) k rows."""
        if self.n == 1:
            return x if wait else None
        out = x.new_empty(self.n * x.shape[0], *x.shape[1:]) if out is None else out
        SENT[purpose] += out.nbytes // self.n * (self.n - 1)
        work = _gather_into(out, x.contiguous(), group=self.handle, async_op=not wait)
        return out if wait else work

    def reduce_scatter(
        self, x: Tensor, purpose: str, out: Tensor | None = None, wait: bool = True
    ) -> Any:
        """Sum (n k, ...) over the ranks; return this rank's (k, ...). A rank sends (n-1) k rows."""
        if self.n == 1:
            return x if wait else None
        out = x.new_empty(x.shape[0] // self.n, *x.shape[1:]) if out is None else out
        SENT[purpose] += x.nbytes // self.n * (self.n - 1)
        work = _scatter_from(out, x.contiguous(), group=self.handle, async_op=not wait)
        return out if wait else work

    def all_reduce(self, x: Tensor, purpose: str) -> Tensor:
        """Return the sum over the ranks, a new tensor. A rank sends twice (n-1) / n of x.

        There is no maximum: gloo's MAX loses a NaN on some ranks.
        """
        if self.n == 1:
            return x
        SENT[purpose] += 2 * x.nbytes * (self.n - 1) // self.n
        x = x.clone()
        dist.all_reduce(x, group=self.handle)
        return x


ALONE = Group()


# ---- the mesh ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mesh:
    """The grid of all ranks, and this process's place in it."""

    rank: int = 0
    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    groups: dict[str, Group] = field(default_factory=dict)
    store: Any = None  # c10d's key-value store: outlives a broken group
    ep: int = 1  # ranks, neighbours among dp x cp, that share the experts of a layer

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def main(self) -> bool:
        """True on the one rank that prints, logs and commits."""
        return self.rank == 0

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp % self.cp

    @property
    def dp_rank(self) -> int:
        """Index of this rank's share of the examples."""
        return self.rank // (self.tp * self.cp) % self.dp

    @property
    def replica(self) -> int:
        """Index of this rank among those of dp x cp."""
        return self.rank // self.tp % (self.cp * self.dp)

    @property
    def ep_rank(self) -> int:
        return self.replica % self.ep

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp * self.cp * self.dp)

    @property
    def last_stage(self) -> bool:
        """True where `pipeline` yields final hidden states."""
        return self.pp_rank == self.pp - 1

    def group(self, axes: str) -> Group:
        """Return the ranks that differ from this one only along `axes`: "tp", "dp cp", "world".

        "ep" are the ranks that share the experts of a layer, "edp" those that hold the same ones.
        """
        return self.groups.get(axes, ALONE)

    def size(self, axes: str) -> int:
        """Return the number of ranks of `group(axes)`. It needs no process group."""
        sizes = {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp, "ends": 2}
        sizes |= {"ep": self.ep, "edp": self.dp * self.cp // self.ep}
        return math.prod(sizes[axis] for axis in axes.split())

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over ranks with different examples. Stages without results pass zeros."""
        return self.group("pp dp").all_reduce(values, "sum")

    def everyone(self, value: Any) -> list[Any]:
        """Return a small Python value of every rank, in order of rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def ask(self, question: Callable[[], Any]) -> Any:
        """Call question() on rank 0 alone; all ranks return what it returns or raise its error."""
        answer, error = None, None
        if self.main:
            try:
                answer = question()
            except (ValueError, OSError) as problem:
                if self.world == 1:
                    raise
                error = problem
        if self.world == 1:
            return answer
        box = [(answer, error)]
        dist.broadcast_object_list(box, 0)
        answer, error = box[0]
        if error:
            raise error
        return answer

    @contextlib.contextmanager
    def one_first(self) -> Iterator[None]:
        """Run the block on the first rank of a node, then on the others, which read its cache."""
        if self.world == 1:
            yield
            return
        first = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        if not first:
            dist.barrier()
        try:
            yield
        finally:
            if first:
                dist.barrier()

    def metrics(self, values: dict[str, float]) -> dict[str, float]:
        """Return the metrics of the last pipeline stage on every stage."""
        if self.pp == 1:
            return values
        box = [values]
        dist.broadcast_object_list(box, self.group("pp").ranks[-1], group=self.group("pp").handle)
        return box[0]


def split(total: int, n: int, i: int) -> tuple[int, int]:
    """Return (first, last + 1) of the i-th of n contiguous parts, whose sizes differ by at most 1.

    split(5, 2, 0) -> (0, 2);  split(5, 2, 1) -> (2, 5)
    """
    return total * i // n, total * (i + 1) // n


def join(device: str = "auto", timeout: float = 30.0) -> Mesh:
    """Join the other processes that torchrun started, if any; return a mesh without a layout.

    timeout: minutes to wait for the others, START_MINUTES at least. OSError: they cannot be met.
    """
    global _here
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if world == 1:
        _here = Mesh()
        return _here
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"  # small CPU tensors need not wait for the GPU
    limit = timedelta(minutes=max(timeout, START_MINUTES))
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    except RuntimeError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise OSError(
            f"rank {rank} of {world} did not meet the others at {place} within {limit} "
            f"({str(error).splitlines()[0]}): are all of them started, and is the address right?"
        ) from None
    _here = Mesh(rank, dp=world, store=store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    return _here


def init_mesh(
    tp: int = 1, cp: int = 1, pp: int = 1, device: str = "auto", timeout=30.0, ep: int = 1
) -> Mesh:
    """Lay the processes out, and join them first where `join` has not.

    ValueError: --tp, --cp, --pp and --ep do not divide the processes; it says what fits.
    """
    global _here
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if min(tp, cp, pp, ep) < 1:
        raise ValueError(f"--tp {tp}, --cp {cp}, --pp {pp} and --ep {ep} must be at least 1")
    unit = tp * cp * pp
    if world % unit:
        start = -(-world // unit) * unit
        fix = f" (torchrun --nproc_per_node {start})" if world == 1 else " or lower one of them"
        raise ValueError(
            f"--tp {tp} x --cp {cp} x --pp {pp} takes a multiple of {unit} processes, torchrun "
            f"started {world}: start {start}{fix}"
        )
    shared = world // (tp * pp)  # ranks of dp x cp
    if shared % ep:
        fitting = [n for n in range(1, shared + 1) if shared % n == 0]
        raise ValueError(
            f"--ep {ep} must divide the {shared} ranks of data and context parallelism: use one of "
            f"{', '.join(map(str, fitting))}, or start {tp * pp * math.lcm(cp, ep)} processes"
        )
    if not dist.is_initialized():
        join(device, timeout)
    if world > 1:
        limit = timedelta(minutes=max(timeout, START_MINUTES))
        _here = grid(_here.rank, pp, world // unit, cp, tp, _here.store, limit, ep)
    return _here


def limit_waits(mesh: Mesh, minutes: float) -> None:
    """Let no collective wait longer than this from now on.

    The start of a run waits longer: one rank tokenises while the others wait.
    """
    handles = [group.handle for group in mesh.groups.values() if group.handle is not None]
    for handle in handles:
        dist.distributed_c10d._set_pg_timeout(timedelta(minutes=minutes), handle)
    if mesh.store is not None:
        mesh.store.set_timeout(timedelta(minutes=minutes))


_here = Mesh()


def here() -> Mesh:
    """Return the mesh of this process, for reports after a failure."""
    return _here


def grid(
    rank: int,
    pp: int,
    dp: int,
    cp: int,
    tp: int,
    store: Any = None,
    limit: timedelta | None = None,
    ep: int = 1,
) -> Mesh:
    """Make the groups of a mesh in the default group; limit: of waits, None = torch's default."""
    ranks = torch.arange(pp * dp * cp * tp).view(pp, dp, cp, tp)
    groups = {"world": Group(tuple(range(ranks.numel())), rank, dist.group.WORLD)}
    axes = ["pp", "dp", "cp", "tp"]
    for name in ("tp", "cp", "pp", "cp tp", "dp", "pp dp", "dp cp", "dp cp tp"):
        keep = [axes.index(axis) for axis in name.split()]
        rest = [i for i in range(4) if i not in keep]
        rows = ranks.permute(*rest, *keep).reshape(-1, math.prod(ranks.shape[i] for i in keep))
        groups[name] = _join(rows.tolist(), rank, limit)
    if ep > 1:  # neighbours of dp x cp share experts, every ep-th of them holds the same
        spread = ranks.view(pp, dp * cp // ep, ep, tp)
        shared = {"ep": spread.movedim(2, 3), "edp": spread.movedim(1, 3)}
        shared["edp tp"] = spread.movedim(1, 2).flatten(2)
        for name, some in shared.items():
            groups[name] = _join(some.flatten(0, -2).tolist(), rank, limit)
    if pp > 1:  # a tied embedding is on the first and on the last stage
        ends = ranks[[0, -1]].permute(3, 0, 1, 2).reshape(tp, -1)
        groups["ends dp cp"] = _join(ends.tolist(), rank, limit)
    return Mesh(rank, pp, dp, cp, tp, groups, store, ep)


def _join(rows: list[list[int]], rank: int, limit: timedelta | None) -> Group:
    """Make all groups along some axes, as c10d requires of every rank, and return this rank's."""
    mine = ALONE
    for row in rows:
        if len(row) == 1:
            mine = Group(tuple(row), 0) if rank in row else mine
            continue
        handle = dist.new_group(row, timeout=limit)  # the world's limit is not inherited
        if rank in row:
            mine = Group(tuple(row), row.index(rank), handle)
    return mine


def close() -> None:
    """Leave the process group once all ranks are done with it."""
    if _here.world > 1:
        dist.barrier()
        dist.destroy_process_group()


# ---- tensor and sequence parallel ----------------------------------------------------------------

# Between two blocks every tensor rank holds ceil(T / n) rows of the residual stream, the last ones
# padded with zeros. Inside a block it needs all T rows for its share of the heads or of the MLP.


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rows, group):
        ctx.group = group
        return group.all_gather(x, "tp")[:rows]

    @staticmethod
    def backward(ctx, grad):
        return ctx.group.reduce_scatter(_pad(grad, ctx.group.n), "tp"), None, None


class _Exit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group, ctx.rows = group, x.shape[0]
        return group.reduce_scatter(_pad(x, group.n), "tp")

    @staticmethod
    def backward(ctx, grad):
        return ctx.group.all_gather(grad, "tp")[: ctx.rows], None


def _pad(x: Tensor, n: int) -> Tensor:
    """Append rows of zeros up to a multiple of n."""
    spare = -x.shape[0] % n
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, spare)) if spare else x


def enter(x: Tensor, rows: int, group: Group) -> Tensor:
    """Gather the residual stream: (ceil(T / n), D) -> (T, D), T = rows; in ColumnLinear.

    forward: all-gather of x             backward: reduce-scatter of the gradient
    """
    return x if group.n == 1 else _Enter.apply(x, rows, group)


def exit(x: Tensor, group: Group) -> Tensor:
    """Add the ranks' partial products: (T, D) -> (ceil(T / n), D), this rank's rows; in RowLinear.

    forward: reduce-scatter of x         backward: all-gather of the gradient
    """
    return x if group.n == 1 else _Exit.apply(x, group)


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return group.all_reduce(x, "tp")

    @staticmethod
    def backward(ctx, grad):
        return ctx.group.all_reduce(grad.contiguous(), "tp"), None


def sum_over(x: Tensor, group: Group) -> Tensor:
    """Sum (T, k) over the ranks by an all-reduce; backward: an all-reduce of the gradient."""
    return x if group.n == 1 else _SumOver.apply(x, group)


class _Assemble(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, places, total, group):
        ctx.save_for_backward(places)
        whole = values.new_zeros(total, *values.shape[1:]).index_copy(0, places, values)
        return group.all_reduce(whole, "logps")

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None, None


def assemble(values: Tensor, places: Tensor, total: int, group: Group) -> Tensor:
    """Put the rows of all ranks together: (k, ...) at indices `places` (k,) -> (total, ...).

    forward: all-reduce of a (total, ...) that is 0 elsewhere
    backward: nothing is sent, as all ranks compute the same from the result
    """
    return values if group.n == 1 else _Assemble.apply(values, places, total, group)
