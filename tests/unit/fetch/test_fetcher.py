"""Readers of small objects and layouts: one download for all, readers before background work, one wait per failure."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.digest import DIGEST_XATTR
from gearworkers.errors import IntegrityError, NotFound, Unavailable
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.partial_files import PartialFiles
from gearworkers.fetch.prefetch import Prefetcher
from gearworkers.fetch.priority_pool import Priority, PriorityPool
from gearworkers.fetch.source import Chunk, checked_layout
from tests.support.fetching import TIMEOUT_S, outcome, wait_until

CONTENTS = {hashlib.sha256(b"%d" % number).digest(): b"%d" % number for number in range(300)}
LARGE_BYTES = 1 << 20


class GatedSource:
    """A source that answers after `gate` is set, and records the digests of all requests."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.requested: list[bytes] = []
        self.is_unreachable = False

    def fetch(self, digest: bytes) -> Iterator[bytes]:
        self._request(digest)
        if digest not in CONTENTS:
            raise NotFound("none")
        yield CONTENTS[digest]

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        self.gate.wait(TIMEOUT_S)
        for digest in digests:
            yield digest, CONTENTS[digest]

    def layout(self, digest: bytes) -> None:
        self._request(digest)

    def chunk(self, digest: bytes) -> bytes:
        raise NotFound("none")

    def document(self, name: str) -> None:
        return None

    def _request(self, digest: bytes) -> None:
        self.requested.append(digest)
        self.gate.wait(TIMEOUT_S)
        if self.is_unreachable:
            raise Unavailable("unreachable")


@pytest.fixture
def source() -> GatedSource:
    return GatedSource()


@pytest.fixture
def pool() -> Iterator[PriorityPool]:
    one = PriorityPool(4, for_background=2)
    yield one
    one.close()


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    one = ObjectStore(tmp_path / "public")
    one.prepare()
    return one


@pytest.fixture
def fetcher(tmp_path: Path, store: ObjectStore, pool: PriorityPool, source: GatedSource) -> Iterator[Fetcher]:
    one = Fetcher(store, tmp_path / "fetching", [source], pool, large_bytes=LARGE_BYTES)
    one.prepare()
    yield one
    source.gate.set()
    one.close()


def fetch(fetcher: Fetcher, digest: bytes, size_bytes: int | None = None) -> Future[None]:
    """Fetch an object on demand."""
    return fetcher.fetch(digest, size_bytes or len(CONTENTS[digest]), Priority.ON_DEMAND)


@pytest.mark.parametrize("size_bytes", [None, LARGE_BYTES])
def test_readers_already_waiting_when_a_source_becomes_unreachable_do_not_retry_it(
    fetcher: Fetcher, source: GatedSource, size_bytes: int | None
) -> None:
    source.is_unreachable = True
    fetched = [fetch(fetcher, digest, size_bytes) for digest in CONTENTS]
    source.gate.set()
    assert {outcome(one) for one in fetched} == {Unavailable}
    assert len(source.requested) <= 4
    source.is_unreachable = False
    assert outcome(fetch(fetcher, next(iter(CONTENTS)))) is None


def test_all_readers_of_an_object_share_one_download(fetcher: Fetcher, source: GatedSource) -> None:
    fetched = [fetch(fetcher, next(iter(CONTENTS))) for _ in range(50)]
    source.gate.set()
    assert {outcome(one) for one in fetched} == {None}
    assert len(source.requested) == 1


def test_a_reader_is_served_before_a_background_request_that_has_not_claimed_its_object(
    fetcher: Fetcher, pool: PriorityPool, source: GatedSource
) -> None:
    prefetcher = Prefetcher(fetcher, [source], pool, large_bytes=LARGE_BYTES)
    prefetcher.fetch_all([(digest, len(content)) for digest, content in CONTENTS.items()])
    last = list(CONTENTS)[-1]
    fetched = fetch(fetcher, last)
    wait_until(lambda: source.requested)
    assert source.requested == [last]
    source.gate.set()
    assert outcome(fetched) is None


def test_a_reader_overtakes_the_background_fetches_of_large_objects(
    fetcher: Fetcher, pool: PriorityPool, source: GatedSource
) -> None:
    first, *_, last = CONTENTS
    background = [fetcher.fetch(digest, LARGE_BYTES, Priority.BACKGROUND) for digest in CONTENTS]
    fetched = fetch(fetcher, last, LARGE_BYTES)
    wait_until(lambda: len(source.requested) == 3)
    assert last in source.requested and first in source.requested
    source.is_unreachable = True
    source.gate.set()
    assert {outcome(one) for one in [*background, fetched]} == {Unavailable}


def test_readers_of_an_object_fail_if_another_content_is_stored_under_its_name(
    fetcher: Fetcher, store: ObjectStore
) -> None:
    digest, other = list(CONTENTS)[:2]
    with open(store.path(digest), "wb") as file:
        os.setxattr(file.fileno(), DIGEST_XATTR, other)
    assert outcome(fetch(fetcher, digest, LARGE_BYTES)) is IntegrityError


def test_a_layout_with_a_gap_or_a_wrong_size_is_rejected() -> None:
    chunk = Chunk(0, 10, bytes(32))
    assert checked_layout([chunk], 10) == [chunk]
    for layout, size_bytes in (
        ([chunk], 11),
        ([chunk, Chunk(11, 10, bytes(32))], 21),
        ([Chunk(0, 0, bytes(32)), chunk], 10),
        ([], 1),
    ):
        with pytest.raises(IntegrityError):
            checked_layout(layout, size_bytes)


def test_two_threads_may_store_one_layout_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, layout, rename = PartialFiles(tmp_path), [Chunk(0, 10, bytes(32))], Path.rename
    files.prepare()

    def late(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        files.create(bytes(32), 10, layout)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    files.create(bytes(32), 10, layout)
    assert files.layout(bytes(32), 10) == layout
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".layout"}
