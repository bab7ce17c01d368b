"""Where a large object is cut: content-defined, so that versions of a file share what they have in common.

Source: Xia et al., "The Design of Fast Content-Defined Chunking for Data Deduplication Based Storage Systems",
IEEE TPDS 31 (2020); pyfastcdc cuts 3.9 GB/s where SHA-256 takes 1.8 GB/s.
The parameters are part of the format: whoever changes them shares nothing with what was stored before.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from io import RawIOBase
from typing import Any

from pyfastcdc import FastCDC, NormalizedChunking

from gearworkers.errors import from_os_error

_AVERAGE_BYTES = 64 << 10
_LEAST_BYTES = 16 << 10
_MOST_BYTES = 256 << 10
_NORMALIZATION: NormalizedChunking = 2


def chunks_of(fd: int) -> Iterator[memoryview]:
    """The chunks of the file *fd* from its beginning to its end; each is valid until the next is asked for.

    Raises:
        GearError: The file cannot be read.
    """
    cutter = FastCDC(
        _AVERAGE_BYTES, min_size=_LEAST_BYTES, max_size=_MOST_BYTES, normalized_chunking=_NORMALIZATION, seed=0
    )
    for chunk in cutter.cut_stream(_FromStart(fd)):
        yield chunk.data


class _FromStart(RawIOBase):
    """Reads a descriptor from 0 on without moving its offset, which others may share."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._at = 0

    def readinto(self, buffer: Any) -> int:
        try:
            size_bytes = os.preadv(self._fd, [buffer], self._at)
        except OSError as exc:
            raise from_os_error(exc, f"read an object at {self._at}") from exc
        self._at += size_bytes
        return size_bytes
