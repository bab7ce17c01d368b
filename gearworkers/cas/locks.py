"""The one lock between imports and the garbage collector."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gearworkers.util.locks import locked_file


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
        with locked_file(self._path, fcntl.LOCK_SH):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Held by the collector while objects are hidden."""
        with locked_file(self._path, fcntl.LOCK_EX):
            yield
