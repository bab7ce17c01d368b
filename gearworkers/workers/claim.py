"""The job's side of the streams socket: claim a job, read or write its stream, report its result."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from gearworkers.errors import GearError, NotFound, Unavailable, from_os_error
from gearworkers.settings import DEFAULT_STREAM_IDLE_S
from gearworkers.workers.http_body import STALLED_S, CallerConnection, RequestBody, ResponseBody, check_gateway
from gearworkers.workers.messages import (
    ByteStream,
    Claim,
    Claimant,
    FrameBuffer,
    Granted,
    HttpConnection,
    JobResult,
    Refused,
    WorkerJob,
    frame,
)

_GRANT_TIMEOUT_S = 10.0


class ClaimedJob:
    """A job that only this process does.

    Args:
        granted: The job and its stream.
        control: The connection to the gateway.
        caller: The connection to the caller, if the stream is an HttpConnection.
    """

    def __init__(self, granted: Granted, control: socket.socket, caller: CallerConnection | None) -> None:
        self._granted = granted
        self._control = control
        self._caller = caller

    @property
    def job(self) -> WorkerJob:
        """The job as the gateway granted it."""
        return self._granted.job

    def request_body(self) -> RequestBody:
        """Return the body of the caller's request."""
        stream, caller = self._http()
        return RequestBody(caller, stream)

    def response_body(self) -> ResponseBody:
        """Return the body of the response to the caller."""
        return ResponseBody(self._http()[1])

    @property
    def stream(self) -> ByteStream:
        """The stream of the job, as the gateway describes it."""
        return self._granted.stream

    def check_not_withdrawn(self) -> None:
        """Raise Unavailable if the gateway is gone or has withdrawn the job."""
        check_gateway(self._control)

    def finish(self, result: JobResult) -> None:
        """Report *result* to the gateway, unless the gateway has died.

        Question marks replace parts of the error that are not Unicode, such as bytes of a file name.
        """
        result = msgspec.structs.replace(result, error=result.error.encode("utf-8", "replace").decode())
        with suppress(OSError):
            self._control.sendall(frame(result))

    def _http(self) -> tuple[HttpConnection, CallerConnection]:
        stream = self._granted.stream
        if not isinstance(stream, HttpConnection) or self._caller is None:
            raise GearError(f"{self.job.call}: the gateway did not hand over a connection")
        return stream, self._caller


@contextmanager
def claim(
    path: Path,
    token: str,
    by: Claimant,
    *,
    idle_s: float = DEFAULT_STREAM_IDLE_S,
    stalled_s: float = STALLED_S,
) -> Iterator[ClaimedJob | None]:
    """Claim the job with *token* at the streams socket *path*.

    Args:
        path: The socket.
        token: The job's.
        by: The kind of this process.
        idle_s: As for `CallerConnection`.
        stalled_s: As for `CallerConnection`.

    Yields:
        The job; None if another process does it, or the gateway has withdrawn it.

    Raises:
        NotFound, Unavailable: No gateway answers.

    Crash: the gateway notices that the control connection ended, and reports an error to its caller.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
        try:
            reply, fds = _ask(control, path, Claim(token, by, os.getpid()))
        except OSError as exc:
            raise from_os_error(exc, f"connect to the gateway's {path}") from exc
        if isinstance(reply, Refused):
            yield None
        elif not fds:
            yield ClaimedJob(reply, control, None)
        else:
            with socket.socket(fileno=fds[0]) as connection:
                yield ClaimedJob(reply, control, CallerConnection(connection, control, idle_s, stalled_s))


def _ask(control: socket.socket, path: Path, claim: Claim) -> tuple[Granted | Refused, list[int]]:
    """Send *claim*; return the reply and its descriptors, which are closed on an error."""
    control.settimeout(_GRANT_TIMEOUT_S)
    try:
        control.connect(str(path))
    except FileNotFoundError as exc:
        raise NotFound(f"connect to the gateway's {path}: the socket does not exist") from exc
    control.sendall(frame(claim))
    fds = list[int]()
    try:
        reply = _receive(control, path, fds)
    except BaseException:
        for fd in fds:
            os.close(fd)  # an open descriptor would hide the gateway's close from the caller
        raise
    control.settimeout(None)
    return reply, fds


def _receive(control: socket.socket, path: Path, fds: list[int]) -> Granted | Refused:
    buffer = FrameBuffer()
    while (message := buffer.next()) is None:
        data, new_fds, _, _ = socket.recv_fds(control, 65536, 1)
        fds += new_fds
        if not data:
            raise Unavailable(f"the gateway at {path} closed the connection")
        buffer.feed(data)
    if not isinstance(message, Granted | Refused):
        raise Unavailable(f"the gateway at {path} answered a claim with {type(message).__name__}")
    needs_fd = isinstance(message, Granted) and isinstance(message.stream, HttpConnection)
    if needs_fd != bool(fds):
        raise Unavailable(f"the gateway at {path} did not hand over its caller's connection")
    return message
