"""The push queue: an object awaiting push is a hard link here until the remote has confirmed it.

Before an object is stored an empty file stands in for the link, since a crash behind the store would leave an object
that every later import finds and none takes for new. An object is never empty, so the two are told apart. One whose
object was never stored, as the import died, goes when garbage is collected (`remove_unstored`).
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Container, Iterator
from contextlib import suppress
from pathlib import Path

from gearworkers.cas.store import ObjectStore
from gearworkers.digest import DIGEST_BYTES
from gearworkers.errors import IntegrityError, NotFound, from_os_error

_TEMPORARY = b".new"
_ASIDE = b".aside"
_NAME = re.compile(rb"[0-9a-f]{64}")
"""What else lies there is somebody else's, and no business of ours."""


class PushQueue:
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
        for name in self._names():
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

    def remove(self, digest: bytes) -> None:
        """The remote has confirmed it."""
        try:
            os.unlink(self._path(digest))
        except FileNotFoundError:
            pass

    def remove_unstored(self, claimed: Callable[[], Container[bytes]]) -> int:
        """Let go of announcements whose object is not in the store and that no import has claimed; how many.

        With them goes what an import that was killed has left of an `add`.

        An import may announce, store and add meanwhile. Its claim is older than its announcement, and an entry is put
        aside before the claims are read: so either the import announces it anew, or its claim is seen.

        Args:
            claimed: Gives the digests that imports under way have claimed by now.

        Crash: entries lie aside; the next call puts them back.
        """
        for digest in self._aside():
            self._put_back(digest)
        for digest in [digest for digest in self.pending() if self._is_unstored(digest)]:
            with suppress(FileNotFoundError):  # pushed meanwhile
                os.rename(self._path(digest), self._path(digest) + _ASIDE)
        aside, unfinished = self._aside(), self._names(_TEMPORARY)
        kept = claimed() if aside or unfinished else ()
        forgotten = 0
        for name in unfinished:
            if bytes.fromhex(name[: 2 * DIGEST_BYTES].decode("ascii")) not in kept:
                os.unlink(self._directory + b"/" + name)
        for digest in aside:
            path = self._path(digest) + _ASIDE
            if digest in kept or os.stat(path).st_size or self._store.has(digest):
                self._put_back(digest)
            else:
                os.unlink(path)
                forgotten += 1
        return forgotten

    def _is_unstored(self, digest: bytes) -> bool:
        return _is_announcement(self._path(digest)) and not self._store.has(digest)

    def _aside(self) -> list[bytes]:
        return [bytes.fromhex(name.removesuffix(_ASIDE).decode("ascii")) for name in self._names(_ASIDE)]

    def _names(self, suffix: bytes = b"") -> list[bytes]:
        """What lies here of objects, and ends in this; of nothing but digests without a suffix."""
        with os.scandir(self._directory) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(suffix)]
        return [name for name in names if (_NAME.match if suffix else _NAME.fullmatch)(name)]

    def _put_back(self, digest: bytes) -> None:
        """Where it was; what an import has put there meanwhile stays if it is the object."""
        path = self._path(digest)
        try:
            os.link(path + _ASIDE, path)
        except FileExistsError:
            if os.stat(path + _ASIDE).st_size and _is_announcement(path):
                os.rename(path + _ASIDE, path)
                return
        os.unlink(path + _ASIDE)

    def prune(self) -> int:
        """Let go of what is no longer in the store; how many. For after a reboot, when the store was checked."""
        gone = [digest for digest in self.pending() if not self._store.has(digest)]
        for digest in gone:
            self.remove(digest)
        for name in self._names(_TEMPORARY):
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
