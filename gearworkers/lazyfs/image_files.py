"""The named files of images, to find companions of a missing file."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

from gearworkers.fetch.read_ahead import MIN_BYTES, block_around
from gearworkers.layers.file_names import NamedLink, NamedObject

_MAX_NEIGHBOUR_BYTES = 128 << 10
"""Larger files are no neighbours: one of them would fill half of a block."""
_PROGRAM_DIRECTORIES = (b"bin", b"sbin")
_ALTERNATIVES = b"alternatives"
_MAX_LINKS = 5


class LayerFiles:
    """The files of one layer.

    Args:
        id: The layer's.
        files: The files in the order of its tar.
    """

    def __init__(self, id: str, files: Iterable[NamedObject | NamedLink]) -> None:
        self.id = id
        self.programs: dict[bytes, NamedObject] = {}
        """Programs and libraries, by digest."""
        self.names: dict[bytes, NamedObject] = {}
        """The same by file name, and libraries by each name that a program may ask for."""
        self.links: dict[bytes, bytes] = {}
        """The names of links in directories of programs, each with the last part of its target."""
        self._places: dict[bytes, tuple[_Group, int]] = {}
        groups: dict[bytes, _Group] = {}
        for file in files:
            directory, _, name = file.path.rpartition(b"/")
            if isinstance(file, NamedLink):
                target = file.target.rpartition(b"/")[2]
                if target != name and directory.rpartition(b"/")[2] in (*_PROGRAM_DIRECTORIES, _ALTERNATIVES):
                    self.links[name] = target
            elif _is_program(directory, name):
                self.programs[file.digest] = file
                for known in _names_of(name):
                    self.names.setdefault(known, file)
            elif file.size_bytes <= _MAX_NEIGHBOUR_BYTES:
                group = groups.setdefault(_suffix(name), _Group([], [], set()))
                self._places.setdefault(file.digest, (group, len(group.files)))
                group.add(file)

    def neighbours(self, digest: bytes) -> Iterator[Neighbour]:
        """Yield the files of the block around a file, those after it first; nothing if it has none."""
        place = self._places.get(digest)
        if place is not None:
            group, number = place
            yield from group.block(number)


class Neighbour(NamedTuple):
    """A file that is no program."""

    digest: bytes
    size_bytes: int


class _Group(NamedTuple):
    """The files of a layer with the same suffix, as if their contents followed each other in one file."""

    files: list[Neighbour]
    ends: list[int]
    """Where each file ends, in bytes from the beginning of the first one."""
    fetched: set[int]
    """The numbers of the blocks of MIN_BYTES that were fetched."""

    def add(self, file: NamedObject) -> None:
        self.files.append(Neighbour(file.digest, file.size_bytes))
        self.ends.append(file.size_bytes + (self.ends[-1] if self.ends else 0))

    def block(self, number: int) -> Iterator[Neighbour]:
        begin = self.ends[number] - self.files[number].size_bytes
        offset, size_bytes = block_around(begin, self._has_any)
        self.fetched.update(_blocks(offset, size_bytes))
        first = bisect_left(self.ends, offset + 1)
        end = bisect_left(self.ends, offset + size_bytes)
        return chain(self.files[number + 1 : end + 1], reversed(self.files[first:number]))

    def _has_any(self, offset: int, size_bytes: int) -> bool:
        return not self.fetched.isdisjoint(_blocks(offset, size_bytes))


class ImageFiles:
    """The files of an image's incomplete layers.

    Args:
        layers: The topmost first.
    """

    def __init__(self, layers: Sequence[LayerFiles]) -> None:
        self.layers = layers
        self.seen: set[bytes] = set()
        """Digests of the programs and libraries whose companions were fetched."""

    def find(self, name: bytes) -> NamedObject | None:
        """Return the program or library with this file name; links are followed by their last part."""
        for _ in range(_MAX_LINKS):
            if (file := next((layer.names[name] for layer in self.layers if name in layer.names), None)) is not None:
                return file
            name = next((layer.links[name] for layer in self.layers if name in layer.links), b"")
        return None


def _blocks(offset: int, size_bytes: int) -> range:
    return range(offset // MIN_BYTES, (offset + size_bytes) // MIN_BYTES)


def _suffix(name: bytes) -> bytes:
    return name.rpartition(b".")[2] if b"." in name else b""


def _is_program(directory: bytes, name: bytes) -> bool:
    return directory.rpartition(b"/")[2] in _PROGRAM_DIRECTORIES or name.endswith(b".so") or b".so." in name


def _names_of(name: bytes) -> Iterator[bytes]:
    """Yield the name, and those of a library without its last numbers: libz.so.1.2.13, libz.so.1.2, libz.so.1, libz.so.

    Programs ask for one of the latter, which is a link to the file.
    """
    yield name
    while b".so." in name:
        name, _, number = name.rpartition(b".")
        if not number.isdigit():
            return
        yield name
