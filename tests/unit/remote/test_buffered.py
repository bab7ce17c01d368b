"""Buffer puts, and flush them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest

from gearworkers.errors import Unavailable
from gearworkers.remote import encoding
from gearworkers.remote.bucket import BucketStore, memory_store
from gearworkers.remote.buffered import BufferedStore

CHUNK = hashlib.sha256(b"chunk").digest()
OBJECT = hashlib.sha256(b"object").digest()
LAYOUT = encoding.encode_layout(OBJECT, [(5, CHUNK)])


class RecordingStore:
    """Records each put, and fails the next `failures` of them."""

    def __init__(self) -> None:
        self.blobs: BucketStore = memory_store()
        self.calls: list[list[bytes]] = []
        self.failures = 0

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        return self.blobs.present(digests)

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        if self.failures:
            self.failures -= 1
            raise Unavailable("unreachable")
        self.calls.append([digest for digest, _ in blobs])
        self.blobs.put_many(blobs)


def buffered(recording: RecordingStore, buffer_bytes: int = 1 << 20) -> BufferedStore:
    return BufferedStore(recording, buffer_bytes=buffer_bytes)  # type: ignore[arg-type]  # it lacks the methods that these tests do not call


def test_a_put_is_visible_through_the_buffer_at_once_and_in_the_store_after_a_flush() -> None:
    recording = RecordingStore()
    store = buffered(recording)
    store.put_many([(CHUNK, encoding.encode(b"chunk"))])
    assert store.present([CHUNK, OBJECT]) == {CHUNK} and recording.calls == []
    store.flush()
    assert recording.blobs.present([CHUNK]) == {CHUNK} == store.present([CHUNK])


def test_layouts_are_stored_after_contents_that_were_put_later() -> None:
    recording = RecordingStore()
    store = buffered(recording)
    store.put_many([(OBJECT, LAYOUT)])
    store.put_many([(CHUNK, encoding.encode(b"chunk"))])
    store.flush()
    assert recording.calls == [[CHUNK], [OBJECT]]


def test_a_full_buffer_is_flushed() -> None:
    recording = RecordingStore()
    store = buffered(recording, buffer_bytes=len(LAYOUT))
    store.put_many([(OBJECT, LAYOUT)])
    assert recording.calls == []
    store.put_many([(CHUNK, encoding.encode(b"chunk"))])
    assert recording.calls == [[CHUNK], [OBJECT]]


def test_a_layout_is_not_stored_after_an_error_that_lost_its_chunks() -> None:
    recording = RecordingStore()
    store = buffered(recording)
    store.put_many([(CHUNK, encoding.encode(b"chunk"))])
    recording.failures = 1
    with pytest.raises(Unavailable):
        store.flush()
    store.put_many([(OBJECT, LAYOUT)])
    with pytest.raises(Unavailable):
        store.flush()
    assert recording.calls == []
