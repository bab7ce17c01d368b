"""Conversions on Celery workers: one task per layer in the queue `convert`, then one for config and manifest.

Any node with a worker of that queue takes part. It needs the same remote, and credentials for the registries::

    python -m gearworkers.workers convert

Only these tasks have results, which Redis keeps for a day. Redis would redeliver the task of a killed worker after
VISIBILITY_TIMEOUT_S. But tasks expire by then, since the tag may name a newer image. Instead, the waiting process
notices that no worker has the unfinished tasks any more, and sends them again.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
from celery import Celery, chord
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from kombu.utils.url import maybe_sanitize_url
from redis.exceptions import RedisError

from gearworkers.errors import FailedPrecondition, GearError, Unavailable
from gearworkers.images.convert import LayerProgress
from gearworkers.images.gear_manifest import ConversionReport
from gearworkers.images.plan import ConversionPlan
from gearworkers.remote.name import remote_name
from gearworkers.settings import Settings
from gearworkers.workers.celery_app import (
    CONVERT_QUEUE,
    IMAGE_TASK,
    LAYER_TASK,
    PROGRESS,
    VISIBILITY_TIMEOUT_S,
    make_app,
)

_POLL_S = 0.2
_PING_TIMEOUT_S = 1.0
_LOST_CHECK_S = 5.0
_ATTEMPTS = 3
_FIRST_WORKER_TIMEOUT_S = 5.0
"""A worker runs niced, so on a busy machine it may answer late."""
_RESTARTED_WORKER_TIMEOUT_S = 30.0

Warn = Callable[[str], None]
"""Called with a line for the user when the conversion continues after a failure."""


@dataclass
class _Attempt:
    """The tasks of one attempt to convert the image."""

    layers: dict[str, AsyncResult]
    """By the layer's digest."""
    image: AsyncResult
    done: set[str] = field(default_factory=set)
    seemed_lost: bool = False

    def unfinished(self) -> set[str]:
        """Return the ids of the tasks that are not known to be done."""
        return {result.id for digest, result in self.layers.items() if digest not in self.done} | {self.image.id}


class _TasksLost(Exception):
    """No worker has the tasks any more."""


def convert_on_workers(
    settings: Settings, plan: ConversionPlan, progress: LayerProgress, warn: Warn
) -> ConversionReport:
    """Convert all of *plan* on workers and wait for the result. Workers finish begun tasks even if this process ends.

    Args:
        settings: With the broker, and the remote, which must be that of the workers.
        plan: The images and layers.
        progress: Called with each layer's progress, which restarts if the layer is retried.
        warn: Called when a task is retried.

    Raises:
        FailedPrecondition: No worker takes tasks from the queue.
        Unavailable: Redis does not answer, or workers were lost repeatedly.
        GearError: The conversion of a layer or of the image failed.
    """
    app = make_app(settings, with_results=True)
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1)
        return _Conversion(app, settings, plan, progress, warn).run()
    except (OperationalError, RedisError) as exc:
        where = maybe_sanitize_url(settings.effective_broker_url)  # without its password
        raise Unavailable(f"Redis at {where}: {exc}; `--local` needs no Redis") from exc
    finally:
        app.close()


class _Conversion:
    def __init__(
        self, app: Celery, settings: Settings, plan: ConversionPlan, progress: LayerProgress, warn: Warn
    ) -> None:
        self._app = app
        self._remote = remote_name(settings.remote.url)
        self._plan = plan
        self._sizes = {job.digest: job.size_bytes for job in plan.jobs()}
        self._progress = progress
        self._warn = warn
        self._reported_errors: set[str] = set()

    def run(self) -> ConversionReport:
        """Send the tasks and wait; repeat that if workers and tasks are lost."""
        for number in range(_ATTEMPTS):
            self._require_worker(_RESTARTED_WORKER_TIMEOUT_S if number else _FIRST_WORKER_TIMEOUT_S)
            attempt = self._send()
            try:
                return self._wait(attempt)
            except _TasksLost:
                self._warn("a worker was lost; its unfinished tasks are sent again")
            except BaseException:
                self._app.control.revoke(list(attempt.unfinished()))  # workers finish begun tasks
                raise
        raise Unavailable("workers were lost repeatedly; check their logs, and the system log for a lack of memory")

    def _require_worker(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._has_worker():
            if time.monotonic() >= deadline:
                raise FailedPrecondition(
                    f"no worker takes tasks from the queue {CONVERT_QUEUE}; start one "
                    "(python -m gearworkers.workers convert), or convert here with --local"
                )

    def _has_worker(self) -> bool:
        answers = self._app.control.inspect(timeout=_PING_TIMEOUT_S).active_queues() or {}
        return any(queue["name"] == CONVERT_QUEUE for queues in answers.values() for queue in queues)

    def _send(self) -> _Attempt:
        jobs = self._plan.jobs()
        options = {"queue": CONVERT_QUEUE, "expires": VISIBILITY_TIMEOUT_S}
        layers = [
            self._app.signature(LAYER_TASK, (msgspec.to_builtins(job), self._remote), options=options) for job in jobs
        ]
        image = self._app.signature(IMAGE_TASK, (msgspec.to_builtins(self._plan),), options=options)
        if not layers:
            return _Attempt({}, image.apply_async(([],)))
        whole = chord(layers, image, app=self._app).apply_async()
        return _Attempt({job.digest: result for job, result in zip(jobs, whole.parent.results, strict=True)}, whole)

    def _wait(self, attempt: _Attempt) -> ConversionReport:
        next_check_s = time.monotonic() + _LOST_CHECK_S
        while not attempt.image.ready():
            self._follow_all(attempt)
            if time.monotonic() > next_check_s:
                self._check_lost(attempt)
                next_check_s = time.monotonic() + _LOST_CHECK_S
            time.sleep(_POLL_S)
        if attempt.image.failed():
            raise _error(next((result for result in attempt.layers.values() if result.failed()), attempt.image))
        self._follow_all(attempt)
        return msgspec.convert(attempt.image.result, ConversionReport)

    def _follow_all(self, attempt: _Attempt) -> None:
        for digest, result in attempt.layers.items():
            if digest not in attempt.done and self._follow(digest, result):
                attempt.done.add(digest)

    def _follow(self, digest: str, result: AsyncResult) -> bool:
        """Report a layer's progress and return whether it is done; raise the error of a failed layer."""
        meta = result.backend.get_task_meta(result.id)
        if meta["status"] in ("FAILURE", "REVOKED"):
            raise _error(result)
        if meta["status"] == "RETRY" and str(meta["result"]) not in self._reported_errors:
            self._reported_errors.add(str(meta["result"]))
            self._warn(f"will be retried: {meta['result']}")
        if meta["status"] == PROGRESS:
            self._progress(digest, meta["result"]["read_bytes"])
        if meta["status"] == "SUCCESS":
            self._progress(digest, self._sizes[digest])
        return bool(meta["status"] == "SUCCESS")

    def _check_lost(self, attempt: _Attempt) -> None:
        """Check that the tasks still exist.

        Raises:
            _TasksLost: In two consecutive checks, no task waited and no worker had one of these tasks. A single check
                may happen after a task has left the queue and before it starts.
        """
        seemed_lost, attempt.seemed_lost = attempt.seemed_lost, not self._is_held(attempt.unfinished())
        if seemed_lost and attempt.seemed_lost and not attempt.image.ready():
            raise _TasksLost

    def _is_held(self, ids: set[str]) -> bool:
        """Return whether a worker has one of these tasks, or any task waits in the queue."""
        with self._app.connection_for_read() as connection:
            if connection.default_channel.client.llen(CONVERT_QUEUE):
                return True
        inspect = self._app.control.inspect(timeout=_PING_TIMEOUT_S)
        held_ids = (
            (task.get("request") or task)["id"]
            for list_tasks in (inspect.active, inspect.reserved, inspect.scheduled)
            for tasks in (list_tasks() or {}).values()
            for task in tasks
        )
        return any(id in ids for id in held_ids)


def _error(result: AsyncResult) -> GearError:
    cause = result.result
    if isinstance(cause, GearError):
        return cause
    if result.state == "REVOKED":
        return Unavailable("a layer waited for hours, and no worker took it")
    return GearError(f"a conversion task failed: {type(cause).__name__}: {cause}; the worker's log has more")
