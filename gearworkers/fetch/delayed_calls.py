"""Calls functions after a fixed delay."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

import structlog

_log = structlog.get_logger(__name__)


class DelayedCalls:
    """One thread that calls functions a fixed time after they are added; it starts with the first."""

    def __init__(self, delay_s: float) -> None:
        self._delay_s = delay_s
        self._calls: queue.SimpleQueue[tuple[float, Callable[[], None]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def add(self, call: Callable[[], None]) -> None:
        """Call *call*, which must not block, after the delay."""
        self._calls.put((time.monotonic() + self._delay_s, call))
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="delayed-calls", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            due_s, call = self._calls.get()
            time.sleep(max(due_s - time.monotonic(), 0.0))
            try:
                call()
            except Exception:
                _log.exception("a delayed call failed unexpectedly")
