"""Threads for light calls, so that quick calls do not queue behind slow ones."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

from gearworkers.engine.mounts import LazyServerNeeded
from plugin_gateway.graphdriver.calls import LIGHT_CALLS, Driver, LightCall, blocking_get, layer_id
from plugin_gateway.graphdriver.messages import Response

_QUICK_THREADS = 16
_DISK_THREADS = 32
_LAZY_THREADS = 128
_DISK = frozenset(f"GraphDriver.{name}" for name in ("Init", "Cleanup", "Status", "Put", "Remove"))
"""Calls that wait for the disk: they repair, count objects, remove trees or sync an upper directory."""
_LAZY = frozenset(f"GraphDriver.{name}" for name in ("Changes", "DiffSize"))
"""Calls that read files of a layer, which may be in the lazy file system."""
_SERIALIZED = frozenset(f"GraphDriver.{name}" for name in ("Get", "Put", "Remove"))
"""Calls that run one after the other for each layer."""


class CallThreads:
    """Three pools: for quick calls, for calls that wait for the disk, and for calls that wait for the lazy file server.

    A Get starts in the quick pool and moves to the lazy pool if it must wait for the lazy file server. A call that
    waits for another call on its layer occupies no thread.
    """

    def __init__(self) -> None:
        self._quick = ThreadPoolExecutor(_QUICK_THREADS, "quick")
        self._disk = ThreadPoolExecutor(_DISK_THREADS, "disk")
        self._lazy = ThreadPoolExecutor(_LAZY_THREADS, "lazy")
        self._layer_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # only locks in use

    async def call(self, method: str, driver: Driver, body: bytes) -> Response:
        """Run one of LIGHT_CALLS and return its response; its errors propagate."""
        if method not in _SERIALIZED:
            return await self._run_in_pool(method, driver, body)
        async with self._layer_locks.setdefault(layer_id(body), asyncio.Lock()):
            return await self._run_in_pool(method, driver, body)

    async def can_dedupe(self, driver: Driver, id: str) -> bool:
        """As `Driver.can_dedupe`."""
        return await asyncio.get_running_loop().run_in_executor(self._quick, driver.can_dedupe, id)

    def close(self) -> None:
        """Start no more calls; do not wait for running ones."""
        for threads in (self._quick, self._disk, self._lazy):
            threads.shutdown(wait=False)

    async def _run_in_pool(self, method: str, driver: Driver, body: bytes) -> Response:
        call = LIGHT_CALLS[method]
        if method in _DISK:
            return await _run(self._disk, call, driver, body)
        if method in _LAZY:
            return await _run(self._lazy, call, driver, body)
        try:
            return await _run(self._quick, call, driver, body)
        except LazyServerNeeded:
            return await _run(self._lazy, blocking_get, driver, body)


async def _run(threads: ThreadPoolExecutor, call: LightCall, driver: Driver, body: bytes) -> Response:
    return await asyncio.get_running_loop().run_in_executor(threads, call, driver, body)
