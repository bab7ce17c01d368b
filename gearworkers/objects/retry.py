"""The one retry policy: NFS and remotes; only errors that say they are retryable."""

from __future__ import annotations

from tenacity import retry, retry_if_exception, stop_after_attempt, stop_after_delay, wait_random_exponential

from gearworkers.errors import GearError

ATTEMPTS = 5
LONGEST_S = 30.0


def _is_retryable(exc: BaseException) -> bool:
    return isinstance(exc, GearError) and exc.retryable


retried = retry(
    retry=retry_if_exception(_is_retryable),
    wait=wait_random_exponential(multiplier=0.2, max=5.0),
    stop=stop_after_attempt(ATTEMPTS) | stop_after_delay(LONGEST_S),
    reraise=True,
)
"""Exponential, jittered, bounded in attempts and time. Celery re-queues the same class of error (app.RETRIES): the
worst product is ATTEMPTS × (1 + RETRIES) = 55 attempts for one call, within some 36 minutes."""
