"""The remote of the manager, for coroutines: blocking calls run in threads, so clients do not wait for each other."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from gearworkers.errors import IntegrityError, InvalidInput, NotFound
from gearworkers.manager.memory_budget import MemoryBudget
from gearworkers.remote import encoding
from gearworkers.remote.remote import Remote

T = TypeVar("T")

_THREADS = 32
_WINDOW_BYTES = 4 << 20
_FIRST_WINDOW = 32
_MIN_WINDOW, _MAX_WINDOW = 4, 256
_STEP_ITEMS = 4
BUDGET_BYTES = 256 << 20
"""Memory for contents that are being stored, and as much again for large objects and layouts, which take longer."""
_COPIES = 2
"""Copies in memory of bytes that are being stored: as received, and as the store sends them."""
_CHUNKS_BYTES = 32 << 20
"""Memory for the chunks of one large object that are on their way to or from the store."""
_LAYOUT_DIVISOR = 400
"""The list of a large object's chunks takes one byte of memory for this many bytes of the object."""


@dataclass(frozen=True, slots=True)
class ReceivedBlob:
    """A received blob, and its place in the upload."""

    digest: bytes
    offset: int
    size_bytes: int


LoadBlob = Callable[[ReceivedBlob], bytes]
"""Reads a received blob into memory; blocks."""


class AsyncRemote:
    """A `Remote` for coroutines."""

    def __init__(self, remote: Remote, max_object_bytes: int, budget_bytes: int = BUDGET_BYTES) -> None:
        """
        Args:
            remote: Stores everything.
            max_object_bytes: Size of the largest object.
            budget_bytes: Memory for storing small contents, and as much again for large objects.
        """
        self.remote = remote
        self.max_object_bytes = max_object_bytes
        self._budget = MemoryBudget(budget_bytes)
        self._large_budget = MemoryBudget(budget_bytes)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="store")

    async def run(self, call: Callable[[], T]) -> T:
        """Return the result of *call*, which may block."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def get_blobs(self, digests: Sequence[bytes]) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """Yield (digest, blob) of the present ones in the order of *digests*, a few MiB at a time."""
        start, window = 0, _FIRST_WINDOW
        while start < len(digests):
            batch = digests[start : start + window]
            found = await self.run(lambda batch=batch: dict(self.remote.blobs.get_many(batch)))  # type: ignore[misc]
            yield [(digest, found[digest]) for digest in batch if digest in found]
            start += len(batch)
            mean_bytes = sum(map(len, found.values())) // max(len(found), 1)
            window = min(max(_WINDOW_BYTES // max(mean_bytes, 1), _MIN_WINDOW), _MAX_WINDOW)

    async def iterate(self, items: Iterator[T]) -> AsyncIterator[T]:
        """Yield the items of an iterator that blocks; a thread takes a few at a time."""
        while batch := await self.run(lambda: list(islice(items, _STEP_ITEMS))):
            for item in batch:
                yield item

    async def put_object(self, digest: bytes, fd: int, size_bytes: int) -> bool:
        """Store the verified content of the file *fd*; return whether it was new."""
        large = size_bytes >= encoding.LARGE_BYTES
        needed_bytes = _CHUNKS_BYTES + size_bytes // _LAYOUT_DIVISOR if large else _COPIES * size_bytes
        async with (self._large_budget if large else self._budget).reserved(needed_bytes):
            return await self.run(lambda: self._put_object(digest, fd))

    def _put_object(self, digest: bytes, fd: int) -> bool:
        is_new = not self.remote.has([digest])
        if is_new:
            self.remote.put(digest, fd)
        return is_new

    async def put_document(self, name: str, version: int | None, size_bytes: int, load: Callable[[], bytes]) -> None:
        """Store the content that *load* returns as this version of the document; None: as the next version.

        Raises:
            AlreadyExists: The document has this version.
        """

        def put() -> None:
            if version is None:
                self.remote.put_document(name, load())
            else:
                self.remote.replace_document(name, load(), version - 1)

        async with self._budget.reserved(_COPIES * size_bytes):
            await self.run(put)

    async def put_blobs(self, blobs: Sequence[ReceivedBlob], load: LoadBlob) -> int:
        """Verify and store blobs that a client has encoded; return the number of new ones.

        Raises:
            IntegrityError: A blob does not match its digest. It is not stored, but blobs before it may be.
            InvalidInput: A layout names chunks that are absent.
        """
        contents, layouts = await self.run(lambda: self._absent(blobs, load))
        async with self._budget.reserved(_COPIES * sum(blob.size_bytes for blob in contents)):
            await self.run(lambda: self._put_contents(contents, load))
        for blob in layouts:
            async with self._large_budget.reserved(_CHUNKS_BYTES + _COPIES * blob.size_bytes):
                await self.run(lambda blob=blob: self._put_layout(blob.digest, load(blob)))  # type: ignore[misc]
        return len(contents) + len(layouts)

    def _absent(self, blobs: Sequence[ReceivedBlob], load: LoadBlob) -> tuple[list[ReceivedBlob], list[ReceivedBlob]]:
        """Return the contents and the layouts that are absent."""
        present = self.remote.blobs.present([blob.digest for blob in blobs])
        new = {blob.digest: blob for blob in blobs if blob.digest not in present}.values()
        layouts = [blob for blob in new if encoding.is_layout(load(replace(blob, size_bytes=1)))]
        return [blob for blob in new if blob not in layouts], layouts

    def _put_contents(self, blobs: Iterable[ReceivedBlob], load: LoadBlob) -> None:
        for blob in blobs:
            if blob.size_bytes > 1 + encoding.MAX_CONTENT_BYTES:
                raise InvalidInput(f"blob {blob.digest.hex()}: a content of {blob.size_bytes} bytes needs a layout")
        contents = [(blob.digest, load(blob)) for blob in blobs]
        for digest, content in contents:
            encoding.decode(digest, content)
        if contents:
            self.remote.blobs.put_many(contents)

    def _put_layout(self, digest: bytes, layout: bytes) -> None:
        self._verify_layout(digest, layout)
        self.remote.blobs.put_many([(digest, layout)])

    def _verify_layout(self, digest: bytes, layout: bytes) -> None:
        if encoding.object_size(digest, layout) > self.max_object_bytes:
            raise InvalidInput(f"object {digest.hex()}: larger than {self.max_object_bytes} bytes")
        hasher = hashlib.sha256()
        try:
            for _, data in self.remote.fetch_chunks(encoding.iter_layout(digest, layout)):
                hasher.update(data)
        except NotFound as exc:
            raise InvalidInput(f"layout of {digest.hex()}: {exc}; push its chunks first") from exc
        if hasher.digest() != digest:
            raise IntegrityError(f"layout of {digest.hex()}: its chunks have SHA-256 {hasher.hexdigest()}")

    def close(self) -> None:
        """End the threads and close the remote."""
        self._threads.shutdown(wait=False)
        self.remote.close()
