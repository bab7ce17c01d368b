"""Locks between processes. The kernel releases each of them when its holder ends.

flock(2) locks belong to the open file: threads of one process exclude each other as well. fcntl(2) record locks belong
to the process: its children do not inherit them.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gearworkers.errors import FailedPrecondition, from_os_error
from gearworkers.util.fs import opened_directory


def open_lock_file(path: Path) -> int:
    """Open a lock file, which is created if it is missing; the caller closes the descriptor."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


@contextmanager
def locked_file(path: Path, operation: int = fcntl.LOCK_EX) -> Iterator[int]:
    """Hold a flock on a file, which is created if it is missing; yield its descriptor.

    Args:
        path: The file.
        operation: LOCK_EX or LOCK_SH, with LOCK_NB to fail instead of waiting.

    Raises:
        BlockingIOError: With LOCK_NB, another holder excludes this one.
        OSError: The file cannot be opened.
    """
    fd = open_lock_file(path)
    try:
        fcntl.flock(fd, operation)
        yield fd
    finally:
        os.close(fd)


@contextmanager
def locked_directory(path: Path, operation: int = fcntl.LOCK_EX) -> Iterator[None]:
    """Hold a flock on a directory; arguments and errors as `locked_file`."""
    with opened_directory(path) as fd:
        fcntl.flock(fd, operation)
        yield


@contextmanager
def sole_process(path: Path, program: str) -> Iterator[None]:
    """Be the only process that holds the lock file *path*; enter it at most once in a process.

    Children of the process do not hold the lock.

    Args:
        path: The lock file; its directory is created.
        program: The program, for the error message, such as ``a gateway of this GEAR_ROOT``.

    Raises:
        FailedPrecondition: Another process holds it.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = open_lock_file(path)
    except OSError as exc:
        raise from_os_error(exc, f"open {path}") from exc
    try:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as exc:
            raise FailedPrecondition(f"{program} is already running ({path} is locked)") from exc
        yield
    finally:
        os.close(fd)
