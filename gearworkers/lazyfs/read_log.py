"""The recent reads of large objects, for start-up profiles."""

from __future__ import annotations

MAX_READS = 2000
"""Limit of reads per object; later reads are not logged."""
MAX_OBJECTS = 128
"""Limit of objects; more than an image reads while it starts."""


class ReadLog:
    """Logs the first reads of recent objects as (offset, size in bytes); any thread may call all methods."""

    def __init__(self, *, max_objects: int = MAX_OBJECTS) -> None:
        self._max_objects = max_objects
        self._reads: dict[int, list[tuple[int, int]]] = {}

    def add(self, node: int, offset: int, size_bytes: int) -> None:
        """Log a read; above the limit of objects, drop those that were read first."""
        reads = self._reads.setdefault(node, [])
        if len(reads) < MAX_READS:
            reads.append((offset, size_bytes))
        if len(self._reads) > self._max_objects:
            for oldest in list(self._reads)[: -self._max_objects]:
                self._reads.pop(oldest, None)

    def of(self, node: int) -> list[tuple[int, int]]:
        """Return the reads of a node, in order."""
        return list(self._reads.get(node, ()))
