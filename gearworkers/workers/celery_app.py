"""The Celery application: queues, acknowledgement, redelivery.

Workers of a node, one process a core for imports, one for what may take its time::

    celery -A gearworkers.workers.celery_app worker -n import@$GEAR_NODE -Q import@$GEAR_NODE --concurrency $(nproc) \\
        --without-gossip --without-mingle --without-heartbeat
    nice celery -A gearworkers.workers.celery_app worker -n push@$GEAR_NODE -Q push@$GEAR_NODE --concurrency 1 \\
        --without-gossip --without-mingle --without-heartbeat

The gateway asks them by these names. Any node's, for conversions of images (`convert_on_workers`)::

    nice celery -A gearworkers.workers.celery_app worker -n convert@$GEAR_NODE -Q convert --concurrency $(nproc)

Nobody waits for a result of a node's tasks through Redis: a heavy call's answer comes over the streams socket. So the
gateway has no result backend, and these tasks ignore their results. A conversion waits for those of its layers: its
tasks keep theirs for a day, and workers have the backend for them alone.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cache
from typing import Any

from celery import Celery, bootsteps, signals

from gearworkers.settings import NodeSettings, Settings
from gearworkers.util.log import configure_logging
from gearworkers.util.process import end_with_parent
from gearworkers.workers.broker import RedisBroker

TIME_LIMIT_S = 3600
"""Of push, collect_garbage and dedupe; an import takes as long as its stream."""
VISIBILITY_TIMEOUT_S = 3 * TIME_LIMIT_S
"""After it Redis hands an unacknowledged task to another worker: above every time limit and every retry's delay."""
RETRIES = 10
CONVERT_QUEUE = "convert"
LAYER_TASK = "gearworkers.convert_layer"
IMAGE_TASK = "gearworkers.convert_image"
PROGRESS = "PROGRESS"
"""State of a layer's conversion while it runs; its meta is ``{"read_bytes": …}``."""
_LONGEST_DELAY_S = 300


def retry_delay_s(retries: int, asked_s: float = 0.0) -> int:
    """Seconds before the next attempt: 2, 4, 8 … 300, or up to that what was asked for.

    With RETRIES, and the few attempts that the remote itself makes in each (`util.retry`), a push is tried for
    some 25 minutes; what is left then stays in the spool for the next one.
    """
    return int(min(max(2 << retries, asked_s), _LONGEST_DELAY_S))


def import_queue(node: str) -> str:
    """The queue of the node's ApplyDiffs and Diffs."""
    return f"import@{node}"


def push_queue(node: str) -> str:
    """The queue of the node's upkeep: push, collect_garbage, dedupe."""
    return f"push@{node}"


class _MendPool(bootsteps.StartStopStep):  # type: ignore[misc] # Celery has no types
    """Mends the pool before the worker listens to its processes anew, after the broker was lost.

    Celery 5.7 then ends the worker with "file descriptor is None" if it has ceased to watch a process that it still
    has: one that died, as its pipe closes a moment before it can be waited for, or one that lives, as its pipe may have
    the number of a dead one's of which an event was still to be handled.
    """

    requires = ("celery.worker.consumer:Tasks",)

    def start(self, consumer: Any) -> None:
        """The consumer starts, for the first time or after the broker was lost."""
        pool = consumer.pool._pool
        if not hasattr(pool, "maintain_pool"):
            return  # not of processes
        pool.maintain_pool()
        for process in pool._pool:
            if getattr(process, "_sentinel_poll", None) is None:
                vars(process).pop("_sentinel_poll", None)  # what is not there is made


def make_app(
    settings: NodeSettings, transport_options: Mapping[str, object] | None = None, *, with_results: bool = False
) -> Celery:
    """The application for the broker of *settings*; connects to nothing yet.

    Args:
        settings: Names the broker and how logs look.
        transport_options: For kombu's Redis transport, beside the visibility timeout.
        with_results: Whether results are kept and can be waited for, in the same Redis.
    """
    app = Celery("gearworkers", set_as_current=False, include=["gearworkers.workers.tasks"], amqp=RedisBroker)
    app.conf.update(
        broker_url=settings.effective_broker_url,
        result_backend=settings.effective_broker_url if with_results else None,
        broker_transport_options={"visibility_timeout": VISIBILITY_TIMEOUT_S, **(transport_options or {})},
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,  # a Redis that is away for long is still waited for
        worker_cancel_long_running_tasks_on_connection_loss=False,  # an import under way needs no Redis
        worker_prefetch_multiplier=1,
        worker_send_task_events=False,
        task_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_track_started=False,
        enable_utc=True,
    )
    app.steps["consumer"].add(_MendPool)
    return app


@cache
def _worker_app() -> Celery:
    settings = Settings.from_environ()
    app = make_app(settings, with_results=True)
    app.set_current()
    signals.setup_logging.connect(lambda **_: configure_logging(settings.log), weak=False)
    signals.worker_process_init.connect(lambda **_: end_with_parent(os.getppid()), weak=False)
    return app


def __getattr__(name: str) -> Celery:
    """``app``, for ``celery -A gearworkers.workers.celery_app``: made when asked for, not at import."""
    if name == "app":
        return _worker_app()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
