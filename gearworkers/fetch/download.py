"""The download of one object: a state machine with one future for all who open the object.

    QUEUED ──► OPENING ──► FETCHING ──► VERIFYING ──► STORED
       └──────────┴───────────┴─────────────┴───────► FAILED

A small object begins in FETCHING, with one chunk. A large object is QUEUED until a thread is free, and OPENING while
its layout is looked up. If a source keeps it in chunks, it can be read in FETCHING; otherwise it has one chunk, as a
small object. STORED and FAILED are final: the fetcher forgets the download, and the next reader starts a new one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from enum import Enum, auto
from functools import partial

import structlog

from gearworkers.errors import GearError, IntegrityError, NotFound, ResourceExhausted, from_os_error
from gearworkers.fetch.chunk_table import ChunkState, ChunkTable
from gearworkers.fetch.context import FetchContext
from gearworkers.fetch.futures import completed, copy_outcome, failed
from gearworkers.fetch.priority_pool import Priority
from gearworkers.fetch.read_ahead import ReadAhead
from gearworkers.fetch.source import Chunk, checked_layout
from gearworkers.fetch.targets import Target, open_target
from gearworkers.util.open_file import File

_log = structlog.get_logger(__name__)


class DownloadState(Enum):
    """See the module."""

    QUEUED = auto()
    OPENING = auto()
    FETCHING = auto()
    VERIFYING = auto()
    STORED = auto()
    FAILED = auto()


class Download:
    """One object on its way into the store; any thread may call all methods, and none blocks unless it says so."""

    __slots__ = (
        "_context",
        "_full_s",
        "_is_required",
        "_opened",
        "_opening_requested_s",
        "_priority",
        "_read_ahead",
        "_stored",
        "_table",
        "_target",
        "digest",
        "error",
        "failed_s",
        "last_read_s",
        "size_bytes",
        "state",
    )

    def __init__(self, context: FetchContext, digest: bytes, size_bytes: int, target: Target | None = None) -> None:
        """
        Args:
            context: Of the fetcher.
            digest: SHA-256 of the object.
            size_bytes: Its size.
            target: Of an object that is fetched whole; None for a large object, whose layout must be looked up.
        """
        self._context = context
        self.digest = digest
        self.size_bytes = size_bytes
        self.state = DownloadState.QUEUED if target is None else DownloadState.FETCHING
        self.error: GearError | None = None
        """Why the download failed."""
        self.last_read_s = math.inf
        """Monotonic time of the last open or read; infinite before the first."""
        self.failed_s = -math.inf
        """Monotonic time of the last failure of a chunk."""
        self._full_s = -math.inf
        self._is_required = False
        self._priority = Priority.BACKGROUND
        self._opening_requested_s = 0.0
        self._opened: Future[Download | None] | None = None
        self._stored: Future[None] | None = None
        self._target = target
        self._table = ChunkTable(target.chunks if target is not None else ())
        self._read_ahead = ReadAhead()

    # -- for readers

    def open(self, priority: Priority) -> Future[Download | None]:
        """Have the object ready to be read.

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
                self._request((0,), priority)
            elif self.state is DownloadState.QUEUED and (is_first or priority is Priority.ON_DEMAND):
                self._opening_requested_s = time.monotonic()
                self._context.pool.submit(self._open, priority)
            return opened

    @property
    def is_readable(self) -> bool:
        """Whether `read` can be called: the object comes in chunks, and its layout is known."""
        return self._target is not None and self._target.file is not None

    @property
    def is_arriving(self) -> bool:
        """Whether bytes are fetched for somebody: not if only its layout was prefetched."""
        is_fetched = self.state in (DownloadState.FETCHING, DownloadState.VERIFYING)
        return is_fetched and (not self.is_readable or self.last_read_s < math.inf)

    @property
    def fd(self) -> int:
        """The descriptor of the file from which a readable object is read."""
        return self._file.fd

    def read(self, offset: int, size_bytes: int) -> Future[bytes]:
        """Return verified bytes of a readable object, fewer only at the end, as soon as their chunks are here."""
        result: Future[bytes] = Future()
        answer = partial(self._answer_read, offset, size_bytes, result)
        with self._context.lock:
            now_s = self.last_read_s = time.monotonic()
            error = self.error
            numbers = self._table.numbers(offset, size_bytes)
            is_waiting = error is None and self._table.wait(numbers, answer)
            if is_waiting:
                self._request(numbers, Priority.ON_DEMAND, now_s)
            ahead_bytes = self._read_ahead.after(offset, size_bytes)
            if ahead_bytes:
                ahead = self._table.numbers(offset + size_bytes, ahead_bytes)
                self._request(ahead, Priority.READ_AHEAD, now_s)
        if not is_waiting:
            answer(error)
        return result

    def store(self, priority: Priority) -> Future[None]:
        """Have all chunks of a readable object fetched.

        Returns:
            Done when the object is in the store. With ON_DEMAND it fails if a chunk cannot be fetched. With another
            priority it waits: `Fetcher.fill_idle` tries the chunk again.
        """
        result: Future[None] = Future()
        with self._context.lock:
            if self.state is DownloadState.STORED:
                return completed(None)
            if self.error is not None:
                return failed(self.error)
            stored = self._stored = self._stored or Future()
            if priority is not Priority.ON_DEMAND:
                self._is_required = True
            elif self._table.wait(range(len(self._table.chunks)), partial(_chunks_done, stored, result)):
                self._request(range(len(self._table.chunks)), priority)
            else:
                return stored  # it is being verified
        if priority is Priority.ON_DEMAND:
            return result
        self.fill()
        return stored

    def fill(self) -> None:
        """Fetch all missing chunks of a readable object in the background."""
        with self._context.lock:
            queued = self._table.request(self._table.all_missing(), Priority.BACKGROUND, time.monotonic())
        self._submit(queued, Priority.BACKGROUND)

    # -- for batch requests

    def numbers_of(self, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """Return the distinct numbers of the chunks that hold these (offset, size in bytes), in their order."""
        return self._table.numbers_of(ranges)

    def chunk(self, number: int) -> Chunk:
        """Return the chunk of this number."""
        return self._table.chunks[number]

    def require(self) -> None:
        """Fetch a chunk alone if the batch request that claimed it does not bring it."""
        self._is_required = True

    def claim(self, number: int) -> bool:
        """Let a batch request bring a chunk; may read the disk.

        Returns:
            Whether it shall; then `deliver` or `miss` follows. False if the chunk is here or fetched already.
        """
        with self._context.lock:
            if self.state is not DownloadState.FETCHING or not self._table.claim(number):
                return False
        assert self._target is not None
        try:
            is_found = self._target.find(self._table.chunks[number])
        except (GearError, OSError):
            return True  # the batch request overwrites it
        except BaseException:
            self.miss(number)
            raise
        if is_found:
            self._chunk_stored(number)
        return not is_found

    def deliver(self, number: int, data: bytes) -> bool:
        """Store a claimed chunk; blocks.

        Returns:
            Whether *data* was the chunk; if not, another `deliver` or `miss` follows.

        Raises:
            ResourceExhausted: It cannot be stored for lack of space.
        """
        if self._table.state(number) is ChunkState.STORED:
            return True
        assert self._target is not None
        try:
            self._target.store(self._table.chunks[number], data)
        except IntegrityError as exc:
            self._context.stats.note_corrupt(exc)
            return False
        except ResourceExhausted:
            raise
        except GearError as exc:
            self._chunk_failed(number, exc)
        else:
            self._chunk_stored(number)
        return True

    def miss(self, number: int) -> None:
        """Give a claimed chunk back: the batch request did not bring it."""
        with self._context.lock:
            if self.state is not DownloadState.FETCHING or self._table.state(number) is not ChunkState.BATCHED:
                return
            is_waited_for = self._table.is_waited_for(number) or self._opened is not None
            if is_waited_for or self._is_required:
                queued = self._table.take_from_batch((number,), time.monotonic())
                self._submit(queued, Priority.ON_DEMAND if is_waited_for else Priority.BACKGROUND)
            elif self.is_readable:
                self._table.put_back(number)
            else:
                self._close(NotFound(f"object {self.digest.hex()}: not part of the batch request's answer"))

    # -- opening

    def adopt_layout(self, layout: Sequence[Chunk]) -> None:
        """Make a QUEUED object readable by a layout that a batch request brought; blocks.

        A wrong layout is dropped. Readers that began to wait meanwhile have the sources asked.
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
            self._end(exc)
        except BaseException as exc:
            self._end(GearError(f"object {self.digest.hex()}: {exc!r}"))
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
        table = ChunkTable(target.chunks)
        with self._context.lock:
            self._target, self._table = target, table
            self.state = DownloadState.FETCHING
            if not self.is_readable:
                self._request((0,), self._priority)
                return
            opened, self._opened = self._opened, None
            if opened is not None:
                self.last_read_s = time.monotonic()
        if opened is not None:
            opened.set_result(self)

    def _open_again(self) -> None:
        with self._context.lock:
            if self._opened is None:
                self._close(NotFound(f"object {self.digest.hex()}: its layout was wrong"))
                return
            self.state = DownloadState.QUEUED
            self._opening_requested_s = time.monotonic()
        self._context.pool.submit(self._open, Priority.ON_DEMAND)

    # -- fetching chunks

    def _request(self, numbers: Iterable[int], priority: Priority, now_s: float | None = None) -> None:
        """Queue chunks; under the lock. A reader waits a moment for chunks that a batch request is about to bring."""
        queued = self._table.request(numbers, priority, now_s or time.monotonic())
        self._submit(queued, priority)
        if priority is Priority.ON_DEMAND and self._table.has_state(ChunkState.BATCHED):
            batched = [number for number in numbers if self._table.state(number) is ChunkState.BATCHED]
            if batched:
                self._context.batch_wait.add(partial(self._take_from_batch, batched))

    def _take_from_batch(self, numbers: Sequence[int]) -> None:
        """Fetch chunks alone: the batch request was too slow."""
        with self._context.lock:
            if self.state is DownloadState.FETCHING:
                self._submit(self._table.take_from_batch(numbers, time.monotonic()), Priority.ON_DEMAND)

    def _submit(self, numbers: Iterable[int], priority: Priority) -> None:
        for number in numbers:
            self._context.pool.submit(partial(self._fetch_chunk, number), priority)

    def _fetch_chunk(self, number: int) -> None:
        with self._context.lock:
            requested_s = self._table.start(number) if self.state is DownloadState.FETCHING else None
            if requested_s is None:
                return
            if self._full_s > requested_s and not self._table.is_waited_for(number):
                self._table.put_back(number)  # the disk was full for others, and nobody reads this chunk
                return
        assert self._target is not None
        chunk = self._table.chunks[number]
        try:
            if not self._target.find(chunk):
                self._target.fetch(chunk, requested_s)
        except GearError as exc:
            self._chunk_failed(number, exc)
        except OSError as exc:
            self._chunk_failed(number, from_os_error(exc, f"store a chunk at {chunk.offset}"))
        except BaseException as exc:
            self._chunk_failed(number, GearError(f"chunk at {chunk.offset}: {exc!r}"))
            raise
        else:
            self._chunk_stored(number)

    def _chunk_stored(self, number: int) -> None:
        with self._context.lock:
            if self.state is not DownloadState.FETCHING or self._table.state(number) is ChunkState.STORED:
                return  # a batch request and a fetch of its own both brought it, or nobody wants it any more
            complete = self._table.store(number)
            is_last = not self._table.missing
            if is_last:
                self.state = DownloadState.VERIFYING
        for done in complete:
            done(None)
        if is_last:
            self._publish()

    def _chunk_failed(self, number: int, error: GearError) -> None:
        """Report to the readers of the chunk; the next reader has it fetched again."""
        with self._context.lock:
            if self.state is not DownloadState.FETCHING or self._table.state(number) is ChunkState.STORED:
                return
            is_readable = self.is_readable
            if is_readable:
                self.failed_s = time.monotonic()
                if isinstance(error, ResourceExhausted):
                    self._full_s = self.failed_s
                waiting = self._table.fail(number)
        if not is_readable:
            self._end(error)
        elif waiting:
            self._context.stats.note_failure(self.digest, error)
            for done in waiting:
                done(error)

    def _answer_read(self, offset: int, size_bytes: int, result: Future[bytes], error: GearError | None) -> None:
        try:
            if error is None:
                result.set_result(self._file.read(offset, size_bytes))
        except GearError as exc:
            error = exc
        if error is not None:
            result.set_exception(error)

    @property
    def _file(self) -> File:
        assert self._target is not None and self._target.file is not None
        return self._target.file

    # -- the end

    def let_go(self, idle_s: float) -> bool:
        """End a download that no image wants any more, and remove its files.

        Returns:
            False if somebody has opened or read it within *idle_s*, or a thread or batch request works on it.
        """
        error = NotFound(f"object {self.digest.hex()}: no image wants it any more")
        with self._context.lock:
            is_idle = self.last_read_s == math.inf or self.last_read_s <= time.monotonic() - idle_s
            is_busy = self._table.has_waiters or self._table.has_state(ChunkState.BATCHED)
            if self.state is not DownloadState.FETCHING or not self.is_readable or not is_idle or is_busy:
                return False
            self._context.partial_files.remove(self.digest)
            futures = self._close(error)
        _resolve(futures, error)
        return True

    def _publish(self) -> None:
        """Verify the whole and make it an object; whatever happens, the waiting callers get a result."""
        assert self._target is not None
        try:
            self._target.publish()
        except GearError as exc:
            self._end(exc)
        except OSError as exc:
            self._end(from_os_error(exc, f"verify object {self.digest.hex()}"))
        except BaseException as exc:
            self._end(GearError(f"object {self.digest.hex()}: {exc!r}"))
            raise
        else:
            self._end(None)

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
        if self._context.downloads.get(self.digest) is self:
            del self._context.downloads[self.digest]
        futures = [future for future in (self._opened, self._stored) if future is not None]
        self._opened = self._stored = None
        return futures


def _resolve(futures: Iterable[Future[Download | None] | Future[None]], error: GearError | None) -> None:
    for future in futures:
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)


def _chunks_done(stored: Future[None], result: Future[None], error: GearError | None) -> None:
    """Pass on the outcome of *stored* once all chunks are here, or the error of a chunk."""
    if error is None:
        stored.add_done_callback(lambda done: copy_outcome(done, result))
    else:
        result.set_exception(error)
