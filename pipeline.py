"""Micro-batches through a model, and through pipeline stages where there are several.

    for batch, hidden in pipeline(model, batches, optimizer):
        ...
        loss.backward()

With stages the schedule is 1F1B (arXiv 2104.04473), here for 3 stages and 5 micro-batches (F
forward, B backward; each column is one exchange with the neighbours):

    stage 0   F0 F1 F2 B0 F3 B1 F4 B2 B3 B4     2 forwards of warm-up
    stage 1      F0 F1 B0 F2 B1 F3 B2 F4 B3 B4  1
    stage 2         F0 B0 F1 B1 F2 B2 ...       0

A stage sends its output (T / (cp tp), D) forward and the gradient of its input back, and holds the
activations of at most `pp` micro-batches.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import overload

import torch
import torch.distributed as dist
from torch import Tensor

from data.trees import TreeBatch
from model import GPT
from optimizer import AdamW
from parallel import SENT
from routing import end_count, start_count

BEFORE, AFTER = -1, 1  # neighbour stages


@overload
def pipeline(model: GPT, batches: Iterable[TreeBatch]) -> Iterator[tuple[TreeBatch, Tensor]]: ...


@overload
def pipeline(
    model: GPT, batches: list[TreeBatch], optimizer: AdamW
) -> Iterator[tuple[TreeBatch, Tensor]]: ...


def pipeline(model, batches, optimizer=None):
    """Yield micro-batches one after another, each with its final hidden states (T, D).

    The caller's loop computes the loss and calls backward on it. Without an optimizer, under
    torch.no_grad(), only forward. With several stages only the last one yields; the others run
    their blocks in step with it.
    """
    device, stages = model.device, model.mesh.pp
    if optimizer and model.balancing:
        _count_tokens(model, batches)
    if stages > 1 and optimizer:
        yield from _one_forward_one_backward(model, batches, optimizer)
        return
    for i, batch in enumerate(batches):
        batch = batch.to(device)
        if optimizer:
            optimizer.expect(last=i + 1 == len(batches))
        x = _exchange(model, receive=(BEFORE, batch)) if model.mesh.pp_rank else None
        y = model(batch, x)
        if model.mesh.last_stage:
            yield batch, y
        else:
            _exchange(model, send=(AFTER, y))
        if optimizer:
            optimizer.collect()


def _count_tokens(model: GPT, batches: list[TreeBatch]) -> None:
    """Count the tokens of each expert over the whole step, before its first backward.

    One micro-batch that is the whole step counts its own.
    """
    tallies = list(model.tallies.values())
    group = model.mesh.group("dp cp")
    if group.n == 1 and len(batches) == 1:
        for tally in tallies:
            tally.fractions = None
        return
    before = start_count(tallies)
    with torch.no_grad():
        for _ in pipeline(model, batches):
            pass
    end_count(tallies, before, group)


def _one_forward_one_backward(
    model: GPT, batches: list[TreeBatch], optimizer: AdamW
) -> Iterator[tuple[TreeBatch, Tensor]]:
    mesh, n = model.mesh, len(batches)
    first, last = mesh.pp_rank == 0, mesh.last_stage
    batches = [batch.to(model.device) for batch in batches]
    ahead = min(mesh.pp - 1 - mesh.pp_rank, n)  # forwards before the first backward
    pending: deque[tuple[Tensor | None, Tensor]] = deque()  # input and output, backward to come

    def forward(i: int, x: Tensor | None) -> Tensor:
        y = model(batches[i], x)
        pending.append((x, y))
        return y

    def backward(i: int, grad: Tensor) -> Tensor | None:
        x, y = pending.popleft()
        optimizer.expect(last=i + 1 == n)
        if y.requires_grad:  # a first stage may be frozen altogether
            y.backward(grad)
        return None if x is None else x.grad

    # Warm-up: fill the stages behind this one.
    for i in range(ahead):
        x = None if first else _exchange(model, receive=(BEFORE, batches[i]))
        _exchange(model, send=(AFTER, forward(i, x)))

    # Steady state: one forward, one backward.
    x = None if first or ahead == n else _exchange(model, receive=(BEFORE, batches[ahead]))
    for i in range(ahead, n):
        y = forward(i, x)
        if last:
            leaf = y.detach().requires_grad_()
            optimizer.expect(last=i + 1 == n)
            yield batches[i], leaf
            grad = leaf.grad
        else:
            grad = _exchange(model, send=(AFTER, y), receive=(AFTER, batches[i - ahead]))
        x_grad = backward(i - ahead, grad)
        if not first:
            following = (BEFORE, batches[i + 1]) if i + 1 < n else None
            x = _exchange(model, send=(BEFORE, x_grad), receive=following)
        # Not before: a tied embedding waits for stage 0, which waits for this stage's x_grad.
        optimizer.collect()

    # Cool-down: the backwards of the warm-up's forwards.
    for i in range(n - ahead, n):
        x_grad = backward(i, _exchange(model, receive=(AFTER, batches[i])))
        if not first:
            _exchange(model, send=(BEFORE, x_grad))
        optimizer.collect()


def _exchange(
    model: GPT,
    send: tuple[int, Tensor] | None = None,
    receive: tuple[int, TreeBatch] | None = None,
) -> Tensor | None:
    """Send a tensor to a neighbour stage and receive the one of a micro-batch, both at once."""
    pp, stage = model.mesh.group("pp"), model.mesh.pp_rank
    x = None
    transfers: list[tuple[Callable, Tensor, int]] = []
    if send:
        out = send[1].detach().contiguous()
        SENT["pp"] += out.nbytes
        transfers.append((dist.isend, out, send[0]))
    if receive:
        x = torch.empty(model.hidden_shape(receive[1]), dtype=model.dtype, device=model.device)
        transfers.append((dist.irecv, x, receive[0]))
    operations = [
        dist.P2POp(way, tensor, pp.ranks[stage + side], pp.handle)
        for way, tensor, side in transfers
        if tensor.numel()  # an empty tensor needs no message
    ]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return None if x is None else x.requires_grad_(torch.is_grad_enabled())
