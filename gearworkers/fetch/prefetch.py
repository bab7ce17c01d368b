"""Fetches objects before a container opens them: the objects of a start-up profile, or all of a layer or pin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import structlog

from gearworkers.errors import GearError
from gearworkers.fetch.batch import DEFAULT_LIMITS, BatchItem, BatchLimits, fetch_in_batches
from gearworkers.fetch.download_chunks import DownloadChunks
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.priority_pool import Priority, PriorityPool
from gearworkers.fetch.source import BytesOrLayout, ObjectSource

_log = structlog.get_logger(__name__)

Arrived = Callable[[bytes], None]
"""Receives the digest of an object that has arrived; it must not block."""


@dataclass(frozen=True, slots=True)
class PrefetchObject:
    """An object that a container will open soon."""

    digest: bytes
    size_bytes: int
    """Length of the whole object."""
    ranges: tuple[tuple[int, int], ...] = ()
    """(offset, size in bytes) of the expected reads; used for objects that are served while they arrive."""


@dataclass(slots=True)
class PrefetchStats:
    """Counters since the process began."""

    contents: int = 0
    """Small objects, and chunks of large ones."""
    size_bytes: int = 0


class Prefetcher:
    """Fetches many objects with few requests, through one fetcher; all methods return at once."""

    def __init__(
        self,
        fetcher: Fetcher,
        sources: Sequence[ObjectSource],
        pool: PriorityPool,
        *,
        large_bytes: int,
        served_bytes: int = 0,
        limits: BatchLimits = DEFAULT_LIMITS,
    ) -> None:
        """
        Args:
            fetcher: Holds the downloads.
            sources: The fetcher's.
            pool: Runs the requests.
            large_bytes: The fetcher's.
            served_bytes: An object of at least this size is served while it arrives; smaller ones are fetched whole.
            limits: Sizes of the requests.
        """
        self._fetcher = fetcher
        self._sources = sources
        self._pool = pool
        self._large_bytes = large_bytes
        self._served_bytes = served_bytes
        self._limits = limits
        self.stats = PrefetchStats()

    def fetch_all(self, objects: Iterable[tuple[bytes, int]]) -> None:
        """Fetch objects, given as (digest, size in bytes), in the background; missing ones are retried one by one."""
        small: list[BatchItem] = []
        for digest, size_bytes in objects:
            if size_bytes >= self._large_bytes:
                self._fetcher.fetch(digest, size_bytes, Priority.BACKGROUND)
            else:
                small.append(_SmallObject(self._fetcher, self.stats, digest, size_bytes, is_required=True))
        self._fetch_in_batches(small, Priority.BACKGROUND)

    def fetch_soon(self, objects: Sequence[PrefetchObject], arrived: Arrived | None = None) -> None:
        """Fetch *objects* in this order, before background work. Their first reader fetches those that fail here.

        One request fetches the layouts of large objects, then a few long ones fetch the contents.

        Args:
            objects: Their parts to fetch.
            arrived: Called with the digest of each object when it is stored, or when the first of its wanted chunks can
                be read; also if another request fetches it, before it has arrived.
        """
        self._pool.submit(lambda: self._fetch_soon(objects, arrived), Priority.READ_AHEAD)

    def _fetch_soon(self, objects: Sequence[PrefetchObject], arrived: Arrived | None) -> None:
        missing = [object for object in objects if not self._fetcher.is_here(object.digest)]
        self._fetch_layouts(
            {object.digest: object.size_bytes for object in missing if object.size_bytes >= self._large_bytes}
        )
        self._fetch_in_batches(self._items(missing, arrived), Priority.READ_AHEAD)

    def _fetch_in_batches(self, items: Iterable[BatchItem], priority: Priority) -> None:
        fetch_in_batches(items, self._sources, self._pool, priority, self._limits)

    def _items(self, objects: Sequence[PrefetchObject], arrived: Arrived | None) -> Iterator[BatchItem]:
        for object in objects:
            download = self._fetcher.get(object.digest)
            if download is not None:
                ranges = object.ranges if object.size_bytes >= self._served_bytes else ((0, object.size_bytes),)
                for at, number in enumerate(download.chunks.numbers_of(ranges)):
                    item: BatchItem = _LargeObjectChunk(download.chunks, self.stats, number)
                    yield item if at or arrived is None else _Reported(item, object.digest, arrived)
            elif object.size_bytes < self._large_bytes:
                item = _SmallObject(self._fetcher, self.stats, object.digest, object.size_bytes, is_required=False)
                yield item if arrived is None else _Reported(item, object.digest, arrived)

    def _fetch_layouts(self, sizes: dict[bytes, int]) -> None:
        """Make large objects, given as digest to size in bytes, readable before the first open."""
        for source in self._sources:
            unopened = [digest for digest in sizes if self._fetcher.get(digest) is None]
            try:
                for digest, content in source.fetch_many(unopened) if unopened else ():
                    if digest in sizes and not isinstance(content, bytes):
                        self._fetcher.adopt_layout(digest, sizes[digest], content)
            except GearError as exc:
                _log.warning("cannot prefetch layouts", error=str(exc))


@dataclass(slots=True)
class _SmallObject:
    """A small object as a `BatchItem`: chunk 0 of its download."""

    fetcher: Fetcher
    stats: PrefetchStats
    digest: bytes
    size_bytes: int
    is_required: bool
    chunks: DownloadChunks | None = None

    def claim(self) -> bool:
        self.chunks = self.fetcher.claim(self.digest, self.size_bytes, is_required=self.is_required)
        return self.chunks is not None

    def deliver(self, content: BytesOrLayout) -> bool:
        assert self.chunks is not None
        is_right = _deliver(self.chunks, 0, content, self.stats)
        if is_right:
            self.chunks = None  # the items of a layer outlive their downloads
        return is_right

    def miss(self) -> None:
        assert self.chunks is not None
        self.chunks.miss(0)


@dataclass(slots=True)
class _LargeObjectChunk:
    """A chunk of a large object as a `BatchItem`."""

    chunks: DownloadChunks
    stats: PrefetchStats
    number: int

    @property
    def digest(self) -> bytes:
        return self.chunks.chunk(self.number).digest

    @property
    def size_bytes(self) -> int:
        return self.chunks.chunk(self.number).size_bytes

    def claim(self) -> bool:
        return self.chunks.claim(self.number)

    def deliver(self, content: BytesOrLayout) -> bool:
        return _deliver(self.chunks, self.number, content, self.stats)

    def miss(self) -> None:
        self.chunks.miss(self.number)


@dataclass(slots=True)
class _Reported:
    """An item whose delivery is reported, or that another request delivers."""

    item: BatchItem
    object: bytes
    """Digest of the object that the item is, or belongs to."""
    arrived: Arrived

    @property
    def digest(self) -> bytes:
        return self.item.digest

    @property
    def size_bytes(self) -> int:
        return self.item.size_bytes

    def claim(self) -> bool:
        is_claimed = self.item.claim()
        if not is_claimed:
            self.arrived(self.object)
        return is_claimed

    def deliver(self, content: BytesOrLayout) -> bool:
        is_right = self.item.deliver(content)
        if is_right:
            self.arrived(self.object)
        return is_right

    def miss(self) -> None:
        self.item.miss()


def _deliver(chunks: DownloadChunks, number: int, content: BytesOrLayout, stats: PrefetchStats) -> bool:
    if not isinstance(content, bytes) or not chunks.deliver(number, content):
        return False
    stats.contents += 1
    stats.size_bytes += len(content)
    return True
