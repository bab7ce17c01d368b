"""The Celery application: queues, acknowledgement, redelivery.

The workers of a node take imports in up to GEAR_WORKER_PROCESSES processes, and maintenance in one process. A worker
for conversions of images may run on any node (`workers.conversion`)::

    python -m gearworkers.workers import push convert

The gateway pings the first two by their names, `import_queue` and `push_queue`.

The results of a node's jobs are sent over the streams socket. So the gateway has no result backend, and these tasks
ignore their results. A conversion waits for the results of its layers' tasks, which Redis keeps for a day. Only these
need the workers' result backend.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery import Celery, bootsteps, signals

from gearworkers.settings import NodeSettings, Settings
from gearworkers.util.log import configure_logging
from gearworkers.workers.broker import RedisBroker

TIME_LIMIT_S = 3600
"""For push, collect_garbage and dedupe; a heavy job takes as long as its stream."""
VISIBILITY_TIMEOUT_S = 3 * TIME_LIMIT_S
"""Seconds after which Redis redelivers an unacknowledged task; longer than any time limit plus any retry's delay."""
RETRIES = 10
CONVERT_QUEUE = "convert"
LAYER_TASK = "gearworkers.convert_layer"
IMAGE_TASK = "gearworkers.convert_image"
PROGRESS = "PROGRESS"
"""The state of a layer's running conversion; its meta is ``{"read_bytes": …}``."""
_MAX_DELAY_S = 300
_PROCESS_START_TIMEOUT_S = 60.0
"""Celery kills a process of a pool that takes longer to start; its default of 4 is too short for a busy machine."""


def retry_delay_s(retries: int, min_s: float = 0.0) -> int:
    """Return the seconds before the next attempt: 2, 4, 8 … 300; at least *min_s*, up to 300.

    With RETRIES, and the few attempts of the remote itself in each (`util.retry`), a push is retried for up to
    36 minutes. The remaining objects then stay pending for the next push.
    """
    return int(min(max(2 << retries, min_s), _MAX_DELAY_S))


def import_queue(node: str) -> str:
    """Return the name of the node's queue of heavy jobs."""
    return f"import@{node}"


def push_queue(node: str) -> str:
    """Return the name of the node's queue of maintenance jobs."""
    return f"push@{node}"


class RepairPool(bootsteps.StartStopStep):  # type: ignore[misc] # Celery has no types
    """Repairs the process pool after the connection to the broker was lost.

    Celery 5.7 ends a worker that no longer watches one of its pool processes ("file descriptor is None"). After a lost
    connection this happens to a process that has just died, and to one whose pipe reuses a dead process's descriptor.
    This step first replaces the former and watches the latter again.
    """

    requires = ("celery.worker.consumer:Tasks",)

    def start(self, consumer: Any) -> None:
        """Run when the consumer starts, initially or after a reconnect."""
        pool = consumer.pool._pool
        if not hasattr(pool, "maintain_pool"):
            return  # not a pool of processes
        pool.maintain_pool()
        for process in pool._pool:
            if getattr(process, "_sentinel_poll", None) is None:
                vars(process).pop("_sentinel_poll", None)  # a missing poll is created again


def make_app(
    settings: NodeSettings, transport_options: Mapping[str, object] | None = None, *, with_results: bool = False
) -> Celery:
    """Return the application for the broker of *settings*, not yet connected.

    Args:
        settings: With the broker.
        transport_options: For kombu's Redis transport, in addition to the visibility timeout.
        with_results: Keep results in the same Redis, so that they can be waited for.
    """
    app = Celery("gearworkers", set_as_current=False, include=["gearworkers.workers.tasks"], amqp=RedisBroker)
    app.conf.update(
        broker_url=settings.effective_broker_url,
        result_backend=settings.effective_broker_url if with_results else None,
        broker_transport_options={"visibility_timeout": VISIBILITY_TIMEOUT_S, **(transport_options or {})},
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # wait for Redis without limit
        worker_cancel_long_running_tasks_on_connection_loss=False,  # a running import needs no Redis
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_track_started=False,
        enable_utc=True,
    )
    app.steps["consumer"].add(RepairPool)
    return app


def make_worker_app(settings: Settings) -> Celery:
    """Return the application of a worker, with the tasks' modules not yet imported; make it the current one."""
    app = make_app(settings, with_results=True)
    app.conf.worker_autoscaler = "gearworkers.workers.scaling:IdleScaler"
    app.conf.worker_proc_alive_timeout = _PROCESS_START_TIMEOUT_S
    app.set_current()
    signals.setup_logging.connect(lambda **_: configure_logging(settings.log), weak=False)
    return app
