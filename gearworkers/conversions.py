"""Conversions by Celery: one task a layer on the queue `convert`, one for config and manifest when all are done.

Any node with a worker of that queue takes part; it needs the same GEAR_REMOTE and credentials for the registries::

    celery -A gearworkers.app worker -n convert@%h -Q convert --concurrency $(nproc)

These are the only tasks with results, which Redis keeps for a day.
"""

from __future__ import annotations

import time

import msgspec
from celery import Celery, chord
from celery.result import AsyncResult
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

from gearworkers.app import CONVERT_QUEUE, IMAGE_TASK, LAYER_TASK, PROGRESS, make_app
from gearworkers.errors import FailedPrecondition, GearError, Unavailable
from gearworkers.images.convert import Plan, Report
from gearworkers.images.local import Told
from gearworkers.settings import Settings

_POLL_S = 0.2
_WORKER_ANSWER_S = 1.5


def convert_on_workers(settings: Settings, plan: Plan, told: Told) -> Report:
    """Do all of *plan* on workers and wait for it; they go on if this process ends.

    Raises:
        FailedPrecondition: No worker takes from the queue.
        Unavailable: Redis does not answer.
        GearError: What a layer or the image met.
    """
    app = make_app(settings, with_results=True)
    try:
        _require_worker(app)
        return _wait(*_send(app, plan), told)
    except (OperationalError, RedisError) as exc:
        raise Unavailable(f"Redis at {settings.effective_broker_url}: {exc}; `--local` needs none") from exc
    finally:
        app.close()


def _require_worker(app: Celery) -> None:
    answers = app.control.inspect(timeout=_WORKER_ANSWER_S).active_queues() or {}
    if not any(queue["name"] == CONVERT_QUEUE for queues in answers.values() for queue in queues):
        raise FailedPrecondition(
            f"no worker takes from the queue {CONVERT_QUEUE}; start one "
            f"(celery -A gearworkers.app worker -Q {CONVERT_QUEUE}), or convert here: --local"
        )


def _send(app: Celery, plan: Plan) -> tuple[dict[str, AsyncResult], AsyncResult]:
    """Send the tasks; results of the layers by digest, and of the whole."""
    jobs = plan.jobs()
    layers = [app.signature(LAYER_TASK, (msgspec.to_builtins(job),), queue=CONVERT_QUEUE) for job in jobs]
    image = app.signature(IMAGE_TASK, (msgspec.to_builtins(plan),), queue=CONVERT_QUEUE)
    whole = chord(layers, image, app=app).apply_async()
    return {job.digest: result for job, result in zip(jobs, whole.parent.results, strict=True)}, whole


def _wait(layers: dict[str, AsyncResult], whole: AsyncResult, told: Told) -> Report:
    read = dict.fromkeys(layers, 0)
    while not whole.ready():
        for digest, result in layers.items():
            _follow(digest, result, read, told)
        time.sleep(_POLL_S)
    if whole.failed():
        raise _error(next((result for result in layers.values() if result.failed()), whole))
    return msgspec.convert(whole.result, Report)


def _follow(digest: str, result: AsyncResult, read: dict[str, int], told: Told) -> None:
    """Tell what is new of a layer; a failed one ends the waiting."""
    meta = result.backend.get_task_meta(result.id)
    if meta["status"] == "FAILURE":
        raise _error(result)
    if meta["status"] == PROGRESS:
        told(digest, meta["result"]["read_bytes"] - read[digest])
        read[digest] = meta["result"]["read_bytes"]


def _error(result: AsyncResult) -> GearError:
    cause = result.result
    if isinstance(cause, GearError):
        return cause
    return GearError(f"a conversion's task failed: {type(cause).__name__}: {cause}; the worker's log has more")
