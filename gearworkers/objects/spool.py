"""The push spool: an object awaiting push is a hard link here until the remote has confirmed it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from gearworkers.errors import from_os_error
from gearworkers.objects.store import ObjectStore


class PushSpool:
    """Links named by the full digest in hex; what is in it survives crashes and garbage collection."""

    def __init__(self, directory: Path, store: ObjectStore) -> None:
        self._directory = os.fsencode(directory)
        self._store = store

    def add(self, digest: bytes) -> None:
        """Note an object that is in the store; noting it twice is fine."""
        try:
            os.link(self._store.path(digest), self._path(digest))
        except FileExistsError:
            pass
        except OSError as exc:
            raise from_os_error(exc, f"note object {digest.hex()} for push") from exc

    def pending(self) -> Iterator[bytes]:
        """Digests of what awaits push, in no order."""
        with os.scandir(self._directory) as entries:
            names = [entry.name for entry in entries]
        for name in names:
            yield bytes.fromhex(name.decode("ascii"))

    def open(self, digest: bytes) -> int:
        """A read-only descriptor of a noted object.

        Raises:
            FileNotFoundError: Somebody else has pushed it meanwhile.
        """
        return os.open(self._path(digest), os.O_RDONLY | os.O_CLOEXEC)

    def done(self, digest: bytes) -> None:
        """The remote has confirmed it."""
        try:
            os.unlink(self._path(digest))
        except FileNotFoundError:
            pass

    def prune(self) -> int:
        """Let go of what is no longer in the store; how many. For after a reboot, when the store was checked."""
        gone = [digest for digest in self.pending() if not self._store.has(digest)]
        for digest in gone:
            self.done(digest)
        return len(gone)

    def _path(self, digest: bytes) -> bytes:
        return self._directory + b"/" + digest.hex().encode()
