"""Celery tasks: thin, ids in, `work.perform` called.

Whoever writes to Redis makes tasks. So a task names no place to read from or write to but references to registries:
root, remote and credentials are the worker's own, and what a task says of them is only compared.

apply_diff and diff are acknowledged when they begin and never come again: their stream is gone with them. push,
collect_garbage, dedupe and the conversions are idempotent, acknowledged when done, and come again after a crash; only
errors marked retryable are retried.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import msgspec
from celery import Task, shared_task
from redis.exceptions import RedisError

from gearworkers.errors import FailedPrecondition, GearError, Unavailable
from gearworkers.images import convert
from gearworkers.images.source import refuse_path
from gearworkers.remote.factory import open_remote, remote_name
from gearworkers.settings import Settings
from gearworkers.workers.celery_app import IMAGE_TASK, LAYER_TASK, PROGRESS, RETRIES, TIME_LIMIT_S, retry_delay_s
from gearworkers.workers.execute import perform, perform_alone
from gearworkers.workers.messages import Order

_TELL_S = 0.2
_UPKEEP = {
    "bind": True,
    "ignore_result": True,
    "acks_late": True,
    "reject_on_worker_lost": True,
    "max_retries": RETRIES,
    "time_limit": TIME_LIMIT_S,
}


@shared_task(name="gearworkers.apply_diff", ignore_result=True, acks_late=False)
def apply_diff(gear_root: str, token: str, id: str, parent: str) -> None:
    """Fill layer *id* from the body of the caller that waits with *token*."""
    perform(Settings.from_environ(), Order("apply_diff", gear_root, token, id, parent), "worker")


@shared_task(name="gearworkers.diff", ignore_result=True, acks_late=False)
def diff(gear_root: str, token: str, id: str, parent: str) -> None:
    """Write layer *id*'s tar to the caller that waits with *token*."""
    perform(Settings.from_environ(), Order("diff", gear_root, token, id, parent), "worker")


@shared_task(name="gearworkers.push", **_UPKEEP)
def push(self: Task, gear_root: str, token: str, id: str, parent: str) -> None:
    """Push what waits in the spool to the remote."""
    _keep_up(self, Order("push", gear_root, token, id, parent))


@shared_task(name="gearworkers.collect_garbage", **_UPKEEP)
def collect_garbage(self: Task, gear_root: str, token: str, id: str, parent: str) -> None:
    """Remove the objects that no layer refers to."""
    _keep_up(self, Order("collect_garbage", gear_root, token, id, parent))


@shared_task(name="gearworkers.dedupe", **_UPKEEP)
def dedupe(self: Task, gear_root: str, token: str, id: str, parent: str) -> None:
    """Move the contents of the finished read-write layer *id* to the object store."""
    _keep_up(self, Order("dedupe", gear_root, token, id, parent))


@shared_task(name=LAYER_TASK, **{**_UPKEEP, "ignore_result": False})
def convert_layer(self: Task, job: dict[str, Any], remote: str) -> dict[str, Any]:
    """Convert one layer of an image; what it became. Its contents go to the worker's remote, which must be *remote*."""
    settings = Settings.from_environ()
    with _retried(self):
        layer = msgspec.convert(job, convert.LayerJob)
        refuse_path(layer.source)
        _refuse_other_remote(settings, remote)
        with closing(open_remote(settings)) as opened:
            return _plain(convert.convert_layer(settings, opened, layer, _Teller(self)))


@shared_task(name=IMAGE_TASK, **{**_UPKEEP, "ignore_result": False})
def convert_image(self: Task, layers: list[dict[str, Any]], plan: dict[str, Any]) -> dict[str, Any]:
    """Push config and manifest of an image whose layers are done; what it came to."""
    with _retried(self):
        done = msgspec.convert(layers, list[convert.LayerDone])
        planned = msgspec.convert(plan, convert.Plan)
        refuse_path(planned.source)
        return _plain(convert.finish_conversion(Settings.from_environ().registry, planned, done))


def _refuse_other_remote(settings: Settings, asked: str) -> None:
    """
    Raises:
        FailedPrecondition: The caller has another remote: it would look for the contents where they are not.
    """
    theirs, ours = remote_name(asked), remote_name(settings.remote.url)
    if theirs != ours:
        raise FailedPrecondition(
            f"this conversion is for GEAR_REMOTE={theirs}, and the worker on {settings.node} has "
            f"GEAR_REMOTE={ours}; give both the same, or convert here: --local"
        )


@contextmanager
def _retried(task: Task) -> Iterator[None]:
    try:
        yield
    except GearError as exc:
        if exc.retryable:
            raise task.retry(exc=exc, countdown=retry_delay_s(task.request.retries, exc.after_s)) from exc
        raise


def _plain(made: msgspec.Struct) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(made)
    return built


class _Teller:
    """Tells the progress of a layer's task, a few times a second at most."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._id = task.request.id  # only the task's own thread has the request, and others read
        self._last_s = 0.0

    def __call__(self, read_bytes: int) -> None:
        if time.monotonic() - self._last_s > _TELL_S:
            self._last_s = time.monotonic()
            with suppress(RedisError):  # nobody is told, and the work goes on
                self._task.update_state(self._id, PROGRESS, meta={"read_bytes": read_bytes})


def _keep_up(task: Task, order: Order) -> None:
    """Once with the gateway's consent; after a crash or a retry, when its offer is past, without."""
    again = task.request.retries or (task.request.delivery_info or {}).get("redelivered")
    settings = Settings.from_environ()
    answer = perform_alone(settings, order) if again else perform(settings, order, "worker")
    if answer is not None and answer.retryable:
        raise task.retry(exc=Unavailable(answer.error), countdown=retry_delay_s(task.request.retries))
