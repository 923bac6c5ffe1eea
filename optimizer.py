import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from parallel import Group

NORM_ROW = 1 << 12  # elements whose squares are added up in fp32


BUCKET = (
    1 << 25
)  # elements of a bucket: large enough for full bandwidth, small enough to start early


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
