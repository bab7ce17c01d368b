"""Open objects, whole or partial."""

from __future__ import annotations

import os
from collections.abc import Callable

from gearworkers.errors import GearError, from_os_error

ReadDone = Callable[[bytes | GearError], None]


class File:
    """An open file that is closed with its last reference."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def read(self, offset: int, size_bytes: int, done: ReadDone) -> None:
        """Call *done* with the bytes (fewer only at the end) or with the error."""
        try:
            data = os.pread(self.fd, size_bytes, offset)
        except OSError as exc:
            done(from_os_error(exc, f"read {size_bytes} bytes of an object at {offset}"))
            return
        done(data)

    def __del__(self) -> None:
        os.close(self.fd)
