"""A store that a fetcher fills from a source in memory; the test controls the source."""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from gearworkers.cas.store import ObjectStore
from gearworkers.errors import NotFound, Unavailable
from gearworkers.fetch.batch import DEFAULT_LIMITS, BatchLimits
from gearworkers.fetch.download import Download
from gearworkers.fetch.fetcher import BATCH_WAIT_S, Fetcher
from gearworkers.fetch.prefetch import Prefetcher, PrefetchObject
from gearworkers.fetch.priority_pool import Priority, PriorityPool
from gearworkers.fetch.source import BytesOrLayout, Chunk

T = TypeVar("T")

LARGE_BYTES = 64 << 10
CHUNK_BYTES = 16 << 10
CHUNKS = 80
TIMEOUT_S = 20.0
_BACKGROUND_THREADS = 3


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def random_bytes(seed: int, size_bytes: int) -> bytes:
    return random.Random(seed).randbytes(size_bytes)


def large_content(seed: int = 9) -> bytes:
    """Return an object of CHUNKS chunks."""
    return random_bytes(seed, CHUNKS * CHUNK_BYTES)


def chunk_of(content: bytes, number: int) -> bytes:
    """Return a chunk of a large object."""
    return content[number * CHUNK_BYTES : (number + 1) * CHUNK_BYTES]


class MemorySource:
    """A source whose batch answers give one content per `release`; it answers single requests at once."""

    def __init__(self) -> None:
        self.contents: dict[bytes, BytesOrLayout] = {}
        self.batches: list[list[bytes]] = []
        """The digests of each batch request."""
        self.single: list[bytes] = []
        """The digests of all other requests."""
        self.refuses_batches = False
        self.refuses_single = False
        self.held: dict[bytes, threading.Event] = {}
        """A single request for one of these digests waits for the event."""
        self._released = threading.Semaphore(0)

    def put(self, content: bytes) -> bytes:
        """Hold an object, in chunks if it is large; return its digest."""
        digest = sha256(content)
        self.contents[digest] = content
        if len(content) >= LARGE_BYTES:
            offsets = range(0, len(content), CHUNK_BYTES)
            pieces = [content[offset : offset + CHUNK_BYTES] for offset in offsets]
            self.contents.update((sha256(piece), piece) for piece in pieces)
            self.contents[digest] = [
                Chunk(offset, len(piece), sha256(piece)) for offset, piece in zip(offsets, pieces, strict=True)
            ]
        return digest

    def release(self, count: int = 10_000) -> None:
        """Let batch answers give *count* more contents."""
        self._released.release(count)

    def fetch(self, digest: bytes) -> Iterator[bytes]:
        if self.refuses_single:
            raise Unavailable("unreachable")
        self.single.append(digest)
        if digest in self.held:
            assert self.held[digest].wait(TIMEOUT_S)
        found = self.contents.get(digest)
        if not isinstance(found, bytes):
            raise NotFound("none")
        yield found

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, BytesOrLayout]]:
        if self.refuses_batches:
            raise Unavailable("unreachable")
        self.batches.append(list(digests))
        for digest in digests:
            self._released.acquire()
            if digest in self.contents:
                yield digest, self.contents[digest]

    def layout(self, digest: bytes) -> Sequence[Chunk] | None:
        self.single.append(digest)
        found = self.contents.get(digest)
        return None if isinstance(found, bytes) else found

    def chunk(self, digest: bytes) -> bytes:
        return b"".join(self.fetch(digest))

    def document(self, name: str) -> None:
        return None


class FetchNode:
    """A store with a fetcher and a prefetcher."""

    def __init__(
        self,
        root: Path,
        source: MemorySource,
        *,
        batch_wait_s: float = BATCH_WAIT_S,
        limits: BatchLimits = DEFAULT_LIMITS,
    ) -> None:
        self.source = source
        self.is_referenced: Callable[[bytes], bool] = lambda _: True
        self.partial_files = root / "fetching"
        self.store = ObjectStore(root / "public")
        self.store.prepare()
        self.pool = PriorityPool(6, for_background=_BACKGROUND_THREADS)
        self.fetcher = Fetcher(
            self.store,
            self.partial_files,
            [source],
            self.pool,
            large_bytes=LARGE_BYTES,
            is_referenced=lambda digest: self.is_referenced(digest),
            batch_wait_s=batch_wait_s,
        )
        self.fetcher.prepare()
        self.prefetcher = Prefetcher(self.fetcher, [source], self.pool, large_bytes=LARGE_BYTES, limits=limits)

    def close(self) -> None:
        self.pool.close()
        self.fetcher.close()

    def put_small(self, count: int, size_bytes: int = 100) -> list[bytes]:
        """Have the source hold small objects; return their digests."""
        return [self.source.put(random_bytes(seed, size_bytes)) for seed in range(count)]

    def prefetch(self, digests: Sequence[bytes], size_bytes: int) -> None:
        """Prefetch objects of one size."""
        self.prefetcher.fetch_soon([PrefetchObject(digest, size_bytes) for digest in digests])

    def prefetch_ranges(self, content: bytes, *ranges: tuple[int, int]) -> None:
        """Prefetch parts of a large object."""
        self.prefetcher.fetch_soon([PrefetchObject(sha256(content), len(content), ranges)])

    def open(self, digest: bytes, size_bytes: int) -> BaseException | None:
        """Open a small object; return the error."""
        return self.fetcher.open(digest, size_bytes).exception(TIMEOUT_S)

    def open_large(self, content: bytes) -> Download:
        """Open a large object; return its download."""
        download = self.fetcher.open(sha256(content), len(content)).result(TIMEOUT_S)
        assert download is not None
        return download

    def read(self, content: bytes, offset: int, size_bytes: int) -> bytes:
        """Open and read a large object."""
        return self.open_large(content).read(offset, size_bytes).result(TIMEOUT_S)

    def fetch_whole(self, content: bytes) -> BaseException | None:
        """Fetch an object in the background; return the error."""
        return self.fetcher.fetch(sha256(content), len(content), Priority.BACKGROUND).exception(TIMEOUT_S)

    def is_arriving(self, content: bytes) -> bool:
        """Return whether a large object can be read while it arrives."""
        return self.fetcher.get(sha256(content)) is not None

    def file(self, content: bytes) -> bytes:
        """Return the bytes of an object in the store."""
        return Path(self.store.path(sha256(content)).decode("latin-1")).read_bytes()

    def partial_names(self) -> set[str]:
        """Return the names, without suffix, of all partial files except the chunk index."""
        return {path.stem for path in self.partial_files.iterdir()} - {"chunks"}

    def wait_for_threads(self, *, busy: int = 0) -> None:
        """Wait until the background threads, except *busy* blocked threads, have done all earlier calls."""
        threads = _BACKGROUND_THREADS - busy
        barrier = threading.Barrier(threads + 1)
        for _ in range(threads):
            self.pool.submit(lambda: _meet(barrier), Priority.BACKGROUND)
        _meet(barrier)

    def wait_for(self, digests: Sequence[bytes]) -> None:
        """Wait until these objects are in the store."""
        wait_until(lambda: all(self.store.has(digest) for digest in digests))


def outcome(future: Future[T]) -> type[BaseException] | None:
    """Return the type of the exception of a future, None for success."""
    error = future.exception(TIMEOUT_S)
    return type(error) if error is not None else None


def wait_until(condition: Callable[[], object]) -> None:
    """Return as soon as *condition* returns a true value."""
    end_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def _meet(barrier: threading.Barrier) -> None:
    barrier.wait(TIMEOUT_S)
