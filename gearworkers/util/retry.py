"""The policy for retries of NFS, remotes and registries: only retryable errors, bounded in attempts and time."""

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
MAX_TIME_S = 30.0

backoff_s = wait_random_exponential(multiplier=0.2, max=5.0)
"""Wait before the next attempt: exponential, with jitter. Tests replace it to avoid waiting."""


def _is_retryable(exc: BaseException) -> bool:
    return isinstance(exc, GearError) and exc.retryable


def _wait_s(state: RetryCallState) -> float:
    """Return the backoff, plus the wait that the server has requested."""
    exc = state.outcome.exception() if state.outcome else None
    return backoff_s(state) + (exc.retry_after_s if isinstance(exc, GearError) else 0.0)


retried = retry(
    retry=retry_if_exception(_is_retryable),
    wait=_wait_s,
    stop=stop_after_attempt(ATTEMPTS) | stop_before_delay(MAX_TIME_S),
    reraise=True,
)
"""Decorator that retries a function. Celery retries tasks after the same errors (`workers.celery_app.RETRIES`), so one
call makes at most ATTEMPTS × (1 + RETRIES) = 55 attempts, within about 36 minutes."""
