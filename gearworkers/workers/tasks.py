"""Celery tasks: thin wrappers around `execute` and the conversion's functions.

Anyone who can write to Redis can create tasks. So a task cannot choose where a worker reads or writes, except for
references to registries. GEAR_ROOT, remote and credentials are the worker's own; the task's values are only compared
with them.

apply_diff and diff are acknowledged when they begin and are never redelivered, since their stream is lost. push,
collect_garbage, dedupe and the conversions are idempotent, acknowledged when done, and redelivered after a crash. Only
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
from gearworkers.images.gear_manifest import finish_conversion
from gearworkers.images.layer_records import ConvertedLayer
from gearworkers.images.plan import ConversionPlan, LayerJob
from gearworkers.images.source import reject_path
from gearworkers.remote.factory import open_remote
from gearworkers.remote.name import remote_name
from gearworkers.settings import Settings
from gearworkers.workers.celery_app import IMAGE_TASK, LAYER_TASK, PROGRESS, RETRIES, TIME_LIMIT_S, retry_delay_s
from gearworkers.workers.execute import execute, execute_alone
from gearworkers.workers.messages import ApplyDiff, CollectGarbage, Dedupe, Diff, HeavyJob, MaintenanceJob, Push

_PROGRESS_INTERVAL_S = 0.2
_HEAVY = {"ignore_result": True, "acks_late": False}
_MAINTENANCE = {
    "bind": True,
    "ignore_result": True,
    "acks_late": True,
    "reject_on_worker_lost": True,
    "max_retries": RETRIES,
    "time_limit": TIME_LIMIT_S,
}


@shared_task(name="gearworkers.apply_diff", **_HEAVY)
def apply_diff(job: dict[str, Any]) -> None:
    """Fill a layer from the stream of the waiting caller."""
    _execute_once(msgspec.convert(job, ApplyDiff))


@shared_task(name="gearworkers.diff", **_HEAVY)
def diff(job: dict[str, Any]) -> None:
    """Write a layer's tar to the stream of the waiting caller."""
    _execute_once(msgspec.convert(job, Diff))


@shared_task(name="gearworkers.push", **_MAINTENANCE)
def push(self: Task, job: dict[str, Any]) -> None:
    """Push the pending objects to the remote."""
    _maintain(self, msgspec.convert(job, Push))


@shared_task(name="gearworkers.collect_garbage", **_MAINTENANCE)
def collect_garbage(self: Task, job: dict[str, Any]) -> None:
    """Remove unreferenced objects."""
    _maintain(self, msgspec.convert(job, CollectGarbage))


@shared_task(name="gearworkers.dedupe", **_MAINTENANCE)
def dedupe(self: Task, job: dict[str, Any]) -> None:
    """Move the contents of a finished read-write layer to the object store."""
    _maintain(self, msgspec.convert(job, Dedupe))


@shared_task(name=LAYER_TASK, **{**_MAINTENANCE, "ignore_result": False})
def convert_layer(self: Task, job: dict[str, Any], remote: str) -> dict[str, Any]:
    """Convert one layer of an image and return the converted layer.

    Its contents go to the worker's remote, which must be *remote*.
    """
    settings = Settings.from_environ()
    with _retried(self):
        layer = msgspec.convert(job, LayerJob)
        reject_path(layer.source)
        _check_remote(settings, remote)
        with closing(open_remote(settings)) as opened:
            return _plain(convert.convert_layer(settings, opened, layer, _ProgressReporter(self)))


@shared_task(name=IMAGE_TASK, **{**_MAINTENANCE, "ignore_result": False})
def convert_image(self: Task, layers: list[dict[str, Any]], plan: dict[str, Any]) -> dict[str, Any]:
    """Push config and manifest of an image whose layers are converted; return the report."""
    with _retried(self):
        done = msgspec.convert(layers, list[ConvertedLayer])
        planned = msgspec.convert(plan, ConversionPlan)
        reject_path(planned.source)
        return _plain(finish_conversion(Settings.from_environ().registry, planned, done))


def _check_remote(settings: Settings, remote: str) -> None:
    """Check that the worker uses the caller's remote.

    Raises:
        FailedPrecondition: The remotes differ, so the caller would not find the contents.
    """
    requested, own = remote_name(remote), remote_name(settings.remote.url)
    if requested != own:
        raise FailedPrecondition(
            f"this conversion is for GEAR_REMOTE={requested}, and the worker on {settings.node} has "
            f"GEAR_REMOTE={own}; set the same remote for both, or convert here with --local"
        )


@contextmanager
def _retried(task: Task) -> Iterator[None]:
    try:
        yield
    except GearError as exc:
        if exc.retryable:
            raise task.retry(exc=exc, countdown=retry_delay_s(task.request.retries, exc.retry_after_s)) from exc
        raise


def _plain(made: msgspec.Struct) -> dict[str, Any]:
    built: dict[str, Any] = msgspec.to_builtins(made)
    return built


class _ProgressReporter:
    """Publishes the progress of a layer's task, a few times a second at most."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._id = task.request.id  # only the task's own thread has the request; other threads call this
        self._last_s = 0.0

    def __call__(self, read_bytes: int) -> None:
        if time.monotonic() - self._last_s > _PROGRESS_INTERVAL_S:
            self._last_s = time.monotonic()
            with suppress(RedisError):  # progress is lost, and the work goes on
                self._task.update_state(self._id, PROGRESS, meta={"read_bytes": read_bytes})


def _execute_once(job: HeavyJob) -> None:
    execute(Settings.from_environ(), job, "worker")


def _maintain(task: Task, job: MaintenanceJob) -> None:
    """Execute *job* for the gateway. After a crash or a retry no gateway offers it: execute it without one."""
    again = task.request.retries or (task.request.delivery_info or {}).get("redelivered")
    settings = Settings.from_environ()
    result = execute_alone(settings, job) if again else execute(settings, job, "worker")
    if result is not None and result.retryable:
        raise task.retry(exc=Unavailable(result.error), countdown=retry_delay_s(task.request.retries))
