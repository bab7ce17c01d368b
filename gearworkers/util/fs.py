"""Directories by descriptor, taking a tree away, whether a file is another one by now, and room for more."""

from __future__ import annotations

import itertools
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from gearworkers.errors import FailedPrecondition, from_os_error

LONGEST_PATH_BYTES = 4095
"""What Linux takes of a path; a layer cannot hold what lies deeper."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FEW_LEVELS = 32


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


def remove_tree(path: Path) -> None:
    """Remove a directory and all that it holds, however deep; what cannot be removed stays, and no error is raised.

    What lies deep is first moved to the top, so that neither stack nor descriptors run out, nor a path gets too long.
    Crash: leaves the rest, which the next call removes.
    """
    with suppress(OSError):
        with opened_directory(path, os.O_NOFOLLOW) as top_fd:
            names = (b"removed-%s-%d" % (secrets.token_hex(8).encode(), n) for n in itertools.count())
            moved = [b"."]
            while moved:
                _remove_directory(moved.pop(), top_fd, _Moving(top_fd, names, moved), _FEW_LEVELS)
        path.rmdir()


class _Moving(NamedTuple):
    """Where directories that lie deep go."""

    top_fd: int
    names: Iterator[bytes]
    moved: list[bytes]

    def take(self, name: bytes | str, dir_fd: int) -> None:
        moved = next(self.names)
        os.rename(name, moved, src_dir_fd=dir_fd, dst_dir_fd=self.top_fd)
        self.moved.append(moved)


def _remove_directory(name: bytes | str, dir_fd: int, moving: _Moving, levels: int) -> None:
    with suppress(OSError):
        fd = os.open(name, _DIRECTORY, dir_fd=dir_fd)
        try:
            with os.scandir(fd) as found:
                entries = list(found)
            for entry in entries:
                with suppress(OSError):
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.name, dir_fd=fd)
                    elif levels:
                        _remove_directory(entry.name, fd, moving, levels - 1)
                    else:
                        moving.take(entry.name, fd)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=dir_fd)


def stamp(path: Path) -> tuple[int, int, int]:
    """Another one when the file was written or replaced since."""
    found = os.stat(path)
    return found.st_ino, found.st_mtime_ns, found.st_size


def read_small(path: Path, most_bytes: int = 1 << 20) -> bytes:
    """All of a file that somebody else writes and that is small: a token, a configuration.

    Raises:
        NotFound: It is not there.
        FailedPrecondition: It is no regular file, or has more than *most_bytes*.
        GearError: As the kernel says.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FailedPrecondition(f"read {path}: it is no regular file")
            data = file.read(most_bytes + 1)
    except IsADirectoryError as exc:
        raise FailedPrecondition(f"read {path}: it is a directory") from exc
    except OSError as exc:
        raise from_os_error(exc, f"read {path}") from exc
    if len(data) > most_bytes:
        raise FailedPrecondition(f"read {path}: it has more than {most_bytes} bytes")
    return data


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
