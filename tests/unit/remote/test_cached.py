"""A store with a cache in front of it."""

from __future__ import annotations

import hashlib

import pytest

from gearworkers.errors import (
    Unavailable,
)
from gearworkers.remote import encoding
from gearworkers.remote.cached import CachedStore
from gearworkers.remote.remote import Remote
from tests.unit.remote.fake_store import FakeStore, blobs


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def test_fetched_blobs_are_cached(store: FakeStore) -> None:
    cache = FakeStore()
    store.held = blobs(5)
    cached = CachedStore(cache, store)
    assert dict(cached.get_many(list(store.held))) == store.held == cache.held
    store.calls.clear()
    assert dict(cached.get_many(list(store.held))) == store.held
    assert all(cached.get(digest) == blob for digest, blob in store.held.items())
    assert store.calls == []


def test_put_blobs_are_in_both_stores(store: FakeStore) -> None:
    cache = FakeStore()
    CachedStore(cache, store).put_many(list(blobs(3).items()))
    assert cache.held == store.held == blobs(3)


def test_wrong_blobs_in_the_cache_are_replaced(store: FakeStore) -> None:
    cache = FakeStore()
    store.held = blobs(3)
    cache.held = {digest: encoding.encode(b"a lie") for digest in store.held}
    cached = CachedStore(cache, store)
    first, *others = store.held
    assert cached.get(first) == store.held[first]
    assert dict(cached.get_many(others)) == {digest: store.held[digest] for digest in others}
    assert cache.held == store.held


@pytest.mark.parametrize("at", [1, 40, -1])
def test_a_damaged_layout_in_the_cache_is_fetched_from_the_origin(store: FakeStore, at: int) -> None:
    cache = FakeStore()
    digest = hashlib.sha256(b"large").digest()
    right = encoding.encode_layout(digest, [(100, hashlib.sha256(b"a").digest()), (50, hashlib.sha256(b"b").digest())])
    damaged = bytearray(right)
    damaged[at] ^= 1
    store.held, cache.held = {digest: right}, {digest: bytes(damaged)}
    assert Remote(CachedStore(cache, store)).layout(digest) == encoding.decode_layout(digest, right)
    assert cache.held == store.held


def test_wrong_blobs_of_the_origin_are_not_cached(store: FakeStore) -> None:
    cache = FakeStore()
    store.held = {digest: encoding.encode(b"a lie") for digest in blobs(2)}
    list(CachedStore(cache, store).get_many(list(store.held)))
    assert cache.held == {}


def test_an_unavailable_cache_is_bypassed(store: FakeStore) -> None:
    cache = FakeStore()
    store.held = blobs(2)
    cached = CachedStore(cache, store)
    cache.errors = [Unavailable("away")]
    assert all(cached.get(digest) == blob for digest, blob in store.held.items())
    cached.put_many([])
    assert len(cache.calls) == 1, "the cache is paused"


def test_the_cache_is_used_again_after_the_pause(store: FakeStore) -> None:
    cache = FakeStore()
    store.held = blobs(1)
    cached = CachedStore(cache, store, pause_s=0.0)
    cache.errors = [Unavailable("away"), Unavailable("away")]
    (digest,) = store.held
    assert cached.get(digest) == store.held[digest]
    assert cached.get(digest) == store.held[digest]
    assert cache.held == store.held


def test_only_the_origin_decides_which_blobs_are_present(store: FakeStore) -> None:
    cache = FakeStore()
    cache.held = blobs(2)
    assert CachedStore(cache, store).present(list(cache.held)) == set()
