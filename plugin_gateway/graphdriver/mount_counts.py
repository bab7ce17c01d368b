"""Counts the users of each layer's mount, since dockerd does not count Get and Put for a plugin.

The counts outlive the gateway. They are stored next to its sockets, in a directory that a reboot empties; a reboot also
ends the mounts. A count without a mount is 0. A mount without a count has one user, as in overlay2 after a restart. A
mount with the count 0 was left by a Get that was killed before it answered, and has no user.

Order of writes: Get writes 0, mounts, writes 1. Put unmounts, then removes the count.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from gearworkers.errors import from_os_error
from gearworkers.mounts.overlay import is_mounted
from gearworkers.util.keyed_locks import KeyedLocks


class MountCounts:
    """The counts in *directory*; the caller holds the lock of the layer in each call on one layer."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._locks = KeyedLocks()

    def prepare(self) -> None:
        """Create the directory.

        Raises:
            GearError: The file system refuses.
        """
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise from_os_error(exc, f"create {self._directory}") from exc

    def locked(self, id: str) -> AbstractContextManager[None]:
        """Keep other threads from counting users of this layer, mounting and unmounting it."""
        return self._locks.held(id)

    def acquire(self, id: str, target: Path, mount: Callable[[], Path], unmount: Callable[[], None]) -> Path:
        """Count one more user of *target*; call *mount* for the first, after *unmount* if a killed Get left a mount.

        Returns:
            *target*, or the path that *mount* returned.

        Raises:
            OSError: The count cannot be written; nothing has changed.
        """
        has_mount = is_mounted(target)
        count = self._read(id) if has_mount else 0
        if count:
            self._write(id, count + 1)
            return target
        self._write(id, 0)
        if has_mount:
            unmount()
        mounted = mount()
        self._write(id, 1)
        return mounted

    def release(self, id: str, target: Path, unmount: Callable[[], None]) -> None:
        """Remove one user; call *unmount* after the last."""
        count = self._count(id, target)
        if count > 1:
            self._write(id, count - 1)
            return
        unmount()
        self.forget(id)

    def forget(self, id: str) -> None:
        """Remove the count of an unmounted layer."""
        (self._directory / id).unlink(missing_ok=True)

    def ids(self) -> list[str]:
        """Return the ids of all layers that have a count."""
        return sorted(path.name for path in self._directory.iterdir())

    def restart(self) -> None:
        """Reset the counts for a new dockerd: each mount has one user, its container; or none, after a killed Get."""
        for path in self._directory.iterdir():
            if self._read(path.name):
                self._write(path.name, 1)

    def _count(self, id: str, target: Path) -> int:
        return self._read(id) if is_mounted(target) else 0

    def _read(self, id: str) -> int:
        try:
            return int((self._directory / id).read_text())
        except (FileNotFoundError, ValueError):
            return 1

    def _write(self, id: str, count: int) -> None:
        """Write in place, so that a full disk does not stop an existing count from changing."""
        fd = os.open(self._directory / id, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, b"%10d" % count, 0)
        finally:
            os.close(fd)
