"""Batch requests: many small objects and chunks in few requests, in order, with the network never idle.

A request asks for a few MiB. The next one is sent before the answer ends. When a reader opens an object that no running
request includes, the object is fetched at once, and later requests leave it out. If a running request includes it, the
reader waits a moment first (`Download`), since the object often arrives next. After that it is fetched alone, and may
arrive twice.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from gearworkers.errors import GearError, ResourceExhausted
from gearworkers.fetch.priority_pool import Priority, PriorityPool
from gearworkers.fetch.source import BytesOrLayout, ObjectSource

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Sizes of batch requests, in bytes before compression."""

    request_bytes: int = 4 << 20
    request_items: int = 2000
    overlap_bytes: int = 1 << 20
    """The next request is sent when this many bytes of the current one are left. 1 MiB is more than a link of
    100 Mbit/s carries in 20 ms, even if compression halves it."""


DEFAULT_LIMITS = BatchLimits()


class BatchItem(Protocol):
    """An object or chunk to request."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the object or chunk."""

    @property
    def size_bytes(self) -> int:
        """Its approximate size."""

    def claim(self) -> bool:
        """Return whether to request the item, right before the request; if so, `deliver` or `miss` follows."""

    def deliver(self, content: BytesOrLayout) -> bool:
        """Store the answer; return False if it is wrong, and then another `deliver` or `miss` follows.

        Raises:
            ResourceExhausted: The disk is full; the batch ends.
        """

    def miss(self) -> None:
        """Note that no source has delivered the item."""


def fetch_in_batches(
    items: Iterable[BatchItem],
    sources: Sequence[ObjectSource],
    pool: PriorityPool,
    priority: Priority,
    limits: BatchLimits,
) -> None:
    """Request *items* in order, in threads of *pool*; returns at once."""
    pool.submit(_Batches(iter(items), sources, pool, priority, limits).request, priority)


class _Batches:
    """The requests of one `fetch_in_batches`; each starts the next one, once."""

    def __init__(
        self,
        items: Iterator[BatchItem],
        sources: Sequence[ObjectSource],
        pool: PriorityPool,
        priority: Priority,
        limits: BatchLimits,
    ) -> None:
        self._items = items
        self._sources = sources
        self._pool = pool
        self._priority = priority
        self._limits = limits
        self._lock = threading.Lock()
        self._is_disk_full = False

    def request(self) -> None:
        """Make one request, and start the next one unless the items or the disk space are used up."""
        batch: dict[bytes, list[BatchItem]] = {}
        try:
            with self._lock:
                self._claim(batch)
            starts_next = bool(batch) and not self._is_disk_full and not self._ask_sources(batch)
        finally:
            for items in batch.values():
                for item in items:
                    item.miss()
        if starts_next and not self._is_disk_full:
            self._pool.submit(self.request, self._priority)

    def _claim(self, batch: dict[bytes, list[BatchItem]]) -> None:
        """Add the next items to *batch*, by digest; the same content is requested once."""
        batch_bytes = 0
        for item in self._items:
            if item.claim():
                batch.setdefault(item.digest, []).append(item)
                batch_bytes += item.size_bytes
                if batch_bytes >= self._limits.request_bytes or len(batch) >= self._limits.request_items:
                    break

    def _ask_sources(self, batch: dict[bytes, list[BatchItem]]) -> bool:
        """Deliver items and remove them from *batch*; return whether the next request was started."""
        is_next_started = False
        left_bytes = sum(item.size_bytes for items in batch.values() for item in items)
        for source in self._sources:
            for size_bytes in self._answers(source, batch):
                left_bytes -= size_bytes
                if left_bytes <= self._limits.overlap_bytes and not is_next_started:
                    is_next_started = True
                    self._pool.submit(self.request, self._priority)
        return is_next_started

    def _answers(self, source: ObjectSource, batch: dict[bytes, list[BatchItem]]) -> Iterator[int]:
        """Deliver the items that *source* has and remove them from *batch*; yield the bytes of each answer."""
        try:
            for digest, content in source.fetch_many(list(batch)) if batch and not self._is_disk_full else ():
                items = batch.get(digest, [])
                batch[digest] = [item for item in items if not item.deliver(content)]
                if not batch[digest]:
                    del batch[digest]
                yield sum(item.size_bytes for item in items)
        except GearError as exc:
            self._is_disk_full = self._is_disk_full or isinstance(exc, ResourceExhausted)
            _log.warning("a batch request failed", error=str(exc))
