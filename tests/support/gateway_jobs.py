"""Jobs without layers, for tests of the gateway: the workers count and write bytes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from gearworkers.errors import GearError, IntegrityError
from gearworkers.workers.claim import ClaimedJob
from gearworkers.workers.messages import ApplyDiff, Diff, JobResult
from plugin_gateway.dispatch.dispatcher import PickupTimeouts
from tests.support.gateways import Running
from tests.support.plugin import Plugin

Start = Callable[..., tuple[Running, Plugin]]
"""Starts a gateway with the arguments of `run_gateway`; returns it and its client."""
LONG = PickupTimeouts(idle_s=60.0, degraded_s=60.0, busy_s=60.0, maintenance_s=60.0)
"""For workers that take every job, perhaps late on a busy machine."""
SHORT = PickupTimeouts(idle_s=0.3, degraded_s=0.05, busy_s=0.5, maintenance_s=0.3)
"""For tests without a free worker."""
BEGUN = bytes(64 << 10)
"""More bytes of a body than the gateway waits for before it publishes the job."""

Kind = TypeVar("Kind")


def work(claimed: ClaimedJob) -> None:
    """Do a job without layers: ApplyDiff counts bytes, Diff writes as many bytes as the id says."""
    try:
        claimed.finish(result_of(claimed))
    except GearError as exc:
        claimed.finish(JobResult(error=str(exc), retryable=exc.retryable))


def result_of(claimed: ClaimedJob) -> JobResult:
    job = claimed.job
    if isinstance(job, ApplyDiff):
        buffer, size_bytes = memoryview(bytearray(1 << 16)), 0
        body = claimed.request_body()
        while count := body.readinto(buffer):
            size_bytes += count
        return JobResult(size_bytes=size_bytes)
    if isinstance(job, Diff):
        response = claimed.response_body()
        response.write(bytes(int(job.id)))
        if job.parent == "damaged":
            raise IntegrityError("an object is damaged")
        response.finish()
    return JobResult()


def published(running: Running, kind: type[Kind]) -> list[Kind]:
    """Return the published jobs of one kind."""
    return [job for job in running.queue.jobs if isinstance(job, kind)]
