"""Orders into Redis, by Celery, from the event loop; and whether Redis is there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from gearworkers.app import import_queue, make_app, push_queue
from gearworkers.settings import Settings
from gearworkers.streams import Order

_log = structlog.stdlib.get_logger(__name__)

_TRANSPORT = {
    "socket_timeout": 1.0,
    "socket_connect_timeout": 0.5,
    "max_retries": 1,  # of kombu's own connecting, which else goes on for minutes
    "interval_start": 0,
    "interval_step": 0,
    "interval_max": 0,
}
_PATIENCE_S = 2.0
_ATTEMPTS = 2  # the first may meet a connection that a restart of Redis has cut

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class QueueState:
    """What Redis says; lengths are of what no worker has taken yet."""

    waiting_imports: int
    waiting_upkeep: int


class TaskQueue:
    """Publishes orders; never raises, never waits for longer than some two seconds.

    Args:
        settings: Name the broker and the node.
    """

    def __init__(self, settings: Settings) -> None:
        self._node = settings.node
        self._app = make_app(settings, _TRANSPORT)
        self._thread = ThreadPoolExecutor(1, "queue")  # one: kombu's channels are not to be shared

    async def publish(self, order: Order, *, heavy: bool, expires_s: float) -> bool:
        """Put *order* into this node's import queue if *heavy*, else into its push queue.

        Args:
            order: What to do.
            heavy: Whether Docker waits for it.
            expires_s: After so many seconds no worker begins it.

        Returns:
            Whether Redis has it; if False, nobody will do it.
        """
        arguments = {"gear_root": order.gear_root, "token": order.token, "id": order.id, "parent": order.parent}
        queue = import_queue(self._node) if heavy else push_queue(self._node)

        def send() -> bool:
            self._app.send_task(
                f"gearworkers.{order.call}", kwargs=arguments, queue=queue, expires=expires_s, retry=False
            )
            return True

        return await self._ask(send) or False

    async def state(self) -> QueueState | None:
        """How long the queues are; None if Redis does not answer."""

        def lengths() -> QueueState:
            with self._app.connection_for_write() as connection:
                client: Any = connection.default_channel.client
                return QueueState(client.llen(import_queue(self._node)), client.llen(push_queue(self._node)))

        return await self._ask(lengths)

    async def _ask(self, call: Callable[[], Result]) -> Result | None:
        try:
            future = asyncio.get_running_loop().run_in_executor(self._thread, _attempted, call)
            return await asyncio.wait_for(future, _PATIENCE_S)
        except TimeoutError:
            _log.info("Redis does not answer in time", patience_s=_PATIENCE_S)
        except Exception as exc:  # kombu and redis-py let many kinds through; each means: not published
            _log.info("Redis does not answer", error=f"{type(exc).__name__}: {exc}")
        return None

    def close(self) -> None:
        """Let the connections go; who is still waiting gets an answer."""
        self._thread.shutdown(wait=False)  # cancelled futures would cancel those that wait
        self._app.close()


def _attempted(call: Callable[[], Result]) -> Result:
    for _ in range(_ATTEMPTS - 1):
        try:
            return call()
        except Exception:
            continue
    return call()
