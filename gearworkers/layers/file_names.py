"""The files of an incomplete layer in the order of its tar, from its stream file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from gearworkers.errors import IntegrityError
from gearworkers.layers.apply import STREAM_FILE
from gearworkers.tar.entry import REG, SYMLINK
from gearworkers.tar.reader import TarReader
from gearworkers.tar.tar_split import ObjectBytes, RawBytes, TarSplitReader


class NamedObject(NamedTuple):
    """A file that a Gear layer names without containing it."""

    path: bytes
    digest: bytes
    size_bytes: int


class NamedLink(NamedTuple):
    """A symbolic link."""

    path: bytes
    target: bytes


def named_files(directory: Path) -> Iterator[NamedObject | NamedLink]:
    """Yield the files of the layer in *directory* whose contents the tar names, and the symbolic links.

    Raises:
        IntegrityError: The stream file is missing or damaged.
    """
    try:
        file = open(directory / STREAM_FILE, "rb")
    except FileNotFoundError as exc:
        raise IntegrityError(f"layer {directory.name}: its {STREAM_FILE} is missing; run `gear fsck`") from exc
    with file:
        for entry in TarReader(_Headers(iter(TarSplitReader(file)))):
            if entry.type == REG and entry.gear is not None:
                yield NamedObject(entry.name, *entry.gear)
            elif entry.type == SYMLINK:
                yield NamedLink(entry.name, entry.linkname)


class _Headers:
    """The tar with zeros in place of the contents that are objects."""

    def __init__(self, pieces: Iterator[RawBytes | ObjectBytes]) -> None:
        self._pieces = pieces
        self._data = memoryview(b"")
        self._zeros = 0

    def readinto(self, buffer: memoryview, /) -> int:
        while not self._data and not self._zeros:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            if isinstance(piece, RawBytes):
                self._data = memoryview(piece.data)
            else:
                self._zeros = piece.length_bytes
        if self._zeros:
            size_bytes = min(self._zeros, len(buffer))
            buffer[:size_bytes] = bytes(size_bytes)
            self._zeros -= size_bytes
            return size_bytes
        size_bytes = min(len(self._data), len(buffer))
        buffer[:size_bytes] = self._data[:size_bytes]
        self._data = self._data[size_bytes:]
        return size_bytes
