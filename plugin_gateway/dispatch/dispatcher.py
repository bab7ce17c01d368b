"""Run jobs on the node's workers, or in the gateway's own pool if no worker begins them in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Protocol

import structlog

from gearworkers.errors import Unavailable
from gearworkers.settings import Settings
from gearworkers.workers.messages import ByteStream, WorkerJob
from plugin_gateway.dispatch.claim_server import Changes, ClaimServer
from plugin_gateway.dispatch.health import NOT_TAKEN, SILENT, WORKERS, Health
from plugin_gateway.dispatch.local_pool import LocalPool
from plugin_gateway.dispatch.pending_job import JobState, PendingJob
from plugin_gateway.dispatch.task_queue import QueueState, TaskQueue
from plugin_gateway.metrics import GatewayMetrics

_log = structlog.stdlib.get_logger(__name__)

_LOCAL_ATTEMPTS = 2
"""At the first attempt, the job may be claimed by a worker that dies before it begins the job."""


@dataclass(frozen=True, slots=True)
class PickupTimeouts:
    """Seconds that the gateway waits for a worker to begin a job before its own pool does it."""

    idle_s: float = 2.0
    """For a heavy job and an idle worker, which needs about 5 ms."""
    degraded_s: float = 0.2
    """Used instead of *idle_s* if no worker took the last job, or a worker waits for its caller."""
    busy_s: float = 10.0
    """For a busy worker to become free."""
    maintenance_s: float = 15.0
    expires_s: float = 60.0
    """Seconds after which workers discard the task."""


class Queue(Protocol):
    """The way to the workers; `TaskQueue`."""

    async def publish(self, job: WorkerJob, *, expires_s: float) -> None:
        """Offer *job* to the workers."""

    async def state(self) -> QueueState:
        """Return the state of the queues and the workers."""

    def close(self) -> None:
        """Release the connections."""


class Pool(Protocol):
    """The gateway's own processes; `LocalPool`."""

    async def run(self, pending: PendingJob) -> None:
        """Let a process claim and do the job."""

    def close(self) -> None:
        """End the processes."""


class Dispatcher:
    """Runs the jobs of all front doors.

    Args:
        settings: The node's settings.
        metrics: The gateway's.
        timeouts: The first value of the attribute, which may be replaced at any time.
        open_queue: Connects to the broker that the settings name.
        open_pool: Creates the gateway's own pool.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: GatewayMetrics,
        timeouts: PickupTimeouts = PickupTimeouts(),
        *,
        open_queue: Callable[[Settings], Queue] = TaskQueue,
        open_pool: Callable[[Settings, Changes], Pool] = LocalPool,
    ) -> None:
        self.timeouts = timeouts
        self.health = Health(metrics)
        self.claims = ClaimServer(settings.streams_socket, metrics)
        self._settings = settings
        self._open_queue = open_queue
        self._queue = open_queue(settings)
        self._pool = open_pool(settings, self.claims.changes)
        self._local_runs: set[asyncio.Task[None]] = set()
        self._checking: asyncio.Task[str] | None = None

    def open(self) -> None:
        """Listen on the streams socket; FailedPrecondition if another gateway does."""
        self.claims.open()

    def close(self) -> None:
        """Abandon all running jobs."""
        self.claims.close()
        self._queue.close()
        self._pool.close()

    def use_broker(self, settings: Settings) -> None:
        """Publish to the broker that *settings* name from now on."""
        if settings.effective_broker_url != self._settings.effective_broker_url:
            self._settings = settings
            self._queue.close()
            self._queue = self._open_queue(settings)
            self.health.reset()

    async def run(self, job: WorkerJob, stream: ByteStream = None, fd: int | None = None) -> PendingJob:
        """Run *job* and return it with its result, which may be an error.

        Args:
            job: The work.
            stream: The bytes that it reads or writes.
            fd: The stream's descriptor; closed at the end.
        """
        with self.claims.offer(job, stream, fd) as pending:
            if not await self._begun_by_worker(pending):
                local_run = asyncio.get_running_loop().create_task(self._run_locally(pending))
                self._local_runs.add(local_run)
                local_run.add_done_callback(self._local_runs.discard)
            await pending.wait_done()
        return pending

    async def status(self) -> list[tuple[str, str]]:
        """Return the lines for `docker info`, after a query of Redis and the workers."""
        queue, claims = await self.check(), self.claims
        running = ", ".join(
            f"{claims.running(by, heavy=True) + claims.running(by, heavy=False)} by {by}"
            for by in ("worker", "gateway")
        )
        stalled = claims.stalled("worker") + claims.stalled("gateway")
        if stalled:
            running += f"; {stalled} wait for their callers"
        return [("Queue", queue), ("At Work", running), ("Degraded", self.health.summary())]

    async def check(self) -> str:
        """Update `health`; return the lengths of the queues as text. Concurrent calls share one check."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.get_running_loop().create_task(self._check())
        return await asyncio.shield(self._checking)

    async def _check(self) -> str:
        queue = self._queue
        try:
            state = await queue.state()
        except Unavailable as exc:
            lengths, reasons = str(exc), dict.fromkeys(WORKERS, str(exc))
        else:
            lengths = f"{state.waiting_imports} imports, {state.waiting_maintenance} maintenance jobs waiting"
            reasons = {worker: self._silence(worker, state) for worker in WORKERS}
        if queue is self._queue:  # otherwise the state is that of a broker replaced meanwhile
            self.health.update(reasons)
        return lengths

    def _silence(self, worker: str, state: QueueState) -> str:
        """Return SILENT if no worker of this kind answers; empty if one answers, or is busy and may answer late."""
        is_busy = self.claims.running("worker", heavy=worker == "import") > 0
        return SILENT if worker in state.silent and not is_busy else ""

    async def _begun_by_worker(self, pending: PendingJob) -> bool:
        """Publish the job and wait for a worker; return whether one has begun it."""
        worker = "import" if pending.is_heavy else "push"
        queue, reason = self._queue, ""
        try:
            await queue.publish(pending.job, expires_s=self.timeouts.expires_s)
            if not await self._wait_for_begin(pending, worker) and not self._is_busy(pending):
                reason = NOT_TAKEN
        except Unavailable as exc:
            reason = str(exc)
        begun = pending.has_begun  # even if Redis did not confirm the task
        if not begun:
            _log.info("no worker is free", call=pending.job.call, id=pending.job.id, reason=reason or "all are busy")
        if queue is self._queue and (begun or reason):
            self.health.note(worker, "" if begun else reason)
        return begun

    async def _wait_for_begin(self, pending: PendingJob, worker: str) -> bool:
        published_s = time.monotonic()
        while not pending.has_begun:
            left_s = self._deadline_s(pending, worker, published_s) - time.monotonic()
            if left_s <= 0:
                return False
            try:
                async with asyncio.timeout(left_s):
                    await self.claims.changes.next()
            except TimeoutError:
                continue
        return True

    def _deadline_s(self, pending: PendingJob, worker: str, published_s: float) -> float:
        timeouts = self.timeouts
        if not pending.is_heavy:
            return published_s + timeouts.maintenance_s
        if self.claims.stalled("worker"):  # the pool replaces this worker until its caller continues
            return published_s + timeouts.degraded_s
        if self._is_busy(pending):
            return published_s + timeouts.busy_s
        idle_s = timeouts.degraded_s if self.health.reason(worker) else timeouts.idle_s
        return max(published_s, self.claims.worker_seen_s) + idle_s

    def _is_busy(self, pending: PendingJob) -> bool:
        """Return whether workers of the job's kind are doing other jobs."""
        return self.claims.running("worker", heavy=pending.is_heavy) > 0

    async def _run_locally(self, pending: PendingJob) -> None:
        """Let the pool do the job, unless a worker begins it first."""
        why = ""
        for _ in range(_LOCAL_ATTEMPTS):
            try:
                await self._pool.run(pending)
                why = "it could not reach the streams socket"
            except BrokenProcessPool:
                why = "it died at its start"
            except Exception as exc:
                why = str(exc)
            while pending.state is JobState.CLAIMED:
                await self.claims.changes.next()
            if not pending.awaits_begin:
                return
        pending.give_up(
            f"no worker took it, and the gateway's own process did not begin: {why}; "
            "the gateway's log may say more; try again"
        )
