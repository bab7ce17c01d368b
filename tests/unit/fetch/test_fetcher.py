"""Fetching without a kernel: who waits for whom, and for how long."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore
from gearworkers.digest import DIGEST_XATTR
from gearworkers.errors import GearError, IntegrityError, NotFound, Unavailable
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.partial_files import Staging
from gearworkers.fetch.prefetch import Prefetcher
from gearworkers.fetch.priority_pool import Urgency, WorkPool
from gearworkers.fetch.source import Chunk, checked_layout

CONTENTS = {hashlib.sha256(b"%d" % number).digest(): b"%d" % number for number in range(300)}


class Gate:
    """A source that answers when it is let; counts what it is asked."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.asked: list[bytes] = []
        self.away = False

    def fetch(self, digest: bytes) -> Iterator[bytes]:
        self.asked.append(digest)
        self.opened.wait(20)
        if self.away:
            raise Unavailable("away")
        if digest not in CONTENTS:
            raise NotFound("none")
        yield CONTENTS[digest]

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        self.opened.wait(20)
        for digest in digests:
            yield digest, CONTENTS[digest]

    def layout(self, digest: bytes) -> None:
        self.asked.append(digest)
        self.opened.wait(20)
        if self.away:
            raise Unavailable("away")

    def chunk(self, digest: bytes) -> bytes:
        raise NotFound("none")

    def document(self, name: str) -> None:
        return None


class Results:
    """What was told to those who waited."""

    def __init__(self, expected: int) -> None:
        self.told: list[GearError | None] = []
        self._expected = expected
        self._all = threading.Event()

    def done(self, error: GearError | None) -> None:
        self.told.append(error)
        if len(self.told) == self._expected:
            self._all.set()

    def wait(self) -> list[GearError | None]:
        assert self._all.wait(20)
        return self.told


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def pool() -> Iterator[WorkPool]:
    one = WorkPool(4, for_background=2)
    yield one
    one.close()


@pytest.fixture
def fetcher(tmp_path: Path, pool: WorkPool, gate: Gate) -> Iterator[Fetcher]:
    store = ObjectStore(tmp_path / "public")
    store.prepare()
    one = Fetcher(store, tmp_path / "fetching", [gate], pool, large_bytes=1 << 20)
    one.prepare()
    yield one
    gate.opened.set()
    one.close()


def ask(fetcher: Fetcher, digests: Sequence[bytes], results: Results) -> None:
    for digest in digests:
        fetcher.fetch(digest, len(CONTENTS[digest]), Urgency.ON_DEMAND, results.done)


@pytest.mark.parametrize("size_bytes", [None, 1 << 20])
def test_a_queue_of_readers_waits_once_for_a_source_that_is_away(
    fetcher: Fetcher, gate: Gate, size_bytes: int | None
) -> None:
    results = Results(len(CONTENTS))
    gate.away = True
    for digest, content in CONTENTS.items():
        fetcher.fetch(digest, size_bytes or len(content), Urgency.ON_DEMAND, results.done)
    gate.opened.set()
    assert all(isinstance(error, Unavailable) for error in results.wait())
    assert len(gate.asked) <= 4
    gate.away = False
    again = Results(1)
    ask(fetcher, [next(iter(CONTENTS))], again)
    assert again.wait() == [None]


def test_all_who_ask_for_one_object_are_told_of_one_download(fetcher: Fetcher, gate: Gate) -> None:
    results = Results(50)
    ask(fetcher, [next(iter(CONTENTS))] * 50, results)
    gate.opened.set()
    assert results.wait() == [None] * 50
    assert len(gate.asked) == 1


def test_what_is_on_demand_goes_before_the_prefetch_that_holds_it(fetcher: Fetcher, pool: WorkPool, gate: Gate) -> None:
    prefetcher = Prefetcher(fetcher, [gate], pool, large_bytes=1 << 20)
    prefetcher.wholly([(digest, len(content)) for digest, content in CONTENTS.items()])
    last = list(CONTENTS)[-1]
    results = Results(1)
    ask(fetcher, [last], results)
    for _ in range(2000):
        if gate.asked:
            break
        threading.Event().wait(0.01)
    assert gate.asked == [last]
    gate.opened.set()
    assert results.wait() == [None]


@pytest.mark.parametrize("for_background", [0, 1])
def test_one_thread_still_does_what_is_on_demand_and_what_is_not(for_background: int) -> None:
    pool = WorkPool(1, for_background=for_background)
    done = {urgency: threading.Event() for urgency in Urgency}
    for urgency, event in done.items():
        pool.submit(event.set, urgency)
    assert all(event.wait(20) for event in done.values())
    pool.close()


def test_who_waits_for_an_object_at_whose_name_another_stands_is_told(fetcher: Fetcher, pool: WorkPool) -> None:
    digest, other = list(CONTENTS)[:2]
    path = fetcher._store.path(digest)
    with open(path, "wb") as file:
        os.setxattr(file.fileno(), DIGEST_XATTR, other)
    results = Results(1)
    fetcher.fetch(digest, 1 << 20, Urgency.ON_DEMAND, results.done)
    assert [type(error) for error in results.wait()] == [IntegrityError]


def test_a_layout_that_leaves_a_gap_or_ends_early_is_refused() -> None:
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


def test_a_layout_may_be_kept_twice_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    staging, layout, rename = Staging(tmp_path), [Chunk(0, 10, bytes(32))], Path.rename
    staging.prepare()

    def late(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        staging.keep(bytes(32), 10, layout)
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", late)
    staging.keep(bytes(32), 10, layout)
    assert staging.layout(bytes(32), 10) == layout
    assert {path.suffix for path in tmp_path.iterdir()} == {"", ".layout"}
