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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, overload

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

NORM_ROW = 1 << 12  # elements whose squares are added up in fp32
BUCKET = (
    1 << 25
)  # elements of a bucket: large enough for full bandwidth, small enough to start early
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
        """The ranks that differ from this one along some axes only: "tp", "dp cp", ... or "world"."""
        return self.groups.get(axes, ALONE)

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


@overload
def pipeline(model: Any, batches: Iterable[Any]) -> Iterator[tuple[Any, Tensor]]: ...


@overload
def pipeline(
    model: Any, batches: list[Any], optimizer: "AdamW"
) -> Iterator[tuple[Any, Tensor]]: ...


def pipeline(
    model: Any, batches: Any, optimizer: "AdamW | None" = None
) -> Iterator[tuple[Any, Tensor]]:
    """Micro-batches one after another, each with its final hidden states; the caller's loop computes the loss and calls
    backward on it. Without an optimizer, under torch.no_grad(), only forward.

    With several stages (--pp) only the last one yields. The others run their blocks in step with it, one forward and
    one backward at a time (1F1B, arXiv 2104.04473): a stage holds the activations of at most `pp` micro-batches.
    """
    device, stages = model.device, model.mesh.pp
    if stages > 1 and optimizer:
        yield from _one_forward_one_backward(model, batches, optimizer)
        return
    for i, batch in enumerate(batches):
        batch = batch.to(device)
        if optimizer:
            optimizer.expect(last=i + 1 == len(batches))
        x = _exchange(model, receive=(-1, batch)) if stages > 1 and model.mesh.pp_rank else None
        y = model(batch, x)
        if model.mesh.last_stage:
            yield batch, y
        else:
            _exchange(model, send=(1, y))
        if optimizer:
            optimizer.collect()


def _one_forward_one_backward(
    model: Any, batches: list[Any], optimizer: "AdamW"
) -> Iterator[tuple[Any, Tensor]]:
    mesh, n = model.mesh, len(batches)
    first, last = mesh.pp_rank == 0, mesh.last_stage
    batches = [batch.to(model.device) for batch in batches]
    ahead = min(mesh.pp - 1 - mesh.pp_rank, n)  # forwards before the first backward
    waiting: deque[tuple[Tensor | None, Tensor]] = (
        deque()
    )  # input and output of forwards without backward

    def backward(i: int, grad: Tensor) -> Tensor | None:
        x, y = waiting.popleft()
        optimizer.expect(last=i + 1 == n)
        y.backward(grad)
        return None if x is None else x.grad

    for i in range(ahead):
        x = None if first else _exchange(model, receive=(-1, batches[i]))
        y = model(batches[i], x)
        waiting.append((x, y))
        _exchange(model, send=(1, y))
    x = None if first or ahead == n else _exchange(model, receive=(-1, batches[ahead]))
    for i in range(ahead, n):
        y = model(batches[i], x)
        waiting.append((x, y))
        if last:
            leaf = y.detach().requires_grad_()
            optimizer.expect(last=i + 1 == n)
            yield batches[i], leaf
            grad = leaf.grad
        else:
            grad = _exchange(model, send=(1, y), receive=(1, batches[i - ahead]))
        down = backward(i - ahead, grad)
        if not first:
            following = (-1, batches[i + 1]) if i + 1 < n else None
            x = _exchange(model, send=(-1, down), receive=following)
        optimizer.collect()  # not before: a tied embedding waits for stage 0, which waits for this stage's `down`
    for i in range(n - ahead, n):
        down = backward(i, _exchange(model, receive=(1, batches[i])))
        if not first:
            _exchange(model, send=(-1, down))
        optimizer.collect()


def _exchange(
    model: Any, send: tuple[int, Tensor] | None = None, receive: tuple[int, Any] | None = None
):
    """Sends a tensor to a neighbour stage (-1 before, 1 after) and receives one of a micro-batch's shape, at once."""
    pp, here = model.mesh.group("pp"), model.mesh.pp_rank
    x = None
    transfers: list[tuple[Callable, Tensor, int]] = []
    if send:
        out = send[1].detach().contiguous()
        SENT["pp"] += out.nbytes
        transfers.append((dist.isend, out, send[0]))
    if receive:
        x = torch.empty(model.hidden_shape(receive[1]), dtype=model.dtype, device=model.device)
        transfers.append((dist.irecv, x, receive[0]))
    transfers = [
        (way, x, side) for way, x, side in transfers if x.numel()
    ]  # an empty one is not worth a message
    for work in dist.batch_isend_irecv([
        dist.P2POp(way, x, pp.ranks[here + side], pp.handle) for way, x, side in transfers
    ]) if transfers else ():  # fmt: skip
        work.wait()
    return x.requires_grad_(torch.is_grad_enabled()) if receive else None


# ---- the optimizer ---------------------------------------------------------------------------------------------------


class Bucket:
    """Parameters of one kind, side by side in flat buffers: the weights and gradients of a model are views into them.

    weights: (m,) in the model's type, m a multiple of the ranks that hold the same.  Each of them owns a piece of it:
    master: (m / n,) fp32 at least, what AdamW works on; IS the piece of the weights where they are exact enough.
    grad: (m,) fp32 at least, summed into `shard`, (m / n,), which is this rank's piece of it (ZeRO-1); or no more than
    `shard` while gradients come and go micro-batch by micro-batch (ZeRO-2, where there are ranks to share with).
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], group: Group, zero: int):
        self.named, self.group, self.keep_whole = named, group, zero < 2 or group.n == 1
        first = named[0][1]
        self.exact = torch.promote_types(first.dtype, torch.float32)
        used = sum(p.numel() for _, p in named)
        size = -(-used // group.n) * group.n
        low, high = size // group.n * group.place, size // group.n * (group.place + 1)
        self.own = slice(low, high)
        self.weights = torch.zeros(size, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros(
            size if self.keep_whole else 0, dtype=self.exact, device=first.device
        )
        for (_, p), weights in zip(named, self.views(self.weights)):
            weights.copy_(p.data)
            p.data = weights
            p.grad_dtype = self.exact  # so that bf16 gradients of many micro-batches add up in fp32
        if self.keep_whole:
            for (_, p), grad in zip(named, self.views(self.grad)):
                p.grad = grad
        self.shard = (
            self.grad[self.own]
            if self.keep_whole
            else torch.zeros_like(self.weights[self.own], dtype=self.exact)
        )
        own = self.weights[self.own]
        self.master = nn.Parameter(own if first.dtype == self.exact else own.to(self.exact))
        self.master.grad = self.shard
        self.missing = len(named)  # parameters whose gradient this micro-batch still owes
        self.work: Any = None  # a reduce-scatter or all-gather under way
        self.incoming: tuple[Tensor, ...] = ()  # ZeRO-2: what the reduce-scatter reads and fills

    def views(self, flat: Tensor) -> list[Tensor]:
        """Cuts a flat buffer into the shapes of the parameters."""
        sizes = [p.numel() for _, p in self.named]
        parts = flat[: sum(sizes)].split(sizes)
        return [part.view(p.shape) for part, (_, p) in zip(parts, self.named)]

    def pieces(self, flat: Tensor) -> Iterator[tuple[str, int, Tensor]]:
        """(name, first element, piece) of every parameter that this rank's piece of a flat buffer has something of."""
        at = 0
        for name, p in self.named:
            low, high = max(at, self.own.start), min(at + p.numel(), self.own.stop)
            if low < high:
                yield name, low - at, flat[low - self.own.start : high - self.own.start]
            at += p.numel()

    def start_reduce(self) -> None:
        """Begins to add up gradients over the ranks."""
        if self.group.n == 1:
            return
        if self.keep_whole:
            self.work = self.group.reduce_scatter(self.grad, "dp", out=self.shard, wait=False)
            return
        parts = [
            torch.zeros_like(p, dtype=self.exact) if p.grad is None else p.grad
            for _, p in self.named
        ]
        spare = len(self.weights) - sum(p.numel() for p in parts)
        flat = torch.cat([*(p.flatten() for p in parts), self.shard.new_zeros(spare)])
        for _, p in self.named:
            p.grad = None
        out = torch.empty_like(self.shard)
        self.work, self.incoming = (
            self.group.reduce_scatter(flat, "dp", out=out, wait=False),
            (flat, out),
        )

    def finish_reduce(self) -> None:
        self.arrive()
        if self.incoming:
            self.shard.add_(self.incoming[1])
            self.incoming = ()

    def start_gather(self) -> None:
        """Begins to send this rank's new weights to the others."""
        self.work = self.group.all_gather(
            self.weights[self.own], "dp", out=self.weights, wait=False
        )

    def arrive(self) -> None:
        """Waits for what is under way."""
        if self.work is not None:
            self.work.wait()
            self.work = None


def _square_sum(flat: Tensor) -> Tensor:
    """Σ x² in fp64 without an fp64 copy: short rows are summed as they are, only the rows' sums are widened."""
    body = flat[: flat.numel() // NORM_ROW * NORM_ROW].view(-1, NORM_ROW)
    norms = [
        torch.linalg.vector_norm(body, dim=1),
        torch.linalg.vector_norm(flat[body.numel() :])[None],
    ]
    return torch.cat(norms).double().square().sum()


class AdamW:
    """AdamW (arXiv 1711.05101) on flat fp32 master weights; norms and biases do not decay. Its arithmetic is torch's.

    Ranks that hold the same weights share the work (ZeRO, arXiv 1910.02054): each owns a piece of the master weights
    and of both means. zero=1 keeps whole gradients and adds them up once a step, while the last backward still runs;
    zero=2 adds them up after every micro-batch and keeps only its piece. New weights travel while the next forward
    runs: `model.wait()` before reading them elsewhere.
    """

    def __init__(
        self, model: Any, betas: tuple[float, float], eps: float, weight_decay: float, zero: int = 1
    ):
        self.model, self.zero, mesh = model, zero, model.mesh
        self.world = mesh.group("world")
        kinds: dict[tuple, list[list]] = {}
        # Gradients arrive about in reverse: so do the buckets. A bucket's weights decay or not, and are the same on the
        # ranks of one group: those of a tensor slice over data and context, norms (of which every tensor rank has seen
        # its rows only) over all three.
        for name, p in reversed(list(model.named_parameters())):
            kind = (model.replicas(name), p.dim() >= 2)
            parts = kinds.setdefault(kind, [[]])
            if parts[-1] and sum(q.numel() for _, q in parts[-1]) + p.numel() > BUCKET:
                parts.append([])
            parts[-1].append((name, p))
        self.buckets = [
            Bucket(part, mesh.group(kind[0]), zero)
            for kind, parts in kinds.items()
            for part in parts
        ]
        groups = [
            {
                "params": [b.master],
                "weight_decay": weight_decay if b.named[0][1].dim() >= 2 else 0.0,
            }
            for b in self.buckets
        ]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)
        self.parts: dict[
            str, list[Bucket]
        ] = {}  # of the model, with the buckets to wait for before they run
        for b in self.buckets:
            for name, _ in b.named:
                buckets = self.parts.setdefault(
                    ".".join(name.split(".")[: 2 if name.startswith("blocks") else 1]), []
                )
                if b not in buckets:
                    buckets.append(b)
        self.early = False  # whether buckets leave as soon as they are full
        self.next = 0  # bucket to leave next: the same order on every rank, whatever order gradients come in
        self.collected = False
        for b in self.buckets:
            if b.group.n > 1:
                for _, p in b.named:
                    p.register_post_accumulate_grad_hook(lambda p, b=b: self._arrived(b))

    def expect(self, last: bool) -> None:
        """A backward is about to run; `last`: that of the step's last micro-batch."""
        self.early = last or self.zero == 2
        self.collected = False

    def _arrived(self, bucket: Bucket) -> None:
        bucket.missing -= 1
        while self.early and self.next < len(self.buckets) and self.buckets[self.next].missing == 0:
            self.buckets[self.next].start_reduce()
            if (
                self.zero == 2 and self.next > 1
            ):  # two on their way at most, or whole gradients would pile up in them
                self.buckets[self.next - 2].finish_reduce()
            self.next += 1

    def collect(self) -> None:
        """A backward is over: adds up what is due over the ranks, and waits for it."""
        if self.early:
            for b in self.buckets[self.next :]:
                b.start_reduce()
            for b in self.buckets:
                b.finish_reduce()
        for b in self.buckets:
            b.missing = len(b.named)
        self.next, self.collected = 0, self.early

    @torch.no_grad()
    def step(self, lr: float, clip: float, stop: object = False) -> tuple[float, bool]:
        """One update from the accumulated gradients, which are zero afterwards. `stop`: true where this rank wants to.

        Returns their norm before clipping, and whether any rank wants to stop. Where the norm is not finite (on any
        rank) nothing changes but the gradients: the caller sees it in the result.
        """
        if not self.collected:
            self.early = True
            self.collect()
        # One sum carries all that ranks must agree on. It is taken on the CPU where the host waits for it anyway.
        squares = torch.stack([_square_sum(b.shard) for b in self.buckets]).sum().cpu()
        squares, stopping = self.world.all_reduce(
            torch.stack((squares, squares.new_tensor(bool(stop)))), "control"
        )
        norm = math.sqrt(squares.item())
        if math.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = lr
            shrink = (
                clip / (norm + 1e-6) if clip else 1.0
            )  # as torch.nn.utils.clip_grad_norm_ has it
            if shrink < 1:
                for b in self.buckets:
                    b.shard.mul_(shrink)
            self.adam.step()
            for b in reversed(self.buckets):  # in the order of the next forward
                self._publish(b)
            self.model.coming = {part: list(buckets) for part, buckets in self.parts.items()}
        for b in self.buckets:
            b.grad.zero_()
            b.shard.zero_()
        self.collected = False
        return norm, bool(stopping)

    def _publish(self, b: Bucket) -> None:
        if b.master.data_ptr() != b.weights[b.own].data_ptr():
            b.weights[b.own].copy_(b.master)
        b.start_gather()

    def state(self) -> tuple[dict[str, tuple[int, Tensor]], int]:
        """What this rank has to save: "kind/parameter" -> (first element, flat piece); and the number of updates."""
        pieces, updates = {}, 0
        for b in self.buckets:
            adam = self.adam.state.get(b.master, {})
            flat = {
                "master": b.master.data,
                "exp_avg": adam.get("exp_avg"),
                "exp_avg_sq": adam.get("exp_avg_sq"),
            }
            updates = int(adam.get("step", 0))
            for kind, buffer in flat.items():
                if buffer is not None:
                    pieces |= {
                        f"{kind}/{name}": (at, piece) for name, at, piece in b.pieces(buffer)
                    }
        return pieces, updates

    @torch.no_grad()
    def load_state(self, read: Callable[[str, str, int, int], Tensor], updates: int) -> None:
        """Puts back what `state` gave, on any layout. read(kind, parameter, first, last + 1) -> that flat piece."""
        for b in self.buckets:
            buffers = {"master": b.master.data}
            if updates:
                buffers |= {
                    "exp_avg": torch.zeros_like(b.shard),
                    "exp_avg_sq": torch.zeros_like(b.shard),
                }
                step = torch.tensor(float(updates), device=b.shard.device)
                self.adam.state[b.master] = {
                    "step": step,
                    **{k: buffers[k] for k in ("exp_avg", "exp_avg_sq")},
                }
            for kind, buffer in buffers.items():
                for name, at, piece in b.pieces(buffer):
                    piece.copy_(read(kind, name, at, at + len(piece)))
            self._publish(b)
            b.arrive()
