"""Store contents in place: write them under the object's name, without a temporary file and a rename.

This halves the cost of an object. The xattr with the digest is set last, and a file without it is not an object, so
look-ups by digest are safe. But the kernel, which follows an overlay's redirect, does not check the xattr. Therefore
contents are stored in place only on a host without incomplete layers and without layers that have lost an object. On
such a host no container can open an object before the layer that adds it is published.

The file `incomplete-layers` in GEAR_ROOT forbids storing in place. An import holds a shared lock while it writes and
releases it before each wait for its tar. `forbid_in_place` creates the file, then waits for that lock. An import that
has seen the file never takes the lock again. So `forbid_in_place` waits for one run of writes at most, regardless of
the number and the duration of imports.

Measured for 20,000 objects of 8 kB on ext4: 37 µs each; with a rename 49 µs, plus 12 µs for a look-up before it.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from itertools import groupby
from pathlib import Path

from gearworkers.cas.store import ObjectState, ObjectStore
from gearworkers.digest import DIGEST_XATTR, shard_number
from gearworkers.errors import from_os_error
from gearworkers.util import syscalls as kernel
from gearworkers.util.locks import locked_file, open_lock_file
from gearworkers.util.writing import write_all

_CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
_FORBIDDEN_FILE = "incomplete-layers"
_LOST_FILE = "lost-objects"
_LOCK_FILE = "inplace.lock"
_OBJECTS_TO_LIST = 6
"""From this number of objects on, their shard is listed: that takes six system calls, and a look-up takes one."""


def put_in_place(store: ObjectStore, digest: bytes, data: memoryview, staging_fd: int) -> bool:
    """Store *data* under its SHA-256, which the caller has computed; return whether the object is new.

    Raises:
        IntegrityError: Another content is stored under the object's name.
        ResourceExhausted: No space or inodes are left.

    Crash: leaves a file without digest. The next import of the object replaces it, or garbage collection removes it.
    """
    try:
        fd = os.open(store.path(digest), _CREATE, 0o400)
    except FileExistsError:
        if store.has(digest):
            return False
        # A crash left the file, or another import is writing it. Replace it as a whole in both cases.
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
    """The lock that an import holds while it stores in place. Use from one thread only.

    Call `close` before a fork: parent and child must not share the lock's file.

    Crash: the kernel releases the lock.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._mark = os.fsencode(root / _FORBIDDEN_FILE)
        self._fd = -1
        self._is_held = False
        self._is_forbidden = False

    def acquire(self) -> bool:
        """Return whether contents may be stored in place until `release`; cheap while the lock is held."""
        if not self._is_held and not self._is_forbidden:
            self._is_held = self._try_lock()
            self._is_forbidden = not self._is_held
        return self._is_held

    def release(self) -> None:
        """Release the lock; call before any wait for the tar."""
        if self._is_held:
            fcntl.flock(self._fd, fcntl.LOCK_UN)
            self._is_held = False

    def close(self) -> None:
        """Release the lock and close its file; `acquire` opens it again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd, self._is_held = -1, False

    def _try_lock(self) -> bool:
        if self._fd < 0:
            self._fd = open_lock_file(self._root / _LOCK_FILE)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        if not os.access(self._mark, os.F_OK):  # ten times as fast as Path.exists
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False


def forbid_in_place(root: Path) -> None:
    """Forbid storing in place, and wait until no import does it. Call before a layer becomes incomplete."""
    touch_incomplete_layers(root)
    with locked_file(root / _LOCK_FILE):
        pass


def remove_unfinished(store: ObjectStore, digests: Iterable[bytes], staging_fd: int) -> None:
    """Remove the files that killed imports left under the names of these objects, since an overlay would open them.

    Call it after `forbid_in_place`, when no import can leave more of them. Most objects of a new layer are not in the
    store, so listing each small shard once is faster than looking up each object.

    Args:
        store: The store that contains the files.
        digests: Objects; this is fastest if they are sorted.
        staging_fd: A directory on the store's file system that only the caller uses; a crash leaves a file there.

    Raises:
        IntegrityError: Another content is stored under the name of one of the objects.
    """
    for _, group in groupby(digests, key=shard_number):
        wanted = {store.path(digest): digest for digest in group}
        for path in _existing(store, wanted):
            if store.find(wanted[path]) is ObjectState.UNFINISHED:
                _remove_unfinished_file(path, staging_fd)


def _existing(store: ObjectStore, paths: Collection[bytes]) -> Iterable[bytes]:
    """Return those of the *paths*, all in one shard, that exist; or all of them if a look-up of each is cheaper."""
    if len(paths) < _OBJECTS_TO_LIST:
        return paths
    shard = next(iter(paths)).rpartition(b"/")[0] + b"/"
    names = store.names_if_few(shard)
    return paths if names is None else [path for path in paths if path[len(shard) :] in names]


def _remove_unfinished_file(path: bytes, staging_fd: int) -> None:
    """Remove the file; if it has become an object meanwhile, it is invisible for a moment and then stays."""
    name = b"unfinished"
    try:
        os.rename(path, name, dst_dir_fd=staging_fd)
        if DIGEST_XATTR in os.listxattr(b"/proc/self/fd/%d/%s" % (staging_fd, name)):
            with suppress(FileExistsError):
                kernel.renameat2(staging_fd, name, -1, path, kernel.Rename.NOREPLACE)
                return
        os.unlink(name, dir_fd=staging_fd)
    except FileNotFoundError:
        return  # the garbage collector has removed it
    except OSError as exc:
        raise from_os_error(exc, f"remove the unfinished file {os.fsdecode(path)}") from exc


def touch_incomplete_layers(root: Path) -> None:
    """Create or touch `incomplete-layers`: it forbids storing in place, and all processes read the records again."""
    forbidden = root / _FORBIDDEN_FILE
    forbidden.touch(mode=0o600)
    now_ns = time.time_ns()
    os.utime(forbidden, ns=(now_ns, now_ns))  # finer than the kernel's clock for files


def mark_time_ns(root: Path) -> int:
    """Return the time of `incomplete-layers`, when the last layer became incomplete; 0 without the file."""
    try:
        return (root / _FORBIDDEN_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def allow_in_place(root: Path) -> None:
    """Remove `incomplete-layers`, unless objects are lost. Call when no layer is or becomes incomplete."""
    if not (root / _LOST_FILE).exists():
        (root / _FORBIDDEN_FILE).unlink(missing_ok=True)


def mark_objects_lost(root: Path) -> None:
    """Forbid storing in place until `clear_objects_lost`. Call before a layer loses an object."""
    (root / _LOST_FILE).touch(mode=0o600)
    forbid_in_place(root)


def clear_objects_lost(root: Path) -> None:
    """Note that no layer lacks an object, so that the next `allow_in_place` removes `incomplete-layers`."""
    (root / _LOST_FILE).unlink(missing_ok=True)
