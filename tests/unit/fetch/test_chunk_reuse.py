"""Chunks that this host has already: in a partial file of an earlier process, or in another large object."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

import pytest

from tests.support.fetching import (
    CHUNK_BYTES,
    CHUNKS,
    FetchNode,
    chunk_of,
    large_content,
    random_bytes,
    sha256,
    wait_until,
)


def versions(node: FetchNode) -> tuple[bytes, bytes]:
    """Return two versions of a large file that differ in chunk 7."""
    old = large_content()
    new = old[: 7 * CHUNK_BYTES] + random_bytes(10, CHUNK_BYTES) + old[8 * CHUNK_BYTES :]
    node.source.put(old)
    node.source.put(new)
    node.source.release()
    return old, new


def digests_of(content: bytes, *numbers: int) -> list[bytes]:
    return [sha256(chunk_of(content, number)) for number in numbers]


def test_chunks_that_an_earlier_process_fetched_are_not_fetched_again(node: FetchNode, tmp_path: Path) -> None:
    content = large_content()
    digest = node.source.put(content)
    node.source.release()
    node.prefetch_ranges(content, (0, 3 * CHUNK_BYTES))
    wait_until(lambda: node.prefetcher.stats.contents == 3)
    later = FetchNode(tmp_path, node.source)
    node.source.batches.clear()
    later.prefetch_ranges(content, (0, 5 * CHUNK_BYTES))
    wait_until(lambda: later.prefetcher.stats.contents == 2)
    assert node.source.batches == [[digest], digests_of(content, 3, 4)]
    later.close()


def test_chunks_of_a_partial_object_are_not_fetched_again_for_another(node: FetchNode) -> None:
    old, new = versions(node)
    node.prefetch_ranges(old, (0, 9 * CHUNK_BYTES))
    wait_until(lambda: node.prefetcher.stats.contents == 9)
    node.source.batches.clear()
    node.prefetch_ranges(new, (0, 10 * CHUNK_BYTES))
    wait_until(lambda: node.prefetcher.stats.contents == 11)
    assert node.source.batches == [[sha256(new)], digests_of(new, 7, 9)]
    assert node.read(new, 0, len(new)) == new
    assert sorted(node.source.single) == sorted(digests_of(new, *range(10, CHUNKS)))
    assert node.fetcher.stats.reused_bytes == 8 * CHUNK_BYTES


def test_the_next_process_finds_chunks_in_a_whole_object(node: FetchNode, tmp_path: Path) -> None:
    old, new = versions(node)
    assert node.fetch_whole(old) is None
    node.source.single.clear()
    later = FetchNode(tmp_path, node.source)
    assert later.fetch_whole(new) is None
    assert node.source.single == [sha256(new), *digests_of(new, 7)]
    later.close()


def test_a_damaged_chunk_of_another_object_is_not_used(node: FetchNode) -> None:
    old, new = versions(node)
    assert node.fetch_whole(old) is None
    path = Path(os.fsdecode(node.store.path(sha256(old))))
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(3 * CHUNK_BYTES)
        file.write(b"damaged")
    node.source.single.clear()
    assert node.fetch_whole(new) is None
    layout, *chunks = node.source.single
    assert layout == sha256(new) and sorted(chunks) == sorted(digests_of(new, 3, 7))


@pytest.mark.parametrize("damage", [b"no database", None])
def test_all_chunks_are_fetched_without_a_chunk_index(node: FetchNode, tmp_path: Path, damage: bytes | None) -> None:
    old, new = versions(node)
    assert node.fetch_whole(old) is None
    node.fetcher.close()
    index = node.partial_files / "chunks.sqlite"
    if damage is None:
        index.unlink()
        index.mkdir()
    else:
        index.write_bytes(damage * 1000)
    later = FetchNode(tmp_path, node.source)
    node.source.single.clear()
    assert later.fetch_whole(new) is None
    assert len(node.source.single) == 1 + CHUNKS
    later.close()


def test_the_chunk_index_forgets_a_removed_object(node: FetchNode) -> None:
    old, new = versions(node)
    assert node.fetch_whole(old) is None
    node.store.remove(sha256(old))
    node.fetcher.remove_unreferenced(0.0)
    with sqlite3.connect(node.partial_files / "chunks.sqlite") as db:
        assert db.execute("SELECT count(*) FROM chunks").fetchone() == (0,)
    db.close()
    node.source.single.clear()
    assert node.fetch_whole(new) is None
    assert len(node.source.single) == 1 + CHUNKS
