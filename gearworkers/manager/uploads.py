"""What comes in, until it is whole: in files without names, so that a slow client costs disk and no memory."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

from gearworkers.errors import IntegrityError, InvalidInput, from_os_error
from gearworkers.manager.async_remote import Incoming, Store
from gearworkers.manager.pacing import PIECE_BYTES, Body, TooLarge
from gearworkers.remote import blob_stream
from gearworkers.util.writing import pwrite_all

_BATCH_BYTES = 4 << 20
_BATCH_BLOBS = 256


class Upload:
    """A body on its way in; made by `uploading`. A crash leaves nothing."""

    def __init__(self, store: Store, directory: Path) -> None:
        self._store = store
        self._directory = directory
        self._hasher: hashlib._Hash | None = None
        self._fd: int | None = None
        self._tail = bytearray()
        self._filed_bytes = 0

    @property
    def size_bytes(self) -> int:
        """How much has come."""
        return self._filed_bytes + len(self._tail)

    async def receive(self, body: Body, most_bytes: int) -> int:
        """Take so many more bytes of *body*; how many came, which are fewer only at its end.

        Raises:
            TooSlow: As `Pace`.
            ResourceExhausted: The disk is full.
        """
        came_bytes = 0
        while came_bytes < most_bytes and (data := await body.read(min(most_bytes - came_bytes, PIECE_BYTES))):
            came_bytes += len(data)
            self._tail += data
            if len(self._tail) >= PIECE_BYTES:
                piece, self._tail = self._tail, bytearray()
                await self._store.run(lambda piece=piece: self._file(piece))  # type: ignore[misc]
        return came_bytes

    async def receive_all(self, body: Body, most_bytes: int) -> None:
        """Take all of *body*.

        Raises:
            TooLarge: It has more than *most_bytes*.
        """
        if await self.receive(body, most_bytes + 1) > most_bytes:
            raise TooLarge(f"a body of at most {most_bytes} bytes is taken here")

    async def receive_object(self, body: Body, digest: bytes) -> int:
        """Take all of *body*, verified; a descriptor of it, which is closed with the upload.

        Raises:
            IntegrityError: Its SHA-256 is not *digest*.
            TooLarge: It has more bytes than an object may have.
        """
        self._hasher = hashlib.sha256()
        while await self.receive(body, PIECE_BYTES):
            if self.size_bytes > self._store.most_object_bytes:
                raise TooLarge(f"objects of at most {self._store.most_object_bytes} bytes are taken")
        await self._store.run(lambda: self._file(self._tail))
        self._tail = bytearray()
        if self._hasher.digest() != digest:
            came = f"{self.size_bytes} bytes with SHA-256 {self._hasher.hexdigest()}"
            raise IntegrityError(f"object {digest.hex()}: {came} came")
        assert self._fd is not None
        return self._fd

    def load(self, blob: Incoming) -> bytes:
        """A blob of what has come. Blocks."""
        return self._read(blob.offset, blob.offset + blob.size_bytes)

    def load_all(self) -> bytes:
        """All that has come. Blocks."""
        return self._read(0, self.size_bytes)

    def _read(self, start: int, end: int) -> bytes:
        filed_bytes = self._filed_bytes
        filed = b""
        if start < filed_bytes:
            assert self._fd is not None
            filed = _read(self._fd, start, min(end, filed_bytes))
        return filed + self._tail[max(start - filed_bytes, 0) : max(end - filed_bytes, 0)]

    def clear(self) -> None:
        """What has come is needed no more."""
        self._tail = bytearray()
        self._filed_bytes = 0

    def close(self) -> None:
        """Let go of the file."""
        if self._fd is not None:
            os.close(self._fd)

    def _file(self, data: bytearray) -> None:
        try:
            if self._fd is None:
                self._fd = _unnamed(self._directory)
            if self._hasher is not None:
                self._hasher.update(data)
            pwrite_all(self._fd, data, self._filed_bytes)
            self._filed_bytes += len(data)
        except OSError as exc:
            raise from_os_error(exc, "keep an upload") from exc


@contextmanager
def uploading(store: Store, directory: Path) -> Iterator[Upload]:
    """An Upload that ends with the block.

    Args:
        store: Whose threads write.
        directory: Where its file is; made if it is not there.
    """
    upload = Upload(store, directory)
    try:
        yield upload
    finally:
        upload.close()


async def receive_whole(body: Body, store: Store, directory: Path, most_bytes: int) -> bytes:
    """All of a small body.

    Raises:
        TooLarge: It has more than *most_bytes*.
    """
    with uploading(store, directory) as upload:
        await upload.receive_all(body, most_bytes)
        return await store.run(upload.load_all)


async def receive_blobs(body: Body, upload: Upload, most_blob_bytes: int) -> AsyncIterator[list[Incoming]]:
    """The blobs of a body, a few MiB of them or one large one at a time; the next step forgets them.

    Raises:
        InvalidInput: It is no stream of blobs, or ends early.
        TooLarge: A blob is larger than any can be.
    """
    batch: list[Incoming] = []
    while raw := await body.exactly(blob_stream.HEADER.size):
        if len(raw) < blob_stream.HEADER.size:
            raise InvalidInput("the stream ends within a header")
        digest, size_bytes = blob_stream.parse_header(raw)
        if size_bytes > most_blob_bytes:
            raise TooLarge(f"blob {digest.hex()}: at most {most_blob_bytes} bytes are taken")
        batch.append(Incoming(digest, upload.size_bytes, size_bytes))
        came_bytes = await upload.receive(body, size_bytes)
        if came_bytes < size_bytes:
            raise InvalidInput(f"blob {digest.hex()}: the stream ends after {came_bytes} of {size_bytes} bytes")
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


def _unnamed(directory: Path) -> int:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise from_os_error(exc, f"make a file in {directory}") from exc
    with tempfile.TemporaryFile(dir=directory) as file:  # NFS has no O_TMPFILE
        return os.dup(file.fileno())
