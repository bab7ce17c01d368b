"""The gateway's own processes, for when no worker takes an order. They start when first needed and end when idle."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import structlog

from gearworkers.log import configure_logging
from gearworkers.processes import end_with_parent
from gearworkers.settings import Settings
from gearworkers.streams import Order
from gearworkers.work import perform

_log = structlog.stdlib.get_logger(__name__)

_IDLE_S = 60.0


class OwnPool:
    """At most one process a core; each order claims its token at the streams socket as a worker does."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._executor: ProcessPoolExecutor | None = None
        self._running = 0
        self._idle: asyncio.TimerHandle | None = None

    async def perform(self, order: Order) -> None:
        """Have *order* done; returns when it is, or when somebody else had claimed it.

        Raises:
            BrokenProcessPool: A process died; the next order gets a new pool.
        """
        executor = self._started()
        self._running += 1
        try:
            await asyncio.wrap_future(executor.submit(_perform, self._settings, order))
        except BrokenProcessPool:
            if self._executor is executor:
                _log.error("a process of the gateway's pool died", call=order.call, id=order.id)
                self._executor = None
            raise
        finally:
            self._running -= 1
            self._end_when_idle()

    def close(self) -> None:
        """End the processes; what is under way in them ends too."""
        executor, self._executor = self._executor, None
        if self._idle is not None:
            self._idle.cancel()
        if executor is not None:
            executor.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():  # all that the gateway has are the pool's
                process.terminate()

    def _started(self) -> ProcessPoolExecutor:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if self._executor is None:
            self._executor = ProcessPoolExecutor(
                os.cpu_count() or 1,
                multiprocessing.get_context("spawn"),
                _begin,
                (self._settings, os.getpid()),
            )
        return self._executor

    def _end_when_idle(self) -> None:
        if not self._running and self._executor is not None:
            self._idle = asyncio.get_running_loop().call_later(_IDLE_S, self.close)


def _begin(settings: Settings, parent_pid: int) -> None:
    end_with_parent(parent_pid)
    configure_logging(settings)


def _perform(settings: Settings, order: Order) -> None:
    perform(settings, order, "gateway")
