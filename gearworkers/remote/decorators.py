"""What a store of blobs is wrapped in: retry, a limit in number and time, a nearer store."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import structlog

from gearworkers.errors import GearError, IntegrityError, Unavailable
from gearworkers.remote import encoding
from gearworkers.remote.blobstore import BlobStore, Document
from gearworkers.util.retry import retried

_log = structlog.get_logger(__name__)

T = TypeVar("T")
P = TypeVar("P")

_PUT_MORE_S = 0.05
"""An NFS server on disks syncs each file, and each name, by itself."""
NEAR_REST_S = 30.0
"""So long a near store is left alone that has failed."""


class Retried:
    """Tries again what is retryable, within the bounds of `util.retry`; a stream goes on where it broke off."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    @retried
    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """As the store's."""
        return self._blobs.present(digests)

    @retried
    def get(self, digest: bytes) -> bytes:
        """As the store's."""
        return self._blobs.get(digest)

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """As the store's; what has come is not asked for again, and each that comes makes all attempts new."""
        missing = dict.fromkeys(digests)
        stream: Iterator[tuple[bytes, bytes]] | None = None

        @retried
        def advance() -> tuple[bytes, bytes] | None:
            nonlocal stream
            if stream is None:
                stream = self._blobs.get_many(list(missing)) if missing else iter(())
            try:
                return next(stream, None)
            except GearError:
                stream = None
                raise

        try:
            while (found := advance()) is not None:
                missing.pop(found[0], None)
                yield found
        finally:
            if isinstance(stream, Generator):
                stream.close()

    @retried
    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """As the store's."""
        self._blobs.put_many(blobs)

    @retried
    def get_document(self, name: str) -> Document | None:
        """As the store's."""
        return self._blobs.get_document(name)

    @retried
    def put_document(self, name: str, document: Document) -> None:
        """As the store's; AlreadyExists may mean that an earlier attempt had worked."""
        self._blobs.put_document(name, document)

    def close(self) -> None:
        """As the store's."""
        self._blobs.close()


class Bounded:
    """At most so many calls at once, each answered in bounded time; many blobs are split over the threads.

    A file system that hangs (NFS whose server is gone) takes the thread that asks, for ever; the caller is told after
    `timeout_s`. When all threads hang, callers wait that long in vain until one comes back.
    """

    def __init__(
        self, blobs: BlobStore, *, threads: int, timeout_s: float, together: int, put_together: int | None = None
    ) -> None:
        """
        Args:
            blobs: What is asked; it waits for itself.
            threads: How many calls run at once.
            timeout_s: For one call, waiting for a thread included; a put has _PUT_MORE_S more for each blob.
            together: So many blobs are asked for in one call.
            put_together: So many are put in one call; None for as many.
        """
        self._blobs = blobs
        self._crew = _Crew(threads, timeout_s)
        self._together = together
        self._put_together = put_together or together

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """As the store's."""
        return set().union(*self._crew.each(self._blobs.present, _parts(digests, self._together)))

    def get(self, digest: bytes) -> bytes:
        """As the store's."""
        return self._crew.call(lambda: self._blobs.get(digest))

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """As the store's."""
        for part in self._crew.each(lambda part: list(self._blobs.get_many(part)), _parts(digests, self._together)):
            yield from part

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """As the store's."""
        parts = _parts(blobs, self._put_together)
        for _ in self._crew.each(self._blobs.put_many, parts, more_s=lambda part: len(part) * _PUT_MORE_S):
            pass

    def get_document(self, name: str) -> Document | None:
        """As the store's."""
        return self._crew.call(lambda: self._blobs.get_document(name))

    def put_document(self, name: str, document: Document) -> None:
        """As the store's."""
        self._crew.call(lambda: self._blobs.put_document(name, document))

    def close(self) -> None:
        """End the threads that do not hang."""
        self._crew.close()
        self._blobs.close()


class Cached:
    """A nearer store before the one that counts: read first, filled as blobs come by; it may fail or lie.

    One that does not answer is left alone for `rest_s`, so that only the first of many who read waits for it.
    """

    def __init__(self, near: BlobStore, far: BlobStore, *, rest_s: float = NEAR_REST_S) -> None:
        self._near = near
        self._far = far
        self._rest_s = rest_s
        self._rests_until_s = 0.0

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """What the far store has: the near one may be emptied."""
        return self._far.present(digests)

    def get(self, digest: bytes) -> bytes:
        """From the near store, if it has it right."""
        found = self._from_near([digest])
        if digest in found:
            return found[digest]
        blob = self._far.get(digest)
        self._keep([(digest, blob)])
        return blob

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Those of the near store first."""
        found = self._from_near(digests)
        missing = [digest for digest in digests if digest not in found]
        yield from found.items()
        found.clear()
        for digest, blob in self._far.get_many(missing) if missing else ():
            self._keep([(digest, blob)])
            yield digest, blob

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """Into the far store, then the near one."""
        self._far.put_many(blobs)
        self._keep(blobs)

    def get_document(self, name: str) -> Document | None:
        """The far store's: documents change."""
        return self._far.get_document(name)

    def put_document(self, name: str, document: Document) -> None:
        """Into the far store."""
        self._far.put_document(name, document)

    def close(self) -> None:
        """Both."""
        self._near.close()
        self._far.close()

    def _from_near(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        if self._rests():
            return found
        try:
            for digest, blob in self._near.get_many(digests):
                if _is_right(digest, blob):
                    found[digest] = blob
        except GearError as exc:
            self._leave_alone("the near store does not answer; the remote is asked", exc)
        return found

    def _keep(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        if self._rests():
            return
        right = [(digest, blob) for digest, blob in blobs if _is_right(digest, blob)]
        try:
            self._near.put_many(right)
        except GearError as exc:
            self._leave_alone("the near store does not take a blob", exc)

    def _rests(self) -> bool:
        return time.monotonic() < self._rests_until_s

    def _leave_alone(self, what: str, error: GearError) -> None:
        self._rests_until_s = time.monotonic() + self._rest_s
        _log.warning(what, error=str(error), rest_s=self._rest_s)


class _Crew:
    """Threads that nobody waits for: at the end of the process those that hang are left behind."""

    def __init__(self, threads: int, timeout_s: float) -> None:
        self._most = threads
        self._timeout_s = timeout_s
        self._jobs: queue.SimpleQueue[tuple[Future[object], Callable[[], object]] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._started = 0

    def call(self, call: Callable[[], T]) -> T:
        """What *call* gives, or Unavailable when it takes too long."""
        return self._result(self._submit(call))

    def each(
        self, call: Callable[[P], T], items: Iterable[P], more_s: Callable[[P], float] = lambda _: 0.0
    ) -> Iterator[T]:
        """What *call* gives for each of *items*, in order; as many at once as there are threads.

        An item may take so much longer as *more_s* says.
        """
        waiting: deque[tuple[Future[T], float]] = deque()
        for item in items:
            waiting.append((self._submit(lambda item=item: call(item)), more_s(item)))  # type: ignore[misc]
            if len(waiting) >= self._most:
                yield self._result(*waiting.popleft())
        while waiting:
            yield self._result(*waiting.popleft())

    def close(self) -> None:
        """Let each thread end after what it is at."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _submit(self, call: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((future, call))  # type: ignore[arg-type]
        with self._lock:
            if self._started < self._most:
                self._started += 1
                threading.Thread(target=self._work, name="remote", daemon=True).start()
        return future

    def _result(self, future: Future[T], more_s: float = 0.0) -> T:
        timeout_s = self._timeout_s + more_s
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


def _parts(items: Sequence[P], size: int) -> Iterator[Sequence[P]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _is_right(digest: bytes, blob: bytes) -> bool:
    try:
        encoding.check(digest, blob)
    except IntegrityError as exc:
        _log.error("a store gave wrong bytes", error=str(exc))
        return False
    return True
