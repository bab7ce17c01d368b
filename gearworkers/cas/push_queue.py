"""The push queue: the objects that the remote does not have yet.

An entry is a hard link to the object, named by the digest in hex. It stays until the remote has confirmed the object.

An import *announces* an object before it stores it: it creates an empty file as the entry. Otherwise a crash after the
store would leave an object that every later import finds, so none would queue it. Objects are never empty, so
announcements and links can be distinguished. If the import dies before it stores the object, garbage collection removes
the announcement (`remove_unstored`).
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
"""Other files in the directory are ignored."""


class PushQueue:
    """The queue in one directory. Entries survive crashes and garbage collection."""

    def __init__(self, directory: Path, store: ObjectStore) -> None:
        self._directory = os.fsencode(directory)
        self._store = store

    def announce(self, digest: bytes) -> None:
        """Announce an object that is about to be stored. Once stored, it is pending even if a crash prevents `add`."""
        try:
            os.close(os.open(self._path(digest), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o400))
        except OSError as exc:
            raise from_os_error(exc, f"queue object {digest.hex()} for push") from exc

    def add(self, digest: bytes) -> None:
        """Queue an object that is in the store; idempotent."""
        path, source = self._path(digest), self._store.path(digest)
        try:
            try:
                os.link(source, path)
            except FileExistsError:
                if _is_announcement(path):
                    self._replace(path, source)
        except OSError as exc:
            raise from_os_error(exc, f"queue object {digest.hex()} for push") from exc

    def _replace(self, path: bytes, source: bytes) -> None:
        temporary = b"%s.%d-%d%s" % (path, os.getpid(), threading.get_ident(), _TEMPORARY)
        os.link(source, temporary)
        os.rename(temporary, path)
        if os.path.lexists(temporary):
            os.unlink(temporary)  # another process was faster: rename does nothing if both names link to one file

    def pending(self) -> Iterator[bytes]:
        """Yield the digests of pending objects, in any order. An object that was only announced may be missing."""
        for name in self._names():
            yield bytes.fromhex(name.decode("ascii"))

    def open(self, digest: bytes) -> int:
        """Return a read-only descriptor of a pending object.

        Raises:
            FileNotFoundError: Another process has pushed the object meanwhile, or it was announced but not stored.
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
        """Remove an entry: the remote has confirmed the object, or the object is damaged. Idempotent."""
        try:
            os.unlink(self._path(digest))
        except FileNotFoundError:
            pass

    def remove_unstored(self, read_build_refs: Callable[[], Container[bytes]]) -> int:
        """Remove announcements of objects that are not stored and that no import refers to; return their number.

        Temporary files that a killed `add` left are removed as well.

        Imports may announce, store and add objects meanwhile. An import writes its ref before its announcement, and
        this method renames the entry before it reads the refs. So either the import announces the object again, or
        this method finds the ref.

        Args:
            read_build_refs: Returns the digests that running imports refer to at the time of the call.

        Crash: leaves renamed entries; the next call renames them back.
        """
        for digest in self._aside():
            self._put_back(digest)
        for digest in [digest for digest in self.pending() if self._is_unstored(digest)]:
            with suppress(FileNotFoundError):  # it was pushed meanwhile
                os.rename(self._path(digest), self._path(digest) + _ASIDE)
        aside, unfinished = self._aside(), self._names(_TEMPORARY)
        kept = read_build_refs() if aside or unfinished else ()
        removed = 0
        for name in unfinished:
            if bytes.fromhex(name[: 2 * DIGEST_BYTES].decode("ascii")) not in kept:
                os.unlink(self._directory + b"/" + name)
        for digest in aside:
            path = self._path(digest) + _ASIDE
            if digest in kept or os.stat(path).st_size or self._store.has(digest):
                self._put_back(digest)
            else:
                os.unlink(path)
                removed += 1
        return removed

    def _is_unstored(self, digest: bytes) -> bool:
        return _is_announcement(self._path(digest)) and not self._store.has(digest)

    def _aside(self) -> list[bytes]:
        return [bytes.fromhex(name.removesuffix(_ASIDE).decode("ascii")) for name in self._names(_ASIDE)]

    def _names(self, suffix: bytes = b"") -> list[bytes]:
        """Return the names of entries with this suffix; by default the names without one."""
        with os.scandir(self._directory) as entries:
            names = [entry.name for entry in entries if entry.name.endswith(suffix)]
        return [name for name in names if (_NAME.match if suffix else _NAME.fullmatch)(name)]

    def _put_back(self, digest: bytes) -> None:
        """Rename an entry back; keep an entry that an import has created meanwhile if it is a link to the object."""
        path = self._path(digest)
        try:
            os.link(path + _ASIDE, path)
        except FileExistsError:
            if os.stat(path + _ASIDE).st_size and _is_announcement(path):
                os.rename(path + _ASIDE, path)
                return
        os.unlink(path + _ASIDE)

    def prune(self) -> int:
        """Remove entries of objects that are not in the store; return their number. Call after a reboot."""
        unstored = [digest for digest in self.pending() if not self._store.has(digest)]
        for digest in unstored:
            self.remove(digest)
        for name in self._names(_TEMPORARY):
            os.unlink(self._directory + b"/" + name)
        return len(unstored)

    def _path(self, digest: bytes) -> bytes:
        return self._directory + b"/" + digest.hex().encode()


def _is_announcement(path: bytes) -> bool:
    """Whether the entry is an announcement; False if it was removed, since then the object was pushed."""
    try:
        return not os.stat(path).st_size
    except FileNotFoundError:
        return False
