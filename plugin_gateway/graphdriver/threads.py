"""Where light calls run: none waits behind one that takes its time."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

from gearworkers.engine.mounts import LazyServerNeeded
from plugin_gateway.graphdriver.calls import LIGHT_CALLS, Driver, Light, get_patiently, layer_id
from plugin_gateway.graphdriver.messages import Response

_PROMPT_THREADS = 16
_DISK_THREADS = 32
_LAZY_THREADS = 128
_DISK = frozenset(f"GraphDriver.{name}" for name in ("Init", "Cleanup", "Status", "Put", "Remove"))
"""They repair, count, remove trees or have an upper synced."""
_LAZY = frozenset(f"GraphDriver.{name}" for name in ("Changes", "DiffSize"))
"""They look at files of a layer, which may lie in the lazy file system."""
_IN_TURN = frozenset(f"GraphDriver.{name}" for name in ("Get", "Put", "Remove"))
"""Those on one layer wait for each other."""


class CallThreads:
    """Threads for calls that a record or a mount answers, for those that wait for the disk, for the lazy file server.

    A Get that must wait for the lazy file server begins among the first and goes on among the last. Calls that wait
    for another one on their layer hold no thread.
    """

    def __init__(self) -> None:
        self._prompt = ThreadPoolExecutor(_PROMPT_THREADS, "prompt")
        self._disk = ThreadPoolExecutor(_DISK_THREADS, "disk")
        self._lazy = ThreadPoolExecutor(_LAZY_THREADS, "lazy")
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # those in use

    async def call(self, method: str, driver: Driver, body: bytes) -> Response:
        """Do one of LIGHT_CALLS; raises what it raises."""
        if method not in _IN_TURN:
            return await self._called(method, driver, body)
        async with self._turns.setdefault(layer_id(body), asyncio.Lock()):
            return await self._called(method, driver, body)

    async def can_dedupe(self, driver: Driver, id: str) -> bool:
        """As the driver's; raises what it raises."""
        return await asyncio.get_running_loop().run_in_executor(self._prompt, driver.can_dedupe, id)

    def close(self) -> None:
        """Begin nothing more; what is under way is not waited for."""
        for threads in (self._prompt, self._disk, self._lazy):
            threads.shutdown(wait=False)

    async def _called(self, method: str, driver: Driver, body: bytes) -> Response:
        call = LIGHT_CALLS[method]
        if method in _DISK:
            return await _run(self._disk, call, driver, body)
        if method in _LAZY:
            return await _run(self._lazy, call, driver, body)
        try:
            return await _run(self._prompt, call, driver, body)
        except LazyServerNeeded:
            return await _run(self._lazy, get_patiently, driver, body)


async def _run(threads: ThreadPoolExecutor, call: Light, driver: Driver, body: bytes) -> Response:
    return await asyncio.get_running_loop().run_in_executor(threads, call, driver, body)
