"""Writing: all of a buffer, files that survive a power cut, and files that are replaced by one rename."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path

from gearworkers.errors import ResourceExhausted
from gearworkers.util.fs import opened_directory


def write_all(fd: int, data: bytes | bytearray | memoryview) -> None:
    """Write all of *data* at the current position of *fd*.

    Raises:
        ResourceExhausted: The file system accepts no more bytes and reports no error.
        OSError: The write failed; a part of the data may be written.
    """
    written = os.write(fd, data)
    while written < len(data):
        written += _progress(os.write(fd, memoryview(data)[written:]))


def pwrite_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of *data* at *offset*; errors as `write_all`."""
    written = os.pwrite(fd, data, offset)
    while written < len(data):
        written += _progress(os.pwrite(fd, memoryview(data)[written:], offset + written))


def replace_file(path: Path, data: bytes, *, sync: bool) -> None:
    """Replace *path* by a file with *data*; readers see the old content or the new one. Concurrent calls are safe.

    Args:
        path: A file, or the name of a new one.
        data: The whole content.
        sync: Whether the new content must survive a power cut. Without it a power cut may leave the old content,
            the new content or, on some file systems, an empty file.

    Raises:
        OSError: The file cannot be written; *path* is unchanged.

    Crash: leaves *path* unchanged and may leave a file ``NAME.….new`` beside it.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(4)}.new")
    try:
        if sync:
            write_synced(temporary, data)
        else:
            temporary.write_bytes(data)
        temporary.rename(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if sync:
        sync_directory(path.parent)


def write_synced(path: Path, data: bytes) -> None:
    """Write a file whose bytes survive a power cut; its name survives after `sync_directory`."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a power cut."""
    with opened_directory(path) as fd:
        os.fsync(fd)


def _progress(written: int) -> int:
    if not written:
        raise ResourceExhausted("the file system accepts no more bytes")
    return written
