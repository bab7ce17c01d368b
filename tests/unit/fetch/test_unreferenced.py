"""Large objects without readers, and unreferenced objects."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from gearworkers.errors import NotFound
from gearworkers.fetch.chunk_index import ChunkIndex
from gearworkers.fetch.priority_pool import Priority
from gearworkers.fetch.source import BytesOrLayout, Chunk
from tests.support.fetching import CHUNK_BYTES, FetchNode, chunk_of, large_content, outcome, sha256, wait_until


def remove_all(node: FetchNode) -> None:
    """Remove all partial files, as if no image were left; afterwards all objects are referenced again."""
    node.is_referenced = lambda _: False
    node.fetcher.remove_unreferenced(0.0)
    node.is_referenced = lambda _: True


def test_a_large_object_without_readers_is_not_fetched_whole(node: FetchNode) -> None:
    content = large_content()
    node.source.put(content)
    node.source.release()
    node.prefetch_ranges(content, (0, 1))
    wait_until(lambda: node.prefetcher.stats.contents == 1)
    node.fetcher.fill_idle(0.0)
    assert node.is_arriving(content) and node.fetcher.arriving == 0
    assert node.source.single == []


def test_partial_files_are_removed_with_their_image_unless_they_were_read_recently(node: FetchNode) -> None:
    contents = referenced, read, unread = [large_content(seed) for seed in range(3)]
    for content in contents:
        node.source.put(content)
    node.source.release()
    for content in contents:
        node.prefetch_ranges(content, (0, 1))
    wait_until(lambda: node.prefetcher.stats.contents == 3)
    node.read(read, 0, 5)
    node.is_referenced = lambda digest: digest == sha256(referenced)
    node.fetcher.remove_unreferenced(60.0)
    assert [node.is_arriving(content) for content in contents] == [True, True, False]
    assert node.partial_names() == {sha256(referenced).hex(), sha256(read).hex()}
    assert node.read(unread, 0, 5) == unread[:5]
    node.fetcher.remove_unreferenced(0.0)
    assert [node.is_arriving(content) for content in contents] == [True, False, False]
    assert node.partial_names() == {sha256(referenced).hex()}


def test_a_download_ends_when_its_image_is_removed_and_starts_again_for_the_next_one(node: FetchNode) -> None:
    content = large_content()
    digest, first = node.source.put(content), sha256(chunk_of(content, 0))
    held = node.source.held[first] = threading.Event()
    fetched = node.fetcher.fetch(digest, len(content), Priority.BACKGROUND)
    wait_until(lambda: first in node.source.single)
    download = node.fetcher.get(digest)
    assert download is not None
    node.is_referenced = lambda _: False
    node.fetcher.remove_unreferenced(0.0)
    assert outcome(fetched) is NotFound
    held.set()
    node.wait_for_threads()
    assert not node.is_arriving(content) and not node.store.has(digest)
    assert node.partial_names() == set()
    assert outcome(download.read(0, 5)) is NotFound
    node.is_referenced = lambda _: True
    assert node.fetch_whole(content) is None
    assert node.store.has(digest)


def test_objects_that_are_unreferenced_on_arrival_are_not_stored(node: FetchNode) -> None:
    small = b"small"
    contents = (small, large_content())
    for content in contents:
        node.source.put(content)
    node.is_referenced = lambda _: False
    assert [node.fetch_whole(content) for content in contents] == [None, None]
    node.source.release()
    node.prefetch([sha256(small)], len(small))
    wait_until(lambda: len(node.source.batches) == 1 and not node.fetcher.arriving)
    assert [node.store.has(sha256(content)) for content in contents] == [False, False]
    assert node.partial_names() == set()
    assert node.fetcher.stats.objects == 0


def test_a_large_object_in_a_batch_request_is_not_removed_before_the_request_ends(node: FetchNode) -> None:
    content = large_content()
    digest, missing = node.source.put(content), chunk_of(content, 5)
    del node.source.contents[sha256(missing)]

    def is_removed() -> bool:
        remove_all(node)
        assert node.is_arriving(content) is (node.partial_files / digest.hex()).exists()
        return not node.is_arriving(content)

    node.prefetch_ranges(content, (0, 10 * CHUNK_BYTES))
    node.source.release(1)  # the layout
    wait_until(lambda: len(node.source.batches) == 2)
    assert not is_removed()
    node.source.release(9)
    wait_until(lambda: node.prefetcher.stats.contents == 8)
    assert not is_removed()
    download = node.fetcher.get(digest)
    assert download is not None
    node.source.release()
    wait_until(is_removed)
    assert node.prefetcher.stats.contents == 9
    assert not download.chunks.claim(15)
    node.source.put(missing)
    assert node.read(content, 0, 5) == content[:5]
    node.fetcher.fill_idle(0.0)
    node.wait_for([digest])
    assert node.file(content) == content
    assert node.fetcher.stats.failures == {}


def test_a_large_object_is_not_removed_while_it_is_published(node: FetchNode) -> None:
    content = large_content()
    digest = node.source.put(content)
    node.source.release()
    publishing: list[bytes] = []

    def is_referenced(digest: bytes) -> bool:
        """Run when the whole object is verified."""
        publishing.append(digest)
        remove_all(node)
        return True

    node.is_referenced = is_referenced
    node.prefetch_ranges(content, (0, len(content)))
    node.wait_for([digest])
    assert publishing == [digest]
    assert node.file(content) == content
    wait_until(lambda: not node.is_arriving(content))
    assert node.fetcher.stats.failures == {}


class ObservedLayout(list[Chunk]):
    """A layout that calls back each time it is iterated."""

    def __init__(self, layout: BytesOrLayout, call: Callable[[], object]) -> None:
        super().__init__(chunk for chunk in layout if isinstance(chunk, Chunk))
        self._call = call

    def __iter__(self) -> Iterator[Chunk]:
        self._call()
        return super().__iter__()


def test_a_large_object_is_not_removed_while_its_layout_is_prepared(
    node: FetchNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = large_content()
    digest = node.source.put(content)
    add = ChunkIndex.add

    def remove_first(index: ChunkIndex, digest: bytes, layout: Sequence[Chunk]) -> None:
        remove_all(node)
        add(index, digest, layout)

    monkeypatch.setattr(ChunkIndex, "add", remove_first)
    node.source.release()
    node.prefetch_ranges(content, (0, len(content)))
    node.wait_for([digest])
    assert node.file(content) == content


@pytest.mark.parametrize("is_right", [True, False])
def test_a_reader_that_arrives_while_a_prefetched_layout_is_prepared_gets_the_object(
    node: FetchNode, is_right: bool
) -> None:
    content = large_content()
    digest = node.source.put(content)
    is_preparing, may_continue = threading.Event(), threading.Event()

    def wait() -> None:
        is_preparing.set()
        assert may_continue.wait(20)

    layout = ObservedLayout(node.source.contents[digest], wait)
    if not is_right:
        del layout[3]
    adopting = threading.Thread(target=node.fetcher.adopt_layout, args=(digest, len(content), layout))
    adopting.start()
    assert is_preparing.wait(20)
    opened = node.fetcher.open(digest, len(content))
    may_continue.set()
    adopting.join(20)
    download = opened.result(20)
    assert download is not None and download is node.fetcher.get(digest)
    assert node.source.single == ([] if is_right else [digest])
    assert node.fetch_whole(content) is None
    assert node.file(content) == content
