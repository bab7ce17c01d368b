"""The gateway's own processes end with it."""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import pytest

from gearworkers.settings import Settings
from plugin_gateway.dispatch import make_order
from plugin_gateway.pool import OwnPool


def test_what_is_under_way_ends_when_the_pool_is_closed(tmp_path: Path) -> None:
    settings = Settings(gear_root=tmp_path / "gear", run_dir=tmp_path)

    async def close_while_busy(listener: socket.socket) -> None:
        loop, pool = asyncio.get_running_loop(), OwnPool(settings)
        working = asyncio.ensure_future(pool.perform(make_order("push", settings)))
        control, _ = await loop.sock_accept(listener)  # and no grant: it waits
        with control:
            pool.close()
            async with asyncio.timeout(60):
                while await loop.sock_recv(control, 4096):
                    pass
                with pytest.raises(BrokenProcessPool):
                    await working

    with socket.socket(socket.AF_UNIX) as listener:
        listener.setblocking(False)
        listener.bind(str(settings.streams_socket))
        listener.listen()
        asyncio.run(close_while_busy(listener))
    for process in multiprocessing.active_children():
        process.join(60)
    assert not multiprocessing.active_children()
