"""Storing a content straight under its object's name: half the cost of a temporary file and a rename.

The digest's xattr is set last, and a file without it is no object, so whoever looks an object up by it is safe. The
kernel, which follows an overlay's redirect, does not look: therefore this is only for a host without incomplete
layers, and without layers that have lost an object. On such a host no container can open an object before the layer
that brings it is published.

Glossary: a *burst* is a run of writes with no wait for the tar between them; an import holds the lock, shared, for a
burst at a time. `forbid` leaves its mark first and then waits for the bursts under way. An import that has seen the
mark never takes the lock again, so imports delay `forbid` by one burst, however many there are and however long they
take.

Measured for 20,000 objects of 8 kB on ext4: 37 µs each, by way of a rename 49 µs and a look-up of 12 µs before.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path

from gearworkers.cas.store import ObjectStore
from gearworkers.digest import DIGEST_XATTR
from gearworkers.errors import from_os_error
from gearworkers.util import syscalls as kernel
from gearworkers.util.locks import locked_file, open_lock_file
from gearworkers.util.writing import write_all

_CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
_FORBIDDEN_FILE = "incomplete-layers"
_LOST_FILE = "lost-objects"
_LOCK_FILE = "inplace.lock"


def put_in_place(store: ObjectStore, digest: bytes, data: memoryview, staging_fd: int) -> bool:
    """Store *data*, whose SHA-256 the caller has computed; whether it is new.

    Raises:
        IntegrityError: Another content stands at its name.
        ResourceExhausted: No space or inodes.

    Crash: leaves a file without digest, which is replaced by the next who stores it, or collected.
    """
    try:
        fd = os.open(store.path(digest), _CREATE, 0o400)
    except FileExistsError:
        if store.has(digest):
            return False
        # Left by a crash, or another import is at it: both ways it is replaced as a whole.
        with store.create(staging_fd) as pending:
            pending.write(data)
            return pending.publish(digest)
    except OSError as exc:
        raise from_os_error(exc, f"store object {digest.hex()}") from exc
    try:
        write_all(fd, data)
        os.setxattr(fd, DIGEST_XATTR, digest)
    except OSError as exc:
        os.ftruncate(fd, 0)
        raise from_os_error(exc, f"store object {digest.hex()}") from exc
    finally:
        os.close(fd)
    return True


class InPlaceLock:
    """One import's permission to store in place, asked for anew in each burst; for one thread.

    After a fork parent and child need one each: whoever forks calls `close` before.

    Crash: the kernel ends the burst with its process.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._mark = os.fsencode(root / _FORBIDDEN_FILE)
        self._fd = -1
        self._is_under_way = False
        self._is_forbidden = False

    def begin(self) -> bool:
        """Whether contents may be stored in place until `end`; free of cost while a burst is under way."""
        if not self._is_under_way and not self._is_forbidden:
            self._is_under_way = self._locked()
            self._is_forbidden = not self._is_under_way
        return self._is_under_way

    def end(self) -> None:
        """Nothing is being written; call it before any wait for the tar."""
        if self._is_under_way:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            self._is_under_way = False

    def close(self) -> None:
        """End the burst and let go of the lock file; `begin` opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self._is_under_way = -1, False

    def _locked(self) -> bool:
        if self._fd < 0:
            self._fd = open_lock_file(self._root / _LOCK_FILE)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not os.access(self._mark, os.F_OK):  # a tenth of what Path.exists takes
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False


def forbid(root: Path) -> None:
    """No more from now on, and none under way: before a layer is published, or marked, incomplete.

    Waits for the bursts that are under way.
    """
    leave_mark(root)
    with locked_file(root / _LOCK_FILE):
        pass


def remove_unfinished(store: ObjectStore, digest: bytes, staging_fd: int) -> None:
    """Remove the file that a killed import left at the object's name: an overlay would take it for the object.

    Args:
        store: Where it lies.
        digest: Of an object that was looked up as `Found.UNFINISHED` after `forbid`.
        staging_fd: A directory on the store's file system, private to the caller; a crash leaves the file there.

    If the object has arrived meanwhile it stays, out of sight for a moment.
    """
    path, name = store.path(digest), b"unfinished"
    try:
        os.rename(path, name, dst_dir_fd=staging_fd)
        if DIGEST_XATTR in os.listxattr(b"/proc/self/fd/%d/%s" % (staging_fd, name)):
            with suppress(FileExistsError):
                kernel.renameat2(staging_fd, name, -1, path, kernel.Rename.NOREPLACE)
                return
        os.unlink(name, dir_fd=staging_fd)
    except FileNotFoundError:
        return  # the collector has removed it
    except OSError as exc:
        raise from_os_error(exc, f"remove the unfinished object {digest.hex()}") from exc


def leave_mark(root: Path) -> None:
    """Forbid it, and have everybody read the layers' records again."""
    forbidden = root / _FORBIDDEN_FILE
    forbidden.touch(mode=0o600)
    now_ns = time.time_ns()
    os.utime(forbidden, ns=(now_ns, now_ns))  # finer than the kernel's own clock


def mark_time_ns(root: Path) -> int:
    """When the last layer became incomplete; 0 if all are complete."""
    try:
        return (root / _FORBIDDEN_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def allow(root: Path) -> None:
    """Allowed again: the host has no incomplete layer, and nobody publishes one; not after `lose`."""
    if not (root / _LOST_FILE).exists():
        (root / _FORBIDDEN_FILE).unlink(missing_ok=True)


def mark_objects_lost(root: Path) -> None:
    """Forbid it until `found`: a layer is about to lose an object that the kernel may be told to open."""
    (root / _LOST_FILE).touch(mode=0o600)
    forbid(root)


def clear_objects_lost(root: Path) -> None:
    """No layer lacks anything; the next `allow` counts again."""
    (root / _LOST_FILE).unlink(missing_ok=True)
