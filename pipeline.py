from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, overload

import torch
import torch.distributed as dist
from torch import Tensor

from optimizer import AdamW
from parallel import SENT


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
