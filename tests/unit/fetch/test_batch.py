"""Batch requests: their order and overlap, readers that wait for them, and answers that are wrong or incomplete."""

from __future__ import annotations

import threading
import time

import pytest

from gearworkers.errors import ResourceExhausted, Unavailable
from gearworkers.fetch.batch import BatchLimits
from gearworkers.fetch.fetcher import BATCH_WAIT_S
from gearworkers.fetch.prefetch import PrefetchObject, PrefetchStats
from tests.support.fetching import CHUNK_BYTES, FetchNode, chunk_of, large_content, sha256, wait_until

SHORT_REQUESTS = pytest.mark.parametrize("limits", [BatchLimits(request_bytes=1000, overlap_bytes=0)])


def test_many_small_objects_are_fetched_by_one_request_in_the_given_order(node: FetchNode) -> None:
    digests = node.put_small(300)[::-1]
    node.source.release()
    node.prefetch(digests, 100)
    node.wait_for(digests)
    assert node.source.batches == [digests]
    assert node.source.single == []
    wait_until(lambda: node.prefetcher.stats == PrefetchStats(300, 30_000))


@pytest.mark.parametrize("limits", [BatchLimits(request_bytes=10_000, overlap_bytes=2_000)])
def test_the_next_request_begins_before_the_last_bytes_of_the_current_one(node: FetchNode) -> None:
    digests = node.put_small(20, 1000)
    node.prefetch(digests, 1000)
    node.source.release(7)
    wait_until(lambda: node.prefetcher.stats.contents == 7)
    assert len(node.source.batches) == 1
    node.source.release(1)
    wait_until(lambda: len(node.source.batches) == 2)
    assert [digest for batch in node.source.batches for digest in batch] == digests
    node.source.release()
    node.wait_for(digests)


@pytest.mark.parametrize("batch_wait_s", [100.0])
def test_a_reader_gets_an_object_from_the_request_that_is_about_to_deliver_it(node: FetchNode) -> None:
    digests = node.put_small(3)
    node.prefetch(digests, 100)
    wait_until(lambda: node.source.batches)
    threading.Timer(0.01, node.source.release).start()
    assert node.open(digests[2], 100) is None
    assert node.source.single == []


def test_a_reader_waits_a_moment_for_a_slow_request_and_then_the_object_is_fetched_alone(node: FetchNode) -> None:
    digests = node.put_small(3)
    node.prefetch(digests, 100)
    wait_until(lambda: node.source.batches)
    began_s = time.monotonic()
    assert node.open(digests[2], 100) is None
    assert time.monotonic() - began_s >= BATCH_WAIT_S
    assert node.source.single == [digests[2]]
    node.source.release()
    node.wait_for(digests)


def test_a_reader_of_a_chunk_does_not_wait_for_a_slow_request(node: FetchNode) -> None:
    content = large_content()
    digest = node.source.put(content)
    node.prefetch_ranges(content, (0, len(content)))
    node.source.release(1)  # the layout
    wait_until(lambda: len(node.source.batches) == 2)
    assert node.read(content, 7 * CHUNK_BYTES, 5) == chunk_of(content, 7)[:5]
    assert node.source.single == [sha256(chunk_of(content, 7))]
    node.source.release()
    node.wait_for([digest])


@SHORT_REQUESTS
def test_later_requests_leave_out_objects_that_a_reader_fetched_meanwhile(node: FetchNode) -> None:
    digests = node.put_small(30)
    node.prefetch(digests, 100)
    wait_until(lambda: node.source.batches)
    assert node.open(digests[25], 100) is None
    assert node.source.single == [digests[25]]
    node.source.release()
    node.wait_for(digests)
    assert [digest for batch in node.source.batches for digest in batch] == digests[:25] + digests[26:]


def test_only_the_chunks_in_the_given_ranges_of_a_large_object_are_prefetched(node: FetchNode) -> None:
    content = large_content()
    digest = node.source.put(content)
    node.source.release()
    node.prefetch_ranges(content, (5 * CHUNK_BYTES, 10), (2 * CHUNK_BYTES + 1, CHUNK_BYTES))
    wait_until(lambda: node.prefetcher.stats.contents == 3)
    assert node.source.batches == [[digest], [sha256(chunk_of(content, number)) for number in (5, 2, 3)]]
    assert node.read(content, 5 * CHUNK_BYTES, 10) == chunk_of(content, 5)[:10]
    assert node.source.single == []
    node.fetcher.fill_idle(0.0)  # it has been read
    node.wait_for([digest])


def test_objects_with_wrong_or_missing_answers_are_left_to_readers(node: FetchNode) -> None:
    digests = node.put_small(5)
    node.source.contents[digests[1]] = b"wrong"
    right = node.source.contents.pop(digests[3])
    node.source.release()
    node.prefetch(digests, 100)
    node.wait_for([digests[0], digests[2], digests[4]])
    wait_until(lambda: node.fetcher.arriving == 0)
    assert node.fetcher.stats.corrupt == 1
    assert node.source.single == [] and node.fetcher.stats.failures == {}
    node.source.contents[digests[3]] = right
    assert node.open(digests[3], 100) is None


def test_a_request_that_fails_unexpectedly_leaves_its_objects_to_readers(
    node: FetchNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests, content = node.put_small(3), large_content()
    other = content + b"another object with the same chunks"
    for one in (content, other):
        node.source.put(one)
    assert node.fetch_whole(other) is None
    node.source.release()
    node.prefetch_ranges(content)
    wait_until(lambda: node.is_arriving(content))
    node.source.batches.clear()
    opened = threading.Event()

    def fail(*_: object) -> None:
        opened.set()
        raise ValueError("broken")

    with monkeypatch.context() as broken:
        broken.setattr(node.store, "open", fail)  # the chunk index opens the other object to copy a chunk
        small = [PrefetchObject(one, 100) for one in digests]
        node.prefetcher.fetch_soon([*small, PrefetchObject(sha256(content), len(content), ((0, 1),))])
        assert opened.wait(20)
        node.wait_for_threads()
        assert node.fetcher.arriving == 0
    assert node.source.batches == []
    assert node.open(digests[2], 100) is None
    assert node.read(content, 0, 5) == content[:5]


def test_a_required_object_is_fetched_alone_if_the_request_of_a_profile_does_not_deliver_it(node: FetchNode) -> None:
    digests = node.put_small(3)
    late = node.source.contents.pop(digests[0])
    node.prefetch(digests, 100)
    wait_until(lambda: node.source.batches)
    node.prefetcher.fetch_all([(digests[0], 100)])
    node.wait_for_threads(busy=1)
    node.source.release(2)
    wait_until(lambda: node.prefetcher.stats.contents == 1)
    node.source.contents[digests[0]] = late
    node.source.release()
    node.wait_for(digests)


def test_a_failed_batch_request_leaves_no_download_behind(node: FetchNode) -> None:
    digests = node.put_small(5)
    node.source.refuses_batches = True
    node.prefetch(digests, 100)
    wait_until(lambda: node.fetcher.arriving == 0)
    assert node.open(digests[0], 100) is None


def test_a_reader_of_a_prefetched_object_asks_a_source_that_was_unreachable_meanwhile(node: FetchNode) -> None:
    digests, other = node.put_small(3), node.source.put(b"other")
    node.prefetch(digests, 100)
    wait_until(lambda: node.source.batches)
    node.source.refuses_single = True
    assert isinstance(node.open(other, 5), Unavailable)
    node.source.refuses_single = False
    assert node.open(digests[2], 100) is None
    assert node.source.single == [digests[2]]


@SHORT_REQUESTS
def test_a_full_disk_ends_a_prefetch_and_fails_readers_only(node: FetchNode, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise ResourceExhausted("no space left")

    digests = node.put_small(30)
    monkeypatch.setattr(node.store, "create", full)
    node.source.release()
    node.prefetch(digests, 100)
    wait_until(lambda: node.source.batches and node.fetcher.arriving == 0)
    assert node.fetcher.stats.failures == {}
    assert isinstance(node.open(digests[20], 100), ResourceExhausted)
    assert node.source.batches == [digests[:10]]
