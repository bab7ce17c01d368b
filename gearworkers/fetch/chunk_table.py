"""The state of each chunk of one object, and the callers that wait for chunks."""

from __future__ import annotations

import bisect
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum

from gearworkers.errors import GearError
from gearworkers.fetch.priority_pool import Priority
from gearworkers.fetch.source import Chunk

ChunksDone = Callable[[GearError | None], None]
"""Called once: with None when all chunks of a request are stored, or with the error of the first that failed."""


_OFFSET = operator.attrgetter("offset")


class ChunkState(IntEnum):
    """The state of one chunk.

    MISSING ──► QUEUED ──► FETCHING ──► STORED
       │  ▲        ▲           │
       │  └────────│───────────┘  failed
       └► BATCHED ─┘              a reader waits too long, or the batch request does not deliver it

    A chunk that a batch request delivers becomes STORED from any state.
    """

    MISSING = 0
    QUEUED = 1
    """Waits for a thread."""
    BATCHED = 2
    """A batch request is about to deliver it."""
    FETCHING = 3
    """A thread fetches it."""
    STORED = 4


@dataclass(slots=True)
class _Waiter:
    missing: int
    """Chunks that are not stored yet; -1 after one has failed."""
    done: ChunksDone


class ChunkTable:
    """Chunks by number, in order of offset. The caller holds a lock during each method; none blocks."""

    __slots__ = ("_requested_s", "_states", "_waiters", "chunks", "missing")

    def __init__(self, chunks: Sequence[Chunk]) -> None:
        self.chunks = chunks
        self.missing = len(chunks)
        """Number of chunks that are not STORED."""
        self._states = bytearray(len(chunks))
        self._requested_s: dict[int, float] = {}
        self._waiters: dict[int, list[_Waiter]] = {}

    def numbers(self, offset: int, size_bytes: int) -> range:
        """Return the numbers of the chunks that hold these bytes."""
        if size_bytes <= 0 or not self.chunks:
            return range(0)
        first = max(bisect.bisect_right(self.chunks, offset, key=_OFFSET) - 1, 0)
        return range(first, bisect.bisect_left(self.chunks, offset + size_bytes, key=_OFFSET))

    def numbers_of(self, ranges: Iterable[tuple[int, int]]) -> list[int]:
        """Return the distinct numbers of the chunks that hold these (offset, size in bytes), in their order."""
        return list(
            dict.fromkeys(number for offset, size_bytes in ranges for number in self.numbers(offset, size_bytes))
        )

    def is_in(self, state: ChunkState, number: int) -> bool:
        """Return whether a chunk is in this state."""
        return self._states[number] == state

    def has_state(self, state: ChunkState) -> bool:
        """Return whether any chunk is in this state."""
        return state in self._states

    def has_any(self, offset: int, size_bytes: int) -> bool:
        """Return whether a chunk that begins in these bytes is not MISSING."""
        first = bisect.bisect_left(self.chunks, offset, key=_OFFSET)
        end = bisect.bisect_left(self.chunks, offset + size_bytes, key=_OFFSET)
        return any(self._states[first:end])

    def all_missing(self) -> list[int]:
        """Return the numbers of the chunks that are MISSING."""
        if ChunkState.MISSING not in self._states:
            return []
        return [number for number, state in enumerate(self._states) if state == ChunkState.MISSING]

    def request(self, numbers: Iterable[int], priority: Priority, now_s: float) -> list[int]:
        """Queue chunks that are MISSING; an ON_DEMAND request queues QUEUED ones again, at its higher priority.

        Returns:
            The numbers to submit to the pool.
        """
        last = ChunkState.QUEUED if priority is Priority.ON_DEMAND else ChunkState.MISSING
        queued = [number for number in numbers if self._states[number] <= last]
        for number in queued:
            self._states[number] = ChunkState.QUEUED
            self._requested_s[number] = now_s
        return queued

    def start(self, number: int) -> float | None:
        """Let one thread fetch a QUEUED chunk.

        Returns:
            The monotonic time of the latest request; None if the chunk is not QUEUED.
        """
        if self._states[number] != ChunkState.QUEUED:
            return None
        self._states[number] = ChunkState.FETCHING
        return self._requested_s.pop(number)

    def put_back(self, number: int) -> None:
        """Make a chunk MISSING again; report no error to the waiting callers."""
        self._states[number] = ChunkState.MISSING
        self._requested_s.pop(number, None)

    def claim(self, number: int) -> bool:
        """Let a batch request fetch a MISSING chunk; return False if it is not MISSING."""
        if self._states[number] != ChunkState.MISSING:
            return False
        self._states[number] = ChunkState.BATCHED
        return True

    def take_from_batch(self, numbers: Iterable[int], now_s: float) -> list[int]:
        """Queue the chunks that are still BATCHED.

        Returns:
            The numbers to submit to the pool.
        """
        late = [number for number in numbers if self._states[number] == ChunkState.BATCHED]
        for number in late:
            self._states[number] = ChunkState.QUEUED
            self._requested_s[number] = now_s
        return late

    # -- waiting

    def wait(self, numbers: Iterable[int], done: ChunksDone) -> bool:
        """Call *done* when all these chunks are stored or one fails; return False if all are stored already."""
        missing = [number for number in numbers if self._states[number] != ChunkState.STORED]
        waiter = _Waiter(len(missing), done)
        for number in missing:
            self._waiters.setdefault(number, []).append(waiter)
        return bool(missing)

    def is_awaited(self, number: int) -> bool:
        """Return whether a caller waits for the chunk."""
        return number in self._waiters

    @property
    def has_waiters(self) -> bool:
        """Whether a caller waits for any chunk."""
        return bool(self._waiters)

    def store(self, number: int) -> list[ChunksDone]:
        """Mark a chunk STORED; return the callbacks of the requests that are complete now."""
        self._states[number] = ChunkState.STORED
        self._requested_s.pop(number, None)
        self.missing -= 1
        complete = []
        for waiter in self._waiters.pop(number, ()):
            waiter.missing -= 1
            if not waiter.missing:
                complete.append(waiter.done)
        return complete

    def fail(self, number: int) -> list[ChunksDone]:
        """Mark a chunk MISSING; return the callbacks of the waiting requests that have not failed yet."""
        self.put_back(number)
        failed = [waiter for waiter in self._waiters.pop(number, ()) if waiter.missing > 0]
        for waiter in failed:
            waiter.missing = -1
        return [waiter.done for waiter in failed]
