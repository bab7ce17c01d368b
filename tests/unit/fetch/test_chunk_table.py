"""States of chunks and their waiters, without threads."""

from __future__ import annotations

from gearworkers.errors import GearError, NotFound
from gearworkers.fetch.chunk_table import ChunkState, ChunkTable
from gearworkers.fetch.priority_pool import Priority
from gearworkers.fetch.source import Chunk


def table() -> ChunkTable:
    """Five chunks of ten bytes."""
    return ChunkTable([Chunk(offset, 10, bytes(32)) for offset in range(0, 50, 10)])


def test_a_range_belongs_to_the_chunks_that_hold_it() -> None:
    assert list(table().numbers(9, 2)) == [0, 1]
    assert list(table().numbers(10, 10)) == [1]
    assert list(table().numbers(45, 100)) == [4]
    assert list(table().numbers(0, 0)) == []
    assert table().numbers_of([(30, 11), (0, 1), (35, 1)]) == [3, 4, 0]


def test_an_on_demand_request_queues_a_background_chunk_again() -> None:
    chunks = table()
    assert chunks.request([0, 1], Priority.BACKGROUND, 1.0) == [0, 1]
    assert chunks.request([0, 1, 2], Priority.READ_AHEAD, 2.0) == [2]
    assert chunks.request([0], Priority.ON_DEMAND, 3.0) == [0]
    assert chunks.start(0) == 3.0
    assert chunks.start(0) is None
    assert chunks.request([0], Priority.ON_DEMAND, 4.0) == []


def test_a_request_is_complete_when_its_last_chunk_is_stored() -> None:
    chunks, reported = table(), list[GearError | None]()
    assert chunks.wait([1, 2], reported.append)
    assert chunks.store(1) == []
    (done,) = chunks.store(2)
    done(None)
    assert reported == [None]
    assert not chunks.wait([1, 2], reported.append)
    assert chunks.missing == 3 and not chunks.has_waiters


def test_a_request_fails_once_however_many_of_its_chunks_fail() -> None:
    chunks, reported = table(), list[GearError | None]()
    chunks.request(range(5), Priority.ON_DEMAND, 1.0)
    assert chunks.wait(range(5), reported.append)
    failed = [done for number in (3, 0, 1) for done in chunks.fail(number)]
    assert len(failed) == 1
    assert [done for number in (2, 4) for done in chunks.store(number)] == []
    assert chunks.is_in(ChunkState.MISSING, 3)
    failed[0](NotFound("none"))
    assert [type(error) for error in reported] == [NotFound]


def test_a_batch_request_claims_only_missing_chunks_and_can_release_them() -> None:
    chunks = table()
    chunks.request([0], Priority.BACKGROUND, 1.0)
    assert [chunks.claim(number) for number in (0, 1)] == [False, True]
    assert chunks.request([1], Priority.ON_DEMAND, 2.0) == []
    assert chunks.take_from_batch([0, 1, 2], 3.0) == [1]
    assert chunks.start(1) == 3.0
