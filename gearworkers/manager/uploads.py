"""Bodies on their way in, in unnamed files until they are complete: a slow client costs disk space, not memory."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from gearworkers.errors import IntegrityError, InvalidInput, from_os_error
from gearworkers.http_service.pacing import PIECE_BYTES, CountBytes, PacedRequestBody, TooLarge
from gearworkers.manager.async_remote import AsyncRemote, ReceivedBlob
from gearworkers.remote import blob_stream
from gearworkers.util.writing import pwrite_all

_BATCH_BYTES = 4 << 20
_BATCH_BLOBS = 256


class Uploads:
    """Receives bodies of requests."""

    def __init__(self, remote: AsyncRemote, directory: Path, client_timeout_s: float, count: CountBytes) -> None:
        """
        Args:
            remote: Its threads write the files, and its limit on objects applies.
            directory: Holds the files; created if it is missing.
            client_timeout_s: Longest time without a byte from the client.
            count: Adds received bytes to a metric.
        """
        self.remote = remote
        self._directory = directory
        self._client_timeout_s = client_timeout_s
        self._count = count

    def body(self, request: web.Request) -> PacedRequestBody:
        """Return the body of a request."""
        return PacedRequestBody(request, self._client_timeout_s, self._count)

    @contextmanager
    def open(self) -> Iterator[Upload]:
        """Yield an Upload; its file is removed after the block."""
        upload = Upload(self.remote, self._directory)
        try:
            yield upload
        finally:
            upload.close()

    async def receive(self, request: web.Request, max_bytes: int) -> bytes:
        """Return the whole body of a request, for small ones.

        Raises:
            TooLarge: It exceeds *max_bytes*.
        """
        with self.open() as upload:
            await upload.receive_all(self.body(request), max_bytes)
            return await self.remote.run(upload.load_all)


class Upload:
    """A body on its way in: its start is in an unnamed file, its end in memory. A crash leaves nothing."""

    def __init__(self, remote: AsyncRemote, directory: Path) -> None:
        self._remote = remote
        self._directory = directory
        self._hasher: hashlib._Hash | None = None
        self._fd: int | None = None
        self._tail = bytearray()
        self._file_bytes = 0

    @property
    def size_bytes(self) -> int:
        """Number of bytes received."""
        return self._file_bytes + len(self._tail)

    async def receive(self, body: PacedRequestBody, max_bytes: int) -> int:
        """Receive up to *max_bytes* more bytes and return their number; it is smaller only at the end of *body*.

        Raises:
            TooSlow: As `Pace`.
            ResourceExhausted: The disk is full.
        """
        received_bytes = 0
        while received_bytes < max_bytes and (data := await body.read(min(max_bytes - received_bytes, PIECE_BYTES))):
            received_bytes += len(data)
            self._tail += data
            if len(self._tail) >= PIECE_BYTES:
                piece, self._tail = self._tail, bytearray()
                await self._remote.run(lambda piece=piece: self._write(piece))  # type: ignore[misc]
        return received_bytes

    async def receive_all(self, body: PacedRequestBody, max_bytes: int) -> None:
        """Receive all of *body*.

        Raises:
            TooLarge: It exceeds *max_bytes*.
        """
        if await self.receive(body, max_bytes + 1) > max_bytes:
            raise TooLarge(f"the body exceeds the maximum of {max_bytes} bytes")

    async def receive_object(self, body: PacedRequestBody, digest: bytes) -> int:
        """Receive and verify all of *body*; return the descriptor of the file, which `close` closes.

        Raises:
            IntegrityError: Its SHA-256 is not *digest*.
            TooLarge: It exceeds the maximum size of an object.
        """
        self._hasher = hashlib.sha256()
        while await self.receive(body, PIECE_BYTES):
            if self.size_bytes > self._remote.max_object_bytes:
                raise TooLarge(f"the object exceeds the maximum of {self._remote.max_object_bytes} bytes")
        await self._remote.run(lambda: self._write(self._tail))
        self._tail = bytearray()
        if self._hasher.digest() != digest:
            received = f"{self.size_bytes} bytes with SHA-256 {self._hasher.hexdigest()}"
            raise IntegrityError(f"object {digest.hex()}: received {received}")
        assert self._fd is not None
        return self._fd

    def load(self, blob: ReceivedBlob) -> bytes:
        """Return a received blob. Blocks."""
        return self._read(blob.offset, blob.offset + blob.size_bytes)

    def load_all(self) -> bytes:
        """Return all received bytes. Blocks."""
        return self._read(0, self.size_bytes)

    def _read(self, start: int, end: int) -> bytes:
        file_bytes = self._file_bytes
        from_file = b""
        if start < file_bytes:
            assert self._fd is not None
            from_file = _read(self._fd, start, min(end, file_bytes))
        return from_file + self._tail[max(start - file_bytes, 0) : max(end - file_bytes, 0)]

    def clear(self) -> None:
        """Discard the received bytes and reuse the file."""
        self._tail = bytearray()
        self._file_bytes = 0

    def close(self) -> None:
        """Close the file, which removes it."""
        if self._fd is not None:
            os.close(self._fd)

    def _write(self, data: bytearray) -> None:
        try:
            if self._fd is None:
                self._fd = _open_unnamed(self._directory)
            if self._hasher is not None:
                self._hasher.update(data)
            pwrite_all(self._fd, data, self._file_bytes)
            self._file_bytes += len(data)
        except OSError as exc:
            raise from_os_error(exc, "write an upload") from exc


async def receive_blobs(
    body: PacedRequestBody, upload: Upload, max_blob_bytes: int
) -> AsyncIterator[list[ReceivedBlob]]:
    """Yield the blobs of a body in batches of a few MiB, or of one large blob; the next step overwrites the batch.

    Raises:
        InvalidInput: The body is not a stream of blobs, or ends early.
        TooLarge: A blob exceeds *max_blob_bytes*.
    """
    batch: list[ReceivedBlob] = []
    while raw := await body.read_exactly(blob_stream.HEADER.size):
        if len(raw) < blob_stream.HEADER.size:
            raise InvalidInput("the stream ends within a header")
        digest, size_bytes = blob_stream.parse_header(raw)
        if size_bytes > max_blob_bytes:
            raise TooLarge(f"blob {digest.hex()}: it exceeds the maximum of {max_blob_bytes} bytes")
        batch.append(ReceivedBlob(digest, upload.size_bytes, size_bytes))
        received_bytes = await upload.receive(body, size_bytes)
        if received_bytes < size_bytes:
            raise InvalidInput(f"blob {digest.hex()}: the stream ends after {received_bytes} of {size_bytes} bytes")
        if upload.size_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_BLOBS:
            yield batch
            batch = []
            upload.clear()
    if batch:
        yield batch


def _read(fd: int, offset: int, end: int) -> bytes:
    parts = []
    while offset < end and (part := os.pread(fd, end - offset, offset)):
        parts.append(part)
        offset += len(part)
    return b"".join(parts)


def _open_unnamed(directory: Path) -> int:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise from_os_error(exc, f"create a file in {directory}") from exc
    with tempfile.TemporaryFile(dir=directory) as file:  # NFS lacks O_TMPFILE
        return os.dup(file.fileno())
