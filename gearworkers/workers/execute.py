"""Doing an order: claim it, call the engine, answer. The same in a Celery worker and in the gateway's own pool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import structlog

from gearworkers.engine.engine import Engine
from gearworkers.engine.root import with_current_root
from gearworkers.errors import GearError, NotFound, Unavailable, from_os_error
from gearworkers.settings import Settings
from gearworkers.workers.claim import Stream, claimed
from gearworkers.workers.messages import Answer, Order

_log = structlog.stdlib.get_logger(__name__)


def perform(settings: Settings, order: Order, by: str) -> Answer | None:
    """Claim *order* and do it; ends quietly if somebody else does.

    Upkeep (push, collect_garbage, dedupe) is done also when no gateway is there to be told.

    Args:
        settings: This process's.
        order: What to do; one for another GEAR_ROOT than the gateway's here is refused, and left unclaimed.
        by: ``worker`` or ``gateway``.

    Returns:
        The answer that was given, errors included; None if nothing was done.

    Crash: the gateway sees it and answers its caller.
    """
    if not _is_ours(settings, order):
        return None
    try:
        with claimed(settings.streams_socket, order.token, by, settings.stream_idle_s) as stream:
            if stream is None:
                _log.info("order not wanted any more", call=order.call, id=order.id)
                return None
            answer = _attempt(settings, order, stream)
            stream.answer(answer)
            return answer
    except (NotFound, Unavailable) as exc:
        _log.warning("no gateway", call=order.call, id=order.id, error=str(exc))
        return perform_alone(settings, order) if order.call in _UPKEEP else None


def perform_alone(settings: Settings, order: Order) -> Answer | None:
    """Do an order of upkeep without asking or telling a gateway; None if it is refused, as by `perform`."""
    return _attempt(settings, order, None) if _is_ours(settings, order) else None


def _is_ours(settings: Settings, order: Order) -> bool:
    """Whether the order names the GEAR_ROOT of this node's gateway: whoever writes to Redis may name any path."""
    try:
        root = with_current_root(settings).gear_root
    except GearError as exc:
        _log.error("order refused", call=order.call, id=order.id, error=str(exc))
        return False
    if Path(order.gear_root) == root:
        return True
    _log.error(
        "order refused: it is for another GEAR_ROOT; a worker needs its gateway's GEAR_ROOT and GEAR_RUN_DIR",
        call=order.call,
        id=order.id,
        asked=order.gear_root,
        ours=str(root),
    )
    return False


def _attempt(settings: Settings, order: Order, stream: Stream | None) -> Answer:
    """Call the engine; every error becomes an answer."""
    try:
        engine = _engine(with_current_root(settings))
        if stream is not None and order.call in _STREAMED:
            return _STREAMED[order.call](engine, order, stream)
        return _UPKEEP[order.call](engine, order)
    except GearError as exc:
        _log.warning("order failed", call=order.call, id=order.id, error=str(exc))
        return Answer(error=str(exc), retryable=exc.retryable)
    except OSError as exc:
        _log.exception("order failed", call=order.call, id=order.id)
        known = from_os_error(exc, f"{order.call} {order.id}".rstrip())
        return Answer(error=str(known), retryable=known.retryable)
    except Exception as exc:
        _log.exception("order failed: a bug", call=order.call, id=order.id)
        return Answer(error=f"internal error in {order.call}: {type(exc).__name__}: {exc}; the worker's log has more")


@cache
def _engine(settings: Settings) -> Engine:
    """Return the process's one engine of that GEAR_ROOT."""
    return Engine.of(settings)


def _apply_diff(engine: Engine, order: Order, stream: Stream) -> Answer:
    return Answer(size_bytes=engine.apply_diff(order.id, order.parent, stream.source()))


def _diff(engine: Engine, order: Order, stream: Stream) -> Answer:
    sink = stream.sink()
    engine.diff(order.id, order.parent, sink)
    sink.finish()
    return Answer()


def _push(engine: Engine, order: Order) -> Answer:
    report = engine.push_pending()
    return Answer(figures={"pushed_objects": report.pushed_objects, "refused_objects": len(report.refused)})


def _collect_garbage(engine: Engine, order: Order) -> Answer:
    report = engine.collect_garbage()
    return Answer(figures={"removed_objects": report.removed_objects, "removed_bytes": report.removed_bytes})


def _dedupe(engine: Engine, order: Order) -> Answer:
    return Answer(figures={"deduplicated_files": engine.dedupe(order.id)})


_STREAMED: Mapping[str, Callable[[Engine, Order, Stream], Answer]] = {"apply_diff": _apply_diff, "diff": _diff}
_UPKEEP: Mapping[str, Callable[[Engine, Order], Answer]] = {
    "push": _push,
    "collect_garbage": _collect_garbage,
    "dedupe": _dedupe,
}
