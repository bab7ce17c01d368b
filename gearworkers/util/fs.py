"""Directories by descriptor, removal of trees, reading of small files, versions of files, free space."""

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

MAX_PATH_BYTES = 4095
"""Longest path that Linux accepts (PATH_MAX without the final NUL); a layer cannot hold deeper files."""

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MAX_RECURSION = 32


@contextmanager
def opened_directory(path: Path, flags: int = 0) -> Iterator[int]:
    """Yield a descriptor of a directory.

    Args:
        path: The directory.
        flags: Such as O_NOFOLLOW, where an untrusted writer may have put a symbolic link at *path*.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def remove_tree(path: Path) -> None:
    """Remove a directory with its content, at any depth; entries that cannot be removed stay, without an error.

    Deep directories are moved to the top first, so that the stack, the descriptors and the length of paths are bounded.

    Crash: leaves the rest, which the next call removes.
    """
    with suppress(OSError):
        with opened_directory(path, os.O_NOFOLLOW) as top_fd:
            names = (b"removed-%s-%d" % (secrets.token_hex(8).encode(), n) for n in itertools.count())
            moved = [b"."]
            while moved:
                _remove_directory(moved.pop(), top_fd, _DeepDirectories(top_fd, names, moved), _MAX_RECURSION)
        path.rmdir()


class _DeepDirectories(NamedTuple):
    """Deep directories, moved to the top of the tree."""

    top_fd: int
    names: Iterator[bytes]
    moved: list[bytes]

    def move(self, name: bytes | str, dir_fd: int) -> None:
        moved = next(self.names)
        os.rename(name, moved, src_dir_fd=dir_fd, dst_dir_fd=self.top_fd)
        self.moved.append(moved)


def _remove_directory(name: bytes | str, dir_fd: int, deep: _DeepDirectories, levels: int) -> None:
    with suppress(OSError):
        fd = os.open(name, _DIRECTORY, dir_fd=dir_fd)
        try:
            with os.scandir(fd) as iterator:
                entries = list(iterator)
            for entry in entries:
                with suppress(OSError):
                    if not entry.is_dir(follow_symlinks=False):
                        os.unlink(entry.name, dir_fd=fd)
                    elif levels:
                        _remove_directory(entry.name, fd, deep, levels - 1)
                    else:
                        deep.move(entry.name, fd)
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=dir_fd)


def file_version(path: Path) -> tuple[int, int, int]:
    """Return a value that changes when the file is written or replaced."""
    status = os.stat(path)
    return status.st_ino, status.st_mtime_ns, status.st_size


def read_small(path: Path, max_bytes: int = 1 << 20) -> bytes:
    """Return the content of a small file that the administrator writes, such as a token or a configuration.

    Raises:
        NotFound: It does not exist.
        FailedPrecondition: It is not a regular file, or exceeds *max_bytes*.
        GearError: It cannot be read.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise FailedPrecondition(f"read {path}: not a regular file")
            data = file.read(max_bytes + 1)
    except IsADirectoryError as exc:
        raise FailedPrecondition(f"read {path}: it is a directory") from exc
    except OSError as exc:
        raise from_os_error(exc, f"read {path}") from exc
    if len(data) > max_bytes:
        raise FailedPrecondition(f"read {path}: it exceeds {max_bytes} bytes")
    return data


def free_bytes(fd: int) -> int:
    """Return the free space in bytes of the file system that holds *fd*.

    Raises:
        GearError: The file system does not report it.
    """
    try:
        status = os.fstatvfs(fd)
    except OSError as exc:
        raise from_os_error(exc, "read the free space of the file system") from exc
    return status.f_bavail * status.f_frsize
