"""Limits of a server: connections, sizes of headers, time for a header and for the shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol, cast

from aiohttp import web

MAX_CONNECTIONS = 2048
SHUTDOWN_S = 60.0
"""Time that running requests have when the server stops."""
_MAX_LINE_BYTES = 8190
_LINGERING_S = 1.0


class Gauge(Protocol):
    """A metric that shows the number of open connections."""

    def inc(self) -> object:
        """Add one."""

    def dec(self) -> object:
        """Subtract one."""


def limited_runner(app: web.Application, client_timeout_s: float) -> web.AppRunner:
    """Return a runner for *app* that limits headers in size and time.

    Args:
        app: The service.
        client_timeout_s: Wait for the header of the first and of each later request of a connection.
    """
    return web.AppRunner(
        app,
        access_log=None,
        keepalive_timeout=client_timeout_s,  # aiohttp applies it to the first header as well
        lingering_time=_LINGERING_S,
        max_line_size=_MAX_LINE_BYTES,
        max_field_size=_MAX_LINE_BYTES,
        shutdown_timeout=SHUTDOWN_S,
    )


class ConnectionLimit:
    """Aborts connections beyond the limit at once."""

    def __init__(self, max_connections: int, gauge: Gauge) -> None:
        self._max_connections = max_connections
        self._gauge = gauge
        self._open = 0

    def limited(self, protocol: asyncio.Protocol) -> asyncio.Protocol:
        """Return *protocol* for a new connection, counted."""
        return _CountedProtocol(protocol, self._opened, self._closed)

    def _opened(self) -> bool:
        self._open += 1
        self._gauge.inc()
        return self._open <= self._max_connections

    def _closed(self) -> None:
        self._open -= 1
        self._gauge.dec()


class _CountedProtocol(asyncio.Protocol):
    """Passes all events on, and aborts the connection if `opened` returns False."""

    def __init__(self, inner: asyncio.Protocol, opened: Callable[[], bool], closed: Callable[[], None]) -> None:
        self._inner = inner
        self._opened = opened
        self._closed = closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._inner.connection_made(transport)
        if not self._opened():
            cast(asyncio.Transport, transport).abort()

    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return self._inner.eof_received()

    def pause_writing(self) -> None:
        self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed()
        self._inner.connection_lost(exc)
