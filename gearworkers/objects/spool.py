"""The push spool: an object awaiting push is a hard link here until the remote has confirmed it.

Before an object is stored an empty file stands in for the link, since a crash behind the store would leave an object
that every later import finds and none takes for new. An object is never empty, so the two are told apart.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

from gearworkers.errors import IntegrityError, NotFound, from_os_error
from gearworkers.objects.store import ObjectStore

_TEMPORARY = b".new"
_NAME = re.compile(rb"[0-9a-f]{64}")
"""What else lies there is somebody else's, and no business of ours."""


class PushSpool:
    """Links named by the full digest in hex; what is in it survives crashes and garbage collection."""

    def __init__(self, directory: Path, store: ObjectStore) -> None:
        self._directory = os.fsencode(directory)
        self._store = store

    def announce(self, digest: bytes) -> None:
        """The object is about to be stored: once it is, it awaits push, whether or not a crash comes before `add`."""
        try:
            os.close(os.open(self._path(digest), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o400))
        except OSError as exc:
            raise from_os_error(exc, f"note object {digest.hex()} for push") from exc

    def add(self, digest: bytes) -> None:
        """Note an object that is in the store; noting it twice is fine."""
        path, source = self._path(digest), self._store.path(digest)
        try:
            try:
                os.link(source, path)
            except FileExistsError:
                if _is_announcement(path):
                    self._replace(path, source)
        except OSError as exc:
            raise from_os_error(exc, f"note object {digest.hex()} for push") from exc

    def _replace(self, path: bytes, source: bytes) -> None:
        temporary = b"%s.%d-%d%s" % (path, os.getpid(), threading.get_ident(), _TEMPORARY)
        os.link(source, temporary)
        os.rename(temporary, path)
        if os.path.lexists(temporary):
            os.unlink(temporary)  # somebody else was first: a rename from one link to another of a file does nothing

    def pending(self) -> Iterator[bytes]:
        """Digests of what awaits push, in no order; what was only announced may turn out not to be there."""
        with os.scandir(self._directory) as entries:
            names = [entry.name for entry in entries if _NAME.fullmatch(entry.name)]
        for name in names:
            yield bytes.fromhex(name.decode("ascii"))

    def open(self, digest: bytes) -> int:
        """A read-only descriptor of a noted object.

        Raises:
            FileNotFoundError: Somebody else has pushed it meanwhile, or it was announced and is not stored.
        """
        fd = os.open(self._path(digest), os.O_RDONLY | os.O_CLOEXEC)
        if os.fstat(fd).st_size:
            return fd
        os.close(fd)
        try:
            return self._store.open(digest)
        except (NotFound, IntegrityError) as exc:
            raise FileNotFoundError(str(exc)) from exc

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
        with os.scandir(self._directory) as entries:
            for name in [entry.name for entry in entries if entry.name.endswith(_TEMPORARY)]:
                os.unlink(self._directory + b"/" + name)
        return len(gone)

    def _path(self, digest: bytes) -> bytes:
        return self._directory + b"/" + digest.hex().encode()


def _is_announcement(path: bytes) -> bool:
    """Whether it only stands in for an object; no if it is gone, for then the object was pushed by now."""
    try:
        return not os.stat(path).st_size
    except FileNotFoundError:
        return False
