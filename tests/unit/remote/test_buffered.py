"""Gathered puts: seen at once by who gathers, by others only when flushed, and layouts never before their chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest

from gearworkers.errors import Unavailable
from gearworkers.remote import encoding
from gearworkers.remote.bucket import Bucket, in_memory
from gearworkers.remote.buffered import Gathered

CHUNK = hashlib.sha256(b"chunk").digest()
OBJECT = hashlib.sha256(b"object").digest()
LAYOUT = encoding.encode_layout(OBJECT, [(5, CHUNK)])


class Watched:
    """Remembers each call, and fails as often as it is told."""

    def __init__(self) -> None:
        self.blobs: Bucket = in_memory()
        self.calls: list[list[bytes]] = []
        self.failures = 0

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        return self.blobs.present(digests)

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        if self.failures:
            self.failures -= 1
            raise Unavailable("away")
        self.calls.append([digest for digest, _ in blobs])
        self.blobs.put_many(blobs)


def gathered(watched: Watched, most_bytes: int = 1 << 20) -> Gathered:
    return Gathered(watched, most_bytes=most_bytes)  # type: ignore[arg-type]  # what is not asked for is left out


def test_what_waits_is_there_for_who_gathers_and_for_others_when_it_is_flushed() -> None:
    watched = Watched()
    store = gathered(watched)
    store.put_many([(CHUNK, encoding.encode(b"chunk"))])
    assert store.present([CHUNK, OBJECT]) == {CHUNK} and watched.calls == []
    store.flush()
    assert watched.blobs.present([CHUNK]) == {CHUNK} == store.present([CHUNK])


def test_layouts_come_after_the_contents_that_were_put_later() -> None:
    watched = Watched()
    store = gathered(watched)
    store.put_many([(OBJECT, LAYOUT)])
    store.put_many([(CHUNK, encoding.encode(b"chunk"))])
    store.flush()
    assert watched.calls == [[CHUNK], [OBJECT]]


def test_what_waits_is_bounded() -> None:
    watched = Watched()
    store = gathered(watched, most_bytes=len(LAYOUT))
    store.put_many([(OBJECT, LAYOUT)])
    assert watched.calls == []
    store.put_many([(CHUNK, encoding.encode(b"chunk"))])
    assert watched.calls == [[CHUNK], [OBJECT]]


def test_after_an_error_no_layout_is_put_whose_chunks_may_be_missing() -> None:
    watched = Watched()
    store = gathered(watched)
    store.put_many([(CHUNK, encoding.encode(b"chunk"))])
    watched.failures = 1
    with pytest.raises(Unavailable):
        store.flush()
    store.put_many([(OBJECT, LAYOUT)])
    with pytest.raises(Unavailable):
        store.flush()
    assert watched.calls == []
