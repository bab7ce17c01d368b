"""The gateway's own processes, for when no worker takes an order. They start when first needed and end when idle."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor

import structlog

from gearworkers.settings import Settings
from gearworkers.util.log import configure_logging
from gearworkers.util.process import end_with_parent
from gearworkers.workers.execute import perform
from gearworkers.workers.messages import Order
from plugin_gateway.dispatch.claims import Changes, Offer

_log = structlog.stdlib.get_logger(__name__)

_IDLE_S = 60.0
_MOST_PER_CORE = 8


class OwnPool:
    """Each order claims its token at the streams socket, as a worker does.

    Of each kind of order one process a core is at work. One that waits for its caller makes room for another, up to
    eight a core. Kinds do not share that: `docker commit` reads a Diff only as fast as its ApplyDiff takes it, so a
    full house of Diffs must not keep ApplyDiffs out.

    Args:
        settings: Of the node.
        changes: The desk's; told when a process is free.
    """

    def __init__(self, settings: Settings, changes: Changes) -> None:
        self._settings = settings
        self._changes = changes
        self._cores = os.cpu_count() or 1
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._at_work: set[Offer] = set()
        self._processes: set[ProcessPoolExecutor] = set()  # of one process each: the death of one is its own
        self._idle: dict[ProcessPoolExecutor, asyncio.TimerHandle] = {}

    async def perform(self, offer: Offer) -> None:
        """Have *offer* claimed and done, in its turn; returns when it is, or when nobody has to do it any more.

        Raises:
            BrokenProcessPool: The process died.
        """
        async with self._turns[offer.kind]:
            while not (self._has_room(offer.kind) or offer.claimed.done() or offer.withdrawn):
                await self._changes.next()
            if offer.claimed.done() or offer.withdrawn:
                return
            self._at_work.add(offer)
        try:
            await self._run(offer.order)
        finally:
            self._at_work.discard(offer)
            self._changes.tell()

    def close(self) -> None:
        """End the processes; what is under way in them ends too."""
        for timer in self._idle.values():
            timer.cancel()
        for process in self._processes:
            process.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():  # all that the gateway has are the pool's
            child.terminate()

    def _has_room(self, kind: str) -> bool:
        stalled = [offer.stalled for offer in self._at_work if offer.kind == kind]
        return stalled.count(False) < self._cores and len(stalled) < self._cores * _MOST_PER_CORE

    async def _run(self, order: Order) -> None:
        process = self._free()
        try:
            await asyncio.wrap_future(process.submit(_perform, self._settings, order))
        except Exception as exc:
            _log.error("a process of the gateway's pool failed", call=order.call, id=order.id, error=repr(exc))
            self._end(process)
            raise
        self._idle[process] = asyncio.get_running_loop().call_later(_IDLE_S, self._end, process)

    def _free(self) -> ProcessPoolExecutor:
        if self._idle:
            process, timer = self._idle.popitem()
            timer.cancel()
            return process
        process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _begin, (self._settings, os.getpid()))
        self._processes.add(process)
        return process

    def _end(self, process: ProcessPoolExecutor) -> None:
        self._idle.pop(process, None)
        self._processes.discard(process)
        process.shutdown(wait=False)


def _begin(settings: Settings, parent_pid: int) -> None:
    end_with_parent(parent_pid)
    configure_logging(settings.log)


def _perform(settings: Settings, order: Order) -> None:
    perform(settings, order, "gateway")
