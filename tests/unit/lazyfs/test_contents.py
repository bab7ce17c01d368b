"""Lookups and reads of the tree's objects, without a kernel."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from gearworkers.cas.refs import OBJECTS_FILE, REF_RECORD
from gearworkers.cas.store import ObjectStore
from gearworkers.digest import object_name
from gearworkers.errors import GearError
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.priority_pool import PriorityPool
from gearworkers.fetch.source import BytesOrLayout, Chunk
from gearworkers.layers.incomplete import IncompleteLayers
from gearworkers.layers.record import RECORD_FILE, Layer, LayerKind
from gearworkers.lazyfs.arrivals import Arrivals
from gearworkers.lazyfs.contents import LazyContents
from gearworkers.lazyfs.read_log import ReadLog
from gearworkers.lazyfs.tree import Arrived, LookupResult, Served, Unknown, node_of
from gearworkers.util.fs import opened_directory

NAME = object_name(bytes(32))
LARGE = {hashlib.sha256(content).digest(): content for content in (b"one" * 10_000, b"two" * 10_000)}


class LargeSource:
    """A source of LARGE, each in one chunk."""

    def fetch(self, digest: bytes) -> Iterator[bytes]:
        yield LARGE[digest]

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, BytesOrLayout]]:
        return iter(())

    def layout(self, digest: bytes) -> Sequence[Chunk]:
        return [Chunk(0, len(LARGE[digest]), digest)]

    def chunk(self, digest: bytes) -> bytes:
        return LARGE[digest]

    def document(self, name: str) -> None:
        return None


@contextmanager
def opened_contents(root: Path, node_of: Callable[[bytes], int] = node_of) -> Iterator[LazyContents]:
    store, pool = ObjectStore(root / "public"), PriorityPool(2, for_background=1)
    arrivals = Arrivals(root / "arrivals", store)
    fetcher = Fetcher(store, root / "fetching", [LargeSource()], pool, large_bytes=1 << 10)
    store.prepare()
    arrivals.prepare()
    fetcher.prepare()
    yield LazyContents(
        store,
        arrivals,
        IncompleteLayers(root / "images"),
        fetcher,
        lambda digest, size_bytes: None,
        served_bytes=1 << 10,
        node_of=node_of,
    )
    pool.close()
    fetcher.close()


@pytest.fixture
def contents(tmp_path: Path) -> Iterator[LazyContents]:
    with opened_contents(tmp_path) as one:
        yield one


def make_layer(root: Path, *, complete: bool) -> None:
    """Create an image layer that refers to LARGE, or replace it."""
    image = root / "images" / "image"
    image.mkdir(parents=True, exist_ok=True)
    records = b"".join(REF_RECORD.pack(digest, len(content)) for digest, content in sorted(LARGE.items()))
    (image / OBJECTS_FILE).write_bytes(records)
    (image / RECORD_FILE).write_bytes(msgspec.json.encode(Layer("image", "", LayerKind.IMAGE, complete=complete)))


def look_up(contents: LazyContents, digest: bytes) -> LookupResult:
    return contents.look_up(object_name(digest)).result(20)


def test_unreadable_lists_of_objects_fail_lookups_and_reads_but_not_the_server(
    contents: LazyContents, tmp_path: Path
) -> None:
    (tmp_path / "images").write_text("not a directory")
    for future in (contents.look_up(NAME), contents.read(node_of(bytes(32)), 0, 10)):
        assert isinstance(future.exception(20), GearError)
    with pytest.raises(GearError):
        contents.size_bytes(node_of(bytes(32)))
    assert contents.whole(node_of(bytes(32))) is None
    assert contents.is_known(NAME)


def test_only_one_of_two_large_objects_with_the_same_node_is_served(tmp_path: Path) -> None:
    make_layer(tmp_path, complete=False)
    one, two = LARGE
    with opened_contents(tmp_path, node_of=lambda _: 1 << 63) as contents:
        assert look_up(contents, one) == Served(1 << 63, 30_000)
        assert look_up(contents, two) == Arrived()
        assert contents.read(1 << 63, 0, 30_000).result(20) == LARGE[one]


def test_an_object_of_a_layer_that_became_complete_during_the_lookup_arrives(
    contents: LazyContents, tmp_path: Path
) -> None:
    make_layer(tmp_path, complete=True)
    digest, content = next(iter(LARGE.items()))
    store = ObjectStore(tmp_path / "public")
    with opened_directory(tmp_path / "fetching") as staging_fd:
        store.put(digest, memoryview(content), staging_fd)
    assert look_up(contents, digest) == Arrived()
    assert ObjectStore(tmp_path / "arrivals").has(digest)
    assert look_up(contents, bytes(32)) == Unknown()


def test_reads_of_large_objects_are_logged(contents: LazyContents, tmp_path: Path) -> None:
    make_layer(tmp_path, complete=False)
    for digest, content in LARGE.items():
        assert contents.read(node_of(digest), 10, 5).result(20) == content[10:15]
        assert contents.reads(digest.hex()) == [(10, 5)]


def test_the_read_log_forgets_the_objects_that_were_read_first() -> None:
    log = ReadLog(max_objects=1)
    for node in (1, 2):
        log.add(node, 10, 5)
        log.add(node, 20, 5)
        assert log.of(node) == [(10, 5), (20, 5)]
    assert log.of(1) == []
