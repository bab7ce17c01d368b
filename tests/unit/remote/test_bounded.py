"""Limit the number and the time of a store's calls."""

from __future__ import annotations

import threading

import pytest

from gearworkers.errors import Unavailable
from gearworkers.remote.bounded import BoundedStore, Limits
from tests.support.processes import wait_until
from tests.unit.remote.fake_store import FakeStore, blobs


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def test_concurrent_calls_do_not_exceed_the_limit(store: FakeStore) -> None:
    def release_when_full(hang: threading.Event) -> None:
        wait_until(lambda: store.running == 4, "four calls run")
        hang.set()

    store.stored = blobs(40)
    store.hang = threading.Event()
    bounded = BoundedStore(store, Limits(threads=4, timeout_s=60, get_batch=1, put_batch=1))
    releaser = threading.Timer(0.3, release_when_full, (store.hang,))
    releaser.start()
    assert dict(bounded.get_many(list(store.stored))) == store.stored
    releaser.join()
    assert store.max_running == 4
    bounded.close()


@pytest.mark.slow
def test_a_store_that_hangs_is_unavailable_within_the_timeout_and_works_again_later(store: FakeStore) -> None:
    store.stored = blobs(3)
    first, *_ = store.stored
    store.hang = threading.Event()
    bounded = BoundedStore(store, Limits(threads=2, timeout_s=0.2, get_batch=1, put_batch=1))
    for ask in (
        lambda: bounded.get(first),
        lambda: bounded.present([first]),
        lambda: list(bounded.get_many([first])),
        lambda: bounded.get_document("x"),
    ):
        with pytest.raises(Unavailable, match="did not answer"):
            ask()
    store.hang.set()
    other = BoundedStore(store, Limits(threads=2, timeout_s=60, get_batch=1, put_batch=1))
    assert other.get(first) == store.stored[first]

    def is_back() -> bool:
        try:
            return bounded.get(first) == store.stored[first]
        except Unavailable:  # a busy machine may exceed the short timeout
            return False

    wait_until(is_back, "the store works again")


@pytest.mark.slow
def test_the_timeout_of_a_put_grows_with_its_blobs(store: FakeStore) -> None:
    store.hang = threading.Event()
    bounded = BoundedStore(store, Limits(threads=2, timeout_s=0.5, get_batch=1, put_batch=100))
    with pytest.raises(Unavailable, match=r"0\.55 s"):
        bounded.put_many([(bytes(32), b"R")])
    later = threading.Timer(1.0, store.hang.set)
    later.start()
    many = blobs(100)
    bounded.put_many(list(many.items()))
    assert store.present(list(many)) == set(many)
    later.join()
