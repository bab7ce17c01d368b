"""A connection of dockerd: the HTTP server answers light requests, a worker takes the connection over for a heavy one.

dockerd keeps connections open and mixes calls on them. The body of ApplyDiff and the response of Diff may have
gigabytes, which this process would only copy. So the connection examines the first bytes of each request. For these two
calls it bypasses the HTTP server and stops reading, and the gateway passes the descriptor to the worker.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

from gearworkers.errors import InvalidInput
from gearworkers.workers.messages import CHUNKED
from plugin_gateway.graphdriver.messages import CONTENT_TYPE, LayerRequest, decode, error

_APPLY_DIFF = b"POST /GraphDriver.ApplyDiff"
_HEAVY = (_APPLY_DIFF + b"?", _APPLY_DIFF + b" ", b"POST /GraphDriver.Diff ")
_HEAD_END = b"\r\n\r\n"
_HEAD_LIMIT_BYTES = 64 << 10
_REQUEST_LIMIT_BYTES = 1 << 20
_BEGIN_BYTES = 32 << 10
"""Bytes of a longer body to receive before a worker is occupied; tar itself writes 10 KiB at a time."""
_CHUNK_SIZE = re.compile(rb"[ \t]*([0-9a-fA-F]+)")
_DRAIN_S = 30.0
_REASONS = {200: b"OK", 400: b"Bad Request", 500: b"Internal Server Error"}


@dataclass(frozen=True, slots=True)
class HeavyRequest:
    """An ApplyDiff or Diff whose head has been read."""

    method: str
    """``GraphDriver.ApplyDiff`` or ``GraphDriver.Diff``."""
    id: str
    parent: str
    body_bytes: int
    """Length of the body that the worker reads, or CHUNKED."""
    head: bytes
    """The part of the body that was already read."""


class DockerConnection(asyncio.Protocol):
    """One connection of dockerd.

    Args:
        light: Creates the HTTP server's protocol for the connection.
        heavy: Receives each heavy request and this connection, on which reading has stopped. It must end with one call
            of respond, close or abort.
    """

    def __init__(
        self, light: Callable[[], asyncio.Protocol], heavy: Callable[[HeavyRequest, DockerConnection], None]
    ) -> None:
        self._make_light = light
        self._heavy = heavy
        self._light: asyncio.Protocol | None = None
        self._receive: Callable[[bytes], None] = self._begin_request
        self._pending = b""
        self._drain: asyncio.TimerHandle | None = None

    # -- callbacks of the event loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start with the transport."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Receive bytes."""
        self._receive(data)

    def eof_received(self) -> bool | None:
        """Handle the end of dockerd's stream."""
        return self._light.eof_received() if self._light is not None else None

    def pause_writing(self) -> None:
        """Stop writing: dockerd reads slowly."""
        if self._light is not None:
            self._light.pause_writing()

    def resume_writing(self) -> None:
        """Write again: dockerd has caught up."""
        if self._light is not None:
            self._light.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Handle the end of the connection."""
        if self._drain is not None:
            self._drain.cancel()
        if self._light is not None:
            self._light.connection_lost(exc)

    # -- between requests

    def light_request_ended(self) -> None:
        """Expect a new request: the HTTP server has read the last one completely."""
        self._receive = self._begin_request

    def _begin_request(self, data: bytes) -> None:
        self._pending += data
        if self._pending.startswith(_HEAVY):
            self._receive = self._read_heavy
            self._read_heavy(b"")
        elif not any(prefix.startswith(self._pending) for prefix in _HEAVY):
            self._receive = self._pass_on
            self._pass_on(self._taken())

    def _pass_on(self, data: bytes) -> None:
        if self._light is None:
            self._light = self._make_light()
            self._light.connection_made(self._transport)
        self._light.data_received(data)

    def _taken(self) -> bytes:
        data, self._pending = self._pending, b""
        return data

    # -- a heavy request

    def _read_heavy(self, data: bytes) -> None:
        self._pending += data
        end = self._pending.find(_HEAD_END)
        if end < 0 and len(self._pending) < _HEAD_LIMIT_BYTES:
            return
        try:
            request = _parsed(self._pending[: max(end, 0)], self._pending[end + len(_HEAD_END) :])
        except InvalidInput as exc:
            self.respond(400, error(str(exc)))
            return
        if request is not None:
            self._pending = b""
            self._receive = self._drop
            self._transport.pause_reading()
            self._heavy(request, self)

    def descriptor(self) -> int:
        """Return a duplicate of the connection's descriptor, which the caller closes."""
        return os.dup(self._transport.get_extra_info("socket").fileno())

    def respond(self, status: int, body: bytes) -> None:
        """Answer the request and end the connection.

        After an error the rest of the request is read and discarded. If the connection closed with unread bytes, Go
        would report a write error without reading the response, and dockerd would send the rest of the body as a new
        request.
        """
        head = b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\nContent-Length: %d\r\nConnection: close\r\n\r\n"
        self._transport.write(head % (status, _REASONS[status], CONTENT_TYPE.encode(), len(body)) + body)
        self._receive = self._drop
        if status == 200:
            self._transport.close()
            return
        self._transport.resume_reading()
        self._drain = asyncio.get_running_loop().call_later(_DRAIN_S, self._transport.abort)

    def close(self) -> None:
        """Close a connection whose request a worker has answered completely."""
        self._transport.close()

    def abort(self) -> None:
        """Abort the connection at once, so that dockerd does not accept a partial response."""
        self._transport.abort()

    def _drop(self, data: bytes) -> None:
        """Discard the rest of the body of a request that was answered."""


def _parsed(head: bytes, body: bytes) -> HeavyRequest | None:
    """Return the request; None while too little of an ApplyDiff's body, or not all of a Diff's, has arrived.

    Raises:
        InvalidInput: The request is malformed.
    """
    if not head:
        raise InvalidInput(f"the request's head is longer than {_HEAD_LIMIT_BYTES} bytes")
    request_line, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    url = urlsplit(request_line.split(" ")[1])
    length = _body_bytes(headers)
    if url.path == "/GraphDriver.ApplyDiff":
        if len(body) < _BEGIN_BYTES and not is_body_complete(body, length):
            return None
        query = parse_qs(url.query)
        return HeavyRequest(url.path[1:], _first(query, "id"), _first(query, "parent"), length, body)
    if not 0 <= length <= _REQUEST_LIMIT_BYTES:
        raise InvalidInput("Diff: the request needs a Content-Length, and a short body")
    if len(body) < length:
        return None
    layer = decode(body[:length], LayerRequest)
    return HeavyRequest(url.path[1:], layer.id, layer.parent, 0, b"")


def is_body_complete(body: bytes, length: int) -> bool:
    """Whether *body* is complete, or malformed, which the worker reports."""
    if length != CHUNKED:
        return len(body) >= length
    at = 0
    while (end := body.find(b"\r\n", at)) >= 0:
        size = _CHUNK_SIZE.match(body, at, end)
        if size is None:
            return True
        if not int(size[1], 16):
            return body.find(b"\r\n\r\n", end) >= 0
        at = end + int(size[1], 16) + 4
    return False


def _body_bytes(headers: dict[str, str]) -> int:
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return CHUNKED
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()):
        raise InvalidInput(f"the request's Content-Length is {length!r}")
    return int(length)


def _first(query: dict[str, list[str]], name: str) -> str:
    return query.get(name, [""])[0]


def connection_of(transport: Any) -> DockerConnection:
    """Return the connection on which an HTTP request arrived."""
    return cast(DockerConnection, transport.get_protocol())
