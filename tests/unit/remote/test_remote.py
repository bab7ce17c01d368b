"""Put and fetch verified contents over a store of blobs."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from gearworkers.errors import IntegrityError, NotFound
from gearworkers.remote import encoding
from gearworkers.remote.bucket import memory_store
from gearworkers.remote.remote import Remote
from tests.unit.remote.fake_store import FakeStore


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def test_large_objects_share_chunks_in_the_store(store: FakeStore, tmp_path: Path) -> None:
    content = os.urandom(2 << 20)
    remote = Remote(store)
    for data in (content, content + b"more"):
        path = tmp_path / "content"
        path.write_bytes(data)
        with path.open("rb") as file:
            remote.put(hashlib.sha256(data).digest(), file.fileno())
    assert sum(map(len, store.stored.values())) < len(content) * 1.2


def test_a_layout_of_another_object_is_rejected(store: FakeStore) -> None:
    piece = b"piece" * 100
    digest = hashlib.sha256(piece).digest()
    other = hashlib.sha256(b"another object").digest()
    store.stored = {digest: encoding.encode(piece), other: encoding.encode_layout(other, [(len(piece), digest)] * 3)}
    with pytest.raises(IntegrityError):
        list(Remote(store).fetch(other))


def test_a_missing_chunk_is_not_found(store: FakeStore) -> None:
    whole = hashlib.sha256(b"whole").digest()
    store.stored = {whole: encoding.encode_layout(whole, [(100, hashlib.sha256(b"missing").digest())])}
    with pytest.raises(NotFound):
        list(Remote(store).fetch(whole))


def test_a_file_is_put_from_its_start_and_keeps_its_offset(store: FakeStore, tmp_path: Path) -> None:
    content = os.urandom(2 << 20)
    path = tmp_path / "content"
    path.write_bytes(content)
    with path.open("rb", buffering=0) as file:
        file.seek(12345)
        Remote(store).put(hashlib.sha256(content).digest(), file.fileno())
        assert file.tell() == 12345
    assert b"".join(Remote(store).fetch(hashlib.sha256(content).digest())) == content


def test_a_content_that_is_put_twice_is_stored_once() -> None:
    remote = Remote(memory_store())
    digest = hashlib.sha256(b"x").digest()
    assert remote.put_many([(digest, b"x"), (digest, b"x")]) == 1
    assert remote.has([digest]) == [digest]
