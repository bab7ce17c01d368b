"""Publishing to Redis ends with a confirmation or an error in every case."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from gearworkers.settings import Settings
from gearworkers.workers.messages import Push
from plugin_gateway.dispatch.task_queue import TaskQueue


@pytest.mark.slow
def test_jobs_published_while_the_broker_is_replaced_are_reported_as_unpublished(tmp_path: Path) -> None:
    settings = Settings(broker_url=f"redis+socket://{tmp_path}/redis.sock?virtual_host=0")
    job = Push(gear_root=str(settings.gear_root))

    async def publish_and_close() -> list[object]:
        queue = TaskQueue(settings)
        waiting = [asyncio.ensure_future(queue.publish(job, expires_s=1.0)) for _ in range(3)]
        await asyncio.sleep(0)  # all are waiting, and one is being sent
        queue.close()
        return await asyncio.gather(*waiting, return_exceptions=True)

    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "redis.sock"))
        silent.listen()
        assert [str(error) for error in asyncio.run(publish_and_close())] == ["Redis does not answer"] * 3
