"""Work side by side, in threads that no exit of this process waits for."""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import TypeVar

AT_ONCE = 64  # requests in flight

V = TypeVar("V")
T = TypeVar("T")


def start(work: Callable[[], T]) -> "Future[T]":
    """Begin work() in a thread of its own and return its future."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - whoever asks for the result gets it
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def together(work: Callable[[V], T], values: Iterable[V]) -> list[T]:
    """Return [work(value), ...], with AT_ONCE under way at a time.

    After an error none begins any more; the first is raised once those under way have ended.
    """
    todo = list(enumerate(values))
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    waiting = iter(todo)
    taking = threading.Lock()

    def run() -> None:
        while not errors:
            with taking:
                place, value = next(waiting, (-1, None))
            if place < 0:
                return
            try:
                results[place] = work(value)  # type: ignore[arg-type]
            except BaseException as error:  # noqa: BLE001 - raised below
                errors.append(error)

    for future in [start(run) for _ in range(min(AT_ONCE, len(todo)))]:
        future.result()
    if errors:
        raise errors[0]
    return [results[place] for place, _ in todo]
