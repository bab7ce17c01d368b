"""How much memory all requests together take for what they store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Room:
    """So many bytes for all; whoever finds it full waits its turn. For the coroutines of one loop.

    Take it once a body has come, for a client may take hours over that; and take it once only, lest two wait for
    each other.
    """

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._free_bytes = size_bytes
        self._turn = asyncio.Lock()  # first come, first served: much room is not kept from who needs it by many little
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def taken(self, size_bytes: int) -> AsyncIterator[None]:
        """Have so many bytes until the block ends; for more than there are, all."""
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
