"""Counters of all fetches since the process began, and the objects whose last fetch failed."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import structlog

from gearworkers.errors import GearError

_log = structlog.get_logger(__name__)

_MAX_FAILURES = 1000


@dataclass(slots=True)
class FetchStats:
    """Counters of one process; any thread may call all methods."""

    objects: int = 0
    """Objects that fetching added to the store."""
    received_bytes: int = 0
    reused_bytes: int = 0
    """Bytes of chunks copied from other large objects of this host."""
    failed: int = 0
    corrupt: int = 0
    """Objects, chunks and layouts that did not match their digest or size, from any source."""
    failures: dict[bytes, str] = field(default_factory=dict)
    """Digest to error text, for each object whose last fetch failed; for `gear status`."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note_success(self, digest: bytes) -> None:
        """Forget an earlier failure of the object."""
        if self.failures:
            with self._lock:
                self.failures.pop(digest, None)

    def note_failure(self, digest: bytes, error: GearError) -> None:
        """Count and log a failed fetch of the object."""
        with self._lock:
            self.failures.pop(digest, None)
            self.failed += 1
            if len(self.failures) >= _MAX_FAILURES:
                del self.failures[next(iter(self.failures))]
            self.failures[digest] = str(error)
        _log.error("cannot fetch an object", object=digest.hex(), error=str(error))

    def note_corrupt(self, error: GearError) -> None:
        """Count and log wrong bytes or a wrong layout from a source."""
        self.corrupt += 1
        _log.error("a source returned wrong data", error=str(error))
