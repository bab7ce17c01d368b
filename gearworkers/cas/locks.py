"""The one lock between imports and the garbage collector."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class GarbageLock:
    """Publishing a layer holds it shared, a batch of the collector exclusively; both for milliseconds.

    It keeps a layer from becoming visible while one of its objects is hidden for a last look at the claims.
    The kernel lets go of it when the holder dies.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / "gc.lock"

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Held by whoever publishes."""
        with _flocked(self._path, fcntl.LOCK_SH):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Held by the collector while objects are hidden."""
        with _flocked(self._path, fcntl.LOCK_EX):
            yield


@contextmanager
def _flocked(path: Path, operation: int) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, operation)
        yield
    finally:
        os.close(fd)
