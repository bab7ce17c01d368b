"""Search in the `objects` file of a layer or a pin.

The file is sorted by digest (`cas.refs`). It is mapped into memory, not read, so a list of a million objects costs
nothing until it is searched.
"""

from __future__ import annotations

import binascii
import bisect
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gearworkers.cas.refs import REF_RECORD
from gearworkers.digest import object_name

_FROM_URLSAFE = bytes.maketrans(b"-_", b"+/")


@dataclass(slots=True)
class ObjectList:
    """The objects of one layer, in the order of their digests."""

    records: mmap.mmap
    positions: range

    @classmethod
    def open(cls, path: Path) -> ObjectList | None:
        """Map the list in the file *path*; return None if the layer was removed or has no objects."""
        try:
            with open(path, "rb") as file:
                size_bytes = os.fstat(file.fileno()).st_size
                if not size_bytes:
                    return None
                records = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                return cls(records, range(size_bytes // REF_RECORD.size))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def has(self, digest: bytes) -> bool:
        """Whether the list contains the object."""
        return bool(self.between(digest, digest))

    def between(self, first: bytes, last: bytes) -> list[tuple[bytes, int]]:
        """Return (digest, size in bytes) of the objects whose digest begins with a prefix from *first* to *last*.

        Both prefixes have the same length and belong to the range.
        """
        length = len(first)
        start = bisect.bisect_left(self.positions, first, key=lambda at: self._prefix(at, length))
        found = []
        for at in self.positions[start:]:
            if self._prefix(at, length) > last:
                break
            found.append(self.record(at))
        return found

    def named(self, name: bytes) -> tuple[bytes, int] | None:
        """Return (digest, size in bytes) of the object with this name of 21 characters; None if it is not listed."""
        return find_named(self.between, name)

    def record(self, at: int) -> tuple[bytes, int]:
        """Return (digest, size in bytes) of the object at this position."""
        digest, size_bytes = REF_RECORD.unpack_from(self.records, at * REF_RECORD.size)
        return digest, size_bytes

    def _prefix(self, at: int, length: int) -> bytes:
        return self.records[at * REF_RECORD.size : at * REF_RECORD.size + length]


def find_named(between: Callable[[bytes, bytes], list[tuple[bytes, int]]], name: bytes) -> tuple[bytes, int] | None:
    """Return (digest, size in bytes) of the object with this name; None if there is none.

    Args:
        between: As `ObjectList.between`.
        name: 21 characters.
    """
    lowest = _lowest_digest(name)
    found = between(lowest[:15], lowest[:15]) if lowest is not None else []
    return next((record for record in found if object_name(record[0]) == name), None)


def _lowest_digest(name: bytes) -> bytes | None:
    """Return the lowest 16-byte prefix of the digests with this object name; None if *name* is not an object's name.

    The name determines the first 126 bits; two zero bits follow.
    """
    try:
        return binascii.a2b_base64(name.translate(_FROM_URLSAFE) + b"A==") if len(name) == 21 else None
    except binascii.Error:
        return None
