"""How often each layer was asked to be mounted: dockerd does not count for a plugin.

The counts outlive the gateway: they lie beside its sockets, in a directory that a reboot empties like the mounts.
A count without a mount is 0; a mount without a count has one user, as overlay2 has it after a restart. A mount with
the count 0 belongs to a Get that was killed before it answered: nobody uses it.

Order of writes: Get writes 0, mounts, writes 1; Put unmounts, then removes the count.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakValueDictionary

from gearworkers.mounts.overlay import is_mounted, unmount


class MountTable:
    """Counted mounts; safe for threads of one process, which is the only one that mounts layers."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._locks: WeakValueDictionary[str, threading.Lock] = WeakValueDictionary()  # those in use
        self._guard = threading.Lock()

    def prepare(self) -> None:
        """Make the directory of the counts."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextmanager
    def locked(self, id: str) -> Iterator[None]:
        """Nobody else mounts, unmounts or changes this layer meanwhile."""
        with self._guard:
            lock = self._locks.setdefault(id, threading.Lock())
        with lock:
            yield

    def acquire(self, id: str, target: Path, mount: Callable[[], None]) -> None:
        """Count one more user of *target*, and mount it for the first; the caller holds the lock.

        Raises:
            OSError: It cannot be counted; nothing has changed.
        """
        count = self._count(id, target)
        if count:
            self._write(id, count + 1)
            return
        self._write(id, 0)
        _unmount_all(target)
        mount()
        self._write(id, 1)

    def release(self, id: str, target: Path) -> bool:
        """Count one user less; unmount after the last. Whether it is unmounted now. The caller holds the lock."""
        count = self._count(id, target)
        if count > 1:
            self._write(id, count - 1)
            return False
        self.drop(id, target)
        return True

    def drop(self, id: str, target: Path) -> None:
        """Unmount whatever the count is; the caller holds the lock."""
        _unmount_all(target)
        (self._directory / id).unlink(missing_ok=True)

    def mounted(self) -> list[str]:
        """Ids of all layers that have a count."""
        return sorted(path.name for path in self._directory.iterdir())

    def restart(self) -> None:
        """A new dockerd counts anew: what is mounted has one user, its container; or none, after a killed Get."""
        for path in self._directory.iterdir():
            if self._counted(path.name):
                self._write(path.name, 1)

    def _count(self, id: str, target: Path) -> int:
        return self._counted(id) if is_mounted(target) else 0

    def _counted(self, id: str) -> int:
        try:
            return int((self._directory / id).read_text())
        except (FileNotFoundError, ValueError):
            return 1

    def _write(self, id: str, count: int) -> None:
        """One that is there is written over: a full disk keeps nobody from it."""
        fd = os.open(self._directory / id, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, b"%10d" % count, 0)
        finally:
            os.close(fd)


def _unmount_all(target: Path) -> None:
    """Also what gearworkers 0.1 may have mounted twice."""
    unmount(target)
    while is_mounted(target):
        unmount(target)
