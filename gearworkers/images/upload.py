"""Upload the contents of a converted layer that the remote lacks, in parallel and in bounded memory."""

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
"""Contents below this size may be passed in memory."""

_BATCH_CONTENTS = 512
_BATCH_BYTES = 2 << 20
_MAX_PENDING_CALLS = 8
"""Batches and files that may be queued or in compression; limits memory, with _BATCH_BYTES and _PUT_BYTES."""
_PUT_BYTES = 32 << 20
"""Compressed bytes of one put; large, because a remote in a directory syncs once per put."""
_THREADS = 4
_SHOWN_DIGESTS = 3


@dataclass(frozen=True, slots=True)
class UploadedContents:
    """The contents of one layer, after `ContentUploader.finish`."""

    objects: int
    """Number of distinct contents that the layer names."""
    object_bytes: int
    new_objects: int
    """Number of these that the remote lacked."""
    new_bytes: int


class ContentUploader:
    """Puts a layer's contents into the remote; created by `uploading`, and used from one thread."""

    def __init__(self, remote: Remote, directory: Path) -> None:
        self.directory = directory
        """Directory for unnamed files that hold large contents."""
        self._buffered = BufferedStore(remote.blobs, buffer_bytes=_PUT_BYTES)
        self._remote = Remote(self._buffered)
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="put")
        self._free_slots = threading.BoundedSemaphore(_MAX_PENDING_CALLS)
        self._futures: list[Future[tuple[int, int]]] = []
        self._failed: list[Future[tuple[int, int]]] = []
        self._seen: dict[bytes, int] = {}
        self._batch: list[tuple[bytes, bytes]] = []
        self._batch_bytes = 0
        self._required: set[bytes] = set()

    def add(self, digest: bytes, data: bytes | memoryview) -> None:
        """Upload a whole content below SMALL_BYTES; *data* are copied before this returns.

        Raises:
            GearError: The upload of an earlier content failed.
        """
        if digest in self._seen:
            return
        self._seen[digest] = len(data)
        self._batch.append((digest, bytes(data)))
        self._batch_bytes += len(data)
        if len(self._batch) >= _BATCH_CONTENTS or self._batch_bytes >= _BATCH_BYTES:
            self._send_batch()

    def add_file(self, digest: bytes, fd: int, size_bytes: int) -> None:
        """Upload a content from a file; *fd* is closed afterwards, even without an upload.

        Raises:
            GearError: The upload of an earlier content failed.
        """
        if digest in self._seen:
            os.close(fd)
            return
        self._seen[digest] = size_bytes
        self._submit(lambda: self._put_file(digest, fd, size_bytes), lambda: os.close(fd))

    def require(self, digest: bytes, size_bytes: int) -> None:
        """Record a content without its bytes; `finish` checks that the remote has it."""
        self._seen.setdefault(digest, size_bytes)
        self._required.add(digest)

    def finish(self) -> UploadedContents:
        """Wait until the remote has stored all contents durably.

        Raises:
            GearError: An upload failed.
            FailedPrecondition: The remote lacks a required content.
        """
        self._send_batch()
        new_objects = new_bytes = 0
        for future in self._futures:
            objects, size_bytes = future.result()
            new_objects += objects
            new_bytes += size_bytes
        self._buffered.flush()
        self._check_required()
        return UploadedContents(len(self._seen), sum(self._seen.values()), new_objects, new_bytes)

    def close(self) -> None:
        """Drop queued uploads and end the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _send_batch(self) -> None:
        batch, self._batch, self._batch_bytes = self._batch, [], 0
        if batch:
            self._submit(lambda: self._put_batch(batch), lambda: None)

    def _submit(self, call: Callable[[], tuple[int, int]], after: Callable[[], None]) -> None:
        """Run *call* in a thread, then *after*, which runs even if *call* is cancelled."""
        self._free_slots.acquire()
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
        self._free_slots.release()

    def _put_batch(self, batch: list[tuple[bytes, bytes]]) -> tuple[int, int]:
        """Put the contents that the remote lacks, under the digests given; return their number and bytes."""
        present = set(self._remote.has([digest for digest, _ in batch]))
        missing = [(digest, data) for digest, data in batch if digest not in present]
        if missing:
            self._remote.blobs.put_many([(digest, encoding.encode(data)) for digest, data in missing])
        return len(missing), sum(len(data) for _, data in missing)

    def _put_file(self, digest: bytes, fd: int, size_bytes: int) -> tuple[int, int]:
        if self._remote.has([digest]):
            return 0, 0
        self._remote.put(digest, fd)
        return 1, size_bytes

    def _check_required(self) -> None:
        required = sorted(self._required)
        present = set(self._remote.has(required)) if required else set()
        missing = [digest.hex() for digest in required if digest not in present]
        if missing:
            shown = ", ".join(missing[:_SHOWN_DIGESTS])
            raise FailedPrecondition(
                f"the layer names {len(missing)} contents that are missing in the remote, such as {shown}; "
                "run `gear push` on the host that has them"
            )


@contextmanager
def uploading(remote: Remote, directory: Path) -> Iterator[ContentUploader]:
    """Yield a ContentUploader, whose threads end with the context.

    Args:
        remote: Receives the contents.
        directory: Directory for unnamed files that hold large contents.
    """
    contents = ContentUploader(remote, directory)
    try:
        yield contents
    finally:
        contents.close()


@contextmanager
def unnamed_file(kind: str, directory: Path) -> Iterator[BinaryIO]:
    """Yield an empty file without a name in *directory*, which is created if missing.

    The file disappears at the end of the context, or at a crash. It is on GEAR_ROOT's disk, since /tmp may be memory.

    Args:
        kind: Description of the file's data, for messages.
        directory: Directory on the file system that stores the data.

    Raises:
        GearError: The file system fails, here or inside the context.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory) as file:
            yield file
    except OSError as exc:
        raise from_os_error(exc, f"store {kind} in {directory}, below GEAR_ROOT") from exc
