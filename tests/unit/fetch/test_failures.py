"""Chunks that cannot be fetched, and disks that fail: readers get the error, and later fetches work again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from gearworkers.errors import GearError, NotFound, ResourceExhausted, Unavailable
from gearworkers.fetch.priority_pool import Priority
from tests.support.fetching import (
    CHUNK_BYTES,
    CHUNKS,
    FetchNode,
    chunk_of,
    large_content,
    outcome,
    random_bytes,
    sha256,
    wait_until,
)


def broken_disk(*_: object) -> None:
    raise OSError(errno.EIO, "broken")


def unexpected(*_: object) -> None:
    raise ValueError("broken")


@pytest.mark.parametrize(("fail", "error"), [(broken_disk, Unavailable), (unexpected, GearError)])
def test_an_error_while_an_object_is_published_is_reported_and_the_next_fetch_works(
    node: FetchNode, monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None], error: type[GearError]
) -> None:
    content = large_content()
    digest = node.source.put(content)
    with monkeypatch.context() as broken:
        broken.setattr(node.store, "adopt", fail)
        assert isinstance(node.fetch_whole(content), error)
    assert node.fetch_whole(content) is None
    assert node.store.has(digest)


def test_a_failed_download_reports_its_error_to_later_callers(node: FetchNode, monkeypatch: pytest.MonkeyPatch) -> None:
    content = large_content()
    node.source.put(content)
    assert node.read(content, 0, 1) == content[:1]
    download = node.fetcher.get(sha256(content))
    assert download is not None
    with monkeypatch.context() as broken:
        broken.setattr(node.store, "adopt", broken_disk)
        assert isinstance(node.fetch_whole(content), Unavailable)
    assert outcome(download.store(Priority.BACKGROUND)) is Unavailable
    assert outcome(download.read(0, 1)) is Unavailable


def test_a_read_fails_if_its_chunks_cannot_be_fetched_and_works_when_they_can(node: FetchNode) -> None:
    content = large_content()
    digest = node.source.put(content)
    for number in range(CHUNKS):
        del node.source.contents[sha256(chunk_of(content, number))]
    download = node.open_large(content)
    assert outcome(download.read(0, 1)) is NotFound
    assert outcome(download.read(0, len(content))) is NotFound
    assert outcome(download.store(Priority.ON_DEMAND)) is NotFound
    node.source.put(content)
    assert download.read(0, len(content)).result(20) == content
    node.wait_for([digest])


def test_a_full_disk_stops_the_fill_of_a_large_object_until_it_is_tried_again(
    node: FetchNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "full")

    content = random_bytes(9, 200 * CHUNK_BYTES)
    digest = node.source.put(content)
    assert node.read(content, 0, 1) == content[:1]
    node.source.single.clear()
    with monkeypatch.context() as small:
        small.setattr(os, "pwrite", full)
        for _ in range(3):
            node.fetcher.fill_idle(0.0)
            node.wait_for_threads()
        assert 1 <= len(node.source.single) <= 10
        with pytest.raises(ResourceExhausted):
            node.read(content, 150 * CHUNK_BYTES, 1)
    assert node.read(content, 150 * CHUNK_BYTES, 1) == chunk_of(content, 150)[:1]
    node.fetcher.fill_idle(0.0)
    node.wait_for_threads()
    assert not node.store.has(digest)
    node.fetcher.fill_idle(0.0, retry_after_s=0.0)
    node.wait_for([digest])


def test_a_large_object_with_a_chunk_that_cannot_be_fetched_counts_as_failing_until_it_is_whole(
    node: FetchNode,
) -> None:
    content = large_content()
    digest, missing = node.source.put(content), chunk_of(content, 5)
    del node.source.contents[sha256(missing)]
    with pytest.raises(NotFound):
        node.read(content, 5 * CHUNK_BYTES, 1)
    assert list(node.fetcher.stats.failures) == [digest]
    assert node.read(content, 0, 1) == content[:1]
    node.source.put(missing)
    assert node.read(content, 5 * CHUNK_BYTES, 1) == missing[:1]
    node.fetcher.fill_idle(0.0, retry_after_s=0.0)
    node.wait_for([digest])
    wait_until(lambda: node.fetcher.stats.failures == {})
