"""Master weights and AdamW of one flat piece of weights, beside it or in host memory.

    master.fetch(shard)          begin to bring the gradient to the master weights
    master.update(lr, shrink)    AdamW, once the gradient is there
    master.write_back()          the new weights, in the model's dtype

With --offload optimizer a GPU keeps weights and gradients alone. Its gradients go to pinned host
memory, the CPU updates bucket after bucket, and the weights go back in the model's dtype:

    GPU to host    gradient 0 | gradient 1 | gradient 2 |
    CPU                       | update 0   | update 1   | update 2
    host to GPU                            | weights 0  | weights 1 | weights 2
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from kernels.device import copies_done, host_buffer


class Master:
    """The exact copy of a piece of weights, (k,), with both moments of AdamW (arXiv 1711.05101).

    value    fp32 at least: the piece itself, where that is exact enough and nothing is offloaded
    """

    def __init__(
        self,
        piece: Tensor,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        offload: bool,
    ):
        self.piece = piece
        exact = torch.promote_types(piece.dtype, torch.float32)
        self.host: Tensor | None = None  # with offload: the memory of `value`
        value = piece.to(exact)  # no copy where the dtype is the same
        if offload:
            value = self.host = host_buffer(piece, exact).copy_(value)
            self.incoming: Tensor | None = None  # buffer for gradients, made at the first one
            same = piece.dtype == exact
            self.outgoing = self.host if same else host_buffer(piece, piece.dtype)
        self.value = nn.Parameter(value)
        self.adam = torch.optim.AdamW(
            [self.value], lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
        )
        self.grad: Tensor | None = None
        self.arrived: Callable[[], None] = lambda: None

    def fetch(self, shard: Tensor) -> None:
        """Begin to bring the gradient, (k,), to where the master weights are."""
        self.grad = shard
        if self.host is None:
            return
        if self.incoming is None:
            self.incoming = host_buffer(shard, shard.dtype)
        self.grad = self.incoming.copy_(shard, non_blocking=shard.is_cuda)
        self.arrived = copies_done(shard.device)

    def update(self, lr: float, shrink: float) -> None:
        """Update the master weights from the gradient, times `shrink` where that is below 1."""
        assert self.grad is not None, "fetch comes first"
        self.arrived()
        grad = self.grad.to(self.value.dtype)  # no copy where the dtype is the same
        if shrink < 1:
            grad.mul_(shrink)
        self.value.grad = grad
        self.adam.param_groups[0]["lr"] = lr
        self.adam.step()
        self.value.grad = self.grad = None

    def write_back(self) -> None:
        """Copy the master weights to the piece. From host memory the GPU copies when it gets there.

        What it reads changes in the next update, which follows a wait of the host for the GPU.
        """
        if self.host is not None:
            if self.outgoing is not self.host:
                self.outgoing.copy_(self.host)
            self.piece.copy_(self.outgoing, non_blocking=self.piece.is_cuda)
        elif self.value.data_ptr() != self.piece.data_ptr():
            self.piece.copy_(self.value.data)

    def state(self) -> tuple[dict[str, Tensor], int]:
        """Return master, exp_avg and exp_avg_sq (before an update the first alone), and updates."""
        adam = self.adam.state.get(self.value, {})
        moments = {kind: adam[kind] for kind in ("exp_avg", "exp_avg_sq") if kind in adam}
        return {"master": self.value.data, **moments}, int(adam.get("step", 0))

    def buffers(self, updates: int) -> dict[str, Tensor]:
        """Return the tensors of `state` to write into, as they are after that many updates."""
        if not updates:
            return {"master": self.value.data}
        moments = {kind: torch.zeros_like(self.value.data) for kind in ("exp_avg", "exp_avg_sq")}
        step = torch.tensor(float(updates), device=self.value.device)
        self.adam.state[self.value] = {"step": step, **moments}
        return {"master": self.value.data, **moments}
