"""Requests for many: order, overlap, who waits for them, and what comes of those that fail. No kernel is needed."""

from __future__ import annotations

import errno
import hashlib
import os
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from gearworkers.cas.store import ObjectStore, verify_file
from gearworkers.errors import GearError, NotFound, ResourceExhausted, Unavailable
from gearworkers.fetch import batch, chunked, partial_object
from gearworkers.fetch.chunked import Opened
from gearworkers.fetch.fetcher import Fetcher
from gearworkers.fetch.partial_object import LargeObject
from gearworkers.fetch.prefetch import Part, PrefetchCounts, Prefetcher
from gearworkers.fetch.priority_pool import Urgency, WorkPool
from gearworkers.fetch.source import Chunk, Content

LARGE_BYTES = 64 << 10
CHUNK_BYTES = 16 << 10
_BACKGROUND_THREADS = 3


def sha256(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


class Shelf:
    """A source whose streams give one content for each `let`; whatever is asked alone comes at once."""

    def __init__(self) -> None:
        self.contents: dict[bytes, Content] = {}
        self.streams: list[list[bytes]] = []
        self.alone: list[bytes] = []
        self.away = False
        self.held: dict[bytes, threading.Event] = {}
        self._let = threading.Semaphore(0)

    def put(self, content: bytes) -> bytes:
        digest = sha256(content)
        self.contents[digest] = content
        if len(content) >= LARGE_BYTES:
            starts = range(0, len(content), CHUNK_BYTES)
            pieces = [content[at : at + CHUNK_BYTES] for at in starts]
            self.contents.update((sha256(piece), piece) for piece in pieces)
            self.contents[digest] = [
                Chunk(at, len(piece), sha256(piece)) for at, piece in zip(starts, pieces, strict=True)
            ]
        return digest

    def let(self, count: int = 10_000) -> None:
        self._let.release(count)

    def fetch(self, digest: bytes) -> Iterator[bytes]:
        self.alone.append(digest)
        if digest in self.held:
            assert self.held[digest].wait(20)
        found = self.contents.get(digest)
        if not isinstance(found, bytes):
            raise NotFound("none")
        yield found

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, Content]]:
        if self.away:
            raise Unavailable("away")
        self.streams.append(list(digests))
        for digest in digests:
            self._let.acquire()
            if digest in self.contents:
                yield digest, self.contents[digest]

    def layout(self, digest: bytes) -> Sequence[Chunk] | None:
        self.alone.append(digest)
        found = self.contents.get(digest)
        return None if isinstance(found, bytes) else found

    def chunk(self, digest: bytes) -> bytes:
        return b"".join(self.fetch(digest))

    def document(self, name: str) -> None:
        return None


class Node:
    """A store that is filled from a shelf."""

    def __init__(self, root: Path, shelf: Shelf, patience_s: float = batch.PATIENCE_S) -> None:
        self.shelf = shelf
        self.wanted: set[bytes] | None = None  # all that there is
        self.store = ObjectStore(root / "public")
        self.store.prepare()
        self.pool = WorkPool(6, for_background=_BACKGROUND_THREADS)
        self.fetcher = Fetcher(
            self.store,
            root / "fetching",
            [self.shelf],
            self.pool,
            large_bytes=LARGE_BYTES,
            is_wanted=lambda digest: self.wanted is None or digest in self.wanted,
            patience_s=patience_s,
        )
        self.fetcher.prepare()
        self.prefetcher = Prefetcher(self.fetcher, [self.shelf], self.pool, large_bytes=LARGE_BYTES)

    def close(self) -> None:
        self.pool.close()
        self.fetcher.close()

    def soon(self, digests: Sequence[bytes], size_bytes: int) -> None:
        self.prefetcher.soon([Part(digest, size_bytes) for digest in digests])

    def open(self, digest: bytes, size_bytes: int) -> GearError | None:
        """As somebody who opens it and waits."""
        told: queue.Queue[GearError | None] = queue.Queue()
        self.fetcher.whole.fetch(digest, size_bytes, Urgency.ON_DEMAND, told.put)
        return told.get(timeout=20)

    def open_whole(self, digest: bytes, size_bytes: int) -> GearError | None:
        """As somebody who wants all of it."""
        told: queue.Queue[GearError | None] = queue.Queue()
        self.fetcher.fetch(digest, size_bytes, Urgency.BACKGROUND, told.put)
        return told.get(timeout=20)

    def read(self, digest: bytes, size_bytes: int, offset: int, length: int) -> bytes | GearError:
        """As somebody who reads a large object."""
        told: queue.Queue[bytes | GearError] = queue.Queue()

        def opened(large: object) -> None:
            assert isinstance(large, LargeObject)
            large.read(offset, length, told.put)

        self.fetcher.chunked.open(digest, size_bytes, Urgency.ON_DEMAND, opened)
        return told.get(timeout=20)

    def wait_for_threads(self) -> None:
        """Until they have done what nobody waits for."""
        meeting = threading.Barrier(_BACKGROUND_THREADS + 1)
        for _ in range(_BACKGROUND_THREADS):
            self.pool.submit(lambda: meeting.wait(20), Urgency.BACKGROUND)  # type: ignore[arg-type]
        meeting.wait(20)

    def wait_for(self, digests: Sequence[bytes]) -> None:
        wait_until(lambda: all(self.store.has(digest) for digest in digests))


def wait_until(is_so: Callable[[], object]) -> None:
    end_s = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end_s
        time.sleep(0.002)


@pytest.fixture
def patience_s() -> float:
    return batch.PATIENCE_S


@pytest.fixture
def node(tmp_path: Path, patience_s: float) -> Iterator[Node]:
    one = Node(tmp_path, Shelf(), patience_s)
    yield one
    one.shelf.let()
    one.close()


def small(node: Node, count: int, size_bytes: int = 100) -> list[bytes]:
    return [node.shelf.put(random.Random(number).randbytes(size_bytes)) for number in range(count)]


def test_many_small_objects_come_in_one_request_in_the_order_asked_for(node: Node) -> None:
    digests = small(node, 300)[::-1]
    node.shelf.let()
    node.soon(digests, 100)
    node.wait_for(digests)
    assert node.shelf.streams == [digests]
    assert node.shelf.alone == []
    wait_until(lambda: node.prefetcher.counts == PrefetchCounts(300, 30_000))


def test_the_next_request_begins_before_the_last_bytes_of_the_one_before(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_REQUEST_BYTES", 10_000)
    monkeypatch.setattr(batch, "_OVERLAP_BYTES", 2_000)
    digests = small(node, 20, 1000)
    node.soon(digests, 1000)
    node.shelf.let(7)
    wait_until(lambda: node.prefetcher.counts.contents == 7)
    assert len(node.shelf.streams) == 1
    node.shelf.let(1)
    wait_until(lambda: len(node.shelf.streams) == 2)
    assert [digest for stream in node.shelf.streams for digest in stream] == digests
    node.shelf.let()
    node.wait_for(digests)


@pytest.mark.parametrize("patience_s", [100.0])
def test_who_opens_what_a_stream_is_about_to_bring_has_it_from_there(node: Node) -> None:
    digests = small(node, 3)
    node.soon(digests, 100)
    wait_until(lambda: node.shelf.streams)
    threading.Timer(0.01, node.shelf.let).start()
    assert node.open(digests[2], 100) is None
    assert node.shelf.alone == []


def test_who_opens_what_comes_late_waits_a_moment_and_then_has_it_fetched(node: Node) -> None:
    digests = small(node, 3)
    node.soon(digests, 100)
    wait_until(lambda: node.shelf.streams)
    began_s = time.monotonic()
    assert node.open(digests[2], 100) is None
    assert time.monotonic() - began_s >= batch.PATIENCE_S
    assert node.shelf.alone == [digests[2]]
    node.shelf.let()
    node.wait_for(digests)


def test_what_was_fetched_in_the_meantime_is_left_out_of_later_requests(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_REQUEST_BYTES", 1000)
    monkeypatch.setattr(batch, "_OVERLAP_BYTES", 0)
    digests = small(node, 30)
    node.soon(digests, 100)
    wait_until(lambda: node.shelf.streams)
    assert node.open(digests[25], 100) is None
    assert node.shelf.alone == [digests[25]]
    node.shelf.let()
    node.wait_for(digests)
    assert [digest for stream in node.shelf.streams for digest in stream] == digests[:25] + digests[26:]


def test_of_a_large_object_only_the_chunks_that_were_read_come(node: Node) -> None:
    content = random.Random(9).randbytes(20 * CHUNK_BYTES)
    digest = node.shelf.put(content)
    node.shelf.let()
    ranges = ((5 * CHUNK_BYTES, 10), (2 * CHUNK_BYTES + 1, CHUNK_BYTES))
    node.prefetcher.soon([Part(digest, len(content), ranges)])
    wait_until(lambda: node.prefetcher.counts.contents == 3)
    chunks = [sha256(content[at * CHUNK_BYTES : (at + 1) * CHUNK_BYTES]) for at in (5, 2, 3)]
    assert node.shelf.streams == [[digest], chunks]
    assert node.read(digest, len(content), 5 * CHUNK_BYTES, 10) == content[5 * CHUNK_BYTES :][:10]
    assert node.shelf.alone == []
    node.fetcher.chunked.fill_idle(0.0)  # it has been read
    node.wait_for([digest])


def test_chunks_that_an_earlier_process_has_brought_do_not_come_again(node: Node, tmp_path: Path) -> None:
    content = random.Random(9).randbytes(20 * CHUNK_BYTES)
    digest = node.shelf.put(content)
    node.shelf.let()
    node.prefetcher.soon([Part(digest, len(content), ((0, 3 * CHUNK_BYTES),))])
    wait_until(lambda: node.prefetcher.counts.contents == 3)
    later = Node(tmp_path, node.shelf)
    node.shelf.streams.clear()
    later.prefetcher.soon([Part(digest, len(content), ((0, 5 * CHUNK_BYTES),))])
    wait_until(lambda: later.prefetcher.counts.contents == 2)
    chunks = [sha256(content[at * CHUNK_BYTES : (at + 1) * CHUNK_BYTES]) for at in (3, 4)]
    assert node.shelf.streams == [[digest], chunks]
    later.close()


def versions(node: Node) -> tuple[bytes, bytes]:
    """Two of a file of 20 chunks, the second with another chunk 7."""
    old = random.Random(9).randbytes(20 * CHUNK_BYTES)
    changed = random.Random(10).randbytes(CHUNK_BYTES)
    new = old[: 7 * CHUNK_BYTES] + changed + old[8 * CHUNK_BYTES :]
    node.shelf.put(old)
    node.shelf.put(new)
    node.shelf.let()
    return old, new


def test_chunks_that_another_object_has_are_not_fetched(node: Node) -> None:
    old, new = versions(node)
    node.prefetcher.soon([Part(sha256(old), len(old), ((0, 9 * CHUNK_BYTES),))])  # so far on its way
    wait_until(lambda: node.prefetcher.counts.contents == 9)
    node.shelf.streams.clear()
    node.prefetcher.soon([Part(sha256(new), len(new), ((0, 10 * CHUNK_BYTES),))])
    wait_until(lambda: node.prefetcher.counts.contents == 11)
    chunks = [sha256(new[at * CHUNK_BYTES : (at + 1) * CHUNK_BYTES]) for at in (7, 9)]
    assert node.shelf.streams == [[sha256(new)], chunks]
    assert node.read(sha256(new), len(new), 0, len(new)) == new
    rest = [sha256(new[at * CHUNK_BYTES : (at + 1) * CHUNK_BYTES]) for at in range(10, 20)]
    assert sorted(node.shelf.alone) == sorted(rest)
    assert node.fetcher.outcomes.reused_bytes == 8 * CHUNK_BYTES


def test_chunks_are_found_in_an_object_that_is_whole_also_by_the_next_process(node: Node, tmp_path: Path) -> None:
    old, new = versions(node)
    assert node.open_whole(sha256(old), len(old)) is None
    node.shelf.alone.clear()
    later = Node(tmp_path, node.shelf)
    assert later.open_whole(sha256(new), len(new)) is None
    assert node.shelf.alone == [sha256(new), sha256(new[7 * CHUNK_BYTES : 8 * CHUNK_BYTES])]
    later.close()


def test_a_chunk_that_is_rotten_here_is_fetched(node: Node) -> None:
    old, new = versions(node)
    assert node.open_whole(sha256(old), len(old)) is None
    path = Path(os.fsdecode(node.store.path(sha256(old))))
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(3 * CHUNK_BYTES)
        file.write(b"rotten")
    node.shelf.alone.clear()
    assert node.open_whole(sha256(new), len(new)) is None
    asked = [sha256(new[at * CHUNK_BYTES : (at + 1) * CHUNK_BYTES]) for at in (3, 7)]
    assert node.shelf.alone[0] == sha256(new) and sorted(node.shelf.alone[1:]) == sorted(asked)


@pytest.mark.parametrize("damage", [b"no database", None])
def test_without_the_index_of_chunks_they_are_fetched(node: Node, tmp_path: Path, damage: bytes | None) -> None:
    old, new = versions(node)
    assert node.open_whole(sha256(old), len(old)) is None
    node.fetcher.close()
    index = tmp_path / "fetching" / "chunks.sqlite"
    if damage is None:
        index.unlink()
        index.mkdir()
    else:
        index.write_bytes(damage * 1000)
    later = Node(tmp_path, node.shelf)
    node.shelf.alone.clear()
    assert later.open_whole(sha256(new), len(new)) is None
    assert len(node.shelf.alone) == 21
    later.close()


def test_an_object_that_is_gone_is_forgotten_by_the_index_of_chunks(node: Node) -> None:
    old, new = versions(node)
    assert node.open_whole(sha256(old), len(old)) is None
    node.store.remove(sha256(old))
    node.fetcher.chunked.forget_unwanted(0.0)
    index = node.fetcher.chunked._index
    assert index._do(lambda db: db.execute("SELECT count(*) FROM chunks").fetchone()) == (0,)
    node.shelf.alone.clear()
    assert node.open_whole(sha256(new), len(new)) is None
    assert len(node.shelf.alone) == 21


def test_a_large_object_that_nobody_reads_does_not_come_whole(node: Node) -> None:
    content = random.Random(9).randbytes(20 * CHUNK_BYTES)
    digest = node.shelf.put(content)
    node.shelf.let()
    node.prefetcher.soon([Part(digest, len(content), ((0, 1),))])
    wait_until(lambda: node.prefetcher.counts.contents == 1)
    node.fetcher.chunked.fill_idle(0.0)
    assert node.fetcher.chunked.get(digest) is not None and node.fetcher.arriving == 0
    assert node.shelf.alone == []


def test_what_was_brought_of_a_large_object_is_let_go_of_when_its_image_is_removed(node: Node, tmp_path: Path) -> None:
    contents = [random.Random(number).randbytes(20 * CHUNK_BYTES) for number in range(3)]
    wanted, read, unwanted = digests = [node.shelf.put(content) for content in contents]
    node.shelf.let()
    node.prefetcher.soon([Part(digest, 20 * CHUNK_BYTES, ((0, 1),)) for digest in digests])
    wait_until(lambda: node.prefetcher.counts.contents == 3)
    node.read(read, 20 * CHUNK_BYTES, 0, 5)
    node.wanted = {wanted}
    node.fetcher.chunked.forget_unwanted(60.0)
    assert [node.fetcher.chunked.get(digest) is None for digest in digests] == [False, False, True]
    assert {path.stem for path in (tmp_path / "fetching").iterdir()} == {wanted.hex(), read.hex(), "chunks"}
    assert node.read(unwanted, 20 * CHUNK_BYTES, 0, 5) == contents[2][:5]
    node.fetcher.chunked.forget_unwanted(0.0)
    assert [node.fetcher.chunked.get(digest) is None for digest in digests] == [False, True, True]
    assert {path.stem for path in (tmp_path / "fetching").iterdir()} == {wanted.hex(), "chunks"}


def test_a_large_object_on_its_way_is_let_go_of_when_its_image_is_removed(node: Node, tmp_path: Path) -> None:
    content = random.Random(9).randbytes(20 * CHUNK_BYTES)
    digest, first = node.shelf.put(content), sha256(content[:CHUNK_BYTES])
    held = node.shelf.held[first] = threading.Event()
    told: queue.Queue[GearError | None] = queue.Queue()
    node.fetcher.fetch(digest, len(content), Urgency.BACKGROUND, told.put)
    wait_until(lambda: first in node.shelf.alone)
    large = node.fetcher.chunked.get(digest)
    node.wanted = set()
    node.fetcher.chunked.forget_unwanted(0.0)
    assert isinstance(told.get(timeout=20), NotFound)
    held.set()
    node.wait_for_threads()
    assert node.fetcher.chunked.get(digest) is None and not node.store.has(digest)
    assert {path.stem for path in (tmp_path / "fetching").iterdir()} == {"chunks"}
    assert large is not None
    broken: queue.Queue[bytes | GearError] = queue.Queue()
    large.read(0, 5, broken.put)
    assert isinstance(broken.get(timeout=20), NotFound)
    node.wanted = None
    assert node.open_whole(digest, len(content)) is None
    assert node.store.has(digest)


def test_what_comes_when_no_image_wants_it_any_more_is_not_kept(node: Node, tmp_path: Path) -> None:
    small, large = b"small", random.Random(9).randbytes(20 * CHUNK_BYTES)
    digests = [node.shelf.put(content) for content in (small, large)]
    node.wanted = set()
    assert [node.open_whole(digest, len(content)) for digest, content in zip(digests, (small, large), strict=True)] == [
        None,
        None,
    ]
    node.shelf.let()
    node.soon([digests[0]], len(small))
    wait_until(lambda: len(node.shelf.streams) == 1 and not node.fetcher.arriving)
    assert [node.store.has(digest) for digest in digests] == [False, False]
    assert {path.stem for path in (tmp_path / "fetching").iterdir()} == {"chunks"}
    assert node.fetcher.outcomes.objects == 0


def test_a_large_object_that_a_stream_brings_is_let_go_of_when_the_stream_has_ended(node: Node, tmp_path: Path) -> None:
    content = random.Random(9).randbytes(20 * CHUNK_BYTES)
    digest, lacking = node.shelf.put(content), content[5 * CHUNK_BYTES : 6 * CHUNK_BYTES]
    del node.shelf.contents[sha256(lacking)]

    def is_let_go_of() -> bool:
        node.wanted = set()
        node.fetcher.chunked.forget_unwanted(0.0)
        node.wanted = None
        assert (node.fetcher.chunked.get(digest) is None) is not (tmp_path / "fetching" / digest.hex()).exists()
        return node.fetcher.chunked.get(digest) is None

    node.prefetcher.soon([Part(digest, len(content), ((0, 10 * CHUNK_BYTES),))])
    node.shelf.let(1)  # the layout
    wait_until(lambda: len(node.shelf.streams) == 2)
    assert not is_let_go_of()
    node.shelf.let(9)
    wait_until(lambda: node.prefetcher.counts.contents == 8)
    assert not is_let_go_of()
    coming = node.fetcher.chunked.get(digest)
    node.shelf.let()
    wait_until(is_let_go_of)
    assert node.prefetcher.counts.contents == 9
    assert coming is not None and not coming.claim(15)
    node.shelf.put(lacking)
    assert node.read(digest, len(content), 0, 5) == content[:5]
    node.fetcher.chunked.fill_idle(0.0)
    node.wait_for([digest])
    assert Path(os.fsdecode(node.store.path(digest))).read_bytes() == content
    assert node.fetcher.outcomes.failures == {}


def brought_by_a_stream(node: Node) -> bytes:
    """The digest of a large object that has come wholly by requests for many, and is here as it should be."""
    content = random.Random(9).randbytes(20 * CHUNK_BYTES)
    digest = node.shelf.put(content)
    node.shelf.let()
    node.prefetcher.soon([Part(digest, len(content), ((0, len(content)),))])
    node.wait_for([digest])
    assert Path(os.fsdecode(node.store.path(digest))).read_bytes() == content
    return digest


def test_a_large_object_that_a_stream_has_brought_is_not_let_go_of_while_it_is_verified(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(fd: int, digest: bytes) -> None:
        node.wanted = set()
        node.fetcher.chunked.forget_unwanted(0.0)
        node.wanted = None
        verify_file(fd, digest)

    monkeypatch.setattr(chunked, "verify_file", late)
    digest = brought_by_a_stream(node)
    wait_until(lambda: node.fetcher.chunked.get(digest) is None)
    assert node.fetcher.outcomes.failures == {}


class LateLayout(list[Chunk]):
    """A layout that is looked at when it is let."""

    def __init__(self, chunks: Content) -> None:
        super().__init__(chunk for chunk in chunks if isinstance(chunk, Chunk))
        self.is_looked_at, self.is_let = threading.Event(), threading.Event()

    def __iter__(self) -> Iterator[Chunk]:
        self.is_looked_at.set()
        assert self.is_let.wait(20)
        return super().__iter__()


@pytest.mark.parametrize("is_right", [True, False])
def test_who_opens_a_large_object_while_it_is_made_ready_gets_it(node: Node, is_right: bool) -> None:
    content = random.Random(9).randbytes(20 * CHUNK_BYTES)
    digest = node.shelf.put(content)
    layout = LateLayout(node.shelf.contents[digest])
    if not is_right:
        del layout[3]
    adopting = threading.Thread(target=node.fetcher.chunked.adopt_layout, args=(digest, len(content), layout))
    adopting.start()
    assert layout.is_looked_at.wait(20)
    told: queue.Queue[Opened] = queue.Queue()
    node.fetcher.chunked.open(digest, len(content), Urgency.ON_DEMAND, told.put)
    layout.is_let.set()
    adopting.join(20)
    opened = told.get(timeout=20)
    assert isinstance(opened, LargeObject) and opened is node.fetcher.chunked.get(digest)
    assert node.shelf.alone == ([] if is_right else [digest])
    assert node.open_whole(digest, len(content)) is None
    assert Path(os.fsdecode(node.store.path(digest))).read_bytes() == content


def test_a_large_object_that_is_made_ready_is_not_let_go_of(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    index = node.fetcher.chunked._index
    note = index.note

    def late(digest: bytes, layout: Sequence[Chunk]) -> None:
        node.wanted = set()
        node.fetcher.chunked.forget_unwanted(0.0)
        node.wanted = None
        note(digest, layout)

    monkeypatch.setattr(index, "note", late)
    brought_by_a_stream(node)


def test_who_reads_a_chunk_that_comes_late_has_it_fetched(node: Node) -> None:
    content = random.Random(9).randbytes(20 * CHUNK_BYTES)
    digest = node.shelf.put(content)
    node.prefetcher.soon([Part(digest, len(content), ((0, len(content)),))])
    node.shelf.let(1)  # the layout
    wait_until(lambda: len(node.shelf.streams) == 2)
    assert node.read(digest, len(content), 7 * CHUNK_BYTES, 5) == content[7 * CHUNK_BYTES :][:5]
    assert node.shelf.alone == [sha256(content[7 * CHUNK_BYTES : 8 * CHUNK_BYTES])]
    node.shelf.let()
    node.wait_for([digest])


def unreadable(*_: object) -> None:
    raise OSError(errno.EIO, "broken")


def unforeseen(*_: object) -> None:
    raise ValueError("broken")


@pytest.mark.parametrize(("fail", "error"), [(unreadable, Unavailable), (unforeseen, GearError)])
def test_a_disk_that_cannot_be_read_is_told_to_who_waits_for_the_whole(
    node: Node, monkeypatch: pytest.MonkeyPatch, fail: Callable[..., None], error: type[GearError]
) -> None:
    content = random.Random(9).randbytes(20 * CHUNK_BYTES)
    digest = node.shelf.put(content)
    with monkeypatch.context() as broken:
        broken.setattr(chunked, "verify_file", fail)
        assert isinstance(node.open_whole(digest, len(content)), error)
    assert node.open_whole(digest, len(content)) is None
    assert node.store.has(digest)


def test_who_wants_the_whole_of_what_broke_off_since_it_was_opened_is_told(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = random.Random(9).randbytes(20 * CHUNK_BYTES)
    digest = node.shelf.put(content)
    assert node.read(digest, len(content), 0, 1) == content[:1]
    opened = node.fetcher.chunked.get(digest)
    assert opened is not None
    told: list[GearError | None] = []
    with monkeypatch.context() as broken:
        broken.setattr(chunked, "verify_file", unreadable)
        assert isinstance(node.open_whole(digest, len(content)), Unavailable)
    node.fetcher.chunked.fill(digest, opened, told.append)
    assert [type(one) for one in told] == [Unavailable]


def test_a_read_of_chunks_that_cannot_be_had_is_told_once(node: Node) -> None:
    content = random.Random(9).randbytes(20 * CHUNK_BYTES)
    digest = node.shelf.put(content)
    for at in range(0, len(content), CHUNK_BYTES):
        del node.shelf.contents[sha256(content[at : at + CHUNK_BYTES])]
    told: list[bytes | GearError] = []
    assert isinstance(node.read(digest, len(content), 0, 1), NotFound)
    large = node.fetcher.chunked.get(digest)
    assert large is not None
    large.read(0, len(content), told.append)
    wait_until(lambda: told and not any(large._states))
    assert [type(one) for one in told] == [NotFound]


def test_a_full_disk_has_the_rest_of_a_large_object_asked_for_neither_wholly_nor_at_once_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    content = random.Random(9).randbytes(60 * CHUNK_BYTES)
    digest = node.shelf.put(content)
    assert node.read(digest, len(content), 0, 1) == content[:1]
    found = node.fetcher.chunked.get(digest)
    assert found is not None
    node.shelf.alone.clear()
    with monkeypatch.context() as small:
        small.setattr(partial_object, "pwrite_all", full)
        for _ in range(3):
            node.fetcher.chunked.fill_idle(0.0)
            wait_until(lambda: set(found._states) == {0, 3})
        assert 1 <= len(node.shelf.alone) <= 10
        assert isinstance(node.read(digest, len(content), 50 * CHUNK_BYTES, 1), ResourceExhausted)
    assert node.read(digest, len(content), 50 * CHUNK_BYTES, 1) == content[50 * CHUNK_BYTES :][:1]
    monkeypatch.setattr(chunked, "_AGAIN_S", 0.0)
    node.fetcher.chunked.fill_idle(0.0)
    node.wait_for([digest])


def test_a_large_object_of_which_a_chunk_cannot_be_had_is_named_until_it_is_whole(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked, "_AGAIN_S", 0.0)
    content = random.Random(9).randbytes(20 * CHUNK_BYTES)
    digest, lacking = node.shelf.put(content), content[5 * CHUNK_BYTES : 6 * CHUNK_BYTES]
    del node.shelf.contents[sha256(lacking)]
    assert isinstance(node.read(digest, len(content), 5 * CHUNK_BYTES, 1), NotFound)
    assert list(node.fetcher.outcomes.failures) == [digest]
    assert node.read(digest, len(content), 0, 1) == content[:1]
    node.shelf.put(lacking)
    assert node.read(digest, len(content), 5 * CHUNK_BYTES, 1) == lacking[:1]
    node.fetcher.chunked.fill_idle(0.0)
    node.wait_for([digest])
    wait_until(lambda: node.fetcher.outcomes.failures == {})


def test_wrong_and_missing_contents_of_a_stream_are_left_to_who_opens_them(node: Node) -> None:
    digests = small(node, 5)
    node.shelf.contents[digests[1]] = b"wrong"
    right = node.shelf.contents.pop(digests[3])
    node.shelf.let()
    node.soon(digests, 100)
    node.wait_for([digests[0], digests[2], digests[4]])
    wait_until(lambda: node.fetcher.arriving == 0)
    assert node.fetcher.outcomes.corrupt == 1
    assert node.shelf.alone == [] and node.fetcher.outcomes.failures == {}
    node.shelf.contents[digests[3]] = right
    assert node.open(digests[3], 100) is None


def test_a_request_that_cannot_be_made_for_an_unforeseen_reason_is_left_to_who_opens_what_it_was_for(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests, content = small(node, 3), random.Random(9).randbytes(20 * CHUNK_BYTES)
    digest = node.shelf.put(content)
    node.shelf.let()
    node.prefetcher.soon([Part(digest, len(content))])
    wait_until(lambda: node.fetcher.chunked.get(digest))
    opened = node.fetcher.chunked.get(digest)
    assert opened is not None
    node.shelf.streams.clear()
    looked_for = threading.Event()

    def fail(*_: object) -> None:
        looked_for.set()
        raise ValueError("broken")

    with monkeypatch.context() as broken:
        broken.setattr(node.fetcher.chunked._index, "find", fail)
        node.prefetcher.soon([*(Part(one, 100) for one in digests), Part(digest, len(content), ((0, 1),))])
        assert looked_for.wait(20)
        wait_until(lambda: node.fetcher.arriving == 0 and not any(opened._states))
    assert node.shelf.streams == []
    assert node.open(digests[2], 100) is None
    assert node.read(digest, len(content), 0, 5) == content[:5]


def test_what_is_wanted_wholly_comes_also_if_a_profiles_stream_was_to_bring_it_and_does_not(node: Node) -> None:
    digests = small(node, 3)
    late = node.shelf.contents.pop(digests[0])
    node.soon(digests, 100)
    wait_until(lambda: node.shelf.streams)
    node.prefetcher.wholly([(digests[0], 100)])
    wait_until(lambda: node.fetcher.whole._jobs[digests[0]].must_come)
    node.shelf.let(2)
    wait_until(lambda: node.prefetcher.counts.contents == 1)
    node.shelf.contents[digests[0]] = late
    node.shelf.let()
    node.wait_for(digests)


def test_a_source_that_is_away_leaves_nothing_behind(node: Node) -> None:
    digests = small(node, 5)
    node.shelf.away = True
    node.soon(digests, 100)
    wait_until(lambda: node.fetcher.arriving == 0)
    assert node.open(digests[0], 100) is None


def test_who_opens_what_a_stream_is_about_to_bring_has_a_source_asked_that_was_away_meanwhile(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(digest: bytes) -> Iterator[bytes]:
        raise Unavailable("away")

    digests, other = small(node, 3), node.shelf.put(b"other")
    node.soon(digests, 100)
    wait_until(lambda: node.shelf.streams)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(node.shelf, "fetch", away)
        assert isinstance(node.open(other, 5), Unavailable)
    assert node.open(digests[2], 100) is None
    assert node.shelf.alone == [digests[2]]


def test_a_full_disk_ends_a_prefetch_and_is_told_to_those_only_who_want_something(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise ResourceExhausted("no space left")

    monkeypatch.setattr(batch, "_REQUEST_BYTES", 1000)
    monkeypatch.setattr(batch, "_OVERLAP_BYTES", 0)
    digests = small(node, 30)
    monkeypatch.setattr(node.store, "create", full)
    node.shelf.let()
    node.soon(digests, 100)
    wait_until(lambda: node.shelf.streams and node.fetcher.arriving == 0)
    assert node.fetcher.outcomes.failures == {}
    assert isinstance(node.open(digests[20], 100), ResourceExhausted)
    assert node.shelf.streams == [digests[:10]]
