"""Orders into Redis, by Celery, from the event loop; and whether Redis and workers are there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import structlog

from gearworkers.errors import Unavailable
from gearworkers.settings import Settings
from gearworkers.workers.broker import why_not_taken
from gearworkers.workers.celery_app import import_queue, make_app, push_queue
from gearworkers.workers.messages import Order

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
_WORKER_ANSWER_S = 1.5  # they answer in 20 ms, unless the machine is busy
_STATE_PATIENCE_S = _PATIENCE_S + _WORKER_ANSWER_S
_ATTEMPTS = 2  # the first may meet a connection that a restart of Redis has cut

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class QueueState:
    """What Redis and the workers say; lengths are of what no worker has taken yet."""

    waiting_imports: int
    waiting_upkeep: int
    silent: frozenset[str] = frozenset()
    """Which workers do not answer: of ``import`` and ``push``."""


class TaskQueue:
    """Publishes orders, and asks how it goes; never waits for longer than a few seconds.

    Args:
        settings: Name the broker and the node.
    """

    def __init__(self, settings: Settings) -> None:
        self._node = settings.node
        self._app = make_app(settings, _TRANSPORT)
        # A thread each, as kombu's channels are not to be shared: no publisher waits while workers are asked.
        self._publishing = ThreadPoolExecutor(1, "queue")
        self._asking = ThreadPoolExecutor(1, "queue-state")

    async def publish(self, order: Order, *, heavy: bool, expires_s: float) -> None:
        """Put *order* into this node's import queue if *heavy*, else into its push queue.

        Args:
            order: What to do.
            heavy: Whether Docker waits for it.
            expires_s: After so many seconds no worker begins it.

        Raises:
            Unavailable: Redis has not taken it; nobody will do it.
        """
        arguments = {"gear_root": order.gear_root, "token": order.token, "id": order.id, "parent": order.parent}
        queue = import_queue(self._node) if heavy else push_queue(self._node)

        def send() -> None:
            self._app.send_task(
                f"gearworkers.{order.call}", kwargs=arguments, queue=queue, expires=expires_s, retry=False
            )

        await _asked(self._publishing, send, _PATIENCE_S)

    async def state(self) -> QueueState:
        """How long the queues are, and whether their workers answer.

        Raises:
            Unavailable: Redis does not answer, or refuses tasks.
        """
        return await _asked(self._asking, self._look, _STATE_PATIENCE_S)

    def _look(self) -> QueueState:
        queues = {"import": import_queue(self._node), "push": push_queue(self._node)}
        with self._app.connection_for_write() as connection:
            client: Any = connection.default_channel.client
            imports, upkeep = (client.llen(queue) for queue in queues.values())
            # Workers are named by their queue, and those that are named are not waited for once they have answered.
            workers = self._app.control.inspect([*queues.values()], timeout=_WORKER_ANSWER_S, connection=connection)
            answers = workers.ping() or {}
        return QueueState(imports, upkeep, frozenset(kind for kind, queue in queues.items() if queue not in answers))

    def close(self) -> None:
        """Let the connections go; who is still waiting gets an answer."""
        for thread in (self._publishing, self._asking):
            thread.shutdown(wait=False)  # cancelled futures would cancel those that wait
        self._app.close()


async def _asked(thread: ThreadPoolExecutor, call: Callable[[], Result], patience_s: float) -> Result:
    try:
        future = asyncio.get_running_loop().run_in_executor(thread, _attempted, call)
        return await asyncio.wait_for(future, patience_s)
    except Exception as exc:  # kombu and redis-py let many kinds through; each means: not taken
        _log.info("Redis takes no task", error=f"{type(exc).__name__}: {exc}")
        raise Unavailable(why_not_taken(exc)) from exc


def _attempted(call: Callable[[], Result]) -> Result:
    for _ in range(_ATTEMPTS - 1):
        try:
            return call()
        except Exception:
            continue
    return call()
