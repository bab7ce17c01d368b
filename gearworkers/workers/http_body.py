"""What goes over a caller's connection that was handed over: a request's body, or an answer's (`streams`)."""

from __future__ import annotations

import re
import select
import socket
from typing import NoReturn

from gearworkers.errors import IntegrityError, Unavailable
from gearworkers.workers.messages import CHUNKED, Progress, frame

RESPONSE_HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/vnd.docker.plugins.v1.1+json\r\n"
    b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
)

_NEXT_CHUNK = re.compile(rb"\r\n([1-9a-f][0-9a-f]{0,13})\r\n")
"""A chunk's end and the size of the next, as they mostly come: together and plain."""

_LINE_LIMIT_BYTES = 4096
_GATHER_BYTES = 64 << 10
_SEND_BUFFER_BYTES = 1 << 20
_STALLED_S = 0.5
"""After such a wait for the caller the gateway lets another process use the core."""
_LONGEST_POLL_MS = (1 << 31) - 1


class Line:
    """The caller's connection, watched together with the gateway's life.

    Args:
        connection: The caller's, non-blocking.
        control: To the gateway, which is told when the caller stalls.
        idle_s: A caller that sends or takes nothing for so long is given up.
    """

    def __init__(self, connection: socket.socket, control: socket.socket, idle_s: float) -> None:
        self._connection = connection
        self._control = control
        self._idle_s = idle_s
        self._started = False
        self._readable = self._poller(select.POLLIN)
        self._writable = self._poller(select.POLLOUT)

    def _poller(self, events: int) -> select.poll:
        poller = select.poll()
        poller.register(self._connection, events)
        poller.register(self._control, select.POLLIN)
        return poller

    def receive_into(self, buffer: memoryview) -> int:
        """Some bytes; waits for them. 0: the caller has closed. Unavailable: it or the gateway is gone, or it idles."""
        while True:
            try:
                return self._connection.recv_into(buffer)
            except BlockingIOError:
                self._wait(self._readable)
            except OSError as exc:
                raise Unavailable(f"read the request's body: {exc.strerror}; it broke off") from exc

    def send(self, parts: list[bytes | memoryview]) -> None:
        """All of *parts*; waits. Unavailable: the caller or the gateway is gone, or the caller idles."""
        while parts:
            try:
                sent = self._connection.sendmsg(parts)
            except BlockingIOError:
                self._wait(self._writable)
                continue
            except OSError as exc:
                raise Unavailable(f"write the answer: {exc.strerror}; the caller is gone") from exc
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = memoryview(parts[0])[sent:]

    def announce(self) -> None:
        """Tell the gateway that the answer's first byte follows."""
        self._started = True
        self._tell(stalled=False)

    def widen(self) -> None:
        """Ask for a send buffer that saves the caller and us some wake-ups."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)

    def check_gateway(self) -> None:
        """Unavailable if the gateway is gone: nobody is left to answer the caller."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        if poller.poll(0):
            raise Unavailable("the gateway is gone or has given the call up")

    def _wait(self, poller: select.poll) -> None:
        ready = poller.poll(_STALLED_S * 1000) or self._wait_stalled(poller)
        if any(fd == self._control.fileno() for fd, _ in ready):
            raise Unavailable("the gateway is gone or has given the call up")

    def _wait_stalled(self, poller: select.poll) -> list[tuple[int, int]]:
        self._tell(stalled=True)
        ready = poller.poll(min(self._idle_s * 1000, _LONGEST_POLL_MS))
        if not ready:
            raise Unavailable(
                f"the call was given up: its caller has sent or taken nothing for {self._idle_s:g} s; "
                "GEAR_STREAM_IDLE_S says how long that may be"
            )
        self._tell(stalled=False)
        return ready

    def _tell(self, *, stalled: bool) -> None:
        try:
            self._control.sendall(frame(Progress(self._started, stalled)))
        except OSError as exc:
            raise Unavailable(f"the gateway is gone ({exc.strerror})") from exc


class BodySource:
    """A request's body, its transfer coding taken off; `Readable`.

    Chunks are taken apart in the caller's buffer: what lies between them is overwritten by what follows, so a byte
    is received once and moved at most once.

    Source: RFC 9112, section 7.1, "Chunked Transfer Coding".
    """

    def __init__(self, line: Line, head: bytes, body_bytes: int) -> None:
        self._line = line
        self._head = memoryview(head)
        self._chunked = body_bytes == CHUNKED
        self._left_bytes = 0 if self._chunked else body_bytes  # of the chunk, or of the body
        self._between = b""  # of a chunk's end and the next one's size, as far as it has come
        self._expects_end = False  # of a chunk: CRLF
        self._in_trailer = False
        self._ended = body_bytes == 0

    def readinto(self, buffer: memoryview) -> int:
        """Fill some of *buffer*; 0 only at the body's proper end.

        Raises:
            Unavailable: The caller broke off, or the gateway is gone.
            IntegrityError: The chunks are malformed.
        """
        while not self._ended:
            received = self._receive(buffer)
            kept = self._decode(buffer, received) if self._chunked else self._count(received)
            if kept:
                return kept
        self._line.check_gateway()
        return 0

    def _receive(self, buffer: memoryview) -> int:
        if self._head:
            taken = min(len(self._head), len(buffer))
            buffer[:taken] = self._head[:taken]
            self._head = self._head[taken:]
            return taken
        received = self._line.receive_into(buffer)
        if not received:
            raise Unavailable("the request's body broke off before its end")
        return received

    def _count(self, received: int) -> int:
        if received > self._left_bytes:
            raise IntegrityError("the request's body is longer than its Content-Length")
        self._left_bytes -= received
        self._ended = not self._left_bytes
        return received

    def _decode(self, buffer: memoryview, received: int) -> int:
        """Move the payload in ``buffer[:received]`` together at its begin; how many bytes it is."""
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
                raise IntegrityError("the request's body goes on behind its last chunk")
            else:
                piece = bytes(buffer[at : min(at + 32, received)])
                plain = _NEXT_CHUNK.match(piece) if self._expects_end and not self._between else None
                if plain is not None:
                    self._left_bytes = int(plain[1], 16)
                    at += plain.end()
                else:
                    at += self._take_line(piece)
        return kept

    def _take_line(self, piece: bytes) -> int:
        """Take what belongs to the line under way; how many bytes of *piece* that is."""
        end = piece.find(b"\n") + 1
        line = self._between + (piece[:end] if end else piece)
        if end:
            self._between = b""
            self._line_ended(line.rstrip(b"\r\n"))
            return end
        if len(line) > _LINE_LIMIT_BYTES:
            self._malformed(line)
        self._between = line
        return len(piece)

    def _line_ended(self, line: bytes) -> None:
        if self._expects_end:
            if line:
                self._malformed(line)
            self._expects_end = False
        elif self._in_trailer:
            self._ended = not line
        else:
            self._left_bytes = self._chunk_size(line)
            self._expects_end = bool(self._left_bytes)
            self._in_trailer = not self._left_bytes

    def _chunk_size(self, line: bytes) -> int:
        digits = line.partition(b";")[0].strip()
        if not digits or len(digits) > 15 or digits.strip(b"0123456789abcdefABCDEF"):
            self._malformed(line)
        return int(digits, 16)

    def _malformed(self, line: bytes) -> NoReturn:
        raise IntegrityError(f"the request's body: {line[:40]!r} where a chunk's size or end should be")


class ChunkedSink:
    """A response with a chunked body; `Writable`. Until the first byte is written an error can be told otherwise."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._gathered = bytearray()
        self._started = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Take all of *data*; what is small is gathered first.

        Raises:
            Unavailable: The caller, or the gateway, is gone.
        """
        if len(self._gathered) + len(data) < _GATHER_BYTES:
            self._gathered += data
        else:
            self._send_chunk(memoryview(data).cast("B"))

    def finish(self) -> None:
        """Write what is gathered and the clean end."""
        if self._gathered:
            self._send_chunk(memoryview(b""))
        self._start()
        self._line.send([b"0\r\n\r\n"])

    def _send_chunk(self, data: memoryview) -> None:
        self._start()
        gathered, self._gathered = self._gathered, bytearray()
        size = b"%x\r\n" % (len(gathered) + len(data))
        self._line.send([size, memoryview(gathered), data, b"\r\n"])

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._line.announce()
            self._line.widen()
            self._line.send([RESPONSE_HEAD])
