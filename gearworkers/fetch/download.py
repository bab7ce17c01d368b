"""The download of one object: a state machine, shared by all readers of the object.

    QUEUED ──► OPENING ──► FETCHING ──► VERIFYING ──► STORED
       └──────────┴───────────┴─────────────┴───────► FAILED

A small object starts in FETCHING and has one chunk. A large object is QUEUED until a thread is free, and OPENING while
its layout is looked up. If a source keeps it in chunks, it can be read in FETCHING; otherwise it has one chunk, like a
small object. STORED and FAILED are final: the fetcher forgets the download, and the next reader starts a new one.

`DownloadChunks` has the states of the chunks while the object is in FETCHING.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from enum import Enum, auto
from functools import partial

import structlog

from gearworkers.errors import GearError, IntegrityError, NotFound, from_os_error
from gearworkers.fetch.context import FetchContext
from gearworkers.fetch.download_chunks import DownloadChunks
from gearworkers.fetch.futures import completed, copy_outcome, failed
from gearworkers.fetch.priority_pool import Priority
from gearworkers.fetch.source import Chunk, checked_layout
from gearworkers.fetch.targets import Target, open_target

_log = structlog.get_logger(__name__)


class DownloadState(Enum):
    """The state of a download; the module's docstring has the transitions."""

    QUEUED = auto()
    OPENING = auto()
    FETCHING = auto()
    VERIFYING = auto()
    STORED = auto()
    FAILED = auto()


class Download:
    """The download of one object; any thread may call all methods, and none blocks unless it says so."""

    __slots__ = (
        "_chunks",
        "_context",
        "_forget",
        "_opened",
        "_opening_requested_s",
        "_priority",
        "_stored",
        "_target",
        "digest",
        "error",
        "last_read_s",
        "size_bytes",
        "state",
    )

    def __init__(
        self,
        context: FetchContext,
        digest: bytes,
        size_bytes: int,
        target: Target | None,
        forget: Callable[[Download], None],
    ) -> None:
        """
        Args:
            context: The fetcher's context.
            digest: SHA-256 of the object.
            size_bytes: Its size.
            target: The target of an object that is fetched whole; None for a large object, whose layout must be looked
                up.
            forget: Called with this download, under the lock, when it ends.
        """
        self._context = context
        self._forget = forget
        self.digest = digest
        self.size_bytes = size_bytes
        self.state = DownloadState.QUEUED if target is None else DownloadState.FETCHING
        self.error: GearError | None = None
        """Why the download failed."""
        self.last_read_s = math.inf
        """Monotonic time of the last open or read; infinite before the first."""
        self._target = target
        self._chunks = DownloadChunks(context, target, self) if target is not None else None
        self._priority = Priority.BACKGROUND
        self._opening_requested_s = 0.0
        self._opened: Future[Download | None] | None = None
        self._stored: Future[None] | None = None

    @property
    def chunks(self) -> DownloadChunks:
        """The chunks, from FETCHING on."""
        assert self._chunks is not None
        return self._chunks

    @property
    def is_readable(self) -> bool:
        """Whether `read` can be called: the object comes in chunks, and its layout is known."""
        return self._chunks is not None and self._chunks.is_readable

    @property
    def is_arriving(self) -> bool:
        """Whether the object is being fetched; False if only its layout was prefetched."""
        is_fetched = self.state in (DownloadState.FETCHING, DownloadState.VERIFYING)
        return is_fetched and (not self.is_readable or self.last_read_s < math.inf)

    # -- for readers

    def open(self, priority: Priority) -> Future[Download | None]:
        """Prepare the object for reading.

        Returns:
            This download as soon as `read` can be called, or None when the object is in the store.
        """
        with self._context.lock:
            if self.state is DownloadState.STORED:
                return completed(None)
            if self.error is not None:
                return failed(self.error)
            if self.is_readable:
                self.last_read_s = time.monotonic()
                return completed(self)
            is_first = self._opened is None
            opened = self._opened = self._opened or Future()
            self._priority = min(self._priority, priority)
            if self.state is DownloadState.FETCHING:
                self.chunks.request((0,), priority)
            elif self.state is DownloadState.QUEUED and (is_first or priority is Priority.ON_DEMAND):
                self._opening_requested_s = time.monotonic()
                self._context.pool.submit(self._open, priority)
            return opened

    @property
    def fd(self) -> int:
        """The descriptor of the file from which a readable object is read."""
        return self.chunks.file.fd

    def read(self, offset: int, size_bytes: int) -> Future[bytes]:
        """Return verified bytes of a readable object as soon as their chunks are stored; fewer only at the end."""
        self.last_read_s = time.monotonic()
        return self.chunks.read(offset, size_bytes)

    def store(self, priority: Priority) -> Future[None]:
        """Fetch all chunks of a readable object.

        Returns:
            Done when the object is in the store. With ON_DEMAND, it fails if a chunk cannot be fetched. With another
            priority, it stays pending: `Fetcher.fill_idle` tries the chunk again.
        """
        result: Future[None] = Future()
        with self._context.lock:
            if self.state is DownloadState.STORED:
                return completed(None)
            if self.error is not None:
                return failed(self.error)
            stored = self._stored = self._stored or Future()
            if priority is not Priority.ON_DEMAND:
                self.require()
            elif not self.chunks.wait_for_all(partial(_chunks_done, stored, result)):
                return stored  # it is being verified
        if priority is Priority.ON_DEMAND:
            return result
        self.chunks.fill()
        return stored

    def require(self) -> None:
        """Fetch a chunk alone if the batch request that claimed it does not deliver it."""
        if self._chunks is not None:
            self._chunks.require()

    # -- opening

    def adopt_layout(self, layout: Sequence[Chunk]) -> None:
        """Make a QUEUED object readable with the layout from a batch request; blocks.

        If the layout is wrong, the sources are asked for it, provided that a reader waits.
        """
        if not self._begin_opening():
            return
        try:
            self._look_up(lambda: checked_layout(layout, self.size_bytes))
        except IntegrityError as exc:
            self._context.stats.note_corrupt(exc)
            self._open_again()
        except GearError as exc:
            _log.warning("cannot prepare a large object", object=self.digest.hex(), error=str(exc))
            self._open_again()
        except BaseException:
            self._open_again()
            raise

    def _open(self) -> None:
        if not self._begin_opening():
            return  # another thread was first
        try:
            self._look_up(
                lambda: self._context.failover.layout(self.digest, self.size_bytes, self._opening_requested_s)
            )
        except GearError as exc:
            self.fail(exc)
        except BaseException as exc:
            self.fail(GearError(f"object {self.digest.hex()}: {exc!r}"))
            raise

    def _begin_opening(self) -> bool:
        with self._context.lock:
            if self.state is not DownloadState.QUEUED:
                return False
            self.state = DownloadState.OPENING
            return True

    def _look_up(self, get_layout: Callable[[], Sequence[Chunk] | None]) -> None:
        if self._context.store.has(self.digest):
            self._end(None)
            return
        target = open_target(self._context, self.digest, self.size_bytes, get_layout)
        chunks = DownloadChunks(self._context, target, self)
        with self._context.lock:
            self._target, self._chunks = target, chunks
            self.state = DownloadState.FETCHING
            if not chunks.is_readable:
                chunks.request((0,), self._priority)
                return
            opened, self._opened = self._opened, None
            if opened is not None:
                self.last_read_s = time.monotonic()
        if opened is not None:
            opened.set_result(self)

    def _open_again(self) -> None:
        with self._context.lock:
            if self._opened is None:
                self.drop(NotFound(f"object {self.digest.hex()}: its layout was wrong"))
                return
            self.state = DownloadState.QUEUED
            self._opening_requested_s = time.monotonic()
        self._context.pool.submit(self._open, Priority.ON_DEMAND)

    # -- for the chunks

    @property
    def is_awaited(self) -> bool:
        """Whether a caller of `open` waits; call it under the lock."""
        return self._opened is not None

    def begin_verifying(self) -> None:
        """Enter VERIFYING, after the last chunk is stored; call it under the lock. `publish` follows."""
        self.state = DownloadState.VERIFYING

    def publish(self) -> None:
        """Verify the object and add it to the store; blocks. The waiting callers get a result in every case."""
        assert self._target is not None
        try:
            self._target.publish()
        except GearError as exc:
            self.fail(exc)
        except OSError as exc:
            self.fail(from_os_error(exc, f"verify object {self.digest.hex()}"))
        except BaseException as exc:
            self.fail(GearError(f"object {self.digest.hex()}: {exc!r}"))
            raise
        else:
            self._end(None)

    def fail(self, error: GearError) -> None:
        """End the download and report *error* to its callers."""
        self._end(error)

    def drop(self, error: GearError) -> None:
        """End a download for which no caller waits; call it under the lock."""
        self._close(error)

    # -- the end

    def discard_if_idle(self, idle_s: float) -> bool:
        """End the download of a readable object and remove its files, if it is not in use.

        Returns:
            False if the object was opened or read within *idle_s*, or a thread or batch request works on it.
        """
        error = NotFound(f"object {self.digest.hex()}: no image or pin refers to it any more")
        with self._context.lock:
            is_idle = self.last_read_s == math.inf or self.last_read_s <= time.monotonic() - idle_s
            if self.state is not DownloadState.FETCHING or not self.is_readable or not is_idle or self.chunks.is_busy:
                return False
            self._context.partial_files.remove(self.digest)
            futures = self._close(error)
        _resolve(futures, error)
        return True

    def _end(self, error: GearError | None) -> None:
        with self._context.lock:
            if self.state in (DownloadState.STORED, DownloadState.FAILED):
                return
            futures = self._close(error)
        if error is None:
            self._context.stats.note_success(self.digest)
        else:
            self._context.stats.note_failure(self.digest, error)
        _resolve(futures, error)

    def _close(self, error: GearError | None) -> list[Future[Download | None] | Future[None]]:
        """Enter the final state, under the lock; return the futures to resolve after it."""
        self.state = DownloadState.STORED if error is None else DownloadState.FAILED
        self.error = error
        if error is not None and self._chunks is not None:
            self._chunks.cancel(error)
        self._forget(self)
        futures: list[Future[Download | None] | Future[None]] = []
        if self._opened is not None:
            futures.append(self._opened)
            self._opened = None
        if self._stored is not None:
            futures.append(self._stored)
            self._stored = None
        return futures


def _resolve(futures: Iterable[Future[Download | None] | Future[None]], error: GearError | None) -> None:
    for future in futures:
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def _chunks_done(stored: Future[None], result: Future[None], error: GearError | None) -> None:
    """Give *result* the error of a chunk, or the outcome of *stored* once all chunks are stored."""
    if error is None:
        stored.add_done_callback(lambda done: copy_outcome(done, result))
    else:
        result.set_exception(error)
