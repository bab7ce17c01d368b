"""The worker's side of the streams socket: claim an order, get the caller's connection, answer (`streams`)."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from gearworkers.errors import GearError, NotFound, Unavailable, from_os_error
from gearworkers.settings import DEFAULT_STREAM_IDLE_S
from gearworkers.workers.http_body import BodySource, ChunkedSink, Line
from gearworkers.workers.messages import Answer, Claim, FrameBuffer, Grant, frame

_GRANT_TIMEOUT_S = 10.0


class Stream:
    """A granted claim: the control connection and, for ApplyDiff and Diff, the caller's connection."""

    def __init__(
        self, control: socket.socket, connection: socket.socket | None, grant: Grant, head: bytes, idle_s: float
    ) -> None:
        self._control = control
        self._connection = connection
        self._grant = grant
        self._head = head
        self._idle_s = idle_s

    def source(self) -> BodySource:
        """The request's body."""
        return BodySource(self._line(), self._head, self._grant.body_bytes)

    def sink(self) -> ChunkedSink:
        """The response's body."""
        return ChunkedSink(self._line())

    def answer(self, answer: Answer) -> None:
        """Tell the gateway the end; if it is gone there is nobody to tell.

        What is not Unicode in an error, as a file's name, becomes question marks.
        """
        answer = msgspec.structs.replace(answer, error=answer.error.encode("utf-8", "replace").decode())
        try:
            self._control.sendall(frame(answer))
        except OSError:
            pass

    def _line(self) -> Line:
        if self._connection is None:
            raise GearError("streams socket: no connection came with the grant")
        return Line(self._connection, self._control, self._idle_s)


@contextmanager
def claimed(path: Path, token: str, by: str, idle_s: float = DEFAULT_STREAM_IDLE_S) -> Iterator[Stream | None]:
    """Claim *token* at the streams socket *path*.

    Args:
        path: The socket.
        token: Of the order.
        by: As in `Claim`.
        idle_s: As of `Line`.

    Yields:
        The stream; None if somebody else does the order, or it is wanted no more.

    Raises:
        NotFound, Unavailable: No gateway is there.

    Crash: the gateway sees the control connection end and answers its caller with an error.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        try:
            grant, head, fds = _negotiate(control, path, Claim(token, by, os.getpid()))
        except OSError as exc:
            raise from_os_error(exc, f"connect to the gateway's {path}") from exc
        if not grant.accepted:
            yield None
        elif not fds:
            yield Stream(control, None, grant, head, idle_s)
        else:
            with socket.socket(fileno=fds[0]) as connection:
                yield Stream(control, connection, grant, head, idle_s)


def _negotiate(control: socket.socket, path: Path, claim: Claim) -> tuple[Grant, bytes, list[int]]:
    """Show the token; the grant, what was read of the body, and the descriptors that came, which an error closes."""
    control.settimeout(_GRANT_TIMEOUT_S)
    try:
        control.connect(str(path))
    except FileNotFoundError as exc:
        raise NotFound(f"connect to the gateway's {path}: it is not there") from exc
    control.sendall(frame(claim))
    fds = list[int]()
    try:
        grant, head = _granted(control, path, fds)
    except BaseException:
        for fd in fds:
            os.close(fd)  # else the caller would not see the gateway's end
        raise
    control.settimeout(None)
    return grant, head, fds


def _granted(control: socket.socket, path: Path, fds: list[int]) -> tuple[Grant, bytes]:
    buffer = FrameBuffer()
    while (message := buffer.next()) is None:
        data, new_fds, _, _ = socket.recv_fds(control, 65536, 1)
        fds += new_fds
        if not data:
            raise Unavailable(f"the gateway at {path} broke off")
        buffer.feed(data)
    grant = msgspec.json.decode(message, type=Grant)
    if grant.has_connection != bool(fds):
        raise Unavailable(f"the gateway at {path} did not hand over its caller's connection")
    head = bytearray(buffer.rest())
    while len(head) < grant.head_bytes:
        data = control.recv(65536)
        if not data:
            raise Unavailable(f"the gateway at {path} broke off")
        head += data
    return grant, bytes(head)
