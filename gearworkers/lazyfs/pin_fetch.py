"""What pins miss is fetched: at once when something is pinned, and again for as long as it is not here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import structlog

from gearworkers.fetch.priority_pool import Urgency, WorkPool
from gearworkers.layers.pins import Pins

_log = structlog.get_logger(__name__)

_AGAIN_S = 60.0
"""While something is missing: the remote may be away."""
_LOOK_S = 600.0
"""While nothing is: `gear fsck --repair` may have removed something damaged."""


class PinKeeper:
    """Looks after the pins; `look` is called a few times a second by one thread."""

    def __init__(
        self,
        pins: Pins,
        is_here: Callable[[bytes], bool],
        pool: WorkPool,
        wholly: Callable[[Iterable[tuple[bytes, int]]], None],
    ) -> None:
        """
        Args:
            pins: Of the node.
            is_here: Whether nothing is to be fetched for an object, given its digest.
            pool: Where the looking is done.
            wholly: Has objects, given as (digest, size in bytes), fetched behind what containers read.
        """
        self._pins = pins
        self._is_here = is_here
        self._pool = pool
        self._wholly = wholly
        self._seen_version = 0
        self._next_s = 0.0
        self._asked: set[bytes] = set()  # and not here at the last look

    def look(self) -> None:
        """See whether it is time, or pins came; returns at once."""
        version = self._pins.version()
        if version != self._seen_version or time.monotonic() >= self._next_s:
            self._seen_version = version
            self._next_s = time.monotonic() + _LOOK_S
            self._pool.submit(self._fetch_missing, Urgency.BACKGROUND)

    def _fetch_missing(self) -> None:
        """Ask for what is missing; of what was asked for before only if none of it has come since."""
        missing = {digest: size_bytes for digest, size_bytes in self._pins.objects() if not self._is_here(digest)}
        if missing:
            self._next_s = time.monotonic() + _AGAIN_S
        is_coming = not self._asked <= missing.keys()
        wanted = [record for record in missing.items() if not is_coming or record[0] not in self._asked]
        self._asked = set(missing)
        if wanted:
            _log.info("pinned objects are fetched", objects=len(wanted))
            self._wholly(wanted)
