"""The gateway's own processes: their number, the jobs that they keep waiting, and their end."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from gearworkers.settings import Settings
from gearworkers.workers.messages import ApplyDiff, Claim, Diff, Progress, Push, WorkerJob
from plugin_gateway.dispatch.claim_server import Changes
from plugin_gateway.dispatch.local_pool import PROCESSES_PER_CORE, LocalPool
from plugin_gateway.dispatch.pending_job import PendingJob
from tests.support.processes import wait_until

CORES = 2


def pending_job(kind: type[WorkerJob], changes: Changes, settings: Settings | None = None) -> PendingJob:
    job = kind(gear_root=str((settings or Settings()).gear_root))
    return PendingJob(job, None, None, changes.notify)


@dataclass
class Threads:
    """A pool of threads instead of processes; each job runs until it is finished."""

    changes: Changes = field(default_factory=Changes)
    begun: list[WorkerJob] = field(default_factory=list)
    ends: dict[str, threading.Event] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pool = LocalPool(
            Settings(), self.changes, cores=CORES, start=lambda _: ThreadPoolExecutor(1), work=self.work
        )

    def work(self, settings: Settings, job: WorkerJob) -> None:
        self.begun.append(job)
        assert self.ends.setdefault(job.token, threading.Event()).wait(60)

    def run(self, kind: type[WorkerJob]) -> tuple[PendingJob, asyncio.Task[None]]:
        pending = pending_job(kind, self.changes)
        return pending, asyncio.ensure_future(self.pool.run(pending))

    def stall(self, pending: PendingJob) -> None:
        pending.progress = Progress(stalled=True)
        self.changes.notify()

    def finish(self, *jobs: PendingJob) -> None:
        for pending in jobs:
            self.ends.setdefault(pending.job.token, threading.Event()).set()

    async def wait_begun(self, *jobs: PendingJob) -> None:
        async with asyncio.timeout(60):
            while not all(self.has_begun(pending) for pending in jobs):
                await asyncio.sleep(0.001)

    def has_begun(self, pending: PendingJob) -> bool:
        return pending.job in self.begun


def with_threads(test: Callable[[Threads], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        threads = Threads()
        await test(threads)
        threads.pool.close()

    asyncio.run(run())


def test_one_job_per_core_runs_and_the_next_one_follows() -> None:
    async def test(threads: Threads) -> None:
        jobs, tasks = zip(*(threads.run(ApplyDiff) for _ in range(CORES + 2)), strict=True)
        await threads.wait_begun(*jobs[:CORES])
        threads.finish(jobs[0])
        await threads.wait_begun(jobs[CORES])
        assert not threads.has_begun(jobs[-1])
        threads.finish(*jobs)
        await asyncio.gather(*tasks)
        assert threads.pool.processes == CORES

    with_threads(test)


def test_a_stalled_job_makes_room_for_another_up_to_a_bound() -> None:
    async def test(threads: Threads) -> None:
        maximum = CORES * PROCESSES_PER_CORE
        jobs, tasks = zip(*(threads.run(ApplyDiff) for _ in range(maximum + 1)), strict=True)
        for pending in jobs[:maximum]:
            await threads.wait_begun(pending)
            threads.stall(pending)
        assert not threads.has_begun(jobs[maximum])
        threads.finish(jobs[3])
        await threads.wait_begun(jobs[maximum])
        threads.finish(*jobs)
        await asyncio.gather(*tasks)

    with_threads(test)


def test_an_apply_diff_does_not_wait_for_diffs_and_maintenance() -> None:
    async def test(threads: Threads) -> None:
        kinds: list[type[WorkerJob]] = [Diff, Push] * (CORES + 1)
        others, tasks = zip(*(threads.run(kind) for kind in kinds), strict=True)
        pending, task = threads.run(ApplyDiff)
        await threads.wait_begun(pending)
        threads.finish(pending, *others)
        await asyncio.gather(task, *tasks)

    with_threads(test)


@pytest.mark.parametrize("how", ["begun by a worker", "withdrawn"])
def test_a_waiting_job_that_was_begun_by_a_worker_or_withdrawn_gets_no_process(how: str) -> None:
    async def test(threads: Threads) -> None:
        jobs, tasks = zip(*(threads.run(Diff) for _ in range(CORES)), strict=True)
        late, waiting = threads.run(Diff)
        await threads.wait_begun(*jobs)
        assert late.withdraw() if how == "withdrawn" else late.claim() and late.begin(Claim("", "worker", 1))
        await waiting
        assert not threads.has_begun(late)
        threads.finish(*jobs)
        await asyncio.gather(*tasks)

    with_threads(test)


# -- with processes


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(gear_root=tmp_path / "gear", run_dir=tmp_path)


@pytest.fixture
def listener(settings: Settings) -> Iterator[socket.socket]:
    """Listen at the streams socket and grant nothing: each claim waits."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setblocking(False)
        listener.bind(str(settings.streams_socket))
        listener.listen()
        yield listener
    # Not by join(): the executor's thread may reap the process first, and then join() returns too early.
    wait_until(lambda: not multiprocessing.active_children(), "the pool's processes have ended")


async def read_to_the_end(control: socket.socket) -> None:
    async with asyncio.timeout(60):
        while await asyncio.get_running_loop().sock_recv(control, 4096):
            pass


@pytest.mark.slow
def test_running_jobs_end_when_the_pool_closes(settings: Settings, listener: socket.socket) -> None:
    async def close_while_busy() -> None:
        changes = Changes()
        pool = LocalPool(settings, changes)
        working = asyncio.ensure_future(pool.run(pending_job(Push, changes, settings)))
        control, _ = await asyncio.get_running_loop().sock_accept(listener)
        with control:
            pool.close()
            await read_to_the_end(control)
            with pytest.raises(BrokenProcessPool):
                await working

    asyncio.run(close_while_busy())


@pytest.mark.slow
def test_the_death_of_a_process_does_not_end_the_others(settings: Settings, listener: socket.socket) -> None:
    async def kill_one() -> None:
        loop, changes = asyncio.get_running_loop(), Changes()
        pool = LocalPool(settings, changes)
        working = {asyncio.ensure_future(pool.run(pending_job(kind, changes, settings))) for kind in (Diff, ApplyDiff)}
        (first, _), (second, _) = [await loop.sock_accept(listener) for _ in range(2)]
        with first, second:
            credentials = first.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            os.kill(int.from_bytes(credentials[:4], "little"), signal.SIGKILL)
            await read_to_the_end(first)
            (ended,), (other,) = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
            assert isinstance(ended.exception(), BrokenProcessPool)
            assert await loop.sock_recv(second, 4096)  # its claim, and no end after it
            with pytest.raises(BlockingIOError):
                second.recv(1)
            pool.close()
            await read_to_the_end(second)
            with pytest.raises(BrokenProcessPool):
                await other

    asyncio.run(kill_one())
