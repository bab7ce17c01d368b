"""The lock between imports and the garbage collector."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gearworkers.util.locks import locked_file


class GarbageLock:
    """A file lock: shared while a layer is published, exclusive while the collector hides objects.

    Both take milliseconds. The lock keeps a layer from becoming visible while one of its objects is hidden. The kernel
    releases it when the holder dies.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / "gc.lock"

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Hold the lock to publish a layer or a pin."""
        with locked_file(self._path, fcntl.LOCK_SH):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the lock to hide objects or to remove damaged ones."""
        with locked_file(self._path, fcntl.LOCK_EX):
            yield
