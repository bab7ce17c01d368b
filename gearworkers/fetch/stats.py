"""What came of fetches: counted since the process began, and failures kept until they work."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import structlog

from gearworkers.errors import GearError

_log = structlog.get_logger(__name__)

_MOST_FAILURES = 1000


@dataclass(slots=True)
class Outcomes:
    """Of all fetches of one process; all methods from any thread."""

    objects: int = 0
    received_bytes: int = 0
    reused_bytes: int = 0
    """Of chunks that another large object of this host had."""
    failed: int = 0
    corrupt: int = 0
    """Objects, chunks and layouts that were not what they should be, from any source."""
    failures: dict[bytes, str] = field(default_factory=dict)
    """Why an object could not be had the last time somebody wanted it, by digest; for `gear status`."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, digest: bytes, error: GearError | None) -> None:
        """The object was wanted, and came or did not."""
        with self._lock:
            self.failures.pop(digest, None)
            if error is None:
                return
            self.failed += 1
            if len(self.failures) >= _MOST_FAILURES:
                del self.failures[next(iter(self.failures))]
            self.failures[digest] = str(error)
        _log.error("an object could not be fetched", object=digest.hex(), error=str(error))

    def note_corrupt(self, error: GearError) -> None:
        """A source gave something else than what was asked for."""
        self.corrupt += 1
        _log.error("a source gave wrong bytes", error=str(error))
