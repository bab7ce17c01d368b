"""Refs: the file `objects`, which lists the objects that a layer or a pin refers to.

In a published layer the file is sorted and has no duplicates. Each record is a 32-byte digest and the size in bytes as
a little-endian u64. While a layer is being built the same file is in its build directory, unsorted. An import writes a
ref before it looks for the object. The garbage collector reads the refs again after it has hidden an object, so it
knows every import that has found the object.
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
    """Appends refs to the `objects` file of a build directory through shared memory: cheap, and visible at once."""

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
        """Write a ref; call before looking for the object."""
        if self._end + REF_RECORD.size > len(self._map):
            grown_bytes = len(self._map) * 2
            self._map.close()
            self._map = self._grown(grown_bytes)
        REF_RECORD.pack_into(self._map, self._end, digest, size_bytes)
        self._end += REF_RECORD.size

    def __len__(self) -> int:
        """Return the number of refs written, duplicates included."""
        return self._end // REF_RECORD.size

    def seal(self) -> tuple[int, int]:
        """Replace the file by the sorted list; return the number of objects and the sum of their sizes in bytes."""
        records = sorted_refs(self._map[: self._end])
        replace_file(self._path, b"".join(records), sync=False)  # publishing the layer syncs the file system
        return len(records), sum(size for _, size in map(REF_RECORD.unpack, records))

    def close(self) -> None:
        """Close the file; the refs stay valid until the file is removed."""
        self._map.close()
        os.close(self._fd)

    def _grown(self, size_bytes: int) -> mmap.mmap:
        # Allocate the blocks: on a full disk, a write into a hole of shared memory would kill the process.
        os.posix_fallocate(self._fd, 0, size_bytes)
        return mmap.mmap(self._fd, size_bytes)


def sorted_refs(raw: bytes) -> list[bytes]:
    """Return the distinct records of an `objects` file, sorted by digest."""
    size = REF_RECORD.size
    records = {raw[at : at + size] for at in range(0, len(raw) - size + 1, size)}
    records.discard(_NO_RECORD)
    return sorted(records)


def read_refs(path: Path) -> Iterator[tuple[bytes, int]]:
    """Yield (digest, size in bytes) of every record in an `objects` file, sorted or not; nothing without the file."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return
    for digest, size_bytes in REF_RECORD.iter_unpack(raw[: len(raw) - len(raw) % REF_RECORD.size]):
        if digest != bytes(DIGEST_BYTES):
            yield digest, size_bytes
