"""Fetches the missing objects of pins: at once when an image is pinned, and again until none is missing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import structlog

from gearworkers.fetch.priority_pool import Priority, PriorityPool
from gearworkers.layers.pins import Pins

_log = structlog.get_logger(__name__)

_RETRY_S = 60.0
"""While objects are missing: the remote may be unreachable."""
_CHECK_S = 600.0
"""While no object is missing: `gear fsck --repair` may have removed a damaged one."""


class PinFetcher:
    """Fetches the objects of all pins; one thread calls `check` a few times a second."""

    def __init__(
        self,
        pins: Pins,
        is_here: Callable[[bytes], bool],
        pool: PriorityPool,
        fetch_all: Callable[[Iterable[tuple[bytes, int]]], None],
    ) -> None:
        """
        Args:
            pins: The node's pins.
            is_here: Whether an object, given its digest, needs no fetch.
            pool: Runs the search for missing objects.
            fetch_all: Fetches objects, given as (digest, size in bytes), in the background.
        """
        self._pins = pins
        self._is_here = is_here
        self._pool = pool
        self._fetch_all = fetch_all
        self._seen_version = 0
        self._next_s = 0.0
        self._requested: set[bytes] = set()
        """Objects that were missing at the last search."""

    def check(self) -> None:
        """Start a search for missing objects if pins changed or the next one is due; return at once."""
        version = self._pins.version()
        if version != self._seen_version or time.monotonic() >= self._next_s:
            self._seen_version = version
            self._next_s = time.monotonic() + _CHECK_S
            self._pool.submit(self.fetch_missing, Priority.BACKGROUND)

    def fetch_missing(self) -> None:
        """Request the missing objects; blocks.

        Objects that were requested before are requested again only if none of them has arrived since.
        """
        missing = {digest: size_bytes for digest, size_bytes in self._pins.objects() if not self._is_here(digest)}
        if missing:
            self._next_s = time.monotonic() + _RETRY_S
        is_progressing = not self._requested <= missing.keys()
        due = [record for record in missing.items() if not is_progressing or record[0] not in self._requested]
        self._requested = set(missing)
        if due:
            _log.info("fetching pinned objects", objects=len(due))
            self._fetch_all(due)
