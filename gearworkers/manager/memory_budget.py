"""A limit on the memory that all requests together use for storing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class MemoryBudget:
    """A number of bytes that coroutines of one event loop share; when it is used up, they wait in turn.

    Reserve memory only after the whole body has arrived, since a client may take hours to send it. Hold one
    reservation at a time: two coroutines that each hold one and want a second would wait for each other.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._free_bytes = size_bytes
        self._turn = asyncio.Lock()  # first come, first served, so that small reservations do not starve a large one
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def reserved(self, size_bytes: int) -> AsyncIterator[None]:
        """Hold a reservation within the block; more than the whole budget counts as the whole budget."""
        size_bytes = min(size_bytes, self._size_bytes)
        async with self._turn:
            while self._free_bytes < size_bytes:
                self._freed.clear()
                await self._freed.wait()
            self._free_bytes -= size_bytes
        try:
            yield
        finally:
            self._free_bytes += size_bytes
            self._freed.set()
