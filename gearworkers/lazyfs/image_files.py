"""The named files of images, to find companions of a missing file."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

from gearworkers.fetch.read_ahead import BLOCK_BYTES, block_around
from gearworkers.layers.file_names import NamedLink, NamedObject

_MAX_NEIGHBOUR_BYTES = 128 << 10
"""Larger files are no neighbours: one of them would fill much of a block."""
_PROGRAM_DIRECTORIES = (b"bin", b"sbin")
_LINK_DIRECTORIES = (*_PROGRAM_DIRECTORIES, b"alternatives")
_MAX_LINKS = 5
STARTUP_FILES = (b"etc/passwd", b"etc/group", b"etc/ld.so.cache", b"etc/nsswitch.conf")
"""Files that the runtime, the dynamic linker or the C library reads in most containers."""


class LayerFiles:
    """The files of one layer, which are read when they are needed.

    Args:
        id: The layer's.
        read: Returns the files in the order of the layer's tar.
    """

    def __init__(self, id: str, read: Callable[[], Iterable[NamedObject | NamedLink]]) -> None:
        self.id = id
        self._read = read

    def program(self, digest: bytes) -> NamedObject | None:
        """Return a program or library with this content."""
        return self._tables.programs.get(digest)

    def named(self, name: bytes) -> NamedObject | None:
        """Return the program or library with this file name, or the library that programs ask for by this name.

        Files of STARTUP_FILES have their path as their name.
        """
        return self._tables.names.get(name)

    def linked(self, name: bytes) -> bytes | None:
        """Return the last part of the target of the link to a program with this file name."""
        return self._tables.links.get(name)

    def neighbours(self, digest: bytes) -> Iterator[Neighbour]:
        """Yield the files of the block around a file, those after it first; nothing if it has none."""
        place = self._tables.places.get(digest)
        if place is not None:
            group, number = place
            yield from group.block(number)

    @cached_property
    def _tables(self) -> _Tables:
        tables = _Tables({}, {}, {}, {})
        groups: dict[bytes, _Group] = {}
        for file in self._read():
            directory, _, name = file.path.rpartition(b"/")
            if isinstance(file, NamedLink):
                target = file.target.rpartition(b"/")[2]
                if target != name and directory.rpartition(b"/")[2] in _LINK_DIRECTORIES:
                    tables.links[name] = target
                continue
            if (path := file.path.lstrip(b"./")) in STARTUP_FILES:
                tables.names[path] = file
            elif _is_program(directory, name):
                tables.programs[file.digest] = file
                for known in _names_of(name):
                    tables.names.setdefault(known, file)
            if file.size_bytes <= _MAX_NEIGHBOUR_BYTES and (file.digest not in tables.programs or _is_plugin(name)):
                group = groups.setdefault(_suffix(name), _Group([], [], set()))
                tables.places.setdefault(file.digest, (group, len(group.files)))
                group.add(file)
        return tables


class _Tables(NamedTuple):
    programs: dict[bytes, NamedObject]
    """By digest."""
    names: dict[bytes, NamedObject]
    links: dict[bytes, bytes]
    places: dict[bytes, tuple[_Group, int]]
    """The files that are neighbours, by digest; each with its number in its group."""


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
    """The numbers of the blocks of BLOCK_BYTES that were fetched."""

    def add(self, file: NamedObject) -> None:
        self.files.append(Neighbour(file.digest, file.size_bytes))
        self.ends.append(file.size_bytes + (self.ends[-1] if self.ends else 0))

    def block(self, number: int) -> Iterator[Neighbour]:
        begin = self.ends[number] - self.files[number].size_bytes
        offset, size_bytes = block_around(begin, self._has_any)
        self.fetched.update(_blocks_in(offset, size_bytes))
        first = bisect_left(self.ends, offset + 1)
        end = bisect_left(self.ends, offset + size_bytes)
        return chain(self.files[number + 1 : end + 1], reversed(self.files[first:number]))

    def _has_any(self, offset: int, size_bytes: int) -> bool:
        return not self.fetched.isdisjoint(_blocks_in(offset, size_bytes))


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
        """Return the file of this name, as `LayerFiles.named`; links are followed by their last part."""
        for _ in range(_MAX_LINKS):
            file = next(filter(None, (layer.named(name) for layer in self.layers)), None)
            if file is not None:
                return file
            name = next(filter(None, (layer.linked(name) for layer in self.layers)), b"")
        return None


def _blocks_in(offset: int, size_bytes: int) -> range:
    return range(offset // BLOCK_BYTES, (offset + size_bytes) // BLOCK_BYTES)


def _suffix(name: bytes) -> bytes:
    return name.rpartition(b".")[2] if b"." in name else b""


def _is_program(directory: bytes, name: bytes) -> bool:
    return directory.rpartition(b"/")[2] in _PROGRAM_DIRECTORIES or _is_plugin(name) or b".so." in name


def _is_plugin(name: bytes) -> bool:
    """Whether a program opens this library by its path; other libraries have a version."""
    return name.endswith(b".so")


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
