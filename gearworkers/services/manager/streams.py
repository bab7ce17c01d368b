"""Bodies at the client's pace, within bounds: what is slow costs its own connection, and what stands still ends."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from aiohttp import ClientConnectionError, web

from gearworkers.errors import IntegrityError, InvalidInput, from_os_error
from gearworkers.objects.remotes import frames
from gearworkers.services.manager.metrics import Metrics
from gearworkers.services.manager.store import Store

T = TypeVar("T")

_PIECE_BYTES = 256 << 10
_LEAST_BYTES_PER_S = 4096
_BATCH_BYTES = 4 << 20
_BATCH_BLOBS = 256
_STARTED: web.RequestKey[web.StreamResponse] = web.RequestKey("started", web.StreamResponse)


class TooSlow(Exception):
    """The client sends or takes less than it must."""


class TooLarge(Exception):
    """A body or object beyond the limit."""


@dataclass(slots=True)
class Pace:
    """How fast one client has to be: something within each `patience_s`, and a little on the whole."""

    patience_s: float
    began_s: float = field(default_factory=time.monotonic)
    moved_bytes: int = 0

    @asynccontextmanager
    async def expected(self) -> AsyncIterator[None]:
        """Around each await of the client.

        Raises:
            TooSlow: It took too long, or takes too long on the whole.
        """
        late_s = time.monotonic() - self.began_s - self.patience_s
        if late_s > 0 and self.moved_bytes < late_s * _LEAST_BYTES_PER_S:
            raise TooSlow
        try:
            async with asyncio.timeout(self.patience_s):
                yield
        except TimeoutError as exc:
            raise TooSlow from exc


class Body:
    """What a client sends, piece by piece."""

    def __init__(self, request: web.Request, patience_s: float, metrics: Metrics) -> None:
        self._content = request.content
        self._pace = Pace(patience_s)
        self._metrics = metrics

    async def read(self, most_bytes: int) -> bytes:
        """Some bytes; none at the end.

        Raises:
            TooSlow: As `Pace`.
        """
        async with self._pace.expected():
            data = await self._content.read(most_bytes)
        self._pace.moved_bytes += len(data)
        self._metrics.received.inc(len(data))
        return data

    async def exactly(self, size_bytes: int) -> bytes:
        """So many bytes; fewer only at the end."""
        parts = []
        while size_bytes and (data := await self.read(min(size_bytes, _PIECE_BYTES))):
            parts.append(data)
            size_bytes -= len(data)
        return b"".join(parts)

    async def whole(self, most_bytes: int) -> bytes:
        """All of it.

        Raises:
            TooLarge: It has more than *most_bytes*.
        """
        data = await self.exactly(most_bytes + 1)
        if len(data) > most_bytes:
            raise TooLarge(f"a body of at most {most_bytes} bytes is taken here")
        return data


class Answer:
    """What a client is sent, piece by piece."""

    def __init__(self, response: web.StreamResponse, patience_s: float, metrics: Metrics) -> None:
        self.response = response
        self._pace = Pace(patience_s)
        self._metrics = metrics

    async def start(self, request: web.Request) -> None:
        """Send the headers; an error from here on can only be told by breaking the connection: `broken_off`."""
        request[_STARTED] = self.response
        await self.response.prepare(request)

    async def write(self, data: bytes | memoryview) -> None:
        """Send *data*; returns when all but a buffer of it is on its way.

        Raises:
            TooSlow: As `Pace`.
        """
        async with self._pace.expected():
            await self.response.write(data)
        self._pace.moved_bytes += len(data)
        self._metrics.sent.inc(len(data))


async def receive_file(body: Body, store: Store, digest: bytes, directory: Path) -> int:
    """A body in a file without a name, verified; its descriptor. A crash leaves nothing.

    Raises:
        IntegrityError: Its SHA-256 is not *digest*.
        TooLarge: It has more bytes than an object may have.
    """
    file = await store.run(lambda: _unnamed(directory))
    try:
        hasher = hashlib.sha256()
        size_bytes = 0
        while piece := await body.exactly(_PIECE_BYTES * 4):
            size_bytes += len(piece)
            if size_bytes > store.most_object_bytes:
                raise TooLarge(f"objects of at most {store.most_object_bytes} bytes are taken")
            await store.run(lambda piece=piece: _append(file, hasher, piece))  # type: ignore[misc]
        if hasher.digest() != digest:
            raise IntegrityError(f"object {digest.hex()}: {size_bytes} bytes with SHA-256 {hasher.hexdigest()} came")
    except BaseException:
        os.close(file)
        raise
    return file


async def receive_blobs(body: Body, most_blob_bytes: int) -> AsyncIterator[list[tuple[bytes, bytes]]]:
    """The blobs of a body, in batches of a few MiB.

    Raises:
        InvalidInput: It is no stream of blobs, or ends early.
        TooLarge: A blob is larger than any can be.
    """
    batch: list[tuple[bytes, bytes]] = []
    batch_bytes = 0
    while raw := await body.exactly(frames.HEADER.size):
        if len(raw) < frames.HEADER.size:
            raise InvalidInput("the stream ends within a header")
        digest, size_bytes = frames.header(raw)
        if size_bytes > most_blob_bytes:
            raise TooLarge(f"blob {digest.hex()}: at most {most_blob_bytes} bytes are taken")
        blob = await body.exactly(size_bytes)
        if len(blob) < size_bytes:
            raise InvalidInput(f"blob {digest.hex()}: the stream ends after {len(blob)} of {size_bytes} bytes")
        batch.append((digest, blob))
        batch_bytes += size_bytes
        if batch_bytes >= _BATCH_BYTES or len(batch) >= _BATCH_BLOBS:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch


def broken_off(request: web.Request) -> web.StreamResponse | None:
    """If the answer has begun, break its connection, so that nobody takes it for whole; that answer."""
    response = request.get(_STARTED)
    if response is not None and request.transport is not None:
        request.transport.abort()
    return response


def is_gone(exc: BaseException) -> bool:
    """Whether an error says that the client has left."""
    return isinstance(exc, ConnectionError | ClientConnectionError)


def _unnamed(directory: Path) -> int:
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        if exc.errno != errno.EOPNOTSUPP:
            raise from_os_error(exc, f"make a file in {directory}") from exc
    with tempfile.TemporaryFile(dir=directory) as file:  # NFS has no O_TMPFILE
        return os.dup(file.fileno())


def _append(fd: int, hasher: hashlib._Hash, data: bytes) -> None:
    hasher.update(data)
    view = memoryview(data)
    try:
        while view:
            view = view[os.write(fd, view) :]
    except OSError as exc:
        raise from_os_error(exc, "keep an upload") from exc
