"""The chunks of one download: each is fetched alone or delivered by a batch request, and stored once.

`Download` has the states of the object, `ChunkTable` those of its chunks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Protocol

from gearworkers.errors import GearError, IntegrityError, NotFound, ResourceExhausted, from_os_error
from gearworkers.fetch.chunk_table import ChunksDone, ChunkState, ChunkTable
from gearworkers.fetch.context import FetchContext
from gearworkers.fetch.priority_pool import Priority
from gearworkers.fetch.read_ahead import ReadAhead, block_around
from gearworkers.fetch.source import Chunk
from gearworkers.fetch.targets import Target
from gearworkers.util.open_file import ObjectFile


class ChunkOwner(Protocol):
    """The download that the chunks belong to."""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the object."""

    @property
    def is_awaited(self) -> bool:
        """Whether a caller waits until the object can be read; called under the lock."""

    def begin_verifying(self) -> None:
        """Enter VERIFYING, after the last chunk is stored; called under the lock. `publish` follows."""

    def publish(self) -> None:
        """Verify the object and add it to the store; blocks."""

    def fail(self, error: GearError) -> None:
        """End the download and report *error* to its callers."""

    def drop(self, error: GearError) -> None:
        """End a download for which no caller waits; called under the lock."""


class DownloadChunks:
    """The chunks of one download; any thread may call all methods, and none blocks unless it says so."""

    __slots__ = (
        "_context",
        "_disk_full_s",
        "_error",
        "_is_required",
        "_owner",
        "_read_ahead",
        "_table",
        "_target",
        "failed_s",
    )

    def __init__(self, context: FetchContext, target: Target, owner: ChunkOwner) -> None:
        self._context = context
        self._target = target
        self._owner = owner
        self._table = ChunkTable(target.chunks)
        self._read_ahead: ReadAhead | None = None
        self._is_required = False
        self._error: GearError | None = None
        self._disk_full_s = -math.inf
        self.failed_s = -math.inf
        """Monotonic time of the last failure of a chunk."""

    @property
    def is_readable(self) -> bool:
        """Whether the chunks can be read before the object is complete."""
        return self._target.file is not None

    @property
    def file(self) -> ObjectFile:
        """The file from which readable chunks are read."""
        assert self._target.file is not None
        return self._target.file

    @property
    def is_busy(self) -> bool:
        """Whether a caller waits for a chunk, or a batch request is about to deliver one; call it under the lock."""
        return self._table.has_waiters or self._table.has_state(ChunkState.BATCHED)

    def cancel(self, error: GearError) -> None:
        """Fetch no more chunks, and fail later reads with *error*; call it under the lock."""
        self._error = error

    # -- for readers

    def read(self, offset: int, size_bytes: int) -> Future[bytes]:
        """Return verified bytes as soon as their chunks are stored; fewer than *size_bytes* only at the end."""
        result: Future[bytes] = Future()
        answer = partial(self._answer_read, offset, size_bytes, result)
        with self._context.lock:
            error = self._error
            numbers = self._table.numbers(offset, size_bytes)
            is_waiting = error is None and self._table.wait(numbers, answer)
            if is_waiting:
                self.request(numbers, Priority.ON_DEMAND)
            self._read_ahead = self._read_ahead or ReadAhead()
            ahead_bytes = self._read_ahead.after(offset, size_bytes)
            if ahead_bytes:
                self.request(self._table.numbers(offset + size_bytes, ahead_bytes), Priority.READ_AHEAD)
            elif is_waiting:
                block = block_around(offset, self._table.has_any)
                self.request(self._table.numbers(*block), Priority.READ_AHEAD)
        if not is_waiting:
            answer(error)
        return result

    def wait_for_all(self, done: ChunksDone) -> bool:
        """Fetch all missing chunks on demand, then call *done*; call it under the lock.

        Returns:
            False if all chunks are stored already; *done* is not called then.
        """
        numbers = range(len(self._table.chunks))
        is_waiting = self._table.wait(numbers, done)
        if is_waiting:
            self.request(numbers, Priority.ON_DEMAND)
        return is_waiting

    def fill(self) -> None:
        """Fetch all missing chunks in the background."""
        with self._context.lock:
            queued = self._table.request(self._table.all_missing(), Priority.BACKGROUND, time.monotonic())
        self._submit(queued, Priority.BACKGROUND)

    def request(self, numbers: Iterable[int], priority: Priority) -> None:
        """Fetch missing chunks; call it under the lock.

        An ON_DEMAND request waits a moment for chunks that a batch request is about to deliver.
        """
        self._submit(self._table.request(numbers, priority, time.monotonic()), priority)
        if priority is Priority.ON_DEMAND and self._table.has_state(ChunkState.BATCHED):
            batched = [number for number in numbers if self._table.is_in(ChunkState.BATCHED, number)]
            if batched:
                self._context.batch_wait.add(partial(self._take_from_batch, batched))

    # -- for batch requests

    def numbers_of(self, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """Return the distinct numbers of the chunks that hold these (offset, size in bytes), in their order."""
        return self._table.numbers_of(ranges)

    def chunk(self, number: int) -> Chunk:
        """Return the chunk of this number."""
        return self._table.chunks[number]

    def require(self) -> None:
        """From now on, fetch a chunk alone if the batch request that claimed it does not deliver it."""
        self._is_required = True

    def claim(self, number: int) -> bool:
        """Let a batch request fetch a chunk; may read the disk.

        Returns:
            True if the batch request must call `deliver` or `miss`; False if the chunk is stored or requested already.
        """
        with self._context.lock:
            if self._error is not None or not self._table.claim(number):
                return False
        try:
            is_found = self._target.find(self._table.chunks[number])
        except (GearError, OSError):
            return True  # the batch request overwrites it
        except BaseException:
            self.miss(number)
            raise
        if is_found:
            self._stored(number)
        return not is_found

    def deliver(self, number: int, data: bytes) -> bool:
        """Store a claimed chunk; blocks.

        Returns:
            Whether *data* matches the chunk; if not, another `deliver` or `miss` follows.

        Raises:
            ResourceExhausted: The disk is full.
        """
        if self._table.is_in(ChunkState.STORED, number):
            return True
        try:
            self._target.store(self._table.chunks[number], data)
        except IntegrityError as exc:
            self._context.stats.note_corrupt(exc)
            return False
        except ResourceExhausted:
            raise
        except GearError as exc:
            self._failed(number, exc)
        else:
            self._stored(number)
        return True

    def miss(self, number: int) -> None:
        """Release a claimed chunk: the batch request did not deliver it."""
        with self._context.lock:
            if self._error is not None or not self._table.is_in(ChunkState.BATCHED, number):
                return
            is_awaited = self._table.is_awaited(number) or self._owner.is_awaited
            if is_awaited or self._is_required:
                queued = self._table.take_from_batch((number,), time.monotonic())
                self._submit(queued, Priority.ON_DEMAND if is_awaited else Priority.BACKGROUND)
            elif self.is_readable:
                self._table.put_back(number)
            else:
                error = NotFound(f"object {self._owner.digest.hex()}: the answer to the batch request lacks it")
                self._owner.drop(error)

    # -- fetching a chunk alone

    def _take_from_batch(self, numbers: Sequence[int]) -> None:
        """Fetch chunks alone because the batch request is too slow."""
        with self._context.lock:
            if self._error is None:
                self._submit(self._table.take_from_batch(numbers, time.monotonic()), Priority.ON_DEMAND)

    def _submit(self, numbers: Iterable[int], priority: Priority) -> None:
        for number in numbers:
            self._context.pool.submit(partial(self._fetch, number), priority)

    def _fetch(self, number: int) -> None:
        with self._context.lock:
            requested_s = self._table.start(number) if self._error is None else None
            if requested_s is None:
                return
            if self._disk_full_s > requested_s and not self._table.is_awaited(number):
                self._table.put_back(number)  # the disk became full since the request, and no caller waits
                return
        chunk = self._table.chunks[number]
        try:
            if not self._target.find(chunk):
                self._target.fetch(chunk, requested_s)
        except GearError as exc:
            self._failed(number, exc)
        except OSError as exc:
            self._failed(number, from_os_error(exc, f"store a chunk at {chunk.offset}"))
        except BaseException as exc:
            self._failed(number, GearError(f"chunk at {chunk.offset}: {exc!r}"))
            raise
        else:
            self._stored(number)

    # -- outcomes

    def _stored(self, number: int) -> None:
        with self._context.lock:
            if self._error is not None or self._table.is_in(ChunkState.STORED, number):
                return  # the download was cancelled, or the chunk was fetched alone and by a batch request
            complete = self._table.store(number)
            is_last = not self._table.missing
            if is_last:
                self._owner.begin_verifying()
        for done in complete:
            done(None)
        if is_last:
            self._owner.publish()

    def _failed(self, number: int, error: GearError) -> None:
        """Report *error* to the callers that wait for the chunk; the next request fetches it again."""
        with self._context.lock:
            if self._error is not None or self._table.is_in(ChunkState.STORED, number):
                return
            waiting: list[ChunksDone] = []
            if self.is_readable:
                self.failed_s = time.monotonic()
                if isinstance(error, ResourceExhausted):
                    self._disk_full_s = self.failed_s
                waiting = self._table.fail(number)
        if not self.is_readable:
            self._owner.fail(error)
        elif waiting:
            self._context.stats.note_failure(self._owner.digest, error)
            for done in waiting:
                done(error)

    def _answer_read(self, offset: int, size_bytes: int, result: Future[bytes], error: GearError | None) -> None:
        try:
            if error is None:
                result.set_result(self.file.read(offset, size_bytes))
        except GearError as exc:
            error = exc
        if error is not None:
            result.set_exception(error)
