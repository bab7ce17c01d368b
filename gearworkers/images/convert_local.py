"""Convert an image in processes of this host, without Redis and workers."""

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
from gearworkers.images.convert import LayerProgress, convert_layer
from gearworkers.images.gear_manifest import ConversionReport, finish_conversion
from gearworkers.images.layer_records import ConvertedLayer
from gearworkers.images.plan import ConversionPlan, LayerJob
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings
from gearworkers.util.process import end_with_parent

_POLL_S = 0.2
_REPORT_BYTES = 1 << 20
"""Number of bytes between two reports of a layer's progress."""

_progress_queue: Any = None
"""In a process of the pool: the queue to its parent."""


def convert_locally(
    settings: Settings, plan: ConversionPlan, processes: int, progress: LayerProgress
) -> ConversionReport:
    """Carry out *plan* with up to *processes* layers at a time.

    Raises:
        GearError: The error of the first layer that failed; layers that were already started are finished first.

    Crash: finished layers stay converted, and the next run reuses them.
    """
    context = multiprocessing.get_context("spawn")
    reports: Any = context.Queue()
    with _pool(processes, context, reports) as pool:
        futures = [pool.submit(_convert, settings, job) for job in plan.jobs()]
        try:
            while any(not future.done() for future in futures) and not _has_failed(futures):
                _forward_reports(reports, progress)
            converted = [future.result() for future in _finished(futures)]
        except BrokenProcessPool as exc:
            raise GearError(
                "a process was killed while it converted a layer, perhaps because memory ran out; "
                "try again with a smaller --processes"
            ) from exc
        _forward_reports(reports, progress)
    return finish_conversion(settings.registry, plan, converted)


@contextmanager
def _pool(processes: int, context: Any, reports: Any) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(processes, context, initializer=_initialize, initargs=(reports, os.getpid()))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        reports.close()


def _initialize(reports: Any, parent_pid: int) -> None:
    global _progress_queue
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the process without a traceback
    end_with_parent(parent_pid)
    reports.cancel_join_thread()  # after an error nobody reads the reports, so the process must not wait for a reader
    _progress_queue = reports


def _convert(settings: Settings, job: LayerJob) -> ConvertedLayer:
    reported_bytes = 0

    def report(read_bytes: int) -> None:
        nonlocal reported_bytes
        if read_bytes - reported_bytes >= _REPORT_BYTES:
            reported_bytes = read_bytes
            _progress_queue.put((job.digest, read_bytes))

    with closing(open_remote(settings)) as remote:
        converted = convert_layer(settings, remote, job, report)
    _progress_queue.put((job.digest, job.size_bytes))
    return converted


def _forward_reports(reports: Any, progress: LayerProgress) -> None:
    """Forward all queued reports; if there are none, wait up to _POLL_S for one."""
    try:
        progress(*reports.get(timeout=_POLL_S))
        while True:
            progress(*reports.get_nowait())
    except queue.Empty:
        pass


def _has_failed(futures: list[Future[ConvertedLayer]]) -> bool:
    return any(future.done() and future.exception() is not None for future in futures)


def _finished(futures: list[Future[ConvertedLayer]]) -> list[Future[ConvertedLayer]]:
    """Return all *futures* if none failed; else cancel the pending ones, wait for the rest, return the failed ones."""
    if not _has_failed(futures):
        return futures
    for future in futures:
        future.cancel()
    wait(futures)
    return [future for future in futures if not future.cancelled() and future.exception() is not None]
