"""Contents on their way into the store: alone, by the process beside, and when something fails."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from gearworkers.cas import writer as module
from gearworkers.cas.inplace import InPlaceLock, forbid, put_in_place
from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.store import ObjectStore
from gearworkers.cas.writer import MAX_CONTENT_BYTES, ContentWriter
from gearworkers.errors import GearError, ResourceExhausted
from gearworkers.util import syscalls as kernel
from tests.support.processes import PATIENCE_S, wait_until


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    store = ObjectStore(tmp_path / "public")
    store.prepare()
    return store


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def bursts(tmp_path: Path) -> InPlaceLock:
    return InPlaceLock(tmp_path)


def put(writer: ContentWriter, content: bytes) -> bytes:
    digest = hashlib.sha256(content).digest()
    writer.put(digest, memoryview(content))
    return digest


def content_of(store: ObjectStore, digest: bytes) -> bytes:
    fd = store.open(digest)
    with open(fd, "rb") as file:
        return file.read()


def children() -> list[str]:
    return Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()


@pytest.fixture
def others() -> set[str]:
    """The children that other tests' fixtures have."""
    return set(children())


def go_beside(writer: ContentWriter) -> int:
    """Put until another process stores; its pid."""
    before = set(children())
    for number in range(module._ALONE_CONTENTS):
        put(writer, b"alone %d" % number)
    (pid,) = set(children()) - before
    return int(pid)


@pytest.mark.parametrize("in_place", [True, False])
def test_contents_of_all_sizes_are_stored_whole_beside(
    store: ObjectStore, staging: int, bursts: InPlaceLock, in_place: bool, others: set[str], tmp_path: Path
) -> None:
    """More of them than the ring holds, the largest included."""
    if not in_place:
        forbid(tmp_path)
    sizes = [
        1,
        2,
        4096,
        1 << 20,
        MAX_CONTENT_BYTES,
        *range(5000, 6500),
        MAX_CONTENT_BYTES,
        3 << 20,
        1,
        MAX_CONTENT_BYTES - 1,
    ]
    contents = [(b"%d " % number) * (size // 4 + 1) for number, size in enumerate(sizes)]
    contents = [content[:size] for content, size in zip(contents, sizes, strict=True)]
    with ContentWriter(store, staging, None, bursts) as writer:
        go_beside(writer)
        digests = [put(writer, content) for content in contents]
        writer.flush()
        assert writer.new_objects == module._ALONE_CONTENTS + len(set(contents))
    for digest, content in zip(digests, contents, strict=True):
        assert content_of(store, digest) == content
    assert not set(children()) - others


@pytest.mark.slow
def test_very_many_tiny_contents_keep_neither_side_waiting(
    store: ObjectStore, staging: int, bursts: InPlaceLock
) -> None:
    """All fit into the ring, so nobody hears the acknowledgements for want of room."""
    content = b"the same"
    digest = hashlib.sha256(content).digest()
    with ContentWriter(store, staging, None, bursts) as writer:
        go_beside(writer)
        for _ in range(200_000):
            writer.put(digest, memoryview(content))
        writer.flush()
        assert writer.new_objects == module._ALONE_CONTENTS + 1


def test_a_full_ring_waits_only_for_what_is_under_way(
    store: ObjectStore, staging: int, bursts: InPlaceLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process may have acknowledged all by the time it is found to be full."""
    hear = module._WriterProcess._hear
    is_deaf = True
    pauses_s = [0.5]  # what is under way is done by then

    def hear_late(beside: module._WriterProcess, flags: int = 0) -> bytes:
        if flags and is_deaf:
            return b""
        if flags and pauses_s:
            time.sleep(pauses_s.pop())
        return hear(beside, flags)

    monkeypatch.setattr(module._WriterProcess, "_hear", hear_late)
    with ContentWriter(store, staging, None, bursts) as writer:
        go_beside(writer)
        for number in range(5):
            put(writer, bytes([number + 1]) * (3 << 20))
        put(writer, b"not handed over yet")
        is_deaf = False
        put(writer, b"\xff" * (3 << 20))
        writer.flush()


def test_the_writer_process_queues_new_objects_for_push(
    store: ObjectStore, staging: int, bursts: InPlaceLock, tmp_path: Path
) -> None:
    (tmp_path / "push").mkdir()
    push_queue = PushQueue(tmp_path / "push", store)
    with ContentWriter(store, staging, push_queue, bursts) as writer:
        go_beside(writer)
        digest = put(writer, b"new")
        writer.flush()
    assert digest in set(push_queue.pending())


def test_a_killed_process_is_a_clear_error(
    store: ObjectStore, staging: int, bursts: InPlaceLock, others: set[str]
) -> None:
    with pytest.raises(GearError, match="was killed"), ContentWriter(store, staging, None, bursts) as writer:
        os.kill(go_beside(writer), signal.SIGKILL)
        put(writer, b"more")
        writer.flush()
    assert not set(children()) - others


def test_an_error_beside_is_told_as_what_it_is(
    store: ObjectStore, staging: int, bursts: InPlaceLock, monkeypatch: pytest.MonkeyPatch, others: set[str]
) -> None:
    monkeypatch.setattr(os, "setxattr", _failing_after(module._ALONE_CONTENTS, os.setxattr))
    with (
        pytest.raises(ResourceExhausted, match="No space"),
        ContentWriter(store, staging, None, bursts) as writer,
    ):
        go_beside(writer)
        for number in range(5000):
            put(writer, b"more %d" % number)
        writer.flush()
    assert not set(children()) - others


def test_an_error_of_the_early_writeback_is_not_lost(
    store: ObjectStore, staging: int, bursts: InPlaceLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells it once."""

    def fail(_: int) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(kernel, "syncfs", fail)
    monkeypatch.setattr(module, "_WRITEBACK_BYTES", 1 << 20)
    with pytest.raises(GearError, match="to the disk"), ContentWriter(store, staging, None, bursts) as writer:
        go_beside(writer)
        put(writer, bytes(2 << 20))
        writer.flush()


def test_a_process_that_is_killed_while_it_stores_in_place_keeps_nobody_from_forbidding_it(
    store: ObjectStore, staging: int, bursts: InPlaceLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent, which may wait for its tar for long, has not noticed."""

    def put_or_stand_still(store: ObjectStore, digest: bytes, data: memoryview, staging_fd: int) -> bool:
        if bytes(data) == b"never":
            (tmp_path / "burst").touch()
            signal.pause()
        return put_in_place(store, digest, data, staging_fd)

    monkeypatch.setattr(module, "put_in_place", put_or_stand_still)
    with ContentWriter(store, staging, None, bursts) as writer:
        pid = go_beside(writer)
        put(writer, b"never")
        assert writer._beside is not None
        writer._beside._hand_over()
        wait_until((tmp_path / "burst").exists, "the process stores")
        forbidding = threading.Thread(target=forbid, args=(tmp_path,), daemon=True)
        forbidding.start()
        os.kill(pid, signal.SIGKILL)
        forbidding.join(PATIENCE_S)
        assert not forbidding.is_alive()


def test_a_broken_off_import_leaves_no_process(
    store: ObjectStore, staging: int, bursts: InPlaceLock, others: set[str]
) -> None:
    with pytest.raises(KeyError), ContentWriter(store, staging, None, bursts) as writer:
        go_beside(writer)
        raise KeyError
    assert not set(children()) - others


def _failing_after(count: int, call):  # type: ignore[no-untyped-def]  # stands in for os.setxattr
    def counted(*arguments: object) -> None:
        nonlocal count
        count -= 1
        if count < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        call(*arguments)

    return counted
