"""Threads that run urgent calls before less urgent ones."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from enum import IntEnum

import structlog

_log = structlog.get_logger(__name__)


class Priority(IntEnum):
    """The order of calls; ON_DEMAND has threads of its own."""

    ON_DEMAND = 0
    READ_AHEAD = 1
    BACKGROUND = 2


class PriorityPool:
    """A fixed number of threads: some run ON_DEMAND calls only, the others run all other calls by priority.

    A call that is submitted twice runs twice. To raise the priority of a call, submit it again and ignore its second
    run.
    """

    def __init__(self, threads: int, *, for_background: int) -> None:
        """
        Args:
            threads: Number of threads; each kind has at least one.
            for_background: Number of threads for calls that are not ON_DEMAND.
        """
        self._on_demand: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._other: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]] = queue.PriorityQueue()
        self._serial = itertools.count()
        self._threads = [
            threading.Thread(target=self._work, args=(take,), name=name, daemon=True)
            for count, take, name in (
                (max(threads - for_background, 1), self._on_demand.get, "fetch-on-demand"),
                (max(for_background, 1), lambda: self._other.get()[2], "fetch-background"),
            )
            for _ in range(count)
        ]
        self.on_demand_calls = 0
        """Number of ON_DEMAND calls since the start."""
        for thread in self._threads:
            thread.start()

    def submit(self, call: Callable[[], None], priority: Priority) -> None:
        """Run *call* in a thread; exceptions are logged. Does not block."""
        if priority is Priority.ON_DEMAND:
            self.on_demand_calls += 1
            self._on_demand.put(call)
        else:
            self._other.put((priority, next(self._serial), call))

    def close(self) -> None:
        """Let each thread end after its current call; queued calls may never run."""
        for _ in self._threads:
            self._on_demand.put(None)
            self._other.put((-1, next(self._serial), None))

    def _work(self, take: Callable[[], Callable[[], None] | None]) -> None:
        while (call := take()) is not None:
            try:
                call()
            except Exception:
                _log.exception("a call of the fetch pool failed unexpectedly")
