"""ContentWriter: contents stored by this process, by the second process, and failures of both."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import pytest

from gearworkers.cas import writer as writer_module
from gearworkers.cas import writer_process
from gearworkers.cas.inplace import InPlaceLock, forbid_in_place, put_in_place
from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.store import ObjectStore
from gearworkers.cas.writer import FORK_AFTER_CONTENTS, ContentWriter
from gearworkers.cas.writer_process import BATCH_CONTENTS, MAX_CONTENT_BYTES, WriterProcess
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
def in_place_lock(tmp_path: Path) -> InPlaceLock:
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
def earlier_children() -> set[str]:
    """Return the child processes of other tests' fixtures."""
    return set(children())


def start_process(writer: ContentWriter) -> int:
    """Put contents until a second process stores; return its pid."""
    before = set(children())
    for number in range(FORK_AFTER_CONTENTS):
        put(writer, b"first %d" % number)
    (pid,) = set(children()) - before
    return int(pid)


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.slow
def test_the_second_process_stores_contents_of_all_sizes(
    store: ObjectStore,
    staging: int,
    in_place_lock: InPlaceLock,
    in_place: bool,
    earlier_children: set[str],
    tmp_path: Path,
) -> None:
    """The contents are larger than the ring, and some have the maximum size."""
    if not in_place:
        forbid_in_place(tmp_path)
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
    with ContentWriter(store, staging, None, in_place_lock) as writer:
        start_process(writer)
        digests = [put(writer, content) for content in contents]
        writer.flush()
        assert writer.new_objects == FORK_AFTER_CONTENTS + len(set(contents))
    for digest, content in zip(digests, contents, strict=True):
        assert content_of(store, digest) == content
    assert not set(children()) - earlier_children


@pytest.mark.slow
def test_200000_tiny_contents_do_not_block_either_process(
    store: ObjectStore, staging: int, in_place_lock: InPlaceLock
) -> None:
    """All contents fit into the ring, so the parent never reads acknowledgements for lack of space."""
    content = b"the same"
    digest = hashlib.sha256(content).digest()
    with ContentWriter(store, staging, None, in_place_lock) as writer:
        start_process(writer)
        for _ in range(200_000):
            writer.put(digest, memoryview(content))
        writer.flush()
        assert writer.new_objects == FORK_AFTER_CONTENTS + 1


class BlockedWriter:
    """A local writer that stores nothing until the file *go* exists, and creates a file per content."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.go = directory / "go"

    def store_now(self, digest: bytes, data: memoryview, /) -> None:
        wait_until(self.go.exists, "the test lets the process store")
        self.stored(digest).touch()

    def stored(self, digest: bytes) -> Path:
        return self._directory / digest.hex()

    def pause(self) -> None:
        pass

    def take_counts(self) -> tuple[int, int]:
        return 0, 0


def test_a_full_ring_waits_only_for_batches_that_were_sent(staging: int, tmp_path: Path) -> None:
    """The process may have acknowledged all batches before the parent finds the ring full."""
    writer = BlockedWriter(tmp_path)
    with closing(WriterProcess(writer, staging)) as process:
        for number in range(5):
            process.put(bytes([number]) * 32, memoryview(bytes(3 << 20)))
        process.put(bytes([5]) * 32, memoryview(b"in a batch that is not sent yet"))
        writer.go.touch()
        wait_until(writer.stored(bytes([4]) * 32).exists, "the sent batches are stored")
        process.put(bytes([6]) * 32, memoryview(bytes(3 << 20)))
        process.flush()
    assert writer.stored(bytes([6]) * 32).exists()


@pytest.mark.slow
def test_the_writer_process_queues_new_objects_for_push(
    store: ObjectStore, staging: int, in_place_lock: InPlaceLock, tmp_path: Path
) -> None:
    (tmp_path / "push").mkdir()
    push_queue = PushQueue(tmp_path / "push", store)
    with ContentWriter(store, staging, push_queue, in_place_lock) as writer:
        start_process(writer)
        digest = put(writer, b"new")
        writer.flush()
    assert digest in set(push_queue.pending())


def test_a_killed_second_process_raises_a_clear_error(
    store: ObjectStore, staging: int, in_place_lock: InPlaceLock, earlier_children: set[str]
) -> None:
    with pytest.raises(GearError, match="was killed"), ContentWriter(store, staging, None, in_place_lock) as writer:
        os.kill(start_process(writer), signal.SIGKILL)
        put(writer, b"more")
        writer.flush()
    assert not set(children()) - earlier_children


def test_an_error_of_the_second_process_keeps_its_class(
    store: ObjectStore,
    staging: int,
    in_place_lock: InPlaceLock,
    monkeypatch: pytest.MonkeyPatch,
    earlier_children: set[str],
) -> None:
    monkeypatch.setattr(os, "setxattr", _failing_after(FORK_AFTER_CONTENTS, os.setxattr))
    with (
        pytest.raises(ResourceExhausted, match="No space"),
        ContentWriter(store, staging, None, in_place_lock) as writer,
    ):
        start_process(writer)
        for number in range(5000):
            put(writer, b"more %d" % number)
        writer.flush()
    assert not set(children()) - earlier_children


def test_an_error_of_the_early_sync_is_raised(
    store: ObjectStore, staging: int, in_place_lock: InPlaceLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports the error once."""

    def fail(_: int) -> NoReturn:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(kernel, "syncfs", fail)
    monkeypatch.setattr(writer_process, "WRITEBACK_BYTES", 1 << 20)
    with pytest.raises(GearError, match="to the disk"), ContentWriter(store, staging, None, in_place_lock) as writer:
        start_process(writer)
        put(writer, bytes(2 << 20))
        writer.flush()


def test_a_process_killed_while_it_stores_in_place_does_not_block_forbid(
    store: ObjectStore, staging: int, in_place_lock: InPlaceLock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parent has not noticed yet; it may wait long for its tar."""

    def put_or_wait_forever(store: ObjectStore, digest: bytes, data: memoryview, staging_fd: int) -> bool:
        if bytes(data) == b"blocks":
            (tmp_path / "storing").touch()
            signal.pause()
        return put_in_place(store, digest, data, staging_fd)

    monkeypatch.setattr(writer_module, "put_in_place", put_or_wait_forever)
    with ContentWriter(store, staging, None, in_place_lock) as writer:
        pid = start_process(writer)
        put(writer, b"blocks")
        for number in range(BATCH_CONTENTS):
            put(writer, b"completes the batch %d" % number)
        wait_until((tmp_path / "storing").exists, "the second process stores")
        forbidding = threading.Thread(target=forbid_in_place, args=(tmp_path,), daemon=True)
        forbidding.start()
        os.kill(pid, signal.SIGKILL)
        forbidding.join(PATIENCE_S)
        assert not forbidding.is_alive()


def test_an_import_that_fails_leaves_no_process(
    store: ObjectStore, staging: int, in_place_lock: InPlaceLock, earlier_children: set[str]
) -> None:
    with pytest.raises(KeyError), ContentWriter(store, staging, None, in_place_lock) as writer:
        start_process(writer)
        raise KeyError
    assert not set(children()) - earlier_children


def _failing_after(count: int, call):  # type: ignore[no-untyped-def]  # stands in for os.setxattr
    def counted(*arguments: object) -> None:
        nonlocal count
        count -= 1
        if count < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        call(*arguments)

    return counted


_FORKS_BESIDE_CALLS = """
import os, sys, threading, time
from gearworkers.containerd.client import connected
from tests.support.fake_containerd import FakeContainerd
from pathlib import Path

directory = Path(sys.argv[1])
FakeContainerd(directory / "socket", directory).start()

def call():
    with connected(directory / "socket") as client:
        while True:
            client.content_directory()

for _ in range(2):
    threading.Thread(target=call, daemon=True).start()
statuses = set()
for _ in range(50):
    pid = os.fork()
    if not pid:
        os.closerange(3, 1024)
        time.sleep(0.02)
        os._exit(0)
    statuses.add(os.waitpid(pid, 0)[1])
print(statuses, flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_a_forked_process_survives_calls_of_grpc(tmp_path: Path) -> None:
    """A worker process may have called containerd before it forks the process that stores contents."""
    command = [sys.executable, "-c", _FORKS_BESIDE_CALLS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.stdout == "{0}\n", done.stderr
