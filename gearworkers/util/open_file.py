"""Open objects, whole or partial."""

from __future__ import annotations

import os

from gearworkers.errors import from_os_error


class ObjectFile:
    """An open file that is closed with its last reference."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Return the bytes at *offset*, fewer only at the end.

        Raises:
            GearError: They cannot be read.
        """
        try:
            return os.pread(self.fd, size_bytes, offset)
        except OSError as exc:
            raise from_os_error(exc, f"read {size_bytes} bytes of an object at {offset}") from exc

    def __del__(self) -> None:
        os.close(self.fd)
