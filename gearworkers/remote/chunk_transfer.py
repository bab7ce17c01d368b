"""Moving the chunks of a large object: a few windows of chunks are in flight at once, so memory stays bounded."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from gearworkers.errors import IntegrityError, NotFound
from gearworkers.fetch.source import Chunk
from gearworkers.remote import encoding
from gearworkers.remote.blobstore import BlobStore
from gearworkers.remote.chunking import chunks_of

_PUT_WINDOW_CHUNKS = 64
_FETCH_WINDOW_BYTES = 1 << 20
_WINDOWS_IN_FLIGHT = 3
_BATCH_ITEMS = 256

_T = TypeVar("_T")


def put_chunks(blobs: BlobStore, source_fd: int) -> Iterator[tuple[int, bytes]]:
    """Cut a file into chunks, store the missing ones, and yield (size in bytes, digest) of each chunk in order.

    All chunks are stored when the iterator is exhausted. While one window is cut and hashed, others are compressed,
    sent and synced.
    """
    chunks = ((hashlib.sha256(data).digest(), bytes(data)) for data in chunks_of(source_fd))
    in_flight: deque[Future[None]] = deque()
    with ThreadPoolExecutor(_WINDOWS_IN_FLIGHT, thread_name_prefix="put") as threads:
        while window := list(islice(chunks, _PUT_WINDOW_CHUNKS)):
            if len(in_flight) == _WINDOWS_IN_FLIGHT:
                in_flight.popleft().result()
            in_flight.append(threads.submit(_put_window, blobs, window))
            yield from ((len(data), digest) for digest, data in window)
        for future in in_flight:
            future.result()


def fetch_chunks(blobs: BlobStore, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, bytes]]:
    """Yield each chunk with its verified bytes, in order.

    Raises:
        NotFound: The store lacks a chunk.
        IntegrityError: A chunk is damaged or has another size.
        Unavailable: The store does not answer.
    """
    windows = batches(chunks, lambda chunk: chunk.size_bytes, _FETCH_WINDOW_BYTES)
    in_flight: deque[Future[list[tuple[Chunk, bytes]]]] = deque()
    threads = ThreadPoolExecutor(_WINDOWS_IN_FLIGHT, thread_name_prefix="get")
    try:
        while True:
            while len(in_flight) < _WINDOWS_IN_FLIGHT and (window := next(windows, None)):
                in_flight.append(threads.submit(_fetch_window, blobs, window))
            if not in_flight:
                return
            yield from in_flight.popleft().result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)  # a caller that stops early does not wait for the rest


def absent(blobs: BlobStore, contents: Sequence[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """Return the distinct (digest, content) of *contents* that the store lacks."""
    present = blobs.present([digest for digest, _ in contents])
    return list({digest: content for digest, content in contents if digest not in present}.items())


def batches(items: Iterable[_T], size_bytes: Callable[[_T], int], max_bytes: int) -> Iterator[list[_T]]:
    """Group *items* in order; a batch ends with the item that reaches *max_bytes*, or with item _BATCH_ITEMS."""
    batch: list[_T] = []
    batch_bytes = 0
    for item in items:
        batch.append(item)
        batch_bytes += size_bytes(item)
        if len(batch) >= _BATCH_ITEMS or batch_bytes >= max_bytes:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch


def _put_window(blobs: BlobStore, window: Sequence[tuple[bytes, bytes]]) -> None:
    missing = absent(blobs, window)
    if missing:
        blobs.put_many([(digest, encoding.encode(data)) for digest, data in missing])


def _fetch_window(blobs: BlobStore, window: Sequence[Chunk]) -> list[tuple[Chunk, bytes]]:
    found = dict(blobs.get_many(list({chunk.digest for chunk in window})))
    fetched = []
    for chunk in window:
        if chunk.digest not in found:
            raise NotFound(f"chunk {chunk.digest.hex()}: not found")
        data = encoding.decode(chunk.digest, found[chunk.digest])
        if len(data) != chunk.size_bytes:
            raise IntegrityError(
                f"chunk {chunk.digest.hex()}: {len(data)} bytes, but its layout says {chunk.size_bytes}"
            )
        fetched.append((chunk, data))
    return fetched
