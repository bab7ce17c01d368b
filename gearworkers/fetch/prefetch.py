"""Objects are brought before anybody asks for them: what profiles name, and behind that whole layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import structlog

from gearworkers.errors import GearError
from gearworkers.fetch.batch import Item, bring
from gearworkers.fetch.download import Job
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.partial_object import LargeObject
from gearworkers.fetch.priority_pool import Urgency, WorkPool
from gearworkers.fetch.source import Content, Source

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Part:
    """What is known to be wanted of an object soon."""

    digest: bytes
    size_bytes: int
    """Of the whole."""
    ranges: tuple[tuple[int, int], ...] = ()
    """Of an object that is served in parts, (offset, size in bytes): what will be read. Others are wanted whole."""


@dataclass(slots=True)
class PrefetchCounts:
    """Since the process began."""

    contents: int = 0
    """Small objects, and chunks of large ones."""
    size_bytes: int = 0


class Prefetcher:
    """Brings many by few requests through one fetcher; all methods return at once."""

    def __init__(
        self, fetcher: Fetcher, sources: Sequence[Source], pool: WorkPool, *, large_bytes: int, served_bytes: int = 0
    ) -> None:
        """
        Args:
            fetcher: Who has the objects.
            sources: As the fetcher's.
            pool: Likewise.
            large_bytes: Likewise.
            served_bytes: From this size on an object is served in parts.
        """
        self._fetcher = fetcher
        self._sources = sources
        self._pool = pool
        self._large_bytes = large_bytes
        self._served_bytes = served_bytes
        self.counts = PrefetchCounts()

    def wholly(self, wanted: Iterable[tuple[bytes, int]]) -> None:
        """Have objects, given as (digest, size in bytes), here some time: behind all that is on demand."""
        small: list[Item] = []
        for digest, size_bytes in wanted:
            if size_bytes >= self._large_bytes:
                self._fetcher.fetch(digest, size_bytes, Urgency.BACKGROUND, lambda _: None)
            else:
                small.append(_Small(self._fetcher, self.counts, digest, size_bytes, must_come=True))
        bring(small, self._sources, self._pool, Urgency.BACKGROUND)

    def soon(self, parts: Sequence[Part]) -> None:
        """Have *parts* here soon, in this order; what no source has is left to who opens it.

        The layouts of large objects come first, in one request, then the contents in a few long ones.
        """
        self._pool.submit(lambda: self._soon(parts), Urgency.READ_AHEAD)

    def _soon(self, parts: Sequence[Part]) -> None:
        missing = [part for part in parts if not self._fetcher.whole.is_here(part.digest)]
        self._bring_layouts({part.digest: part.size_bytes for part in missing if part.size_bytes >= self._large_bytes})
        bring(self._items(missing), self._sources, self._pool, Urgency.READ_AHEAD)

    def _items(self, parts: Sequence[Part]) -> Iterator[Item]:
        for part in parts:
            large = self._fetcher.chunked.get(part.digest)
            if large is not None:
                ranges = part.ranges if part.size_bytes >= self._served_bytes else ((0, part.size_bytes),)
                yield from (_Piece(large, self._fetcher, self.counts, order) for order in large.orders(ranges))
            elif part.size_bytes < self._large_bytes:
                yield _Small(self._fetcher, self.counts, part.digest, part.size_bytes, must_come=False)

    def _bring_layouts(self, sizes: dict[bytes, int]) -> None:
        """Have these large objects, by digest, ready to be read; nobody has asked for them yet."""
        for source in self._sources:
            wanted = [digest for digest in sizes if self._fetcher.chunked.get(digest) is None]
            try:
                for digest, content in source.fetch_many(wanted) if wanted else ():
                    if digest in sizes and not isinstance(content, bytes):
                        self._fetcher.chunked.adopt_layout(digest, sizes[digest], content)
            except GearError as exc:
                _log.warning("layouts could not be prefetched", error=str(exc))


@dataclass(slots=True)
class _Small:
    """A whole object as one of many; implements `ahead.Item`."""

    fetcher: Fetcher
    counts: PrefetchCounts
    digest: bytes
    size_bytes: int
    must_come: bool
    job: Job | None = None

    def claim(self) -> bool:
        self.job = self.fetcher.whole.claim(self.digest, self.size_bytes, must_come=self.must_come)
        return self.job is not None

    def deliver(self, content: Content) -> bool:
        assert self.job is not None
        if not isinstance(content, bytes) or not self.fetcher.whole.stored(self.job, content):
            return False
        self.counts.contents += 1
        self.counts.size_bytes += len(content)
        return True

    def miss(self) -> None:
        assert self.job is not None
        self.fetcher.whole.unclaim(self.job)


@dataclass(slots=True)
class _Piece:
    """A chunk of a large object as one of many; implements `ahead.Item`."""

    large: LargeObject
    fetcher: Fetcher
    counts: PrefetchCounts
    order: int

    @property
    def digest(self) -> bytes:
        return self.large.chunk(self.order).digest

    @property
    def size_bytes(self) -> int:
        return self.large.chunk(self.order).size_bytes

    def claim(self) -> bool:
        return self.large.claim(self.order)

    def deliver(self, content: Content) -> bool:
        if not isinstance(content, bytes) or not self.large.deliver(self.order, content):
            return False
        self.fetcher.outcomes.received_bytes += len(content)
        self.counts.contents += 1
        self.counts.size_bytes += len(content)
        return True

    def miss(self) -> None:
        self.large.miss(self.order)
