"""Maintenance that no caller waits for: garbage collection after removals, push and deduplication after imports."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import structlog

from gearworkers.settings import Settings
from gearworkers.workers.messages import CollectGarbage, Dedupe, MaintenanceJob, Push
from plugin_gateway.dispatch.dispatcher import Dispatcher
from plugin_gateway.metrics import GatewayMetrics

_log = structlog.stdlib.get_logger(__name__)

_RETRY_S = 60.0


class Debounce:
    """Calls *action* once for many requests.

    Args:
        quiet_s: Seconds without a request after which the action is called.
        max_wait_s: Maximum seconds from the first request to the call.
        action: The function to call.
    """

    def __init__(self, quiet_s: float, max_wait_s: float, action: Callable[[], None]) -> None:
        self._quiet_s = quiet_s
        self._max_wait_s = max_wait_s
        self._action = action
        self._timer: asyncio.TimerHandle | None = None
        self._latest_s = 0.0

    def request(self) -> None:
        """Request one call of the action."""
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        if self._timer is None:
            self._latest_s = now_s + self._max_wait_s
        else:
            self._timer.cancel()
        self._timer = loop.call_at(min(now_s + self._quiet_s, self._latest_s), self._fire)

    def cancel(self) -> None:
        """Forget the requests."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self._action()


class Maintenance:
    """Runs maintenance jobs when the calls of a front door have made them due.

    Args:
        dispatcher: Runs the jobs.
        settings: Returns the current settings, which an Init may change.
        metrics: Counts the results.
        gc_quiet_s: Seconds without a removal after which garbage is collected.
        gc_max_wait_s: Maximum seconds from the first removal to the collection.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        settings: Callable[[], Settings],
        metrics: GatewayMetrics,
        *,
        gc_quiet_s: float = 5.0,
        gc_max_wait_s: float = 20.0,
    ) -> None:
        self._dispatcher = dispatcher
        self._settings = settings
        self._metrics = metrics
        self._collect = Debounce(gc_quiet_s, gc_max_wait_s, partial(self._start, CollectGarbage))
        self._push = Debounce(1.0, 5.0, partial(self._start, Push))
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """Collect garbage and push objects that an earlier gateway left; called at the gateway's start."""
        self._start(CollectGarbage)
        self.layer_stored()

    def layer_removed(self) -> None:
        """Collect garbage soon: a layer was removed, and its objects may be unreferenced."""
        self._collect.request()

    def layer_stored(self) -> None:
        """Push soon, if there is a remote: a layer was stored, and its new objects are pending."""
        if self._settings().remote.url:
            self._push.request()

    def dedupe(self, id: str) -> None:
        """Deduplicate the finished read-write layer *id*, whose contents are not in the object store yet."""
        self._start(Dedupe, id)

    async def close(self) -> None:
        """Stop; workers finish the jobs that they have begun."""
        self._collect.cancel()
        self._push.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, kind: type[MaintenanceJob], id: str = "") -> None:
        task = asyncio.get_running_loop().create_task(self._run(kind, id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, kind: type[MaintenanceJob], id: str) -> None:
        job = kind(gear_root=str(self._settings().gear_root), id=id)
        done = await self._dispatcher.run(job)
        result = done.result
        if not result.error:
            _log.info("maintenance done", call=job.call, id=id, by=done.by, **result.figures)
            self._after(job, result.figures)
            return
        _log.warning("maintenance failed", call=job.call, id=id, by=done.by, error=result.error)
        if result.retryable and done.by != "worker":  # Celery retries a worker's job
            await asyncio.sleep(_RETRY_S)
            self._start(kind, id)

    def _after(self, job: MaintenanceJob, figures: dict[str, int]) -> None:
        if isinstance(job, Dedupe):
            self.layer_stored()
        if isinstance(job, Push):
            self._metrics.pushed.inc(figures.get("pushed_objects", 0))
            self._metrics.refused.set(figures.get("refused_objects", 0))
