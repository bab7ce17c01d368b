"""The gateway's own processes, for jobs that no worker begins. They start when needed and end when idle."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor

import structlog

from gearworkers.settings import Settings
from gearworkers.util.log import configure_logging
from gearworkers.util.process import end_with_parent
from gearworkers.workers.execute import execute
from gearworkers.workers.messages import WorkerJob
from plugin_gateway.dispatch.claim_server import Changes
from plugin_gateway.dispatch.pending_job import PendingJob

_log = structlog.stdlib.get_logger(__name__)

PROCESSES_PER_CORE = 8
"""For each kind of job, including the processes that wait for their callers."""
_IDLE_S = 60.0


def start_process(settings: Settings) -> Executor:
    """Return an executor with one process, which starts with the first job.

    Each process has an executor of its own, since the death of one process breaks its whole executor.
    """
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _initialize, (settings, os.getpid()))


def execute_locally(settings: Settings, job: WorkerJob) -> None:
    """Claim and do *job*, in a process of the pool."""
    execute(settings, job, "gateway")


class LocalPool:
    """Runs jobs in processes, each of which claims its job at the streams socket as a worker does.

    One process per core works on each kind of job. A process that waits for its caller makes room for another, up to
    PROCESSES_PER_CORE. Kinds have separate limits: `docker commit` reads a Diff only as fast as its ApplyDiff consumes
    it, so waiting Diffs must not block ApplyDiffs.

    Args:
        settings: The node's settings.
        changes: Notified of changes of the jobs, and by the pool when a process is free.
        cores: The number of processes of one kind that may work at the same time.
        start: Starts a process.
        work: The function that a process calls with each job.
    """

    def __init__(
        self,
        settings: Settings,
        changes: Changes,
        *,
        cores: int | None = None,
        start: Callable[[Settings], Executor] = start_process,
        work: Callable[[Settings, WorkerJob], None] = execute_locally,
    ) -> None:
        self._settings = settings
        self._changes = changes
        self._cores = cores or os.cpu_count() or 1
        self._start = start
        self._work = work
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._running: set[PendingJob] = set()
        self._processes: set[Executor] = set()
        self._idle: dict[Executor, asyncio.TimerHandle] = {}

    @property
    def processes(self) -> int:
        """The number of processes."""
        return len(self._processes)

    async def run(self, pending: PendingJob) -> None:
        """Let a process claim and do the job once one is free; return early if the job does not need one any more.

        Raises:
            BrokenProcessPool: The process died.
        """
        kind = _kind(pending)
        async with self._turns[kind]:
            while pending.awaits_begin and not self._has_capacity(kind):
                await self._changes.next()
            if not pending.awaits_begin:
                return
            self._running.add(pending)
        try:
            await self._run(pending.job)
        finally:
            self._running.discard(pending)
            self._changes.notify()

    def close(self) -> None:
        """End the processes and their jobs."""
        for timer in self._idle.values():
            timer.cancel()
        for child in multiprocessing.active_children():  # the gateway has no others
            child.terminate()
        for process in self._processes:
            process.shutdown(cancel_futures=True)  # waits: else Python's exit may use the process's closed pipe

    def _has_capacity(self, kind: str) -> bool:
        stalled = [pending.progress.stalled for pending in self._running if _kind(pending) == kind]
        return stalled.count(False) < self._cores and len(stalled) < self._cores * PROCESSES_PER_CORE

    async def _run(self, job: WorkerJob) -> None:
        process = self._take_process()
        try:
            await asyncio.wrap_future(process.submit(self._work, self._settings, job))
        except Exception as exc:
            _log.error("a process of the gateway's pool failed", call=job.call, id=job.id, error=repr(exc))
            self._end(process)
            raise
        self._idle[process] = asyncio.get_running_loop().call_later(_IDLE_S, self._end, process)

    def _take_process(self) -> Executor:
        if self._idle:
            process, timer = self._idle.popitem()
            timer.cancel()
            return process
        process = self._start(self._settings)
        self._processes.add(process)
        return process

    def _end(self, process: Executor) -> None:
        self._idle.pop(process, None)
        self._processes.discard(process)
        process.shutdown(wait=False)


def _kind(pending: PendingJob) -> str:
    return pending.job.call if pending.is_heavy else "maintenance"


def _initialize(settings: Settings, parent_pid: int) -> None:
    end_with_parent(parent_pid)
    configure_logging(settings.log)
