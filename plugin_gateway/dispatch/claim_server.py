"""The streams socket: grants each offered job to the process that claims it first, and follows that process."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog

from gearworkers.errors import InvalidInput
from gearworkers.workers.messages import (
    ByteStream,
    Claim,
    Claimant,
    FrameBuffer,
    Granted,
    JobResult,
    Message,
    Progress,
    Refused,
    WorkerJob,
    frame,
)
from plugin_gateway.dispatch.pending_job import PendingJob
from plugin_gateway.metrics import GatewayMetrics
from plugin_gateway.sockets import listen

_log = structlog.stdlib.get_logger(__name__)

_CLAIM_TIMEOUT_S = 10.0
_GRANT_TIMEOUT_S = 30.0
_ACCEPT_RETRY_S = 0.2


class Changes:
    """Wakes the tasks that wait for the next change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    async def next(self) -> None:
        """Return at the next `notify`."""
        await self._event.wait()

    def notify(self) -> None:
        """Wake the waiting tasks."""
        self._event.set()
        self._event.clear()


class ClaimServer:
    """Listens on the streams socket at *path*."""

    def __init__(self, path: Path, metrics: GatewayMetrics) -> None:
        self._path = path
        self._metrics = metrics
        self._offers: dict[str, PendingJob] = {}
        self._running: set[PendingJob] = set()  # their processes have begun and are still connected
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_open = False
        self.changes = Changes()
        """Notified when the state or the progress of a job changes."""
        self.worker_seen_s = 0.0
        """Monotonic time when a worker last began, reported on or ended a job."""

    def open(self, listener: socket.socket | None = None) -> None:
        """Begin to listen.

        Args:
            listener: The listening socket at the path; None creates one.

        Raises:
            FailedPrecondition: Another gateway listens there.
        """
        listener = listener or listen(self._path)
        self._is_open = True
        self._spawn(self._accept(listener))

    def close(self) -> None:
        """Stop listening and disconnect the processes, which then abandon their jobs."""
        for task in self._tasks:
            task.cancel()
        if self._is_open:
            self._path.unlink(missing_ok=True)

    def running(self, by: Claimant, *, heavy: bool) -> int:
        """Return the number of jobs that processes of this kind are doing."""
        return sum(pending.is_heavy == heavy and pending.by == by for pending in self._running)

    def stalled(self, by: Claimant) -> int:
        """Return the number of jobs in progress by this kind of process that wait for their callers."""
        return sum(pending.progress.stalled and pending.by == by for pending in self._running)

    @contextmanager
    def offer(self, job: WorkerJob, stream: ByteStream = None, fd: int | None = None) -> Iterator[PendingJob]:
        """Offer *job* until the context ends.

        Args:
            job: The work.
            stream: The bytes that it reads or writes.
            fd: The stream's descriptor; closed with the context.
        """
        pending = PendingJob(job, stream, fd, self.changes.notify)
        self._offers[job.token] = pending
        try:
            yield pending
        finally:
            pending.withdraw()
            del self._offers[job.token]
            if fd is not None:
                os.close(fd)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with listener:
            while True:
                try:
                    control, _ = await loop.sock_accept(listener)
                except OSError as exc:  # no descriptors or memory for now; the claiming process waits
                    _log.error("cannot accept claims", error=str(exc), retry_s=_ACCEPT_RETRY_S)
                    await asyncio.sleep(_ACCEPT_RETRY_S)
                    continue
                control.setblocking(False)
                self._spawn(self._serve(control))

    def _spawn(self, work: asyncio._CoroutineLike[None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, control: socket.socket) -> None:
        """Serve one process, from its claim to its result or its death."""
        with control:
            frames = FrameBuffer()
            try:
                async with asyncio.timeout(_CLAIM_TIMEOUT_S):
                    claim = await _receive(control, frames)
                if not isinstance(claim, Claim | None):
                    raise InvalidInput(f"streams socket: {type(claim).__name__} instead of a claim")
                pending = await self._grant(control, claim) if claim is not None else None
                if pending is not None:
                    await self._follow(control, frames, pending)
            except (OSError, InvalidInput) as exc:
                _log.warning("serving a claim failed", error=f"{type(exc).__name__}: {exc}")

    async def _grant(self, control: socket.socket, claim: Claim) -> PendingJob | None:
        """Grant the claimed job and return it; None if the process does not get the job."""
        pending = self._offers.get(claim.token)
        if pending is None or not pending.claim():
            await asyncio.get_running_loop().sock_sendall(control, frame(Refused()))
            return None
        try:
            async with asyncio.timeout(_GRANT_TIMEOUT_S):
                await _hand_over(control, pending)
        except OSError:
            pending.release()
            raise
        # False if the job was withdrawn meanwhile: the process notices that its control connection ends.
        return pending if pending.begin(claim) else None

    async def _follow(self, control: socket.socket, frames: FrameBuffer, pending: PendingJob) -> None:
        """Receive the progress and the result of the process that does the job."""
        assert pending.by is not None
        self._running.add(pending)
        self._metrics.jobs.labels(pending.job.call, pending.by).inc()
        self._note_change(pending.by)
        try:
            while (message := await _receive(control, frames)) is not None:
                if isinstance(message, JobResult):
                    pending.finish(message)
                    return
                if not isinstance(message, Progress):
                    raise InvalidInput(f"streams socket: {type(message).__name__} instead of a result")
                pending.progress = message
                self._note_change(pending.by)
        finally:
            self._running.discard(pending)
            pending.lose()
            self._note_change(pending.by)

    def _note_change(self, by: Claimant) -> None:
        self._metrics.running.labels(by).set(sum(self.running(by, heavy=heavy) for heavy in (True, False)))
        self._metrics.stalled.labels(by).set(self.stalled(by))
        if by == "worker":
            self.worker_seen_s = time.monotonic()
        self.changes.notify()


async def _hand_over(control: socket.socket, pending: PendingJob) -> None:
    """Send the grant; its first bytes fit into the empty socket buffer, and carry the descriptor."""
    grant, sent = frame(Granted(pending.job, pending.stream)), 0
    if pending.fd is not None:
        sent = socket.send_fds(control, [grant], [pending.fd])
    await asyncio.get_running_loop().sock_sendall(control, grant[sent:])


async def _receive(control: socket.socket, frames: FrameBuffer) -> Message | None:
    """Return the next message; None at the connection's end."""
    while (message := frames.next()) is None:
        try:
            data = await asyncio.get_running_loop().sock_recv(control, 65536)
        except ConnectionResetError:
            return None
        if not data:
            return None
        frames.feed(data)
    return message
