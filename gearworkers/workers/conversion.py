"""Conversions by Celery: one task a layer on the queue `convert`, one for config and manifest when all are done.

Any node with a worker of that queue takes part; it needs the same remote and credentials for the registries::

    celery -A gearworkers.workers.celery_app worker -n convert@$GEAR_NODE -Q convert --concurrency $(nproc)

These are the only tasks with results, which Redis keeps for a day. A task whose worker was killed as a whole would come
again when VISIBILITY_TIMEOUT_S is over; it expires before, since by then the tag may stand for something newer. Whoever
waits notices that nobody has it any more and sends what is left anew.
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
from gearworkers.remote.factory import remote_name
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
_WORKER_ANSWER_S = 1.0
_LOOK_FOR_LOST_S = 5.0
_TURNS = 3
_WORKER_BUSY_S = 5.0
"""A worker is nice: on a busy machine it may answer late."""
_WORKER_RESTART_S = 30.0

Noted = Callable[[str], None]
"""Called with a line for the user when something goes on, but not as it should."""


@dataclass
class _Sent:
    """The tasks of one turn."""

    layers: dict[str, AsyncResult]
    """By the layer's digest."""
    whole: AsyncResult
    done: set[str] = field(default_factory=set)
    seemed_lost: bool = False

    def unfinished(self) -> set[str]:
        """The ids of the tasks that are not known to be done."""
        return {result.id for digest, result in self.layers.items() if digest not in self.done} | {self.whole.id}


class _Lost(Exception):
    """Nobody has the tasks any more."""


def convert_on_workers(settings: Settings, plan: ConversionPlan, told: LayerProgress, noted: Noted) -> ConversionReport:
    """Do all of *plan* on workers and wait for it; what they have begun goes on if this process ends.

    Args:
        settings: Their broker, and the remote, which must be the workers' own.
        plan: What to do.
        told: Called with how far each layer is; of one that is tried again it begins anew.
        noted: Called when a task is tried again.

    Raises:
        FailedPrecondition: No worker takes from the queue.
        Unavailable: Redis does not answer, or workers keep being killed.
        GearError: What a layer or the image met.
    """
    app = make_app(settings, with_results=True)
    try:
        with app.connection_for_write() as connection:
            connection.ensure_connection(max_retries=1)
        return _Conversion(app, settings, plan, told, noted).run()
    except (OperationalError, RedisError) as exc:
        where = maybe_sanitize_url(settings.effective_broker_url)  # its password is not told
        raise Unavailable(f"Redis at {where}: {exc}; `--local` needs none") from exc
    finally:
        app.close()


class _Conversion:
    def __init__(
        self, app: Celery, settings: Settings, plan: ConversionPlan, told: LayerProgress, noted: Noted
    ) -> None:
        self._app = app
        self._remote = remote_name(settings.remote.url)
        self._plan = plan
        self._sizes = {job.digest: job.size_bytes for job in plan.jobs()}
        self._told = told
        self._noted = noted
        self._told_errors: set[str] = set()

    def run(self) -> ConversionReport:
        """Send the tasks and wait; again if workers and tasks were lost."""
        for turn in range(_TURNS):
            self._require_worker(_WORKER_RESTART_S if turn else _WORKER_BUSY_S)
            sent = self._send()
            try:
                return self._wait(sent)
            except _Lost:
                self._noted("a worker was lost with what it had begun; that is sent anew")
            except BaseException:
                self._app.control.revoke(list(sent.unfinished()))  # what has begun is finished
                raise
        raise Unavailable("workers were lost again and again; their log may say why, the system's that memory ran out")

    def _require_worker(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        while not self._has_worker():
            if time.monotonic() >= deadline:
                raise FailedPrecondition(
                    f"no worker takes from the queue {CONVERT_QUEUE}; start one "
                    f"(celery -A gearworkers.workers.celery_app worker -Q {CONVERT_QUEUE}), or convert here: --local"
                )

    def _has_worker(self) -> bool:
        answers = self._app.control.inspect(timeout=_WORKER_ANSWER_S).active_queues() or {}
        return any(queue["name"] == CONVERT_QUEUE for queues in answers.values() for queue in queues)

    def _send(self) -> _Sent:
        jobs = self._plan.jobs()
        options = {"queue": CONVERT_QUEUE, "expires": VISIBILITY_TIMEOUT_S}
        layers = [
            self._app.signature(LAYER_TASK, (msgspec.to_builtins(job), self._remote), options=options) for job in jobs
        ]
        image = self._app.signature(IMAGE_TASK, (msgspec.to_builtins(self._plan),), options=options)
        if not layers:
            return _Sent({}, image.apply_async(([],)))
        whole = chord(layers, image, app=self._app).apply_async()
        return _Sent({job.digest: result for job, result in zip(jobs, whole.parent.results, strict=True)}, whole)

    def _wait(self, sent: _Sent) -> ConversionReport:
        look_at = time.monotonic() + _LOOK_FOR_LOST_S
        while not sent.whole.ready():
            self._follow_all(sent)
            if time.monotonic() > look_at:
                self._look_for_lost(sent)
                look_at = time.monotonic() + _LOOK_FOR_LOST_S
            time.sleep(_POLL_S)
        if sent.whole.failed():
            raise _error(next((result for result in sent.layers.values() if result.failed()), sent.whole))
        self._follow_all(sent)
        return msgspec.convert(sent.whole.result, ConversionReport)

    def _follow_all(self, sent: _Sent) -> None:
        for digest, result in sent.layers.items():
            if digest not in sent.done and self._follow(digest, result):
                sent.done.add(digest)

    def _follow(self, digest: str, result: AsyncResult) -> bool:
        """Tell what is new of a layer; whether it is done. A failed one ends the waiting."""
        meta = result.backend.get_task_meta(result.id)
        if meta["status"] in ("FAILURE", "REVOKED"):
            raise _error(result)
        if meta["status"] == "RETRY" and str(meta["result"]) not in self._told_errors:
            self._told_errors.add(str(meta["result"]))
            self._noted(f"will be tried again: {meta['result']}")
        if meta["status"] == PROGRESS:
            self._told(digest, meta["result"]["read_bytes"])
        if meta["status"] == "SUCCESS":
            self._told(digest, self._sizes[digest])
        return bool(meta["status"] == "SUCCESS")

    def _look_for_lost(self, sent: _Sent) -> None:
        """
        Raises:
            _Lost: Twice in a row no task waited and no worker had one of ours; once may be the moment in between.
        """
        seemed_lost, sent.seemed_lost = sent.seemed_lost, not self._is_held(sent.unfinished())
        if seemed_lost and sent.seemed_lost and not sent.whole.ready():
            raise _Lost

    def _is_held(self, ids: set[str]) -> bool:
        """Whether a worker has one of these tasks, or some wait for one."""
        with self._app.connection_for_read() as connection:
            if connection.default_channel.client.llen(CONVERT_QUEUE):
                return True
        inspect = self._app.control.inspect(timeout=_WORKER_ANSWER_S)
        held = (
            (task.get("request") or task)["id"]
            for asked in (inspect.active, inspect.reserved, inspect.scheduled)
            for tasks in (asked() or {}).values()
            for task in tasks
        )
        return any(id in ids for id in held)


def _error(result: AsyncResult) -> GearError:
    cause = result.result
    if isinstance(cause, GearError):
        return cause
    if result.state == "REVOKED":
        return Unavailable("a layer waited for hours and no worker took it")
    return GearError(f"a conversion's task failed: {type(cause).__name__}: {cause}; the worker's log has more")
