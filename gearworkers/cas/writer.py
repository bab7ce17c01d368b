"""Store the contents of an import, partly in a second process beside the one that reads and hashes the tar."""

from __future__ import annotations

from types import TracebackType

from gearworkers.cas.inplace import InPlaceLock, put_in_place
from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.store import ObjectStore
from gearworkers.cas.writer_process import WriterProcess

FORK_AFTER_BYTES = 8 << 20
FORK_AFTER_CONTENTS = 1000
"""After this many bytes or contents, a second process stores the rest of an import."""


class ContentWriter:
    """Stores contents under their digest if they are new. A context manager; use from one thread only.

    This process stores the first contents. Once there are many, a forked process stores the rest; it receives the
    contents through shared memory. A thread would wait for the interpreter lock at each of its system calls. All
    contents are stored when `flush` has returned. The caller calls `pause` before it waits for anything.

    Attributes:
        new_objects: The number of new objects; correct after `flush`.
        new_bytes: The sum of their sizes.

    Crash: the kernel ends the second process with this one. `inplace` and `store` document the leftovers of a write.
    """

    def __init__(
        self, store: ObjectStore, staging_fd: int, push_queue: PushQueue | None, in_place_lock: InPlaceLock
    ) -> None:
        self._store = store
        self._staging_fd = staging_fd
        self._push_queue = push_queue
        self._in_place_lock = in_place_lock
        self._is_private = False
        self._process: WriterProcess | None = None
        self._own_contents = self._own_bytes = 0  # stored by this process
        self.new_objects = 0
        self.new_bytes = 0

    def __enter__(self) -> ContentWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._in_place_lock.close()
        if self._process is not None:
            self._process.close()

    def put(self, digest: bytes, data: memoryview) -> None:
        """Store *data*, whose SHA-256 the caller has computed. The data are copied before the call returns.

        Args:
            digest: SHA-256 of data.
            data: At most `writer_process.MAX_CONTENT_BYTES`.

        Raises:
            GearError: This or an earlier content cannot be stored.
        """
        if self._process is not None:
            self._process.put(digest, data)
            return
        self.store_now(digest, data)
        self._own_contents += 1
        self._own_bytes += len(data)
        if self._own_contents >= FORK_AFTER_CONTENTS or self._own_bytes >= FORK_AFTER_BYTES:
            self._in_place_lock.close()  # otherwise both processes would share the lock
            self._process = WriterProcess(self, self._staging_fd)

    def pause(self) -> None:
        """Release the lock for storing in place, so that no process waits for this import; cheap."""
        self._in_place_lock.release()

    def disable_push(self) -> None:
        """Queue no objects for push. For Gear layers: the remote has their objects, or each node gets them inline."""
        self._push_queue = None

    def use_private_store(self, store: ObjectStore) -> None:
        """Store the following contents in *store*, which is not visible yet, and never push them.

        Call before the first content.
        """
        self._store = store
        self._push_queue = None
        self._is_private = True

    def announce(self, digest: bytes) -> None:
        """Announce for push an object that the caller is about to store without this writer."""
        if self._push_queue is not None:
            self._push_queue.announce(digest)

    def note_stored(self, digest: bytes, size_bytes: int) -> None:
        """Count, and queue for push, a new object that the caller has stored."""
        self.new_objects += 1
        self.new_bytes += size_bytes
        if self._push_queue is not None:
            self._push_queue.add(digest)

    def flush(self) -> None:
        """Wait until all contents are stored.

        Raises:
            GearError: A content cannot be stored.
        """
        if self._process is not None:
            new_objects, new_bytes = self._process.flush()
            self.new_objects += new_objects
            self.new_bytes += new_bytes

    def store_now(self, digest: bytes, data: memoryview) -> None:
        """Store a content in the calling process."""
        store, staging_fd = self._store, self._staging_fd
        if self._push_queue is not None and not store.has(digest):
            self._push_queue.announce(digest)
        if self._is_private or self._in_place_lock.acquire():
            new = put_in_place(store, digest, data, staging_fd)
        else:
            new = not store.has(digest) and store.put(digest, data, staging_fd)
        if new:
            self.note_stored(digest, len(data))

    def take_counts(self) -> tuple[int, int]:
        """Return `new_objects` and `new_bytes`, and reset both."""
        counts = self.new_objects, self.new_bytes
        self.new_objects = self.new_bytes = 0
        return counts
