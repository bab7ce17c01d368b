"""Bodies at the client's pace, within bounds: what is slow costs its own connection, and what stands still ends."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from aiohttp import ClientConnectionError, web

from gearworkers.manager.metrics import Metrics

PIECE_BYTES = 256 << 10
"""What a connection's body takes in memory at most, beside aiohttp's own buffers."""

_LEAST_BYTES_PER_S = 4096
_STARTED: web.RequestKey[web.StreamResponse] = web.RequestKey("started", web.StreamResponse)


class TooSlow(Exception):
    """The client sends or takes less than it must."""


class TooLarge(Exception):
    """A body or object beyond the limit."""


@dataclass(slots=True)
class Pace:
    """How fast one client has to be: something within each `patience_s`, and a little on the whole."""

    patience_s: float
    waited_s: float = 0.0
    """For the client alone: what the store takes is not its fault."""
    moved_bytes: int = 0

    @asynccontextmanager
    async def expected(self) -> AsyncIterator[None]:
        """Around each await of the client.

        Raises:
            TooSlow: It took too long, or takes too long on the whole.
        """
        late_s = self.waited_s - self.patience_s
        if late_s > 0 and self.moved_bytes < late_s * _LEAST_BYTES_PER_S:
            raise TooSlow
        began_s = time.monotonic()
        try:
            async with asyncio.timeout(self.patience_s):
                yield
        except TimeoutError as exc:
            raise TooSlow from exc
        finally:
            self.waited_s += time.monotonic() - began_s


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
        while size_bytes and (data := await self.read(min(size_bytes, PIECE_BYTES))):
            parts.append(data)
            size_bytes -= len(data)
        return b"".join(parts)


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


def broken_off(request: web.Request) -> web.StreamResponse | None:
    """If the answer has begun, break its connection, so that nobody takes it for whole; that answer."""
    response = request.get(_STARTED)
    if response is not None and request.transport is not None:
        request.transport.abort()
    return response


def is_gone(exc: BaseException) -> bool:
    """Whether an error says that the client has left."""
    return isinstance(exc, ConnectionError | ClientConnectionError)
