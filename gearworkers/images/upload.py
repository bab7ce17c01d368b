"""Where the contents of a converted layer go: what the remote lacks is put there, many at once, in bounded memory."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from gearworkers.errors import FailedPrecondition, from_os_error
from gearworkers.remote import encoding
from gearworkers.remote.buffered import BufferedStore
from gearworkers.remote.remote import Remote

SMALL_BYTES = encoding.LARGE_BYTES
"""Contents below this size may be handed over in memory."""

_BATCH_CONTENTS = 512
_BATCH_BYTES = 2 << 20
_CALLS_AHEAD = 8
"""Batches or files that wait or are compressed: with _BATCH_BYTES and _PUT_BYTES the bound on memory."""
_PUT_BYTES = 32 << 20
"""So much, compressed, is put together: in a directory each put is synced."""
_THREADS = 4
_SHOWN_DIGESTS = 3


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of a layer's contents."""

    objects: int
    """Distinct contents that the layer names."""
    object_bytes: int
    new_objects: int
    """Of them, how many the remote did not have."""
    new_bytes: int


class Contents:
    """Takes contents and names of contents from one thread; made by `storing`."""

    def __init__(self, remote: Remote, directory: Path) -> None:
        self.directory = directory
        """For large ones on their way."""
        self._gathered = BufferedStore(remote.blobs, buffer_bytes=_PUT_BYTES)
        self._remote = Remote(self._gathered)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="put")
        self._room = threading.BoundedSemaphore(_CALLS_AHEAD)
        self._futures: list[Future[tuple[int, int]]] = []
        self._failed: list[Future[tuple[int, int]]] = []
        self._seen: dict[bytes, int] = {}
        self._batch: list[tuple[bytes, bytes]] = []
        self._batch_bytes = 0
        self._named: set[bytes] = set()

    def add(self, digest: bytes, data: bytes | memoryview) -> None:
        """A whole content below SMALL_BYTES, copied before this returns.

        Raises:
            GearError: An earlier one could not be put.
        """
        if digest in self._seen:
            return
        self._seen[digest] = len(data)
        self._batch.append((digest, bytes(data)))
        self._batch_bytes += len(data)
        if len(self._batch) >= _BATCH_CONTENTS or self._batch_bytes >= _BATCH_BYTES:
            self._send_batch()

    def add_file(self, digest: bytes, fd: int, size_bytes: int) -> None:
        """A content as a file; *fd* is closed when it was put, or will not be.

        Raises:
            GearError: An earlier one could not be put.
        """
        if digest in self._seen:
            os.close(fd)
            return
        self._seen[digest] = size_bytes
        self._submit(lambda: self._put_file(digest, fd, size_bytes), lambda: os.close(fd))

    def name(self, digest: bytes, size_bytes: int) -> None:
        """A content that is not here, but must be in the remote already."""
        self._seen.setdefault(digest, size_bytes)
        self._named.add(digest)

    def finish(self) -> Stored:
        """Wait until the remote has all of them, durable.

        Raises:
            GearError: One could not be put.
            FailedPrecondition: One that was only named is not there.
        """
        self._send_batch()
        new_objects = new_bytes = 0
        for future in self._futures:
            objects, size_bytes = future.result()
            new_objects += objects
            new_bytes += size_bytes
        self._gathered.flush()
        self._check_named()
        return Stored(len(self._seen), sum(self._seen.values()), new_objects, new_bytes)

    def close(self) -> None:
        """Drop what waits and let the threads end."""
        self._pool.shutdown(cancel_futures=True)

    def _send_batch(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if batch:
            self._submit(lambda: self._put_batch(batch), lambda: None)

    def _submit(self, call: Callable[[], tuple[int, int]], after: Callable[[], None]) -> None:
        """Have a thread do *call*, and then, or if it comes to nothing, *after*."""
        self._room.acquire()
        if self._failed:
            after()
            self._failed[0].result()
        future = self._pool.submit(call)
        future.add_done_callback(lambda done: self._done(done, after))
        self._futures.append(future)

    def _done(self, future: Future[tuple[int, int]], after: Callable[[], None]) -> None:
        if not future.cancelled() and future.exception() is not None:
            self._failed.append(future)
        after()
        self._room.release()

    def _put_batch(self, batch: list[tuple[bytes, bytes]]) -> tuple[int, int]:
        """Put what the remote lacks; how many contents, and how many bytes. The digests were just made of the bytes."""
        present = set(self._remote.has([digest for digest, _ in batch]))
        lacking = [(digest, data) for digest, data in batch if digest not in present]
        if lacking:
            self._remote.blobs.put_many([(digest, encoding.encode(data)) for digest, data in lacking])
        return len(lacking), sum(len(data) for _, data in lacking)

    def _put_file(self, digest: bytes, fd: int, size_bytes: int) -> tuple[int, int]:
        if self._remote.has([digest]):
            return 0, 0
        self._remote.put(digest, fd)
        return 1, size_bytes

    def _check_named(self) -> None:
        named = sorted(self._named)
        present = set(self._remote.has(named)) if named else set()
        missing = [digest.hex() for digest in named if digest not in present]
        if missing:
            shown = ", ".join(missing[:_SHOWN_DIGESTS])
            raise FailedPrecondition(
                f"the layer names {len(missing)} contents that the remote does not have, as {shown}; "
                "push them from the host that has them: `gear push`"
            )


@contextmanager
def storing(remote: Remote, directory: Path) -> Iterator[Contents]:
    """A Contents whose threads end with the block.

    Args:
        remote: Where the contents go.
        directory: Where files without names may be made for large ones.
    """
    contents = Contents(remote, directory)
    try:
        yield contents
    finally:
        contents.close()


@contextmanager
def nameless_file(what: str, directory: Path) -> Iterator[BinaryIO]:
    """An empty file in *directory*, made if it is not there, for *what*; ends with the block, or with a crash.

    Raises:
        GearError: In the block too, what the kernel says.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            yield file
    except OSError as exc:
        raise from_os_error(exc, f"keep {what} in {directory}, below GEAR_ROOT") from exc
