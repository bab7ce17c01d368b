"""An order becomes a task, a stream and an answer: by a worker, or, when none takes it, by the gateway's own pool."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import structlog

from gearworkers.errors import Unavailable
from gearworkers.settings import Settings
from gearworkers.workers.messages import Answer, Order
from plugin_gateway.dispatch.claims import Body, Desk, Offer
from plugin_gateway.dispatch.local_pool import OwnPool
from plugin_gateway.dispatch.task_queue import QueueState, TaskQueue
from plugin_gateway.metrics import Metrics

_log = structlog.stdlib.get_logger(__name__)

KINDS = ("import", "push")
"""Of work, by the worker that does it."""
NOT_TAKEN = "no worker takes tasks"
SILENT = "no worker answers"


@dataclass(frozen=True, slots=True)
class Patience:
    """How long the gateway waits for a worker before it does the work itself."""

    pickup_s: float = 2.0
    """For an idle worker to take a call that Docker waits for: it needs some 5 ms."""
    degraded_pickup_s: float = 0.2
    """The same when the last one was not taken, or a worker waits for its caller."""
    busy_s: float = 10.0
    """For a busy one to become free."""
    upkeep_pickup_s: float = 15.0
    expires_s: float = 60.0
    """Then a worker that comes too late does not even begin."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of an order."""

    answer: Answer
    started: bool
    """Diff: bytes may have been written, so an error can only be told by breaking off."""
    by: str
    """``worker``, ``gateway``, or empty if nobody claimed it."""


class Health:
    """Why the gateway works for the workers, if it does: by kind of work."""

    def __init__(self, metrics: Metrics) -> None:
        self._reasons: dict[str, str] = {}
        self._metrics = metrics

    def reason(self, kind: str) -> str:
        """Empty if all is well."""
        return self._reasons.get(kind, "")

    def summary(self) -> str:
        """For `docker info`."""
        if not self._reasons:
            return "no"
        return "yes: " + "; ".join(f"{kind}: {reason}" for kind, reason in sorted(self._reasons.items()))

    def forget(self) -> None:
        """What was known was about another broker's workers."""
        self._reasons.clear()
        self._metrics.degraded.set(False)

    def looked(self, reasons: Mapping[str, str]) -> None:
        """What Redis and the workers answer, by kind; a task that was not taken is disproved by one that is taken."""
        for kind, reason in reasons.items():
            if reason or self.reason(kind) != NOT_TAKEN:
                self.note(kind, reason)

    def note(self, kind: str, reason: str) -> None:
        """*reason* empty: all is well. Logged when it changes."""
        if reason == self.reason(kind) or (reason, self.reason(kind)) == (NOT_TAKEN, SILENT):
            return
        if reason:
            self._reasons[kind] = reason
            _log.warning("degraded: the gateway works for the workers", kind=kind, reason=reason)
        else:
            del self._reasons[kind]
            _log.info("no longer degraded", kind=kind)
        self._metrics.degraded.set(bool(self._reasons))


class Dispatcher:
    """Gets orders done.

    Args:
        settings: Of the node.
        metrics: Where it counts.
        patience: How long it waits for workers.
    """

    def __init__(self, settings: Settings, metrics: Metrics, patience: Patience = Patience()) -> None:
        self._settings = settings
        self._patience = patience
        self.desk = Desk(settings.streams_socket, metrics)
        self.queue = TaskQueue(settings)
        self.health = Health(metrics)
        self._pool = OwnPool(settings, self.desk.changes)
        self._looking: asyncio.Task[str] | None = None

    def open(self) -> None:
        """Listen on the streams socket; FailedPrecondition if another gateway does."""
        self.desk.open()

    def close(self) -> None:
        """Give up whatever is under way."""
        self.desk.close()
        self.queue.close()
        self._pool.close()

    def use_broker(self, settings: Settings) -> None:
        """Publish to the broker that *settings* name from now on."""
        if settings.effective_broker_url != self._settings.effective_broker_url:
            self._settings = settings
            self.queue.close()
            self.queue = TaskQueue(settings)
            self.health.forget()

    async def do(self, order: Order, body: Body | None) -> Outcome:
        """Get *order* done and return its answer; errors are answers. With a *body*, Docker waits for it."""
        with self.desk.offer(order, body) as offer:
            own = await self._assign(offer)
            try:
                answer = await self._answer(offer, own)
            finally:
                if own is not None and not own.done():
                    own.add_done_callback(_retrieved)
            by = offer.claimed.result().by if offer.claimed.done() else ""
            return Outcome(answer, offer.started, by)

    async def look(self) -> str:
        """Have `health` be what Redis and the workers answer now; returns how the queue is, for `docker info`."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.get_running_loop().create_task(self._look())
        return await asyncio.shield(self._looking)

    async def _look(self) -> str:
        queue = self.queue
        try:
            state = await queue.state()
        except Unavailable as exc:
            told, reasons = str(exc), dict.fromkeys(KINDS, str(exc))
        else:
            told = f"{state.waiting_imports} imports, {state.waiting_upkeep} upkeep waiting"
            reasons = {kind: self._silence(kind, state) for kind in KINDS}
        if queue is self.queue:  # else it tells of a broker that was replaced
            self.health.looked(reasons)
        return told

    def _silence(self, kind: str, state: QueueState) -> str:
        """Why *kind* is not done by workers, empty if one answers; one that is at work may be slow to."""
        is_at_work = self.desk.serving("worker", heavy=kind == "import") > 0
        return SILENT if kind in state.silent and not is_at_work else ""

    async def _assign(self, offer: Offer) -> asyncio.Task[None] | None:
        """See that somebody takes it; the task if it is the gateway's own pool."""
        kind = "import" if offer.heavy else "push"
        queue = self.queue
        try:
            await queue.publish(offer.order, heavy=offer.heavy, expires_s=self._patience.expires_s)
            reason = "" if await self._picked_up(offer, kind) or self._is_busy(offer) else NOT_TAKEN
        except Unavailable as exc:
            reason = str(exc)
        if not offer.claimed.done():
            _log.info("no worker is free", call=offer.order.call, id=offer.order.id, reason=reason or "all are busy")
        if offer.claimed.done():
            reason = ""
        if queue is self.queue and (reason or offer.claimed.done()):
            self.health.note(kind, reason)
        if offer.claimed.done():
            return None
        return asyncio.get_running_loop().create_task(self._pool.perform(offer))

    async def _picked_up(self, offer: Offer, kind: str) -> bool:
        """Wait for a claim as long as one may be hoped for."""
        begun_s = time.monotonic()
        while not offer.claimed.done():
            left_s = self._deadline_s(offer, kind, begun_s) - time.monotonic()
            if left_s <= 0:
                return False
            change = asyncio.ensure_future(self.desk.changes.next())
            waited_for: set[asyncio.Future[Any]] = {offer.claimed, change}
            try:
                await asyncio.wait(waited_for, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            finally:
                change.cancel()
        return True

    def _deadline_s(self, offer: Offer, kind: str, begun_s: float) -> float:
        patience = self._patience
        if not offer.heavy:
            return begun_s + patience.upkeep_pickup_s
        if self.desk.stalled("worker"):  # for as long as its caller likes: the pool takes its place
            return begun_s + patience.degraded_pickup_s
        if self._is_busy(offer):
            return begun_s + patience.busy_s
        pickup_s = patience.degraded_pickup_s if self.health.reason(kind) else patience.pickup_s
        return max(begun_s, self.desk.last_sign_s) + pickup_s

    def _is_busy(self, offer: Offer) -> bool:
        """Whether there are workers, and they are at work."""
        return self.desk.serving("worker", heavy=offer.heavy) > 0

    async def _answer(self, offer: Offer, own: asyncio.Task[None] | None) -> Answer:
        if own is not None:
            waited_for: set[asyncio.Future[Any]] = {own, offer.done}
            await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
            if not offer.claimed.done():
                return Answer(error=_not_begun(offer, own), retryable=True)
        answer = await offer.done
        if answer is not None:
            return answer
        claim = offer.claimed.result()
        return Answer(
            error=f"{_named(offer.order)}: the {claim.by}'s process {claim.pid} that did it died; "
            "nothing of it is visible; try again",
            retryable=True,
        )


def make_order(call: str, settings: Settings, id: str = "", parent: str = "") -> Order:
    """An order with a token of its own, for the GEAR_ROOT of *settings*."""
    return Order(call, str(settings.gear_root), secrets.token_hex(16), id, parent)


def _not_begun(offer: Offer, own: asyncio.Task[None]) -> str:
    why = own.exception() or "it could not reach the streams socket"
    if isinstance(why, BrokenProcessPool):
        why = "it died at its start"
    return (
        f"{_named(offer.order)}: no worker took it, and the gateway's own process did not begin: {why}; "
        "the gateway's log may say more; try again"
    )


def _named(order: Order) -> str:
    return f"{order.call} {order.id}".rstrip()


def _retrieved(task: asyncio.Task[None]) -> None:
    """Have the task's error, which its offer has told already, not be reported as lost."""
    if not task.cancelled():
        task.exception()
