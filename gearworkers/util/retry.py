"""The one retry policy: NFS and remotes; only errors that say they are retryable."""

from __future__ import annotations

from tenacity import (
    RetryCallState,
    retry,
    retry_if_exception,
    stop_after_attempt,
    stop_before_delay,
    wait_random_exponential,
)

from gearworkers.errors import GearError

ATTEMPTS = 5
LONGEST_S = 30.0
_jittered_s = wait_random_exponential(multiplier=0.2, max=5.0)


def _is_retryable(exc: BaseException) -> bool:
    return isinstance(exc, GearError) and exc.retryable


def _wait_s(state: RetryCallState) -> float:
    """What the other side has asked for goes before."""
    exc = state.outcome.exception() if state.outcome else None
    return _jittered_s(state) + (exc.after_s if isinstance(exc, GearError) else 0.0)


retried = retry(
    retry=retry_if_exception(_is_retryable),
    wait=_wait_s,
    stop=stop_after_attempt(ATTEMPTS) | stop_before_delay(LONGEST_S),
    reraise=True,
)
"""Exponential, jittered, bounded in attempts and time. Celery re-queues the same class of error (app.RETRIES): the
worst product is ATTEMPTS × (1 + RETRIES) = 55 attempts for one call, within some 36 minutes."""
