"""Storing an import's contents beside the thread that reads and hashes them."""

from __future__ import annotations

import queue
import threading
from types import TracebackType

from gearworkers.objects.inplace import put_in_place
from gearworkers.objects.spool import PushSpool
from gearworkers.objects.store import ObjectStore

_BATCH_CONTENTS = 128
_BATCH_BYTES = 1 << 20
_BATCHES_WAITING = 8

_Batch = list[tuple[bytes, bytes]]


class ContentWriter:
    """Takes contents with their digest and stores those that are new; a context manager, for one thread.

    What was put is stored when `flush` has returned, or the context has ended without an error.

    Attributes:
        new_objects: How many were new; right after `flush`.
        new_bytes: Their bytes.
    """

    def __init__(self, store: ObjectStore, staging_fd: int, spool: PushSpool | None, *, in_place: bool) -> None:
        self._store = store
        self._staging_fd = staging_fd
        self._spool = spool
        self._in_place = in_place
        self._batch: _Batch = []
        self._batch_bytes = 0
        self._queue: queue.Queue[_Batch | None] = queue.Queue(_BATCHES_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="contents", daemon=True)
        self.new_objects = 0
        self.new_bytes = 0

    def __enter__(self) -> ContentWriter:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._error = self._error or error
        self._hand_over()
        self._queue.put(None)
        self._thread.join()
        if kind is None:
            self._raise()

    def put(self, digest: bytes, data: memoryview) -> None:
        """Store *data*, whose SHA-256 the caller has computed; copied before the call returns.

        Raises:
            GearError: Of this or an earlier content.
        """
        self._batch.append((digest, bytes(data)))
        self._batch_bytes += len(data)
        if len(self._batch) >= _BATCH_CONTENTS or self._batch_bytes >= _BATCH_BYTES:
            self._hand_over()
            self._raise()

    def announce(self, digest: bytes) -> None:
        """The caller is about to store this object, which is not here, otherwise."""
        if self._spool is not None:
            self._spool.announce(digest)

    def stored(self, digest: bytes, size_bytes: int) -> None:
        """Note a new object that the caller has stored otherwise."""
        self.new_objects += 1
        self.new_bytes += size_bytes
        if self._spool is not None:
            self._spool.add(digest)

    def flush(self) -> None:
        """Wait until all that was put is stored.

        Raises:
            GearError: Of any of them.
        """
        self._hand_over()
        self._queue.join()
        self._raise()

    def _hand_over(self) -> None:
        self._queue.put(self._batch)
        self._batch, self._batch_bytes = [], 0

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        while (batch := self._queue.get()) is not None:
            try:
                if self._error is None:
                    self._store_all(batch)
            except BaseException as exc:
                self._error = exc
            finally:
                self._queue.task_done()

    def _store_all(self, batch: _Batch) -> None:
        store, staging_fd = self._store, self._staging_fd
        for digest, data in batch:
            if self._spool is not None and not store.has(digest):
                self._spool.announce(digest)
            if self._in_place:
                new = put_in_place(store, digest, memoryview(data), staging_fd)
            else:
                new = not store.has(digest) and store.put(digest, memoryview(data), staging_fd)
            if new:
                self.stored(digest, len(data))
