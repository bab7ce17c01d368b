"""A large object while it arrives: chunks are fetched when they are read, the rest behind.

Its file lies in staging, sparse, and becomes the object when all its chunks are here and the whole is verified.
Beside it lies its layout. A crash leaves both; whoever opens it again believes none of the bytes before it has
compared them with their chunk's digest, which costs less than to fetch them.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import partial

from gearworkers.errors import GearError, NotFound, ResourceExhausted, from_os_error
from gearworkers.fetch.batch import Patience
from gearworkers.fetch.priority_pool import Urgency, WorkPool
from gearworkers.fetch.source import Chunk
from gearworkers.util.open_file import File, ReadDone
from gearworkers.util.writing import pwrite_all

_LEAST_AHEAD_BYTES = 256 << 10
_MOST_AHEAD_BYTES = 4 << 20


class _State(IntEnum):
    MISSING = 0
    QUEUED = 1
    COMING = 2
    HERE = 3


@dataclass(slots=True)
class _Read:
    """Somebody who waits for chunks."""

    offset: int
    size_bytes: int
    missing: int
    done: ReadDone


class LargeObject:
    """One object on its way; all methods from any thread."""

    def __init__(
        self,
        file: File,
        layout: Sequence[Chunk],
        pool: WorkPool,
        patience: Patience,
        find_chunk: Callable[[Chunk], bytes | None],
        fetch_chunk: Callable[[Chunk, float], bytes],
        whole: Callable[[], None],
        failed: Callable[[GearError], None],
    ) -> None:
        """
        Args:
            file: Open for reading and writing; what it holds already is verified before it is used.
            layout: As `sources.checked_layout` lets through.
            pool: Where chunks are fetched.
            patience: How long who reads waits for a chunk that a stream brings.
            find_chunk: Gives a chunk's bytes, verified, if another object of this host has it.
            fetch_chunk: Given a chunk and the monotonic time at which it was asked for, its bytes, verified; or
                GearError.
            whole: Called once, in a thread of the pool, when all chunks are here.
            failed: Called with why somebody could not be given what he read.
        """
        self._file = file
        self._layout = layout
        self._offsets = [chunk.offset for chunk in layout]
        self._states = bytearray(len(layout))
        self._missing = len(layout)
        self._pool = pool
        self._patience = patience
        self._find_chunk = find_chunk
        self._fetch_chunk = fetch_chunk
        self._whole = whole
        self._note_failure = failed
        self._lock = threading.Lock()
        self._waiting: dict[int, list[_Read]] = {}
        self._streamed: set[int] = set()
        self._read_end = 0
        self._ahead_bytes = 0
        self.last_read_s = math.inf
        """When it was opened or read last; infinite before the first time."""
        self.failed_s = -math.inf
        """When a chunk could not be had last."""
        self._full_s = -math.inf
        self.broken: GearError | None = None
        """Why nothing of it is given any more."""

    def read(self, offset: int, size_bytes: int, done: ReadDone) -> None:
        """Call *done* once with the bytes, fewer only at the end, or with what went wrong; now or later."""
        self.last_read_s = time.monotonic()
        wanted = self._chunks(offset, size_bytes)
        read = _Read(offset, size_bytes, 0, done)
        with self._lock:
            broken = self.broken
            missing = [order for order in wanted if self._states[order] != _State.HERE] if broken is None else []
            read.missing = len(missing)
            for order in missing:
                self._waiting.setdefault(order, []).append(read)
            to_fetch = self._queued(missing, even_if_queued=True)
            streamed = [order for order in missing if order in self._streamed]
            ahead = self._queued(self._chunks(offset + size_bytes, self._grown_ahead(offset, size_bytes)))
        self._submit(to_fetch, Urgency.ON_DEMAND)
        self._submit(ahead, Urgency.READ_AHEAD)
        if streamed:
            self._patience.then(lambda: self._hurry(streamed))
        if broken is not None:
            done(broken)
        elif not missing:
            self._file.read(offset, size_bytes, done)

    @property
    def fd(self) -> int:
        """The descriptor of its file."""
        return self._file.fd

    def fill(self) -> None:
        """Have everything fetched that is missing, behind what is read."""
        with self._lock:
            to_fetch = self._queued(range(len(self._layout)))
        self._submit(to_fetch, Urgency.BACKGROUND)

    # -- chunks that a stream brings

    def orders(self, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """The numbers of the distinct chunks that hold these (offset, size in bytes), in their order."""
        return list(dict.fromkeys(order for offset, size_bytes in ranges for order in self._chunks(offset, size_bytes)))

    def chunk(self, order: int) -> Chunk:
        """The chunk of this number."""
        return self._layout[order]

    def claim(self, order: int) -> bool:
        """Whether the chunk is to be fetched and nobody does; if so, the caller does: `deliver` or `miss` follows."""
        with self._lock:
            if self.broken is not None or self._states[order] != _State.MISSING:
                return False
            self._states[order] = _State.COMING
            self._streamed.add(order)
        try:
            if self._found_here(self._layout[order]):
                self._arrived(order)
                return False
        except OSError:
            pass  # it is overwritten
        except BaseException:
            self.miss(order)
            raise
        return True

    def deliver(self, order: int, data: bytes) -> bool:
        """Take the chunk; whether it was the right one.

        Raises:
            GearError: It could not be kept.
        """
        chunk = self._layout[order]
        if len(data) != chunk.size_bytes or hashlib.sha256(data).digest() != chunk.digest:
            return False
        try:
            pwrite_all(self._file.fd, data, chunk.offset)
        except OSError as exc:
            raise from_os_error(exc, f"keep a chunk at {chunk.offset}") from exc
        self._arrived(order)
        return True

    def miss(self, order: int) -> None:
        """The chunk does not come by the stream."""
        with self._lock:
            if order not in self._streamed:
                return
            self._streamed.discard(order)
            is_wanted = order in self._waiting
            self._states[order] = _State.QUEUED if is_wanted else _State.MISSING
        if is_wanted:
            self._submit([order], Urgency.ON_DEMAND)

    def _hurry(self, orders: Sequence[int]) -> None:
        """Who waits for a stream has waited long enough."""
        with self._lock:
            late = [order for order in orders if order in self._streamed]
            self._streamed.difference_update(late)
            for order in late:
                self._states[order] = _State.QUEUED
        self._submit(late, Urgency.ON_DEMAND)

    def let_go(self, idle_s: float) -> bool:
        """Whether nobody has read it for so long and no stream brings parts; then nothing of it comes any more.

        Who opens it, to read or to fill it, sets `last_read_s` under the lock under which this is called.
        """
        with self._lock:
            is_idle = self.last_read_s == math.inf or self.last_read_s <= time.monotonic() - idle_s
            if not is_idle or self._waiting or self._streamed or not self._missing:
                return False
            self.broken = NotFound("a large object that no image wants was let go of")
            return True

    def break_off(self, error: GearError) -> None:
        """The whole is not what its layout promised: nothing of it is given any more."""
        self.broken = error

    def _chunks(self, offset: int, size_bytes: int) -> range:
        if size_bytes <= 0 or not self._layout:
            return range(0)
        first = max(bisect.bisect_right(self._offsets, offset) - 1, 0)
        return range(first, bisect.bisect_left(self._offsets, offset + size_bytes))

    def _grown_ahead(self, offset: int, size_bytes: int) -> int:
        """How far to read ahead: nothing for random access, ever more for a sequence."""
        if offset == self._read_end and offset:
            self._ahead_bytes = min(max(self._ahead_bytes * 2, _LEAST_AHEAD_BYTES), _MOST_AHEAD_BYTES)
        else:
            self._ahead_bytes = 0
        self._read_end = offset + size_bytes
        return self._ahead_bytes

    def _queued(self, orders: Sequence[int], *, even_if_queued: bool = False) -> list[int]:
        """Mark what is to be fetched of *orders*; those waiting for their turn only if asked. Under the lock."""
        last = _State.QUEUED if even_if_queued else _State.MISSING
        found = [order for order in orders if self._states[order] <= last]
        for order in found:
            self._states[order] = _State.QUEUED
        return found

    def _submit(self, orders: Sequence[int], urgency: Urgency) -> None:
        asked_s = time.monotonic()
        for order in orders:
            self._pool.submit(partial(self._load, order, asked_s), urgency)

    def _load(self, order: int, asked_s: float) -> None:
        with self._lock:
            if self._states[order] != _State.QUEUED or self.broken is not None:
                return
            if self._full_s > asked_s and order not in self._waiting:
                self._states[order] = _State.MISSING  # there was no room for others; nobody reads this one
                return
            self._states[order] = _State.COMING
        chunk = self._layout[order]
        try:
            if not self._found_here(chunk):
                pwrite_all(self._file.fd, self._fetch_chunk(chunk, asked_s), chunk.offset)
        except GearError as exc:
            self._failed(order, exc)
        except OSError as exc:
            self._failed(order, from_os_error(exc, f"keep a chunk at {chunk.offset}"))
        except BaseException as exc:
            self._failed(order, GearError(f"chunk at {chunk.offset}: {exc!r}"))
            raise
        else:
            self._arrived(order)

    def _found_here(self, chunk: Chunk) -> bool:
        """Whether it need not be fetched: an earlier process has, or another object has the same."""
        if self._is_here_already(chunk):
            return True
        data = self._find_chunk(chunk)
        if data is not None:
            pwrite_all(self._file.fd, data, chunk.offset)
        return data is not None

    def _is_here_already(self, chunk: Chunk) -> bool:
        if _is_hole(self._file.fd, chunk.offset, chunk.size_bytes):
            return False
        data = os.pread(self._file.fd, chunk.size_bytes, chunk.offset)
        return len(data) == chunk.size_bytes and hashlib.sha256(data).digest() == chunk.digest

    def _arrived(self, order: int) -> None:
        with self._lock:
            if self._states[order] == _State.HERE or self.broken is not None:
                return  # a stream and a fetch of its own both brought it, or it was let go of
            self._states[order] = _State.HERE
            self._streamed.discard(order)
            self._missing -= 1
            is_whole = not self._missing
            ready = []
            for read in self._waiting.pop(order, ()):
                read.missing -= 1
                if not read.missing:
                    ready.append(read)
        for read in ready:
            self._file.read(read.offset, read.size_bytes, read.done)
        if is_whole:
            self._whole()

    def _failed(self, order: int, error: GearError) -> None:
        """Whoever waits for the chunk is told; whoever reads it next has it fetched anew."""
        with self._lock:
            if self._states[order] == _State.HERE:
                return
            self._states[order] = _State.MISSING
            self.failed_s = time.monotonic()
            if isinstance(error, ResourceExhausted):
                self._full_s = self.failed_s
            failed = [read for read in self._waiting.pop(order, ()) if read.missing > 0]
            for read in failed:
                read.missing = -1  # it waits for no other chunk, and is told nothing more
        if failed:
            self._note_failure(error)
        for read in failed:
            read.done(error)


def _is_hole(fd: int, offset: int, size_bytes: int) -> bool:
    """Whether nothing was ever written there; False where the file system cannot tell."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) >= offset + size_bytes
    except OSError as exc:
        return exc.errno == errno.ENXIO
