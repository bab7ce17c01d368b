"""Threads that do what is urgent before what is not."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from enum import IntEnum

import structlog

_log = structlog.get_logger(__name__)


class Urgency(IntEnum):
    """What goes before what; ON_DEMAND has threads of its own."""

    ON_DEMAND = 0
    READ_AHEAD = 1
    BACKGROUND = 2


class WorkPool:
    """A bounded number of threads: a share of them for what is on demand, the others for what is not, in its order.

    A call given twice runs twice: who raises the urgency of a call gives it again, and makes it run once.
    """

    def __init__(self, threads: int, *, for_background: int) -> None:
        """
        Args:
            threads: How many calls run at once; two at least, one of either kind.
            for_background: How many of them may be less than ON_DEMAND.
        """
        self._urgent: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._other: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._serial = itertools.count()
        self._threads = [
            threading.Thread(target=self._work, args=(take,), name=name, daemon=True)
            for count, take, name in (
                (max(threads - for_background, 1), self._urgent.get, "fetch-on-demand"),
                (max(for_background, 1), lambda: self._other.get()[2], "fetch-behind"),
            )
            for _ in range(count)
        ]
        self.urgent_calls = 0
        """How many calls were ON_DEMAND."""
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], None], urgency: Urgency) -> None:
        """Have a thread run *call*, which must not raise."""
        if urgency is Urgency.ON_DEMAND:
            self.urgent_calls += 1
            self._urgent.put(call)
        else:
            self._other.put((urgency, next(self._serial), call))

    def close(self) -> None:
        """Let the threads end after what they are at; what waits is dropped with the process."""
        for _ in self._threads:
            self._urgent.put(None)
            self._other.put((-1, next(self._serial), None))

    def _work(self, take: Callable[[], Callable[[], None] | None]) -> None:
        while (call := take()) is not None:
            try:
                call()
            except Exception:
                _log.exception("a fetch failed in a way that was not foreseen")
