"""The read-ahead distance for a reader of a large object."""

from __future__ import annotations

MIN_BYTES = 256 << 10
MAX_BYTES = 4 << 20


class ReadAhead:
    """Doubles the distance with each sequential read; random reads have none."""

    __slots__ = ("_ahead_bytes", "_end")

    def __init__(self) -> None:
        self._end = 0
        self._ahead_bytes = 0

    def after(self, offset: int, size_bytes: int) -> int:
        """Return the number of bytes to fetch after the end of this read."""
        if offset == self._end and offset:
            self._ahead_bytes = min(max(self._ahead_bytes * 2, MIN_BYTES), MAX_BYTES)
        else:
            self._ahead_bytes = 0
        self._end = offset + size_bytes
        return self._ahead_bytes
