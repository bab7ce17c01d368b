"""The manager's way to what it keeps: a remote that blocks, asked from threads so that no client waits for another."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from gearworkers.errors import IntegrityError, InvalidInput, NotFound
from gearworkers.manager.memory_budget import Room
from gearworkers.remote import encoding
from gearworkers.remote.remote import Remote

T = TypeVar("T")

_THREADS = 32
_WINDOW_BYTES = 4 << 20
_FIRST_WINDOW = 32
_LEAST_WINDOW, _MOST_WINDOW = 4, 256
_STEP_PIECES = 4
ROOM_BYTES = 256 << 20
"""For contents that are being stored, and as much for large objects and layouts, which take longer."""
_COPIES = 2
"""How often bytes that are stored lie in memory: as they came, and as the store sends them."""
_CHUNKS_BYTES = 32 << 20
"""What the chunks of one large object take that are on their way to the store or from it."""
_LAYOUT_SHARE = 400
"""Of a large object, one byte in so many is its list of chunks, in memory."""


@dataclass(frozen=True, slots=True)
class Incoming:
    """A blob that has come, and where it lies in its upload."""

    digest: bytes
    offset: int
    size_bytes: int


Load = Callable[[Incoming], bytes]
"""Brings a blob that has come into memory; blocks."""


class Store:
    """A `Remote` for coroutines."""

    def __init__(self, remote: Remote, most_object_bytes: int, room_bytes: int = ROOM_BYTES) -> None:
        """
        Args:
            remote: What is kept, and where.
            most_object_bytes: An object's size at most.
            room_bytes: Of memory for what is being stored at once: for small things, and again for large ones.
        """
        self.remote = remote
        self.most_object_bytes = most_object_bytes
        self._room = Room(room_bytes)
        self._large_room = Room(room_bytes)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="store")

    async def run(self, call: Callable[[], T]) -> T:
        """What *call* gives; it may block."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def blobs(self, digests: Sequence[bytes]) -> AsyncIterator[list[tuple[bytes, bytes]]]:
        """(digest, blob) of those that are there, in the order asked for; a few MiB of them at a time."""
        at, window = 0, _FIRST_WINDOW
        while at < len(digests):
            part = digests[at : at + window]
            found = await self.run(lambda part=part: dict(self.remote.blobs.get_many(part)))  # type: ignore[misc]
            yield [(digest, found[digest]) for digest in part if digest in found]
            at += len(part)
            mean_bytes = sum(map(len, found.values())) // max(len(found), 1)
            window = min(max(_WINDOW_BYTES // max(mean_bytes, 1), _LEAST_WINDOW), _MOST_WINDOW)

    async def steps(self, pieces: Iterator[T]) -> AsyncIterator[T]:
        """The items of an iterator that blocks, a few asked for at a time."""
        while part := await self.run(lambda: list(islice(pieces, _STEP_PIECES))):
            for piece in part:
                yield piece

    async def put_object(self, digest: bytes, fd: int, size_bytes: int) -> bool:
        """Store what the file *fd* holds, which was verified; whether it was new."""
        large = size_bytes >= encoding.LARGE_BYTES
        need_bytes = _CHUNKS_BYTES + size_bytes // _LAYOUT_SHARE if large else _COPIES * size_bytes
        async with (self._large_room if large else self._room).taken(need_bytes):
            return await self.run(lambda: self._put_object(digest, fd))

    def _put_object(self, digest: bytes, fd: int) -> bool:
        is_new = not self.remote.has([digest])
        if is_new:
            self.remote.put(digest, fd)
        return is_new

    async def put_document(self, name: str, version: int | None, size_bytes: int, load: Callable[[], bytes]) -> None:
        """Have the document hold what *load* gives, as this version; as whichever is next if that is None.

        Raises:
            AlreadyExists: There is this version already.
        """

        def put() -> None:
            if version is None:
                self.remote.put_document(name, load())
            else:
                self.remote.replace_document(name, load(), version - 1)

        async with self._room.taken(_COPIES * size_bytes):
            await self.run(put)

    async def put_blobs(self, blobs: Sequence[Incoming], load: Load) -> int:
        """Verify and store blobs that a client has made; how many were new.

        Raises:
            IntegrityError: One is not what its digest says; those before it may be stored, it is not.
            InvalidInput: A layout names chunks that are not there.
        """
        contents, layouts = await self.run(lambda: self._lacking(blobs, load))
        async with self._room.taken(_COPIES * sum(blob.size_bytes for blob in contents)):
            await self.run(lambda: self._put_contents(contents, load))
        for blob in layouts:
            async with self._large_room.taken(_CHUNKS_BYTES + _COPIES * blob.size_bytes):
                await self.run(lambda blob=blob: self._put_layout(blob.digest, load(blob)))  # type: ignore[misc]
        return len(contents) + len(layouts)

    def _lacking(self, blobs: Sequence[Incoming], load: Load) -> tuple[list[Incoming], list[Incoming]]:
        """Contents and layouts that are not here yet."""
        present = self.remote.blobs.present([blob.digest for blob in blobs])
        new = {blob.digest: blob for blob in blobs if blob.digest not in present}.values()
        layouts = [blob for blob in new if encoding.is_layout(load(replace(blob, size_bytes=1)))]
        return [blob for blob in new if blob not in layouts], layouts

    def _put_contents(self, blobs: Iterable[Incoming], load: Load) -> None:
        for blob in blobs:
            if blob.size_bytes > 1 + encoding.MAX_CONTENT_BYTES:
                raise InvalidInput(f"blob {blob.digest.hex()}: a content of {blob.size_bytes} bytes needs a layout")
        contents = [(blob.digest, load(blob)) for blob in blobs]
        for digest, content in contents:
            encoding.decode(digest, content)
        if contents:
            self.remote.blobs.put_many(contents)

    def _put_layout(self, digest: bytes, layout: bytes) -> None:
        self._check_layout(digest, layout)
        self.remote.blobs.put_many([(digest, layout)])

    def _check_layout(self, digest: bytes, blob: bytes) -> None:
        if encoding.object_size(digest, blob) > self.most_object_bytes:
            raise InvalidInput(f"object {digest.hex()}: larger than {self.most_object_bytes} bytes")
        hasher = hashlib.sha256()
        try:
            for _, piece in self.remote.fetch_chunks(encoding.iter_layout(digest, blob)):
                hasher.update(piece)
        except NotFound as exc:
            raise InvalidInput(f"layout of {digest.hex()}: {exc}; chunks go first") from exc
        if hasher.digest() != digest:
            raise IntegrityError(f"layout of {digest.hex()}: its chunks make up {hasher.hexdigest()}")

    def close(self) -> None:
        """Let go of the threads."""
        self._threads.shutdown(wait=False)
        self.remote.close()
