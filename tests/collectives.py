"""A recorder of what ranks send each other, and the rules that NCCL asks of the order.

    recorder = Recorder()             on every rank, before the process groups are made
    train_dpo.main([...])
    find_faults(launch(...))          of the `events` of all ranks: "" or what is wrong

NCCL runs on streams: a collective that is started reads its input and writes its output at any time
until `wait`. gloo is kinder, so the recorder plays NCCL's part. Until the wait the output is filled
with NaN, whatever is read too early; and an input that changes in the meantime is a fault.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import parallel

Message = tuple[int, int, int]  # sender, receiver, bytes


class Event(NamedTuple):
    """One call of one rank: a collective, or some messages at once."""

    group: tuple[int, ...]  # ranks that take part
    number: int  # c10d's name of the group, counted: two groups may have the same ranks
    kind: str
    size: int  # bytes that are sent or summed; 0 where it may differ, as for objects
    step: int  # optimizer steps before it
    stream: str = "main"  # "side": it may go on, on NCCL's stream, after the call returns
    messages: tuple[Message, ...] = ()


class Recorder:
    """Records this process's collectives from now on, in `events`; `faults` has broken rules."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.faults: list[str] = []
        self.step = 0
        self.numbers: dict[str, int] = {}
        self.busy = 0  # inside another collective: object collectives are made of tensor ones
        parallel._gather_into = self._tensors("all_gather", parallel._gather_into)
        parallel._scatter_from = self._tensors("reduce_scatter", parallel._scatter_from)
        for name in (
            "all_reduce",
            "all_to_all_single",
            "barrier",
            "all_gather_object",
            "broadcast_object_list",
        ):
            setattr(dist, name, self._plain(name, getattr(dist, name)))
        dist.batch_isend_irecv = self._batch(dist.batch_isend_irecv)

    def _add(
        self,
        handle: Any,
        kind: str,
        size: int,
        stream: str = "main",
        messages: tuple[Message, ...] = (),
    ) -> None:
        group = dist.group.WORLD if handle is None else handle
        ranks = tuple(dist.get_process_group_ranks(group))
        event = Event(ranks, int(group.group_name), kind, size, self.step, stream, messages)
        self.events.append(event)

    def _plain(self, kind: str, call: Callable) -> Callable:
        """Record a collective that ends before it returns."""

        def recorded(*args: Any, group: Any = None, **options: Any) -> Any:
            if self.busy:
                return call(*args, group=group, **options)
            self._add(group, kind, args[0].nbytes if kind == "all_reduce" else 0)
            self.busy += 1
            try:
                return call(*args, group=group, **options)
            finally:
                self.busy -= 1

        return recorded

    def _tensors(self, kind: str, call: Callable) -> Callable:
        """Record a collective of tensors, which may go on after it returns."""

        def recorded(out: Tensor, x: Tensor, group: Any, async_op: bool) -> Any:
            stream = "side" if async_op else "main"
            self._add(group, kind, max(out.nbytes, x.nbytes), stream)
            if not async_op:
                return call(out, x, group=group, async_op=False)
            return _Running(self, kind, call, out, x, group)

        return recorded

    def _batch(self, call: Callable) -> Callable:
        """Record messages that are sent and received at once."""

        def recorded(operations: list) -> Any:
            here, messages = dist.get_rank(), []
            for operation in operations:
                ends = (here, operation.peer)
                ends = ends if operation.op is dist.isend else ends[::-1]
                messages.append((*ends, operation.tensor.nbytes))
            self._add(operations[0].group, "messages", 0, messages=tuple(messages))
            return call(operations)

        return recorded


class _Running:
    """A collective that has been started and not been waited for."""

    def __init__(
        self, recorder: Recorder, kind: str, call: Callable, out: Tensor, x: Tensor, group
    ):
        self.recorder, self.kind, self.out, self.x = recorder, kind, out, x
        self.before, self.result = x.clone(), torch.empty_like(out)
        self.work = call(self.result, self.before.clone(), group=group, async_op=True)
        own = x.data_ptr() - out.data_ptr()  # all-gather: where the input lies in the output
        out.fill_(float("nan"))
        if kind == "all_gather" and 0 <= own < out.nbytes:
            x.copy_(self.before)  # NCCL leaves it alone

    def wait(self) -> None:
        """End the collective: its output may be read, and its input may change."""
        if self.work is None:
            return
        self.work.wait()
        self.work = None
        same = (self.x == self.before) | (self.before != self.before) | self._inside_output()
        if not same.all():
            self.recorder.faults.append(f"the input of a {self.kind} changed before its wait")
        self.out.copy_(self.result)

    def _inside_output(self) -> Tensor:
        """Tell which elements of the input are the output's own, True where they are."""
        first = (self.out.data_ptr() - self.x.data_ptr()) // self.x.element_size()
        inside = torch.zeros_like(self.x, dtype=torch.bool)
        if 0 <= first < self.x.numel():
            inside.view(-1)[first : first + self.out.numel()] = True
        return inside


# ---- the rules -----------------------------------------------------------------------------------


def find_faults(ranks: list[list[Event]]) -> str:
    """Return what NCCL would not forgive in the events of all ranks, "" if there is nothing.

    Every two ranks call the collectives of all groups that they share in one order, with the same
    kinds, sizes and streams. And every rank could run its calls one at a time, each ending before
    the next begins, without waiting forever: then no overlap of them can deadlock.
    """
    for a in range(len(ranks)):
        for b in range(a + 1, len(ranks)):
            if fault := _compare(ranks, a, b):
                return fault
    return _run_in_order(ranks)


def _compare(ranks: list[list[Event]], a: int, b: int) -> str:
    """Compare the calls of two ranks in the groups that they share, messages left out."""
    shared = [
        [event for event in ranks[one] if other in event.group and not event.messages]
        for one, other in ((a, b), (b, a))
    ]
    for k, (mine, theirs) in enumerate(zip(*shared)):
        if mine != theirs:
            return f"call {k} that ranks {a} and {b} share: {mine} and {theirs}"
    if len(shared[0]) != len(shared[1]):
        return f"ranks {a} and {b} share {len(shared[0])} and {len(shared[1])} calls"
    return ""


def _run_in_order(ranks: list[list[Event]]) -> str:
    """Run the calls of every rank one at a time; return where they wait for each other forever."""
    at = [0] * len(ranks)  # call that each rank is in
    ended: list[dict] = [{} for _ in ranks]  # rank -> (group or message) -> calls that have ended

    def count(rank: int, key: Any) -> int:
        """Return the calls of a group, or messages of a pair, that a rank has begun."""
        begun = ended[rank].get(key, 0)
        if at[rank] < len(ranks[rank]):
            begun += keys_of(ranks[rank][at[rank]]).count(key)
        return begun

    def keys_of(event: Event) -> list:
        return list(event.messages) or [(event.number, event.group)]

    def can_end(rank: int) -> bool:
        event = ranks[rank][at[rank]]
        for key in keys_of(event):
            peers = key[:2] if event.messages else event.group
            if any(count(peer, key) <= ended[rank].get(key, 0) for peer in peers):
                return False
        return True

    moved = True
    while moved:
        moved = False
        for rank, events in enumerate(ranks):
            while at[rank] < len(events) and can_end(rank):
                for key in keys_of(events[at[rank]]):
                    ended[rank][key] = ended[rank].get(key, 0) + 1
                at[rank] += 1
                moved = True
    stuck = {r: events[at[r]] for r, events in enumerate(ranks) if at[r] < len(events)}
    return f"ranks wait for each other: {stuck}" if stuck else ""
