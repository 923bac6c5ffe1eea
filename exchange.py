"""Rows that ranks exchange inside a layer, with a backward: keys and values, tokens of experts.

    k = gather_rows(k, shares, mesh.group("cp"))       all keys on every context rank
    rows = exchange(rows, send, receive, group)        rows to the ranks that hold their experts

Letters: T tokens of a flat row, k rows of one rank, n ranks of a group.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from parallel import SENT, Group

# ---- context parallel ----------------------------------------------------------------------------


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, shares, group):
        ctx.shares, ctx.group, ctx.held = shares, group, x.shape[0]
        most = max(len(share) for share in shares)
        padded = F.pad(x, (0, 0) * (x.dim() - 1) + (0, most - x.shape[0]))
        parts = group.all_gather(padded, "cp").split(most)
        whole = x.new_empty(sum(map(len, shares)), *x.shape[1:])  # (T, ...)
        for share, part in zip(shares, parts):
            whole[share] = part[: len(share)]
        return whole

    @staticmethod
    def backward(ctx, grad):
        most = max(len(share) for share in ctx.shares)
        parts = grad.new_zeros(len(ctx.shares), most, *grad.shape[1:])
        for part, share in zip(parts, ctx.shares):
            part[: len(share)] = grad[share]
        return ctx.group.reduce_scatter(parts.flatten(0, 1), "cp")[: ctx.held], None, None


def gather_rows(x: Tensor, shares: list[Tensor], group: Group) -> Tensor:
    """Gather the rows of the flat row from all context ranks: (k, ...) -> (T, ...), for k and v.

    shares: indices of every rank's rows. Shorter shares are sent padded to the longest.
    forward: all-gather of x             backward: reduce-scatter of the gradient, grouped by rank
    """
    return x if group.n == 1 else _GatherRows.apply(x, shares, group)


# ---- expert parallel -----------------------------------------------------------------------------


def all_to_all(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Send send[i] rows of x to rank i, one rank after another; return the rows of all, in order.

    x: (Σ send, ...). receive: rows that come from each rank. Nothing is padded.
    """
    out = x.new_empty(sum(receive), *x.shape[1:])
    row = x[:1].nbytes
    SENT["ep"] += row * (len(x) - send[group.place])
    dist.all_to_all_single(out, x.contiguous(), receive, send, group=group.handle)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, send, receive, group):
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return all_to_all(x, send, receive, group)

    @staticmethod
    def backward(ctx, grad):
        return all_to_all(grad, ctx.receive, ctx.send, ctx.group), None, None, None


def exchange(x: Tensor, send: list[int], receive: list[int], group: Group) -> Tensor:
    """Send rows to the ranks that work on them: (Σ send, ...) -> (Σ receive, ...); see all_to_all.

    forward: all-to-all of x             backward: all-to-all of the gradient, the other way round
    """
    return _Exchange.apply(x, send, receive, group)
