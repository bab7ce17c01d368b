"""Targets of downloads: one whole file, or a sparse file of chunks."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from gearworkers.cas.store import verify_file
from gearworkers.errors import IntegrityError, from_os_error
from gearworkers.fetch.context import FetchContext
from gearworkers.fetch.failover import verify_chunk
from gearworkers.fetch.source import Chunk
from gearworkers.util.open_file import ObjectFile
from gearworkers.util.writing import pwrite_all


class Target(Protocol):
    """Fetches and stores the chunks of one object; methods block, and many threads call them, one per chunk."""

    @property
    def chunks(self) -> Sequence[Chunk]:
        """The layout of the object."""

    @property
    def file(self) -> ObjectFile | None:
        """The file from which chunks can be read before the object is whole; None if there is none."""

    def find(self, chunk: Chunk) -> bool:
        """Store the chunk if this host has a copy of it; return whether it is stored."""

    def fetch(self, chunk: Chunk, requested_s: float) -> None:
        """Fetch the chunk from the sources and store it.

        Args:
            chunk: One of `chunks`.
            requested_s: Monotonic time of the request, for `Failover.ask`.

        Raises:
            GearError: It cannot be fetched or stored.
        """

    def store(self, chunk: Chunk, data: bytes) -> None:
        """Verify and store a chunk that a batch request delivered.

        Raises:
            IntegrityError: *data* does not match the chunk.
            GearError: It cannot be stored.
        """

    def publish(self) -> None:
        """Make the object visible in the store, after the last chunk.

        Raises:
            IntegrityError: The stored chunks do not match the object's digest.
        """


def open_target(
    context: FetchContext, digest: bytes, size_bytes: int, get_layout: Callable[[], Sequence[Chunk] | None]
) -> Target:
    """Return the target of a large object: a sparse file if the object is kept in chunks, else a whole file.

    Args:
        context: The fetcher's context.
        digest: SHA-256 of the object.
        size_bytes: Its size.
        get_layout: Returns a checked layout, or None; called if no layout is left here from an earlier process.

    Raises:
        GearError: The sources do not answer, or the partial file cannot be created.
    """
    if digest in context.wrong_layouts:
        return WholeFile(context, digest, size_bytes)
    layout = context.partial_files.layout(digest, size_bytes) or get_layout()
    if layout is None:
        return WholeFile(context, digest, size_bytes)
    file = context.partial_files.create(digest, size_bytes, layout)
    context.chunk_index.add(digest, layout)
    return SparseFile(context, digest, file, layout)


class WholeFile:
    """Receives an object in one piece, as its only chunk. The store has it once it is verified.

    Crash: leaves a partial file, which the next process removes.
    """

    __slots__ = ("_context", "_digest", "_size_bytes", "chunks")

    file = None

    def __init__(self, context: FetchContext, digest: bytes, size_bytes: int) -> None:
        self._context = context
        self._digest = digest
        self._size_bytes = size_bytes
        self.chunks: Sequence[Chunk] = (Chunk(0, size_bytes, digest),)

    def find(self, chunk: Chunk) -> bool:
        return False  # the fetcher looks in the store first

    def fetch(self, chunk: Chunk, requested_s: float) -> None:
        if not self._context.store.has(self._digest):
            self._context.failover.ask(
                lambda source: self._store(source.fetch(self._digest)), self._digest, requested_s
            )

    def store(self, chunk: Chunk, data: bytes) -> None:
        self._store((data,))

    def publish(self) -> None:
        """Do nothing: storing the chunk published the object."""

    def _store(self, pieces: Iterable[bytes]) -> None:
        context, hasher, received_bytes = self._context, hashlib.sha256(), 0
        with context.store.create(context.partial_files.fd) as pending:
            for piece in pieces:
                received_bytes += len(piece)
                if received_bytes > self._size_bytes:
                    break
                hasher.update(piece)
                pending.write(memoryview(piece))
            context.stats.received_bytes += received_bytes
            if received_bytes != self._size_bytes or hasher.digest() != self._digest:
                raise IntegrityError(
                    f"object {self._digest.hex()}: received {received_bytes} bytes with SHA-256 {hasher.hexdigest()}, "
                    f"expected {self._size_bytes} bytes"
                )
            if context.is_referenced(self._digest) and pending.publish(self._digest):
                context.stats.objects += 1


class SparseFile:
    """Receives the chunks of a large object in any order; becomes the object when all are stored.

    Crash: leaves the file and its layout. The next process verifies each chunk against its digest before it uses the
    chunk, which costs less than fetching it again.
    """

    def __init__(self, context: FetchContext, digest: bytes, file: ObjectFile, chunks: Sequence[Chunk]) -> None:
        self._context = context
        self._digest = digest
        self.file = file
        self.chunks = chunks

    def find(self, chunk: Chunk) -> bool:
        """Look for the chunk in this file, which an earlier process may have filled, then in other large objects."""
        if self._has(chunk):
            return True
        data = self._context.chunk_index.find(chunk, self._digest)
        if data is None:
            return False
        self._context.stats.reused_bytes += len(data)
        self._write(chunk, data)
        return True

    def fetch(self, chunk: Chunk, requested_s: float) -> None:
        self._write(chunk, self._context.failover.chunk(chunk, requested_s))

    def store(self, chunk: Chunk, data: bytes) -> None:
        self._context.stats.received_bytes += len(data)
        verify_chunk(chunk, data)
        self._write(chunk, data)

    def publish(self) -> None:
        """Verify the whole file and make it an object, unless the object is unreferenced by now.

        If the file does not match the object's digest, its layout is not used again: the next download fetches the
        object whole.
        """
        context, digest = self._context, self._digest
        try:
            verify_file(self.file.fd, digest)
            if context.is_referenced(digest) and context.store.adopt(
                self.file.fd, context.partial_files.fd, context.partial_files.name(digest), digest
            ):
                context.stats.objects += 1
        except IntegrityError as exc:
            context.stats.note_corrupt(exc)
            context.wrong_layouts.add(digest)
            context.partial_files.remove(digest)
            raise
        context.partial_files.remove(digest)

    def _has(self, chunk: Chunk) -> bool:
        if _is_hole(self.file.fd, chunk.offset, chunk.size_bytes):
            return False
        data = os.pread(self.file.fd, chunk.size_bytes, chunk.offset)
        return len(data) == chunk.size_bytes and hashlib.sha256(data).digest() == chunk.digest

    def _write(self, chunk: Chunk, data: bytes) -> None:
        try:
            pwrite_all(self.file.fd, data, chunk.offset)
        except OSError as exc:
            raise from_os_error(exc, f"write a chunk of object {self._digest.hex()} at {chunk.offset}") from exc


def _is_hole(fd: int, offset: int, size_bytes: int) -> bool:
    """Return whether nothing was ever written there; False if the file system cannot tell."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) >= offset + size_bytes
    except OSError as exc:
        return exc.errno == errno.ENXIO
