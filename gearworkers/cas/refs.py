"""The list of objects that a layer refers to: its file `objects`.

In a published layer it is sorted and free of doubles: records of a 32-byte digest and the size in bytes as a
little-endian u64. While a layer is being made the same file lies in its build directory, unsorted, and is a
*claim*: a digest stands in it before the object is looked for, so whoever collects garbage and reads the claims
after hiding an object knows of every import that has found it.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from gearworkers.digest import DIGEST_BYTES
from gearworkers.util.writing import replace_file

REF_RECORD = struct.Struct("<32sQ")
_GROWTH_BYTES = 1 << 20
_NO_RECORD = bytes(REF_RECORD.size)

OBJECTS_FILE = "objects"


class RefWriter:
    """Appends to a build directory's `objects` through shared memory: visible at once, cheap."""

    def __init__(self, build: Path, name: str = OBJECTS_FILE) -> None:
        self._path = build / name
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._end = 0
        try:
            self._map = self._grown(_GROWTH_BYTES)
        except BaseException:
            os.close(self._fd)
            raise

    def add(self, digest: bytes, size_bytes: int) -> None:
        """Claim an object, before asking whether it is there."""
        if self._end + REF_RECORD.size > len(self._map):
            grown_bytes = len(self._map) * 2
            self._map.close()
            self._map = self._grown(grown_bytes)
        REF_RECORD.pack_into(self._map, self._end, digest, size_bytes)
        self._end += REF_RECORD.size

    def __len__(self) -> int:
        """How many were claimed, doubles included."""
        return self._end // REF_RECORD.size

    def seal(self) -> tuple[int, int]:
        """Replace the claims by the sorted list; how many objects it names, and the sum of their sizes in bytes."""
        records = sorted_refs(self._map[: self._end])
        replace_file(self._path, b"".join(records), sync=False)  # whoever publishes the layer syncs the file system
        return len(records), sum(size for _, size in map(REF_RECORD.unpack, records))

    def close(self) -> None:
        """Let go of the file; what was claimed stays claimed as long as the file is there."""
        self._map.close()
        os.close(self._fd)

    def _grown(self, size_bytes: int) -> mmap.mmap:
        # Not a hole: a disk that fills up later would kill the process at a write into shared memory.
        os.posix_fallocate(self._fd, 0, size_bytes)
        return mmap.mmap(self._fd, size_bytes)


def sorted_refs(raw: bytes) -> list[bytes]:
    """The distinct records of an `objects` file or of claims, sorted by digest."""
    size = REF_RECORD.size
    records = {raw[at : at + size] for at in range(0, len(raw) - size + 1, size)}
    records.discard(_NO_RECORD)
    return sorted(records)


def read_refs(path: Path) -> Iterator[tuple[bytes, int]]:
    """(digest, size in bytes) of every record of an `objects` file, sealed or not; none if there is no file."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return
    for digest, size_bytes in REF_RECORD.iter_unpack(raw[: len(raw) - len(raw) % REF_RECORD.size]):
        if digest != bytes(DIGEST_BYTES):
            yield digest, size_bytes
