"""The directory that a remote lies in, which may be a mount point that nothing is mounted on.

What is written there then lies on the local disk, hidden from all nodes; what is looked for there is missing. So no
directory is made, and one that has held blobs and has none now is taken for a file system that is away.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from gearworkers.errors import Unavailable, from_os_error

_HELD = ("objects", "documents")


class Root:
    """One such directory; blocks as its file system does."""

    def __init__(self, path: Path, notes: Path | None = None) -> None:
        """
        Args:
            path: The directory; whoever begins a remote makes it.
            notes: A local directory in which is noted that it held blobs; None to remember it in memory only.
        """
        self.path = path
        self._note = None if notes is None else notes / hashlib.sha256(os.fsencode(path)).hexdigest()
        self._is_noted = False

    def check(self) -> None:
        """See that it is there.

        Raises:
            Unavailable: Its file system is not mounted, or nobody has made it.
        """
        try:
            if any((self.path / name).is_dir() for name in _HELD):
                self.note()
                return
            is_there = self.path.is_dir()
        except OSError as exc:
            raise from_os_error(exc, f"look at {self.path}") from exc
        if not is_there:
            raise Unavailable(
                f"{self.path} is not there: mount its file system, or make the directory for a new remote"
            )
        if self._is_noted or (self._note is not None and self._note.exists()):
            raise Unavailable(
                f"{self.path} held objects and is empty: mount its file system; if it is to begin anew, "
                f"make {self.path / _HELD[0]}"
            )

    def note(self) -> None:
        """It holds blobs; a node that cannot write that down remembers it while the process lives."""
        if self._is_noted:
            return
        self._is_noted = True
        if self._note is not None:
            try:
                self._note.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._note.touch()
            except OSError:
                pass
