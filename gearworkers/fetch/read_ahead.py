"""The parts of a large object that are fetched with a read: the next ones of a sequential reader, else those around.

Programs read their libraries and archives at random, but their reads cluster. A block of 512 KiB around a read costs
about the time of another read's round trip.
"""

from __future__ import annotations

from collections.abc import Callable

MIN_BYTES = 256 << 10
MAX_BYTES = 4 << 20
BLOCK_BYTES = 512 << 10
_MAX_BLOCK_BYTES = 2 << 20


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


def block_around(offset: int, has_any: Callable[[int, int], bool]) -> tuple[int, int]:
    """Return (offset, size in bytes) of the block to fetch with a random read at *offset*.

    The block has BLOCK_BYTES. It is doubled, up to 2 MiB, while the other half of the larger block was read before.

    Args:
        offset: Of the read.
        has_any: Whether any of the bytes, given by offset and size in bytes, have arrived or are requested.
    """
    size_bytes = BLOCK_BYTES
    start = offset - offset % size_bytes
    while size_bytes < _MAX_BLOCK_BYTES:
        other = start ^ size_bytes
        if not has_any(other, size_bytes):
            break
        start, size_bytes = min(start, other), size_bytes * 2
    return start, size_bytes
