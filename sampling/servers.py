"""Several servers that do the same."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from sampling.server import NoAnswer, Server

S = TypeVar("S", bound=Server)
T = TypeVar("T")


class Servers(Generic[S]):
    """Servers that do the same; one that dies is named once, and the others take its requests."""

    def __init__(self, servers: list[S]):
        self.servers = servers
        self.dead: set[int] = set()  # numbers of servers that no longer answer
        self.mourning = threading.Lock()  # requests run side by side

    def ask(self, place: int, request: Callable[[S], T]) -> tuple[int, T]:
        """Return the number of the server that answers a request, and its reply.

        place: of the request among others, which are shared out by it. NoAnswer: none is left.
        """
        alive = self.alive()
        first = place % max(1, len(alive))  # two may die at the same moment: none is left
        for k in alive[first:] + alive[:first]:
            if k in self.dead:  # since this loop began
                continue
            try:
                return k, request(self.servers[k])
            except NoAnswer as error:
                if not set(self.alive()) - {k}:
                    raise
                self.mourn(k, error)
        flag = self.servers[0].FLAG.strip()
        raise NoAnswer(f"{flag}: none of {len(self.servers)} servers answers")

    def alive(self) -> list[int]:
        """Return the numbers of the servers that answer."""
        return [k for k in range(len(self.servers)) if k not in self.dead]

    def mourn(self, k: int, error: OSError) -> None:
        """Count a server as dead and say so once."""
        with self.mourning:
            known = k in self.dead
            self.dead.add(k)
        if not known:
            print(f"warning: {error}; the other servers get its requests")
