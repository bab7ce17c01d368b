"""Celery tasks: thin, ids in, `work.perform` called.

apply_diff and diff are acknowledged when they begin and never come again: their stream is gone with them. push,
collect_garbage and absorb are idempotent, acknowledged when done, and come again after a crash; only errors marked
retryable are retried.
"""

from __future__ import annotations

from celery import Task, shared_task

from gearworkers.app import RETRIES, TIME_LIMIT_S, retry_delay_s
from gearworkers.errors import Unavailable
from gearworkers.settings import Settings
from gearworkers.streams import Order
from gearworkers.work import perform, perform_alone

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


@shared_task(name="gearworkers.absorb", **_UPKEEP)
def absorb(self: Task, gear_root: str, token: str, id: str, parent: str) -> None:
    """Move the contents of the finished read-write layer *id* to the object store."""
    _keep_up(self, Order("absorb", gear_root, token, id, parent))


def _keep_up(task: Task, order: Order) -> None:
    """Once with the gateway's consent; after a crash or a retry, when its offer is past, without."""
    again = task.request.retries or (task.request.delivery_info or {}).get("redelivered")
    settings = Settings.from_environ()
    answer = perform_alone(settings, order) if again else perform(settings, order, "worker")
    if answer is not None and answer.retryable:
        raise task.retry(exc=Unavailable(answer.error), countdown=retry_delay_s(task.request.retries))
