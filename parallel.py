"""Ranks, and the optimizer whose state can be sharded over them.

This version runs in one process: the mesh is a group of one, and every sum over ranks is the number itself. What the
scripts see (rank counts, the flat-bucket optimizer, sums over the mesh) is what they will see with more.
"""

import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NORM_ROW = 1 << 12  # elements whose squares are added up in fp32


@dataclass(frozen=True)
class Mesh:
    """Where this process stands among all of them."""

    rank: int = 0
    dp_rank: int = 0  # which share of the examples is this rank's
    dp: int = 1  # how many shares there are

    def sum(self, values: Tensor) -> Tensor:
        """Adds up over the ranks that hold different examples."""
        return values

    def everyone(self, value):
        """A small Python value of every rank, in order, on every rank."""
        return [value]

    def ask(self, question):
        return question()

    tp_rank = cp_rank = pp_rank = 0
    main = True


def init_mesh() -> Mesh:
    """The mesh of this run, from torchrun's environment. ValueError: more than one process."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise ValueError(f"torchrun started {world} processes, this version trains in one: use --nproc_per_node 1")
    return Mesh()


class Bucket:
    """Parameters of one kind, side by side in flat buffers: the weights and gradients of a model are views into them.

    weights: (n,) in the model's type.  grad: (n,) fp32 at least.  master: (n,) fp32 at least, what AdamW works on; it
    IS the weights where they are exact enough already.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]]):
        self.named = named
        first = named[0][1]
        exact = torch.promote_types(first.dtype, torch.float32)
        size = sum(p.numel() for _, p in named)
        self.weights = torch.empty(size, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros(size, dtype=exact, device=first.device)
        for (_, p), weights, grad in zip(named, self.views(self.weights), self.views(self.grad)):
            weights.copy_(p.data)
            p.data = weights
            p.grad_dtype = exact  # so that bf16 gradients of many micro-batches add up in fp32
            p.grad = grad
        self.master = nn.Parameter(self.weights if first.dtype == exact else self.weights.to(exact))
        self.master.grad = self.grad

    def views(self, flat: Tensor) -> list[Tensor]:
        """Cuts a flat buffer into the shapes of the parameters."""
        sizes = [p.numel() for _, p in self.named]
        return [part.view(p.shape) for part, (_, p) in zip(flat.split(sizes), self.named)]


def _square_sum(flat: Tensor) -> Tensor:
    """Σ x² in fp64 without an fp64 copy: short rows are summed as they are, only the rows' sums are widened."""
    body = flat[: flat.numel() // NORM_ROW * NORM_ROW].view(-1, NORM_ROW)
    norms = [torch.linalg.vector_norm(body, dim=1), torch.linalg.vector_norm(flat[body.numel() :])[None]]
    return torch.cat(norms).double().square().sum()


class AdamW:
    """AdamW (arXiv 1711.05101) on flat fp32 master weights; norms and biases do not decay.

    Gradients accumulate in place until `step`. Its arithmetic is torch.optim's.
    """

    def __init__(self, model: nn.Module, betas: tuple[float, float], eps: float, weight_decay: float):
        named = list(model.named_parameters())
        decaying = [(name, p) for name, p in named if p.dim() >= 2]
        flat = [(name, p) for name, p in named if p.dim() < 2]
        self.buckets = [Bucket(part) for part in (decaying, flat) if part]
        groups = [
            {"params": [b.master], "weight_decay": weight_decay if b.named[0][1].dim() >= 2 else 0.0}
            for b in self.buckets
        ]
        self.adam = torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, lr: float, clip: float) -> float:
        """One update from the accumulated gradients, which are zero afterwards. Returns their norm before clipping.

        Where the norm is not finite nothing changes but the gradients: the caller sees it in the result.
        """
        norm = math.sqrt(torch.stack([_square_sum(b.grad) for b in self.buckets]).sum().item())
        if math.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = lr
            shrink = clip / (norm + 1e-6) if clip else 1.0  # as torch.nn.utils.clip_grad_norm_ has it
            if shrink < 1:
                for b in self.buckets:
                    b.grad.mul_(shrink)
            self.adam.step()
            for b in self.buckets:
                if b.master.data_ptr() != b.weights.data_ptr():
                    b.weights.copy_(b.master)
        for b in self.buckets:
            b.grad.zero_()
        return norm

    def state(self) -> tuple[dict[str, Tensor], int]:
        """Everything to save, by parameter and in its shape whatever the buckets are; and the number of updates."""
        tensors, updates = {}, 0
        for b in self.buckets:
            adam = self.adam.state.get(b.master, {})
            flat = {"master": b.master.data, "exp_avg": adam.get("exp_avg"), "exp_avg_sq": adam.get("exp_avg_sq")}
            updates = int(adam.get("step", 0))
            for kind, buffer in flat.items():
                if buffer is not None:
                    tensors |= {f"{kind}/{name}": view for (name, _), view in zip(b.named, b.views(buffer))}
        return tensors, updates

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Puts back what `state` gave. ValueError names a tensor that is missing or of another shape."""
        for b in self.buckets:
            buffers = {"master": b.master.data}
            if updates:
                buffers |= {"exp_avg": torch.zeros_like(b.grad), "exp_avg_sq": torch.zeros_like(b.grad)}
                step = torch.tensor(float(updates), device=b.grad.device)
                self.adam.state[b.master] = {"step": step, **{k: buffers[k] for k in ("exp_avg", "exp_avg_sq")}}
            for kind, buffer in buffers.items():
                for (name, _), view in zip(b.named, b.views(buffer)):
                    saved = tensors.get(f"{kind}/{name}")
                    if saved is None or saved.shape != view.shape:
                        raise ValueError(f"the checkpoint has no {kind} {name} {tuple(view.shape)}: another --model?")
                    view.copy_(saved)
            b.weights.copy_(b.master)
