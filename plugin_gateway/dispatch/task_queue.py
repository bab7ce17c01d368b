"""Publish jobs to Redis through Celery, and query Redis and the workers, without blocking the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import structlog

from gearworkers.errors import Unavailable
from gearworkers.settings import NodeSettings
from gearworkers.workers.broker import refusal_reason
from gearworkers.workers.celery_app import import_queue, make_app, push_queue
from gearworkers.workers.messages import HeavyJob, WorkerJob

_log = structlog.stdlib.get_logger(__name__)

_TRANSPORT = {
    "socket_timeout": 1.0,
    "socket_connect_timeout": 0.5,
    "max_retries": 1,  # kombu itself tries to connect for minutes
    "interval_start": 0,
    "interval_step": 0,
    "interval_max": 0,
}
_PUBLISH_TIMEOUT_S = 2.0
_PING_TIMEOUT_S = 1.5  # workers answer in 20 ms, unless the machine is busy
_STATE_TIMEOUT_S = _PUBLISH_TIMEOUT_S + _PING_TIMEOUT_S
_ATTEMPTS = 2  # the first may use a connection that a restart of Redis has closed

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class QueueState:
    """The state of the queues and their workers; the lengths count tasks that no worker has taken yet."""

    waiting_imports: int
    waiting_maintenance: int
    silent: frozenset[str] = frozenset()
    """The kinds of workers that do not answer, of ``import`` and ``push``."""


class TaskQueue:
    """The node's queues in Redis; no call waits for longer than a few seconds.

    Args:
        settings: With the broker and the node.
    """

    def __init__(self, settings: NodeSettings) -> None:
        self._node = settings.node
        self._app = make_app(settings, _TRANSPORT)
        # One thread each: kombu's channels cannot be shared, and publishing must not wait for the workers' answers.
        self._publishing = ThreadPoolExecutor(1, "queue")
        self._querying = ThreadPoolExecutor(1, "queue-state")

    async def publish(self, job: WorkerJob, *, expires_s: float) -> None:
        """Put a heavy job into the node's import queue, and any other job into its push queue.

        Args:
            job: The work.
            expires_s: Seconds after which workers discard the job.

        Raises:
            Unavailable: Redis did not confirm the task.
        """
        arguments = {"job": msgspec.to_builtins(job)}
        queue = import_queue(self._node) if isinstance(job, HeavyJob) else push_queue(self._node)

        def send() -> None:
            self._app.send_task(
                f"gearworkers.{job.call}", kwargs=arguments, queue=queue, expires=expires_s, retry=False
            )

        await _run(self._publishing, send, _PUBLISH_TIMEOUT_S)

    async def state(self) -> QueueState:
        """Return the lengths of the queues, and the workers that do not answer.

        Raises:
            Unavailable: Redis does not answer, or refuses tasks.
        """
        return await _run(self._querying, self._query_state, _STATE_TIMEOUT_S)

    def _query_state(self) -> QueueState:
        queues = {"import": import_queue(self._node), "push": push_queue(self._node)}
        with self._app.connection_for_write() as connection:
            client: Any = connection.default_channel.client
            imports, maintenance = (client.llen(queue) for queue in queues.values())
            # Workers have the names of their queues. Naming them ends the wait with the last answer.
            workers = self._app.control.inspect([*queues.values()], timeout=_PING_TIMEOUT_S, connection=connection)
            answers = workers.ping() or {}
        return QueueState(
            imports, maintenance, frozenset(kind for kind, queue in queues.items() if queue not in answers)
        )

    def close(self) -> None:
        """Release the connections; pending calls still end, with a result or an error."""
        for thread in (self._publishing, self._querying):
            thread.shutdown(wait=False)  # cancelling futures would cancel the waiting callers
        self._app.close()


async def _run(thread: ThreadPoolExecutor, call: Callable[[], Result], timeout_s: float) -> Result:
    try:
        future = asyncio.get_running_loop().run_in_executor(thread, _attempt, call)
        return await asyncio.wait_for(future, timeout_s)
    except Exception as exc:  # kombu and redis-py raise many kinds; each means that Redis did not confirm the call
        _log.info("a call to Redis failed", error=f"{type(exc).__name__}: {exc}")
        raise Unavailable(refusal_reason(exc)) from exc


def _attempt(call: Callable[[], Result]) -> Result:
    for _ in range(_ATTEMPTS - 1):
        try:
            return call()
        except Exception:
            continue
    return call()
