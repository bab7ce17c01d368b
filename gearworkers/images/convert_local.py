"""A conversion by processes of this host: no Redis, no worker is needed."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from typing import Any

from gearworkers.errors import GearError
from gearworkers.images.convert import LayerDone, LayerJob, Plan, Report, Told, convert_layer, finish_conversion
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings
from gearworkers.util.process import end_with_parent

_POLL_S = 0.2
_TELL_BYTES = 1 << 20

_told: Any = None
"""In a process of the pool: the queue to the one that started it."""


def convert_here(settings: Settings, plan: Plan, processes: int, told: Told) -> Report:
    """Do all of *plan*, so many layers at once.

    Raises:
        GearError: What the first layer that failed met; layers that are being converted are finished first.

    Crash: what is done stays done; the next run finds it.
    """
    context = multiprocessing.get_context("spawn")
    progress: Any = context.Queue()
    with _pool(processes, context, progress) as pool:
        futures = [pool.submit(_convert, settings, job) for job in plan.jobs()]
        try:
            while any(not future.done() for future in futures) and not _failed(futures):
                _pass_on(progress, told)
            done = [future.result() for future in _settled(futures)]
        except BrokenProcessPool as exc:
            raise GearError("a process that converted a layer was killed; is there too little memory?") from exc
        _pass_on(progress, told)
    return finish_conversion(settings.registry, plan, done)


@contextmanager
def _pool(processes: int, context: Any, progress: Any) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(processes, context, initializer=_begin, initargs=(progress, os.getpid()))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        progress.close()


def _begin(progress: Any, parent_pid: int) -> None:
    global _told
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Ctrl-C ends it without a word
    end_with_parent(parent_pid)
    _told = progress


def _convert(settings: Settings, job: LayerJob) -> LayerDone:
    told_bytes = 0

    def tell(read_bytes: int) -> None:
        nonlocal told_bytes
        if read_bytes - told_bytes >= _TELL_BYTES:
            told_bytes = read_bytes
            _told.put((job.digest, read_bytes))

    with closing(open_remote(settings)) as remote:
        done = convert_layer(settings, remote, job, tell)
    _told.put((job.digest, job.size_bytes))
    return done


def _pass_on(progress: Any, told: Told) -> None:
    """What has been told, or comes within a moment."""
    try:
        told(*progress.get(timeout=_POLL_S))
        while True:
            told(*progress.get_nowait())
    except queue.Empty:
        pass


def _failed(futures: list[Future[LayerDone]]) -> bool:
    return any(future.done() and future.exception() is not None for future in futures)


def _settled(futures: list[Future[LayerDone]]) -> list[Future[LayerDone]]:
    """All of them when none failed; else the one that did, after those that wait have been dropped."""
    if not _failed(futures):
        return futures
    for future in futures:
        future.cancel()
    wait(futures)
    return [future for future in futures if not future.cancelled() and future.exception() is not None]
