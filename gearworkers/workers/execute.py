"""Execute a job, in a Celery worker or in the gateway's own pool: claim it, call the engine, report the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import structlog

from gearworkers.engine.engine import Engine
from gearworkers.engine.root import with_current_root
from gearworkers.errors import GearError, NotFound, Unavailable, from_os_error
from gearworkers.settings import Settings
from gearworkers.workers.claim import ClaimedJob, claim
from gearworkers.workers.content import new_blob, opened_blob
from gearworkers.workers.messages import (
    ApplyDiff,
    Claimant,
    CollectGarbage,
    Dedupe,
    Diff,
    JobResult,
    MaintenanceJob,
    NewBlob,
    Push,
    StoredBlob,
    WorkerJob,
)

_log = structlog.stdlib.get_logger(__name__)


def execute(settings: Settings, job: WorkerJob, by: Claimant) -> JobResult | None:
    """Claim *job* and do it. A MaintenanceJob is also done without a gateway.

    Args:
        settings: This process's.
        job: The job from Redis or the pool. A job for another GEAR_ROOT than that of this node's gateway is refused and
            not claimed.
        by: The kind of this process.

    Returns:
        The reported result, including errors; None if this process did not do the job.

    Crash: the gateway notices, and reports an error to its caller.
    """
    if not _is_for_this_root(settings, job):
        return None
    try:
        with claim(settings.streams_socket, job.token, by, idle_s=settings.stream_idle_s) as claimed:
            if claimed is None:
                _log.info("job already withdrawn or claimed", call=job.call, id=job.id)
                return None
            result = _attempt(settings, claimed.job, partial(_claimed_result, claimed))
            claimed.finish(result)
            return result
    except (NotFound, Unavailable) as exc:
        _log.warning("no gateway", call=job.call, id=job.id, error=str(exc))
        return execute_alone(settings, job) if isinstance(job, MaintenanceJob) else None


def execute_alone(settings: Settings, job: MaintenanceJob) -> JobResult | None:
    """Do *job* without a gateway; return None if it is refused, as in `execute`."""
    if not _is_for_this_root(settings, job):
        return None
    return _attempt(settings, job, partial(_maintenance_result, job))


def _is_for_this_root(settings: Settings, job: WorkerJob) -> bool:
    """Return whether the job names the GEAR_ROOT of this node's gateway: a writer to Redis may name any path."""
    try:
        root = with_current_root(settings).gear_root
    except GearError as exc:
        _log.error("job refused", call=job.call, id=job.id, error=str(exc))
        return False
    if Path(job.gear_root) in (root, settings.gear_root):
        return True
    _log.error(
        "job refused: it is for another GEAR_ROOT; a worker needs its gateway's GEAR_ROOT and GEAR_RUN_DIR",
        call=job.call,
        id=job.id,
        requested=job.gear_root,
        own=str(root),
    )
    return False


def _attempt(settings: Settings, job: WorkerJob, run: Callable[[Engine], JobResult]) -> JobResult:
    """Run *job* on the engine; every error becomes a result."""
    try:
        return run(_engine(replace(settings, gear_root=Path(job.gear_root))))
    except GearError as exc:
        _log.warning("job failed", call=job.call, id=job.id, error=str(exc))
        return JobResult(error=str(exc), retryable=exc.retryable, error_kind=type(exc).__name__)
    except OSError as exc:
        _log.exception("job failed", call=job.call, id=job.id)
        known = from_os_error(exc, f"{job.call} {job.id}".rstrip())
        return JobResult(error=str(known), retryable=known.retryable, error_kind=type(known).__name__)
    except Exception as exc:
        _log.exception("job failed: a bug", call=job.call, id=job.id)
        return JobResult(error=f"internal error in {job.call}: {type(exc).__name__}: {exc}; the worker's log has more")


@cache
def _engine(settings: Settings) -> Engine:
    """Return the process's only engine for these settings."""
    return Engine.of(settings)


def _claimed_result(claimed: ClaimedJob, engine: Engine) -> JobResult:
    match claimed.job:
        case ApplyDiff() as job:
            if isinstance(claimed.stream, StoredBlob):
                return _apply_blob(claimed, claimed.stream, job, engine)
            return JobResult(size_bytes=engine.apply_diff(job.id, job.parent, claimed.request_body()))
        case Diff() as job:
            if isinstance(claimed.stream, NewBlob):
                return _diff_to_blob(claimed, claimed.stream, job, engine)
            response = claimed.response_body()
            engine.diff(job.id, job.parent, response)
            response.finish()
            return JobResult()
        case job:
            return _maintenance_result(job, engine)


def _apply_blob(claimed: ClaimedJob, stream: StoredBlob, job: ApplyDiff, engine: Engine) -> JobResult:
    with opened_blob(stream, claimed.check_not_withdrawn) as tar:
        size_bytes = engine.apply_diff(job.id, job.parent, tar, again=True, is_index=stream.is_index)
        return JobResult(size_bytes=size_bytes, digest=tar.digest, stream_bytes=tar.read_bytes)


def _diff_to_blob(claimed: ClaimedJob, stream: NewBlob, job: Diff, engine: Engine) -> JobResult:
    with new_blob(stream, claimed.check_not_withdrawn) as body:
        engine.diff(job.id, job.parent, body, max_mtime_ns=stream.max_mtime_ns)
        stored = body.finish()
    return JobResult(digest=stored.digest, stream_bytes=stored.size_bytes)


def _maintenance_result(job: MaintenanceJob, engine: Engine) -> JobResult:
    match job:
        case Push():
            push = engine.push_pending()
            return JobResult(figures={"pushed_objects": push.pushed_objects, "refused_objects": len(push.refused)})
        case CollectGarbage():
            garbage = engine.collect_garbage()
            return JobResult(
                figures={"removed_objects": garbage.removed_objects, "removed_bytes": garbage.removed_bytes}
            )
        case Dedupe():
            return JobResult(figures={"deduplicated_files": engine.dedupe(job.id)})
