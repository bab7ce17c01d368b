"""Storing a content straight under its object's name: half the cost of a temporary file and a rename.

The digest's xattr is set last, and a file without it is no object, so whoever looks an object up by it is safe. The
kernel, which follows an overlay's redirect, does not look: therefore this is only for a host without incomplete
layers, and without layers that have lost an object. On such a host no container can open an object before the layer
that brings it is published.

Measured for 20,000 objects of 8 kB on ext4: 37 µs each, by way of a rename 49 µs and a look-up of 12 µs before.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gearworkers.digest import DIGEST_XATTR
from gearworkers.errors import from_os_error
from gearworkers.objects.store import ObjectStore, write_all

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


@contextmanager
def permission(root: Path) -> Iterator[bool]:
    """Whether contents may be stored in place for as long as the context lasts."""
    fd = os.open(root / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield not (root / _FORBIDDEN_FILE).exists()
    finally:
        os.close(fd)


def forbid(root: Path) -> None:
    """No more from now on, and none under way: before a layer is published, or marked, incomplete."""
    note_change(root)
    fd = os.open(root / _LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    finally:
        os.close(fd)


def note_change(root: Path) -> None:
    """Forbid it, and have everybody read the layers' records again."""
    forbidden = root / _FORBIDDEN_FILE
    forbidden.touch(mode=0o600)
    now_ns = time.time_ns()
    os.utime(forbidden, ns=(now_ns, now_ns))  # finer than the kernel's own clock


def changed_ns(root: Path) -> int:
    """When the last layer became incomplete; 0 if all are complete."""
    try:
        return (root / _FORBIDDEN_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def allow(root: Path) -> None:
    """Allowed again: the host has no incomplete layer, and nobody publishes one; not after `lose`."""
    if not (root / _LOST_FILE).exists():
        (root / _FORBIDDEN_FILE).unlink(missing_ok=True)


def lose(root: Path) -> None:
    """Forbid it until `found`: a layer is about to lose an object that the kernel may be told to open."""
    (root / _LOST_FILE).touch(mode=0o600)
    forbid(root)


def found(root: Path) -> None:
    """No layer lacks anything; the next `allow` counts again."""
    (root / _LOST_FILE).unlink(missing_ok=True)
