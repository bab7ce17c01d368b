"""The body of a request or response, on the caller's HTTP connection that the gateway has handed over."""

from __future__ import annotations

import re
import select
import socket
from typing import NoReturn

from gearworkers.errors import IntegrityError, Unavailable
from gearworkers.workers.messages import CHUNKED, HttpConnection, Progress, frame

RESPONSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.plugins.v1.1+json\r\n"
    b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)
STALLED_S = 0.5
"""Seconds of waiting for the caller after which the gateway lets another process use the core."""

_NEXT_CHUNK = re.compile(rb"\r\n([1-9a-f][0-9a-f]{0,13})\r\n")
"""The end of a chunk and the size of the next, in their common form: received together, without extensions."""
_LINE_LIMIT_BYTES = 4096
_BUFFER_BYTES = 64 << 10
_SEND_BUFFER_BYTES = 1 << 20
_MAX_POLL_MS = (1 << 31) - 1


class CallerConnection:
    """The caller's connection; each wait for the caller also ends when the gateway dies.

    Args:
        connection: To the caller; non-blocking.
        control: To the gateway, which gets a report when the caller stalls.
        idle_s: Seconds after which a stalled caller is given up.
        stalled_s: Seconds of waiting after which the caller counts as stalled.
    """

    def __init__(
        self, connection: socket.socket, control: socket.socket, idle_s: float, stalled_s: float = STALLED_S
    ) -> None:
        self._connection = connection
        self._control = control
        self._idle_s = idle_s
        self._stalled_s = stalled_s
        self._response_begun = False
        self._readable = self._poller(select.POLLIN)
        self._writable = self._poller(select.POLLOUT)

    def receive_into(self, buffer: memoryview) -> int:
        """Wait for some bytes and return their number; 0 if the caller has closed the connection.

        Raises:
            Unavailable: The caller or the gateway has died, or the caller is idle for too long.
        """
        while True:
            try:
                return self._connection.recv_into(buffer)
            except BlockingIOError:
                self._wait(self._readable)
            except OSError as exc:
                raise Unavailable(f"read the request's body: {exc.strerror}; the caller closed the connection") from exc

    def send(self, parts: list[bytes | memoryview]) -> None:
        """Send all of *parts*, waiting as needed.

        Raises:
            Unavailable: The caller or the gateway has died, or the caller is idle for too long.
        """
        while parts:
            try:
                sent = self._connection.sendmsg(parts)
            except BlockingIOError:
                self._wait(self._writable)
                continue
            except OSError as exc:
                raise Unavailable(f"write the response: {exc.strerror}; the caller closed the connection") from exc
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = memoryview(parts[0])[sent:]

    def begin_response(self) -> None:
        """Report to the gateway that the response begins, then send its head.

        The send buffer grows, which saves wake-ups on both sides.
        """
        self._response_begun = True
        self._report(stalled=False)
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self.send([RESPONSE_HEAD])

    def check_gateway(self) -> None:
        """As the function `check_gateway`."""
        check_gateway(self._control)

    def _poller(self, events: int) -> select.poll:
        poller = select.poll()
        poller.register(self._connection, events)
        poller.register(self._control, select.POLLIN)
        return poller

    def _wait(self, poller: select.poll) -> None:
        ready = poller.poll(self._stalled_s * 1000) or self._wait_stalled(poller)
        if any(fd == self._control.fileno() for fd, _ in ready):
            raise Unavailable("the gateway has died or has withdrawn the job")

    def _wait_stalled(self, poller: select.poll) -> list[tuple[int, int]]:
        self._report(stalled=True)
        ready = poller.poll(min(self._idle_s * 1000, _MAX_POLL_MS))
        if not ready:
            raise Unavailable(
                f"the call was given up: its caller has sent or received nothing for {self._idle_s:g} s; "
                "GEAR_STREAM_IDLE_S sets this limit"
            )
        self._report(stalled=False)
        return ready

    def _report(self, *, stalled: bool) -> None:
        try:
            self._control.sendall(frame(Progress(self._response_begun, stalled)))
        except OSError as exc:
            raise Unavailable(f"the gateway has died ({exc.strerror})") from exc


def check_gateway(control: socket.socket) -> None:
    """Raise Unavailable if the gateway has died or has withdrawn the job: it could not answer the caller."""
    poller = select.poll()
    poller.register(control, select.POLLIN)
    if poller.poll(0):
        raise Unavailable("the gateway has died or has withdrawn the job")


class RequestBody:
    """The body of a request, without its transfer coding; `Readable`.

    Chunks are decoded in the reader's buffer: the payload of each chunk overwrites the framing before it. So a byte is
    received once and moved at most once.

    Source: RFC 9112, section 7.1, "Chunked Transfer Coding".
    """

    def __init__(self, caller: CallerConnection, stream: HttpConnection) -> None:
        self._caller = caller
        self._received = memoryview(stream.received)
        self._chunked = stream.body_bytes == CHUNKED
        self._left_bytes = 0 if self._chunked else stream.body_bytes  # of the chunk, or of the body
        self._partial_line = b""  # of the framing between chunks
        self._expects_crlf = False  # at the end of a chunk
        self._in_trailer = False
        self._ended = stream.body_bytes == 0

    def readinto(self, buffer: memoryview) -> int:
        """Fill some of *buffer* and return the number of bytes; 0 only at the proper end of the body.

        Raises:
            Unavailable: The caller closed the connection too early, or the gateway has died.
            IntegrityError: The chunks are malformed.
        """
        while not self._ended:
            received = self._receive(buffer)
            kept = self._decode(buffer, received) if self._chunked else self._count(received)
            if kept:
                return kept
        self._caller.check_gateway()
        return 0

    def _receive(self, buffer: memoryview) -> int:
        if self._received:
            taken = min(len(self._received), len(buffer))
            buffer[:taken] = self._received[:taken]
            self._received = self._received[taken:]
            return taken
        received = self._caller.receive_into(buffer)
        if not received:
            raise Unavailable("the request's body ended early: the caller closed the connection")
        return received

    def _count(self, received: int) -> int:
        if received > self._left_bytes:
            raise IntegrityError("the request's body is longer than its Content-Length")
        self._left_bytes -= received
        self._ended = not self._left_bytes
        return received

    def _decode(self, buffer: memoryview, received: int) -> int:
        """Move the payload in ``buffer[:received]`` to the start of *buffer*; return its number of bytes."""
        at = kept = 0
        while at < received:
            if self._left_bytes:
                step = min(self._left_bytes, received - at)
                if at != kept:
                    buffer[kept : kept + step] = buffer[at : at + step]
                self._left_bytes -= step
                at += step
                kept += step
            elif self._ended:
                raise IntegrityError("the request's body continues after its last chunk")
            else:
                piece = bytes(buffer[at : min(at + 32, received)])
                plain = _NEXT_CHUNK.match(piece) if self._expects_crlf and not self._partial_line else None
                if plain is not None:
                    self._left_bytes = int(plain[1], 16)
                    at += plain.end()
                else:
                    at += self._take_line(piece)
        return kept

    def _take_line(self, piece: bytes) -> int:
        """Take the rest of the current line from *piece*; return its number of bytes."""
        end = piece.find(b"\n") + 1
        line = self._partial_line + (piece[:end] if end else piece)
        if end:
            self._partial_line = b""
            self._line_ended(line.rstrip(b"\r\n"))
            return end
        if len(line) > _LINE_LIMIT_BYTES:
            self._malformed(line)
        self._partial_line = line
        return len(piece)

    def _line_ended(self, line: bytes) -> None:
        if self._expects_crlf:
            if line:
                self._malformed(line)
            self._expects_crlf = False
        elif self._in_trailer:
            self._ended = not line
        else:
            self._left_bytes = self._chunk_size(line)
            self._expects_crlf = bool(self._left_bytes)
            self._in_trailer = not self._left_bytes

    def _chunk_size(self, line: bytes) -> int:
        digits = line.partition(b";")[0].strip()
        if not digits or len(digits) > 15 or digits.strip(b"0123456789abcdefABCDEF"):
            self._malformed(line)
        return int(digits, 16)

    def _malformed(self, line: bytes) -> NoReturn:
        raise IntegrityError(f"the request's body: expected a chunk's size or end, found {line[:40]!r}")


class ResponseBody:
    """The chunked body of a response; `Writable`. Until its first byte, the gateway can answer with an error."""

    def __init__(self, caller: CallerConnection) -> None:
        self._caller = caller
        self._buffer = bytearray()
        self._begun = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of *data*; small pieces are buffered and sent as one chunk.

        Raises:
            Unavailable: The caller or the gateway has died, or the caller is idle for too long.
        """
        if len(self._buffer) + len(data) < _BUFFER_BYTES:
            self._buffer += data
        else:
            self._send_chunk(memoryview(data).cast("B"))

    def finish(self) -> None:
        """Write the buffered bytes and the end of the body."""
        if self._buffer:
            self._send_chunk(memoryview(b""))
        self._begin()
        self._caller.send([b"0\r\n\r\n"])

    def _send_chunk(self, data: memoryview) -> None:
        self._begin()
        buffered, self._buffer = self._buffer, bytearray()
        size = b"%x\r\n" % (len(buffered) + len(data))
        self._caller.send([size, memoryview(buffered), data, b"\r\n"])

    def _begin(self) -> None:
        if not self._begun:
            self._begun = True
            self._caller.begin_response()
