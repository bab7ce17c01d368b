"""Read through a cache that may be stale, damaged or unavailable."""

from __future__ import annotations

import hashlib

import pytest

from gearworkers.errors import Unavailable
from gearworkers.remote import encoding
from gearworkers.remote.cached import CachedStore
from gearworkers.remote.remote import Remote
from tests.unit.remote.fake_store import FakeStore, blobs


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def test_fetched_blobs_are_cached(store: FakeStore) -> None:
    cache = FakeStore()
    store.stored = blobs(5)
    cached = CachedStore(cache, store)
    assert dict(cached.get_many(list(store.stored))) == store.stored == cache.stored
    store.calls.clear()
    assert dict(cached.get_many(list(store.stored))) == store.stored
    assert all(cached.get(digest) == blob for digest, blob in store.stored.items())
    assert store.calls == []


def test_put_blobs_are_in_both_stores(store: FakeStore) -> None:
    cache = FakeStore()
    CachedStore(cache, store).put_many(list(blobs(3).items()))
    assert cache.stored == store.stored == blobs(3)


def test_wrong_blobs_in_the_cache_are_replaced(store: FakeStore) -> None:
    cache = FakeStore()
    store.stored = blobs(3)
    cache.stored = {digest: encoding.encode(b"another content") for digest in store.stored}
    cached = CachedStore(cache, store)
    first, *others = store.stored
    assert cached.get(first) == store.stored[first]
    assert dict(cached.get_many(others)) == {digest: store.stored[digest] for digest in others}
    assert cache.stored == store.stored


@pytest.mark.parametrize("offset", [1, 40, -1])
def test_a_damaged_layout_in_the_cache_is_fetched_from_the_origin(store: FakeStore, offset: int) -> None:
    cache = FakeStore()
    digest = hashlib.sha256(b"large").digest()
    right = encoding.encode_layout(digest, [(100, hashlib.sha256(b"a").digest()), (50, hashlib.sha256(b"b").digest())])
    damaged = bytearray(right)
    damaged[offset] ^= 1
    store.stored, cache.stored = {digest: right}, {digest: bytes(damaged)}
    assert Remote(CachedStore(cache, store)).layout(digest) == encoding.decode_layout(digest, right)
    assert cache.stored == store.stored


def test_wrong_blobs_of_the_origin_are_not_cached(store: FakeStore) -> None:
    cache = FakeStore()
    store.stored = {digest: encoding.encode(b"another content") for digest in blobs(2)}
    list(CachedStore(cache, store).get_many(list(store.stored)))
    assert cache.stored == {}


def test_an_unavailable_cache_is_bypassed(store: FakeStore) -> None:
    cache = FakeStore()
    store.stored = blobs(2)
    cached = CachedStore(cache, store)
    cache.errors = [Unavailable("unreachable")]
    assert all(cached.get(digest) == blob for digest, blob in store.stored.items())
    cached.put_many([])
    assert len(cache.calls) == 1, "the cache is paused"


def test_the_cache_is_used_again_after_the_pause(store: FakeStore) -> None:
    cache = FakeStore()
    store.stored = blobs(1)
    cached = CachedStore(cache, store, pause_s=0.0)
    cache.errors = [Unavailable("unreachable"), Unavailable("unreachable")]
    (digest,) = store.stored
    assert cached.get(digest) == store.stored[digest]
    assert cached.get(digest) == store.stored[digest]
    assert cache.stored == store.stored


def test_only_the_origin_decides_which_blobs_are_present(store: FakeStore) -> None:
    cache = FakeStore()
    cache.stored = blobs(2)
    assert CachedStore(cache, store).present(list(cache.stored)) == set()
