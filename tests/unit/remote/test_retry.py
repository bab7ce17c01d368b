"""Retry a store's calls."""

from __future__ import annotations

import pytest

from gearworkers.errors import FailedPrecondition, GearError, IntegrityError, InvalidInput, NotFound, Unavailable
from gearworkers.remote.retry import RetryingStore
from gearworkers.util.retry import ATTEMPTS
from tests.unit.remote.fake_store import FakeStore, blobs


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def test_retryable_errors_are_retried(store: FakeStore) -> None:
    store.stored = blobs(1)
    (digest,) = store.stored
    store.errors = [Unavailable("once"), Unavailable("twice")]
    assert RetryingStore(store).get(digest) == store.stored[digest]
    assert len(store.calls) == 3


@pytest.mark.slow
def test_retries_end_after_the_last_attempt(store: FakeStore) -> None:
    store.errors = [Unavailable("again") for _ in range(ATTEMPTS + 1)]
    with pytest.raises(Unavailable):
        RetryingStore(store).present([bytes(32)])
    assert len(store.calls) == ATTEMPTS


@pytest.mark.parametrize("error", [NotFound("x"), IntegrityError("x"), FailedPrecondition("x"), InvalidInput("x")])
def test_other_errors_are_not_retried(store: FakeStore, error: GearError) -> None:
    store.errors = [error]
    with pytest.raises(type(error)):
        RetryingStore(store).put_many([])
    assert len(store.calls) == 1


def test_an_interrupted_stream_resumes_with_the_missing_blobs(store: FakeStore) -> None:
    store.stored = blobs(7)
    store.break_after = 3
    assert dict(RetryingStore(store).get_many(list(store.stored))) == store.stored
    assert [len(asked) for asked in store.calls] == [7, 4, 1]
