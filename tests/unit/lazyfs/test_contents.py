"""What the lazy file system's tree is told, without a kernel."""

from __future__ import annotations

import hashlib
import queue
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from gearworkers.cas.refs import OBJECTS_FILE, REF_RECORD
from gearworkers.cas.store import ObjectStore
from gearworkers.digest import object_name
from gearworkers.errors import GearError
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.priority_pool import WorkPool
from gearworkers.fetch.source import Chunk, Content
from gearworkers.layers.incomplete import IncompleteLayers
from gearworkers.layers.record import RECORD_FILE, Layer, LayerKind
from gearworkers.lazyfs import contents as lazy_contents
from gearworkers.lazyfs.arrivals import Arrivals
from gearworkers.lazyfs.contents import LazyContents
from gearworkers.lazyfs.tree import Arrived, Found, Served, Unknown, node_of
from gearworkers.util.fs import opened_directory

NAME = object_name(bytes(32))
LARGE = {hashlib.sha256(content).digest(): content for content in (b"one" * 10_000, b"two" * 10_000)}


class Shelf:
    """A source of LARGE, each in one chunk."""

    def fetch(self, digest: bytes) -> Iterator[bytes]:
        yield LARGE[digest]

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, Content]]:
        return iter(())

    def layout(self, digest: bytes) -> Sequence[Chunk]:
        return [Chunk(0, len(LARGE[digest]), digest)]

    def chunk(self, digest: bytes) -> bytes:
        return LARGE[digest]

    def document(self, name: str) -> None:
        return None


@pytest.fixture
def contents(tmp_path: Path) -> Iterator[LazyContents]:
    store, pool = ObjectStore(tmp_path / "public"), WorkPool(2, for_background=1)
    arrivals = Arrivals(tmp_path / "arrivals", store)
    fetcher = Fetcher(store, tmp_path / "fetching", [Shelf()], pool, large_bytes=1 << 10)
    store.prepare()
    arrivals.prepare()
    fetcher.prepare()
    yield LazyContents(
        store,
        arrivals,
        IncompleteLayers(tmp_path / "images"),
        fetcher,
        lambda digest, size_bytes: None,
        large_bytes=1 << 10,
        served_bytes=1 << 10,
    )
    pool.close()
    fetcher.close()


def make_layer(root: Path, *, complete: bool) -> None:
    """An image layer that refers to LARGE; it replaces the one before."""
    image = root / "images" / "image"
    image.mkdir(parents=True, exist_ok=True)
    records = b"".join(REF_RECORD.pack(digest, len(content)) for digest, content in sorted(LARGE.items()))
    (image / OBJECTS_FILE).write_bytes(records)
    (image / RECORD_FILE).write_bytes(msgspec.json.encode(Layer("image", "", LayerKind.IMAGE, complete=complete)))


def wanted(contents: LazyContents, digest: bytes) -> Found:
    """As the kernel is told."""
    told: queue.Queue[Found] = queue.Queue()
    contents.want(object_name(digest), told.put)
    return told.get(timeout=20)


def test_lists_that_cannot_be_read_are_an_error_of_who_looks_and_not_of_the_server(
    contents: LazyContents, tmp_path: Path
) -> None:
    (tmp_path / "images").write_text("no directory")
    told: list[Found | bytes] = []
    contents.want(NAME, told.append)
    contents.read(node_of(bytes(32)), 0, 10, told.append)
    assert [isinstance(one, GearError) for one in told] == [True, True]
    assert isinstance(contents.size_bytes(node_of(bytes(32))), GearError)
    assert contents.whole(node_of(bytes(32))) is None
    assert contents.is_wanted(NAME)


def test_of_two_large_objects_whose_digests_begin_alike_one_is_served_and_the_other_comes_whole(
    contents: LazyContents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_layer(tmp_path, complete=False)
    monkeypatch.setattr(lazy_contents, "node_of", lambda _: 1 << 63)
    one, two = LARGE
    assert wanted(contents, one) == Served(1 << 63, 30_000)
    assert wanted(contents, two) == Arrived()
    told: queue.Queue[bytes | GearError] = queue.Queue()
    contents.read(1 << 63, 0, 30_000, told.put)
    assert told.get(timeout=20) == LARGE[one]


def test_an_object_whose_layer_became_complete_while_the_kernel_asked_for_it_is_there(
    contents: LazyContents, tmp_path: Path
) -> None:
    make_layer(tmp_path, complete=True)
    digest, content = next(iter(LARGE.items()))
    store = ObjectStore(tmp_path / "public")
    with opened_directory(tmp_path / "fetching") as staging_fd:
        store.put(digest, memoryview(content), staging_fd)
    assert wanted(contents, digest) == Arrived()
    assert ObjectStore(tmp_path / "arrivals").has(digest)
    assert wanted(contents, bytes(32)) == Unknown()


def test_what_is_read_is_remembered_of_the_objects_that_were_read_last(
    contents: LazyContents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_contents, "_MOST_READ_OBJECTS", 1)
    make_layer(tmp_path, complete=False)
    one, two = LARGE
    told: queue.Queue[bytes | GearError] = queue.Queue()
    for digest in (one, two):
        contents.read(node_of(digest), 10, 5, told.put)
        assert told.get(timeout=20) == LARGE[digest][10:15]
        assert contents.reads(digest.hex()) == [(10, 5)]
    assert contents.reads(one.hex()) == []
