"""The dispatcher ends each job with one result, even if workers or the pool's processes die before they begin."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from gearworkers.settings import Settings
from gearworkers.workers.claim import claim
from gearworkers.workers.messages import (
    ApplyDiff,
    Claim,
    CollectGarbage,
    HttpConnection,
    JobResult,
    WorkerJob,
    frame,
)
from plugin_gateway.dispatch.dispatcher import Dispatcher, PickupTimeouts
from plugin_gateway.dispatch.pending_job import JobState, PendingJob
from plugin_gateway.dispatch.task_queue import QueueState
from plugin_gateway.metrics import GatewayMetrics

SHORT = PickupTimeouts(idle_s=0.05, degraded_s=0.05, busy_s=0.05, maintenance_s=0.05)
MORE_THAN_A_SOCKET_HOLDS = HttpConnection(received=bytes(3 << 20))


class SilentQueue:
    """A queue whose tasks no worker takes."""

    async def publish(self, job: WorkerJob, *, expires_s: float) -> None:
        """Take the job."""

    async def state(self) -> QueueState:
        return QueueState(0, 0)

    def close(self) -> None:
        """Release nothing."""


@dataclass
class ScriptedPool:
    """A pool that calls one function for each run, the last one for all further runs."""

    runs: list[Callable[[PendingJob], Awaitable[None]]]
    states: list[JobState] = field(default_factory=list)
    """The job's state at the beginning of each run."""

    async def run(self, pending: PendingJob) -> None:
        self.states.append(pending.state)
        await self.runs[min(len(self.states), len(self.runs)) - 1](pending)

    def close(self) -> None:
        """End nothing."""


def settings_of(tmp_path: Path) -> Settings:
    return Settings(gear_root=tmp_path / "gear", run_dir=tmp_path)


def run(tmp_path: Path, pool: ScriptedPool, job: WorkerJob, stream: HttpConnection | None = None) -> PendingJob:
    """Run *job* on a dispatcher without workers."""
    settings = settings_of(tmp_path)

    async def dispatch() -> PendingJob:
        dispatcher = Dispatcher(
            settings, GatewayMetrics(), SHORT, open_queue=lambda _: SilentQueue(), open_pool=lambda *_: pool
        )
        dispatcher.open()
        ours, theirs = socket.socketpair()
        with ours, theirs:
            fd = os.dup(ours.fileno()) if stream is not None else None
            async with asyncio.timeout(60):
                done = await dispatcher.run(job, stream, fd)
        dispatcher.close()
        return done

    return asyncio.run(dispatch())


def do(settings: Settings) -> Callable[[PendingJob], Awaitable[None]]:
    """Return a run in which a process of the pool claims the job and does it."""

    def work(pending: PendingJob) -> None:
        with claim(settings.streams_socket, pending.job.token, "gateway") as claimed:
            if claimed is not None:
                claimed.finish(JobResult(size_bytes=5))

    return lambda pending: asyncio.to_thread(work, pending)


def test_the_pool_does_a_job_whose_worker_dies_before_it_begins(tmp_path: Path) -> None:
    job = ApplyDiff(gear_root="/gear", id="a")
    settings = settings_of(tmp_path)
    work = do(settings)

    async def meet_a_dying_worker(pending: PendingJob) -> None:
        """Run while the job is claimed by a worker that dies in the middle of the grant."""
        loop = asyncio.get_running_loop()
        with socket.socket(socket.AF_UNIX) as worker:
            worker.setblocking(False)
            await loop.sock_connect(worker, str(settings.streams_socket))
            await loop.sock_sendall(worker, frame(Claim(job.token, "worker", 1)))
            assert await loop.sock_recv(worker, 1)
            await work(pending)

    pool = ScriptedPool([meet_a_dying_worker, work])
    done = run(tmp_path, pool, job, MORE_THAN_A_SOCKET_HOLDS)
    assert (done.by, done.result) == ("gateway", JobResult(size_bytes=5))
    assert pool.states == [JobState.OFFERED, JobState.OFFERED]


def test_a_pool_whose_first_process_dies_before_it_begins_starts_another(tmp_path: Path) -> None:
    async def die(pending: PendingJob) -> None:
        raise OSError("no process")

    done = run(tmp_path, ScriptedPool([die, do(settings_of(tmp_path))]), CollectGarbage(gear_root="/gear"))
    assert done.result == JobResult(size_bytes=5)


def test_a_job_that_no_process_can_reach_ends_with_an_error(tmp_path: Path) -> None:
    async def end(pending: PendingJob) -> None:
        """End without a claim."""

    done = run(tmp_path, ScriptedPool([end]), CollectGarbage(gear_root="/gear"))
    assert "could not reach the streams socket" in done.result.error and done.result.retryable
    assert done.by is None
