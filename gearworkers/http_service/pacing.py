"""Bodies at the client's pace: a slow client delays only its own connection, and a stalled client is dropped."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import ClientConnectionError, web

PIECE_BYTES = 256 << 10
"""Memory that a connection's body takes at most, beside aiohttp's own buffers."""

_MIN_BYTES_PER_S = 4096
_STARTED: web.RequestKey[web.StreamResponse] = web.RequestKey("started", web.StreamResponse)

CountBytes = Callable[[int], object]
"""Adds received or sent bytes to a metric."""


class TooSlow(Exception):
    """The client sends or receives too slowly."""


class TooLarge(Exception):
    """A body or object exceeds the limit."""


@dataclass(slots=True)
class Pace:
    """The pace that a client must keep: something within each `timeout_s`, and _MIN_BYTES_PER_S overall."""

    timeout_s: float
    waited_s: float = 0.0
    """Time spent waiting for the client; the service's own work does not count."""
    moved_bytes: int = 0

    @asynccontextmanager
    async def expected(self) -> AsyncIterator[None]:
        """Time an await of the client.

        Raises:
            TooSlow: This await timed out, or the client is too slow overall.
        """
        late_s = self.waited_s - self.timeout_s
        if late_s > 0 and self.moved_bytes < late_s * _MIN_BYTES_PER_S:
            raise TooSlow
        started_s = time.monotonic()
        try:
            async with asyncio.timeout(self.timeout_s):
                yield
        except TimeoutError as exc:
            raise TooSlow from exc
        finally:
            self.waited_s += time.monotonic() - started_s


class PacedRequestBody:
    """The body of a request, read piece by piece."""

    def __init__(self, request: web.Request, timeout_s: float, count: CountBytes) -> None:
        self._content = request.content
        self._pace = Pace(timeout_s)
        self._count = count

    async def read(self, max_bytes: int) -> bytes:
        """Return some bytes; none at the end.

        Raises:
            TooSlow: As `Pace`.
        """
        async with self._pace.expected():
            data = await self._content.read(max_bytes)
        self._pace.moved_bytes += len(data)
        self._count(len(data))
        return data

    async def read_exactly(self, size_bytes: int) -> bytes:
        """Return that many bytes; fewer only at the end."""
        parts = []
        while size_bytes and (data := await self.read(min(size_bytes, PIECE_BYTES))):
            parts.append(data)
            size_bytes -= len(data)
        return b"".join(parts)


class PacedResponse:
    """A response, written piece by piece."""

    def __init__(self, response: web.StreamResponse, timeout_s: float, count: CountBytes) -> None:
        self.response = response
        self._pace = Pace(timeout_s)
        self._count = count

    async def start(self, request: web.Request) -> None:
        """Send the headers; later errors can only abort the connection (`abort_started`)."""
        request[_STARTED] = self.response
        await self.response.prepare(request)

    async def write(self, data: bytes | memoryview) -> None:
        """Send *data*; return when all but a buffer of it is sent.

        Raises:
            TooSlow: As `Pace`.
        """
        async with self._pace.expected():
            await self.response.write(data)
        self._pace.moved_bytes += len(data)
        self._count(len(data))


def abort_started(request: web.Request) -> web.StreamResponse | None:
    """Abort the connection of a response that has started, so that the client does not accept it as complete.

    Returns:
        That response; None if none has started.
    """
    response = request.get(_STARTED)
    if response is not None and request.transport is not None:
        request.transport.abort()
    return response


def is_disconnect(exc: BaseException) -> bool:
    """Return whether an error means that the client has disconnected."""
    return isinstance(exc, ConnectionError | ClientConnectionError)
