"""Work that nobody waits for: garbage collection after removals, push and absorption after imports and commits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial

import structlog

from gearworkers.settings import Settings
from plugin_gateway.dispatch.dispatcher import Dispatcher, make_order
from plugin_gateway.metrics import Metrics

_log = structlog.stdlib.get_logger(__name__)

_AGAIN_S = 60.0


class Debounce:
    """Calls *action* once *quiet_s* after the last of many requests, and *at_most_s* after the first at the latest."""

    def __init__(self, quiet_s: float, at_most_s: float, action: Callable[[], None]) -> None:
        self._quiet_s = quiet_s
        self._at_most_s = at_most_s
        self._action = action
        self._timer: asyncio.TimerHandle | None = None
        self._latest_s = 0.0

    def request(self) -> None:
        """Ask for one call of the action."""
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        if self._timer is None:
            self._latest_s = now_s + self._at_most_s
        else:
            self._timer.cancel()
        self._timer = loop.call_at(min(now_s + self._quiet_s, self._latest_s), self._fire)

    def cancel(self) -> None:
        """Forget what was requested."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self._action()


class Upkeep:
    """Orders upkeep when calls of Docker have made it due.

    Args:
        dispatcher: Gets orders done.
        settings: Gives the settings as they are after Init.
        metrics: Where it counts.
        gc_quiet_s: Seconds without a removal before garbage is collected.
        gc_at_most_s: Seconds after the first removal in which it is at the latest.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        settings: Callable[[], Settings],
        metrics: Metrics,
        *,
        gc_quiet_s: float = 5.0,
        gc_at_most_s: float = 20.0,
    ) -> None:
        self._dispatcher = dispatcher
        self._settings = settings
        self._metrics = metrics
        self._collect = Debounce(gc_quiet_s, gc_at_most_s, partial(self._start, "collect_garbage"))
        self._push = Debounce(1.0, 5.0, partial(self._start, "push"))
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self) -> None:
        """At the gateway's start: see to what a crash may have left."""
        self._start("collect_garbage")
        self.stored()

    def removed(self) -> None:
        """A layer is gone: its objects may be nobody's."""
        self._collect.request()

    def stored(self) -> None:
        """A layer is stored: its new objects await push, if there is a remote."""
        if self._settings().remote.url:
            self._push.request()

    def dedupe(self, id: str) -> None:
        """A finished read-write layer keeps contents to itself."""
        self._start("dedupe", id)

    async def close(self) -> None:
        """Stop; what workers are doing they finish."""
        self._collect.cancel()
        self._push.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, call: str, id: str = "") -> None:
        task = asyncio.get_running_loop().create_task(self._run(call, id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, call: str, id: str) -> None:
        outcome = await self._dispatcher.do(make_order(call, self._settings(), id), None)
        answer = outcome.answer
        if not answer.error:
            _log.info("upkeep done", call=call, id=id, by=outcome.by, **answer.figures)
            if call == "dedupe":
                self.stored()
            if call == "push":
                self._metrics.pushed.inc(answer.figures.get("pushed_objects", 0))
                self._metrics.refused.set(answer.figures.get("refused_objects", 0))
            return
        _log.warning("upkeep failed", call=call, id=id, by=outcome.by, error=answer.error)
        if answer.retryable and outcome.by != "worker":  # a worker's Celery tries again by itself
            await asyncio.sleep(_AGAIN_S)
            self._start(call, id)
