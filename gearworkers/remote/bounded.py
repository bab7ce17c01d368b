"""A store with a limit on concurrent calls and on the time of each call."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeVar

from gearworkers.errors import Unavailable
from gearworkers.remote.blobstore import BlobStore, Document

T = TypeVar("T")
P = TypeVar("P")

_PUT_EXTRA_S = 0.05
"""Extra time for each blob of a put: an NFS server on disks syncs each file, and each name, on its own."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of a `BoundedStore`."""

    threads: int
    """Calls that run at once."""
    timeout_s: float
    """Time for one call, including the wait for a thread; a put gets _PUT_EXTRA_S more for each blob."""
    get_batch: int
    """Blobs of one `present` or `get_many` call."""
    put_batch: int
    """Blobs of one `put_many` call."""


class BoundedStore:
    """A `BlobStore` that makes a limited number of calls at once, each in bounded time; it splits large calls.

    A hung file system (NFS without its server) blocks a thread for as long as it hangs; the caller gets Unavailable
    after the timeout. While all threads are blocked, every call ends this way.
    """

    def __init__(self, blobs: BlobStore, limits: Limits) -> None:
        self._blobs = blobs
        self._limits = limits
        self._pool = _DaemonPool(limits.threads, limits.timeout_s)

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """Ask the store."""
        return set().union(*self._pool.map(self._blobs.present, _batches(digests, self._limits.get_batch)))

    def get(self, digest: bytes) -> bytes:
        """Ask the store."""
        return self._pool.call(lambda: self._blobs.get(digest))

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Ask the store."""
        batches = _batches(digests, self._limits.get_batch)
        for batch in self._pool.map(lambda batch: list(self._blobs.get_many(batch)), batches):
            yield from batch

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """Put them into the store."""
        batches = _batches(blobs, self._limits.put_batch)
        for _ in self._pool.map(self._blobs.put_many, batches, extra_s=lambda batch: len(batch) * _PUT_EXTRA_S):
            pass

    def get_document(self, name: str) -> Document | None:
        """Ask the store."""
        return self._pool.call(lambda: self._blobs.get_document(name))

    def put_document(self, name: str, document: Document) -> None:
        """Put it into the store."""
        self._pool.call(lambda: self._blobs.put_document(name, document))

    def close(self) -> None:
        """End the threads that do not hang, and close the store."""
        self._pool.close()
        self._blobs.close()


class _DaemonPool:
    """A thread pool that abandons calls after a timeout; threads that hang end with the process."""

    def __init__(self, threads: int, timeout_s: float) -> None:
        self._max_threads = threads
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = 0

    def call(self, call: Callable[[], T]) -> T:
        """Return the result of *call*; Unavailable after the timeout."""
        return self._result(self._submit(call))

    def map(
        self, call: Callable[[P], T], items: Iterable[P], extra_s: Callable[[P], float] = lambda _: 0.0
    ) -> Iterator[T]:
        """Yield the results of *call* for *items*, in order; as many calls run at once as there are threads.

        *extra_s* returns seconds that an item may take beyond the timeout.
        """
        pending: deque[tuple[Future[T], float]] = deque()
        for item in items:
            pending.append((self._submit(lambda item=item: call(item)), extra_s(item)))  # type: ignore[misc]
            if len(pending) >= self._max_threads:
                yield self._result(*pending.popleft())
        while pending:
            yield self._result(*pending.popleft())

    def close(self) -> None:
        """Let each thread end after its current call."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((future, call))  # type: ignore[arg-type]
        with self._lock:
            if self._started < self._max_threads:
                self._started += 1
                threading.Thread(target=self._work, name="remote", daemon=True).start()
        return future

    def _result(self, future: Future[T], extra_s: float = 0.0) -> T:
        timeout_s = self._timeout_s + extra_s
        try:
            return future.result(timeout_s)
        except TimeoutError as exc:
            future.cancel()
            raise Unavailable(f"a remote did not answer within {timeout_s:g} s; is its file system hung?") from exc

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, call = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = call()
            except BaseException as exc:
                future.set_exception(exc)
            else:
                future.set_result(result)
            del job, future, call


def _batches(items: Sequence[P], size: int) -> Iterator[Sequence[P]]:
    return (items[start : start + size] for start in range(0, len(items), size))
