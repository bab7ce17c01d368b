"""Many contents in few requests: in order, the way never empty, and nobody who wants one of them now waits long.

A request is for some megabytes; the next one is sent before the answer ends. Who opens an object that no request
under way is to bring has it fetched at once, and later requests leave it out. If one is, he waits for it a moment
(`Patience`), since it is mostly among the next to come; then it is fetched for him, and may come twice.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import structlog

from gearworkers.errors import GearError, ResourceExhausted
from gearworkers.fetch.priority_pool import Urgency, WorkPool
from gearworkers.fetch.source import Content, Source

_log = structlog.get_logger(__name__)

PATIENCE_S = 0.1
_REQUEST_BYTES = 4 << 20
_REQUEST_ITEMS = 2000
_OVERLAP_BYTES = 1 << 20
"""Uncompressed; more than a way of 100 Mbit/s holds in 20 ms, also when half of it."""


class Item(Protocol):
    """One of many."""

    @property
    def digest(self) -> bytes:
        """What is asked for."""

    @property
    def size_bytes(self) -> int:
        """About what it takes."""

    def claim(self) -> bool:
        """Whether it is still wanted: called right before it is asked for; if so, `deliver` or `miss` follows."""

    def deliver(self, content: Content) -> bool:
        """Take it; False if it is not what it should be, and then `miss` may follow.

        Raises:
            ResourceExhausted: There is no room; all are missed that have not come.
        """

    def miss(self) -> None:
        """No source has given it."""


class Patience:
    """Calls things a fixed time later; one thread, which begins with the first."""

    def __init__(self, wait_s: float = PATIENCE_S) -> None:
        self._wait_s = wait_s
        self._calls: queue.SimpleQueue[tuple[float, Callable[[], None]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def then(self, call: Callable[[], None]) -> None:
        """Have *call*, which must not block, called after the wait."""
        self._calls.put((time.monotonic() + self._wait_s, call))
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="patience", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            due_s, call = self._calls.get()
            time.sleep(max(due_s - time.monotonic(), 0.0))
            try:
                call()
            except Exception:
                _log.exception("a fetch could not be hurried")


def bring(items: Iterable[Item], sources: Sequence[Source], pool: WorkPool, urgency: Urgency) -> None:
    """Have *items* brought by threads of *pool*, in order."""
    pool.submit(_Stream(iter(items), sources, pool, urgency).request, urgency)


class _Stream:
    """Items of one call of `bring`; each request has the next one follow, once."""

    def __init__(self, items: Iterator[Item], sources: Sequence[Source], pool: WorkPool, urgency: Urgency) -> None:
        self._items = items
        self._sources = sources
        self._pool = pool
        self._urgency = urgency
        self._lock = threading.Lock()
        self._is_full = False

    def request(self) -> None:
        """Bring the next some megabytes, and have another request follow."""
        batch: dict[bytes, list[Item]] = {}
        try:
            with self._lock:
                self._claim(batch)
            is_last = bool(batch) and not self._is_full and self._brought(batch)
        finally:
            self._miss(batch)
        if is_last and not self._is_full:
            self._pool.submit(self.request, self._urgency)

    def _miss(self, batch: dict[bytes, list[Item]]) -> None:
        for items in batch.values():
            for item in items:
                item.miss()

    def _brought(self, batch: dict[bytes, list[Item]]) -> bool:
        """Take out of *batch* what any source gives; whether no other request has followed yet."""
        is_last = True
        left_bytes = sum(item.size_bytes for items in batch.values() for item in items)
        for source in self._sources:
            for size_bytes in self._answered(source, batch):
                left_bytes -= size_bytes
                if left_bytes <= _OVERLAP_BYTES and is_last:
                    is_last = False
                    self._pool.submit(self.request, self._urgency)
        return is_last

    def _claim(self, batch: dict[bytes, list[Item]]) -> None:
        """Add the next that are still wanted to *batch*, by digest; contents that are wanted twice come once."""
        batch_bytes = 0
        for item in self._items:
            if item.claim():
                batch.setdefault(item.digest, []).append(item)
                batch_bytes += item.size_bytes
                if batch_bytes >= _REQUEST_BYTES or len(batch) >= _REQUEST_ITEMS:
                    break

    def _answered(self, source: Source, batch: dict[bytes, list[Item]]) -> Iterator[int]:
        """Take out of *batch* what *source* gives; how many bytes, each time."""
        try:
            for digest, content in source.fetch_many(list(batch)) if batch and not self._is_full else ():
                items = batch.get(digest, [])
                batch[digest] = [item for item in items if not item.deliver(content)]
                if not batch[digest]:
                    del batch[digest]
                yield sum(item.size_bytes for item in items)
        except GearError as exc:
            self._is_full = self._is_full or isinstance(exc, ResourceExhausted)
            _log.warning("a prefetch broke off", error=str(exc))
