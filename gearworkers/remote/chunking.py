"""Cutting large objects into chunks at places that their content defines, so that versions of a file share chunks.

Source: Xia et al., "The Design of Fast Content-Defined Chunking for Data Deduplication Based Storage Systems",
IEEE TPDS 31 (2020); pyfastcdc cuts 3.9 GB/s where SHA-256 takes 1.8 GB/s.
The parameters are part of the format: with different parameters, new objects would share no chunks with stored ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import RawIOBase
from typing import Any

from pyfastcdc import FastCDC, NormalizedChunking

from gearworkers.errors import from_os_error

_AVERAGE_BYTES = 64 << 10
_MIN_BYTES = 16 << 10
_MAX_BYTES = 256 << 10
_NORMALIZATION: NormalizedChunking = 2


def chunks_of(fd: int) -> Iterator[memoryview]:
    """Yield the chunks of the file *fd* from its start to its end; each is valid until the next one.

    Raises:
        GearError: The file cannot be read.
    """
    cutter = FastCDC(
        _AVERAGE_BYTES, min_size=_MIN_BYTES, max_size=_MAX_BYTES, normalized_chunking=_NORMALIZATION, seed=0
    )
    for chunk in cutter.cut_stream(_PositionedReader(fd)):
        yield chunk.data


class _PositionedReader(RawIOBase):
    """Reads a descriptor from its start without moving its offset, which others may share."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._offset = 0

    def readinto(self, buffer: Any) -> int:
        try:
            size_bytes = os.preadv(self._fd, [buffer], self._offset)
        except OSError as exc:
            raise from_os_error(exc, f"read an object at {self._offset}") from exc
        self._offset += size_bytes
        return size_bytes
