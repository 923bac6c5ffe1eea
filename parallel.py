"""Ranks, what they say to each other, and the optimizer whose state is sharded over them.

    mesh = init_mesh(tp=2, cp=1, pp=2, device="cuda")           the grid of ranks; what is left over is data parallel
    for batch, hidden in pipeline(model, batches, optimizer):   micro-batches through the stages, one after another
        ...loss.backward()
    norm, stopping = optimizer.step(lr, clip, stop)             one update, the same on every rank

    rank = ((pp * DP + dp) * CP + cp) * TP + tp       tensor slices are neighbours: they talk most

One process is a mesh of one: every group has one rank, and nothing is ever sent. Runs on gloo (CPU) and NCCL (GPUs);
all of it is tested on gloo in float64, none of it has ever run on NCCL with more than one GPU.

Letters: T tokens of a flat row, D width, n ranks of a group.
"""

import contextlib
import datetime
import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

SENT: Counter[str] = (
    Counter()
)  # bytes this rank has sent, by purpose: plan.py predicts them, a test compares

# torch 2.13 renames them; both names do the same.
_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_from = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


# ---- the mesh --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """Some ranks that talk to each other, and this rank's place among them. Every collective of the project is here."""

    ranks: tuple[int, ...] = (0,)
    place: int = 0
    handle: Any = None  # c10d's group; None where there is one rank

    @property
    def n(self) -> int:
        return len(self.ranks)

    def all_gather(
        self, x: Tensor, purpose: str, out: Tensor | None = None, wait: bool = True
    ) -> Any:
        """(k, ...) of every rank -> (n k, ...), in order. wait=False returns the work to wait for; `out` is filled."""
        if self.n == 1:
            return x if wait else None
        out = x.new_empty(self.n * x.shape[0], *x.shape[1:]) if out is None else out
        SENT[purpose] += out.nbytes // self.n * (self.n - 1)
        work = _gather_into(out, x.contiguous(), group=self.handle, async_op=not wait)
        return out if wait else work

    def reduce_scatter(
        self, x: Tensor, purpose: str, out: Tensor | None = None, wait: bool = True
    ) -> Any:
        """(n k, ...) of every rank, summed -> this rank's (k, ...). wait=False returns the work; `out` is filled."""
        if self.n == 1:
            return x if wait else None
        out = x.new_empty(x.shape[0] // self.n, *x.shape[1:]) if out is None else out
        SENT[purpose] += x.nbytes // self.n * (self.n - 1)
        work = _scatter_from(out, x.contiguous(), group=self.handle, async_op=not wait)
        return out if wait else work

    def all_reduce(self, x: Tensor, purpose: str) -> Tensor:
        """The sum over the ranks, in a tensor of its own. SUM only: gloo's MAX loses a NaN on some ranks."""
        if self.n == 1:
            return x
        SENT[purpose] += 2 * x.nbytes * (self.n - 1) // self.n
        x = x.clone()
        dist.all_reduce(x, group=self.handle)
        return x


@dataclass(frozen=True)
class Mesh:
    """Where this process stands in the grid of all of them."""

    rank: int = 0
    pp: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    groups: dict[str, Group] = field(default_factory=dict)
    store: Any = None  # c10d's key-value store: outlives a broken group

    @property
    def world(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def main(self) -> bool:
        """The rank that prints, logs and commits."""
        return self.rank == 0

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def cp_rank(self) -> int:
        return self.rank // self.tp % self.cp

    @property
    def dp_rank(self) -> int:
        """Which share of the examples is this rank's."""
        return self.rank // (self.tp * self.cp) % self.dp

    @property
    def pp_rank(self) -> int:
        return self.rank // (self.tp * self.cp * self.dp)

    @property
    def last_stage(self) -> bool:
        """Whether this rank sees final hidden states, and so runs the body of the loop over `pipeline`."""
        return self.pp_rank == self.pp - 1

    def group(self, axes: str) -> Group:
        """Return the ranks that differ from this one along some axes only: "tp", "dp cp", "world"."""
        return self.groups.get(axes, ALONE)

    def size(self, axes: str) -> int:
        """Return the number of ranks in such a group, also where there is no process group."""
        sizes = {"pp": self.pp, "dp": self.dp, "cp": self.cp, "tp": self.tp, "ends": 2}
        return math.prod(sizes[axis] for axis in axes.split())

    def sum(self, values: Tensor) -> Tensor:
        """Adds up over the ranks that hold different examples; pipeline stages that hold none give zeros."""
        return self.group("pp dp").all_reduce(values, "sum")

    def everyone(self, value: Any) -> list[Any]:
        """A small Python value of every rank, in order, on every rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def ask(self, question: Callable[[], Any]) -> Any:
        """Answers a question on rank 0 alone and tells everyone. What it raises there, every rank raises."""
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
        """Rank 0 of every node runs the block first, the others then find in the cache what it left there."""
        if self.world == 1:
            yield
            return
        early = int(os.environ.get("LOCAL_RANK", self.rank)) == 0
        if not early:
            dist.barrier()
        try:
            yield
        finally:
            if early:
                dist.barrier()

    def metrics(self, values: dict[str, float]) -> dict[str, float]:
        """What the last pipeline stage found, on every rank."""
        if self.pp == 1:
            return values
        box = [values]
        dist.broadcast_object_list(box, self.group("pp").ranks[-1], group=self.group("pp").handle)
        return box[0]


ALONE = Group()


def split(total: int, n: int, i: int) -> tuple[int, int]:
    """(first, last + 1) of the i-th of n parts of `total` things: contiguous, sizes differ by one at most."""
    return total * i // n, total * (i + 1) // n


def init_mesh(
    tp: int = 1, cp: int = 1, pp: int = 1, device: str = "auto", timeout: float = 30.0
) -> Mesh:
    """Joins the other processes that torchrun started, if any. timeout: minutes that a rank may let others wait.

    ValueError: --tp, --cp and --pp that do not divide the number of processes, with what would.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if min(tp, cp, pp) < 1:
        raise ValueError(f"--tp {tp}, --cp {cp} and --pp {pp} must be at least 1")
    if world % (tp * cp * pp):
        more = -(-world // (tp * cp * pp)) * tp * cp * pp
        raise ValueError(
            f"--tp {tp} x --cp {cp} x --pp {pp} takes a multiple of {tp * cp * pp} processes, torchrun started {world}:"
            f" start {more}"
            + (f" (torchrun --nproc_per_node {more})" if world == 1 else " or lower one of them")
        )
    global _here
    if world == 1:
        _here = Mesh()
        return _here
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"  # small things go over the CPU and do not wait for the GPU
    limit = datetime.timedelta(minutes=timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    _here = grid(rank, pp, world // (tp * cp * pp), cp, tp, store, limit)
    return _here


_here = Mesh()


def here() -> Mesh:
    """The mesh of this process, for what has to be said after a failure."""
    return _here


def grid(
    rank: int,
    pp: int,
    dp: int,
    cp: int,
    tp: int,
    store: Any = None,
    limit: datetime.timedelta | None = None,
) -> Mesh:
    """The mesh of a process group that is there already. limit: how long a rank waits for others; None: torch's own."""
    ranks = torch.arange(pp * dp * cp * tp).view(pp, dp, cp, tp)
    groups = {"world": Group(tuple(range(ranks.numel())), rank, dist.group.WORLD)}
    axes = ["pp", "dp", "cp", "tp"]
    for name in ("tp", "cp", "pp", "cp tp", "dp", "pp dp", "dp cp", "dp cp tp"):
        keep = [axes.index(axis) for axis in name.split()]
        rest = [i for i in range(4) if i not in keep]
        rows = ranks.permute(*rest, *keep).reshape(-1, math.prod(ranks.shape[i] for i in keep))
        groups[name] = _join(rows.tolist(), rank, limit)
    if pp > 1:  # an embedding that is the head as well lives on the first and on the last stage
        ends = ranks[[0, -1]].permute(3, 0, 1, 2).reshape(tp, -1)
        groups["ends dp cp"] = _join(ends.tolist(), rank, limit)
    return Mesh(rank, pp, dp, cp, tp, groups, store)


def _join(rows: list[list[int]], rank: int, limit: datetime.timedelta | None) -> Group:
    """This rank's group of several; c10d wants every rank to make all of them, in the same order."""
    mine = ALONE
    for row in rows:
        if len(row) == 1:
            mine = Group(tuple(row), 0) if rank in row else mine
            continue
        handle = dist.new_group(row, timeout=limit)  # it does not inherit the world's
        if rank in row:
            mine = Group(tuple(row), row.index(rank), handle)
    return mine


def close() -> None:
    """Leaves the others in good order: nobody's connections go while somebody still needs them."""
    if _here.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def is_about_others(error: Exception) -> bool:
    """Whether an error only says that talking to the others failed, and not why."""
    return isinstance(error, dist.DistError) or "gloo/" in str(
        error
    )  # gloo's are plain RuntimeErrors


def last_words(mesh: Mesh, words: str, patience: float) -> str:
    """Leaves this rank's last words in the store, and reads the others': who failed first, and who does not answer.

    Called when something failed; the groups may be broken by then, torchrun's store is not. patience: seconds to wait
    for the others' words.
    """
    said: dict[int, str] = {}
    until = time.monotonic() + patience

    def talk() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone
            ask()

    def ask() -> None:
        mesh.store.set(f"last words {mesh.rank}", f"{time.time()} {words}")
        while True:
            for other in range(mesh.world):
                if other not in said and mesh.store.check([f"last words {other}"]):
                    said[other] = mesh.store.get(f"last words {other}").decode()
            if len(said) == mesh.world or time.monotonic() >= until:
                return
            time.sleep(0.05)

    # In a thread: without torchrun rank 0 holds the store, and a store that hangs lets its callers wait for ever.
    thread = threading.Thread(target=talk, daemon=True)
    thread.start()
    thread.join(patience + 1)
    if mesh.rank not in said:
        return "rank 0 does not answer: it is dead or hung, or the network to its node is"
    silent = [str(other) for other in range(mesh.world) if other not in said]
    if silent:
        return f"rank {', '.join(silent)} does not answer: dead, or hung"
    first = min(said, key=lambda other: float(said[other].split()[0]))
    return f"rank {first} failed first: {said[first].partition(' ')[2]}"


# ---- tensor and sequence parallel ------------------------------------------------------------------------------------

# Between two blocks every tensor rank holds ceil(T / n) rows of the flat row (the last ones padded with zeros). A block
# needs all T rows for its share of the heads or of the MLP:
#
#     Y_i = enter(x) W_i        columns of W: all-gather of rows forward, reduce-scatter of gradients backward
#     y   = exit(Y_i V_i)       rows of V:    reduce-scatter of partial sums forward, all-gather backward


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
    """Rows of zeros up to a multiple of n."""
    spare = -x.shape[0] % n
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, spare)) if spare else x


def enter(x: Tensor, rows: int, group: Group) -> Tensor:
    """(ceil(T / n), D) -> (T, D), T = rows: before a matmul whose columns are shared out."""
    return x if group.n == 1 else _Enter.apply(x, rows, group)


def exit(x: Tensor, group: Group) -> Tensor:
    """Partial sums (T, D) -> this rank's rows of their sum, (ceil(T / n), D): after a matmul whose rows are shared."""
    return x if group.n == 1 else _Exit.apply(x, group)


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
    """Rows that the ranks of a group hold of one tensor, (k, ...) at `places` (k,), into all of it, (total, ...).

    Every rank goes on with the same numbers and finds the same gradient, of which each takes its own rows.
    """
    return values if group.n == 1 else _Assemble.apply(values, places, total, group)


# ---- context parallel ------------------------------------------------------------------------------------------------


class _GatherRows(torch.autograd.Function):
    """Rows of the flat row from every context rank: k and v before attention.

    forward  all-gather, then the rows into their places    backward  gradients by rank, then reduce-scatter
    """

    @staticmethod
    def forward(ctx, x, shares, group):
        ctx.shares, ctx.group, ctx.own = shares, group, x.shape[0]
        most = max(len(share) for share in shares)
        parts = group.all_gather(
            F.pad(x, (0, 0) * (x.dim() - 1) + (0, most - x.shape[0])), "cp"
        ).split(most)
        whole = x.new_empty(sum(map(len, shares)), *x.shape[1:])
        for share, part in zip(shares, parts):
            whole[share] = part[: len(share)]
        return whole

    @staticmethod
    def backward(ctx, grad):
        most = max(len(share) for share in ctx.shares)
        parts = grad.new_zeros(len(ctx.shares), most, *grad.shape[1:])
        for part, share in zip(parts, ctx.shares):
            part[: len(share)] = grad[share]
        return ctx.group.reduce_scatter(parts.flatten(0, 1), "cp")[: ctx.own], None, None


def gather_rows(x: Tensor, shares: list[Tensor], group: Group) -> Tensor:
    """This rank's rows (k, ...) -> those of all ranks in order, (T, ...). shares: the places of every rank's rows."""
    return x if group.n == 1 else _GatherRows.apply(x, shares, group)


# ---- pipeline parallel -----------------------------------------------------------------------------------------------


# ---- the optimizer ---------------------------------------------------------------------------------------------------
