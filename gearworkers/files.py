"""Directories by descriptor, whether a file is another one by now, and what room there is for more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gearworkers.errors import from_os_error


@contextmanager
def opened_directory(path: Path, flags: int = 0) -> Iterator[int]:
    """A descriptor of the directory while the context lasts.

    Args:
        path: Of the directory.
        flags: Such as O_NOFOLLOW, where others choose what stands at the path.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def stamp(path: Path) -> tuple[int, int, int]:
    """Another one when the file was written or replaced since."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


def free_bytes(fd: int) -> int:
    """How much space is free where *fd* lies.

    Raises:
        GearError: The file system cannot tell.
    """
    try:
        status = os.fstatvfs(fd)
    except OSError as exc:
        raise from_os_error(exc, "ask how much space is free") from exc
    return status.f_bavail * status.f_frsize
