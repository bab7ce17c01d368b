"""The gateway's way to Redis: whatever becomes of it, who publishes is told."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

from gearworkers.settings import Settings
from plugin_gateway.dispatch.dispatcher import make_order
from plugin_gateway.dispatch.task_queue import TaskQueue


def test_who_publishes_while_the_broker_is_replaced_is_told_that_it_was_not_published(tmp_path: Path) -> None:
    settings = Settings(broker_url=f"redis+socket://{tmp_path}/redis.sock?virtual_host=0")
    order = make_order("push", settings)

    async def publish_and_close() -> list[object]:
        queue = TaskQueue(settings)
        waiting = [asyncio.ensure_future(queue.publish(order, heavy=False, expires_s=1.0)) for _ in range(3)]
        await asyncio.sleep(0)  # all have asked, and one is being answered
        queue.close()
        return await asyncio.gather(*waiting, return_exceptions=True)

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "redis.sock"))
        silent.listen()
        assert [str(error) for error in asyncio.run(publish_and_close())] == ["Redis does not answer"] * 3
