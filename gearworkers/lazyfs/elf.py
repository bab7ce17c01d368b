"""Find the libraries that a program or library needs (DT_NEEDED), from a few parts of its file.

Only the kind that Linux uses on x86-64, arm64, riscv64 and ppc64le is read: ELF of 64 bits, little-endian. Sizes and
counts are bounded, since anybody may have made the file.

Source: the System V ABI, chapters 4 and 5 ("Program Header", "Dynamic Section").
"""

from __future__ import annotations

import struct
from typing import NamedTuple

HEAD_BYTES = 4096
"""Length of the beginning of the file that `parse_head` needs."""
_IDENT = b"\x7fELF\x02\x01"
_HEADER = struct.Struct("<16sHHIQQQIHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_DYNAMIC = struct.Struct("<qQ")
_PT_LOAD, _PT_DYNAMIC = 1, 2
_PF_W = 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ = 0, 1, 5, 10
_MAX_DYNAMIC_BYTES = 64 << 10
_MAX_STRINGS_BYTES = 1 << 20
_MAX_NAME_BYTES = 256
_MAX_NEEDED = 500
_MAX_LOADED_BYTES = 1 << 20


class Part(NamedTuple):
    """A part of the file, in bytes."""

    offset: int
    size_bytes: int


class Segment(NamedTuple):
    """A loaded segment."""

    flags: int
    offset: int
    address: int
    size_bytes: int
    """In the file."""


class Program(NamedTuple):
    """The program headers of a file."""

    segments: list[Segment]
    dynamic: Part

    def loaded(self) -> list[Part]:
        """Return the parts that the dynamic linker reads and relocates: the first segment and the writable ones."""
        first, *others = self.segments
        return [
            Part(segment.offset, min(segment.size_bytes, _MAX_LOADED_BYTES))
            for segment in (first, *(other for other in others if other.flags & _PF_W))
        ]


class Needed(NamedTuple):
    """The needed libraries, as places in a part of the table of strings."""

    strings: Part
    names: list[int]
    """The beginnings of the names, in bytes from the beginning of *strings*."""


def parse_head(head: bytes) -> Program | None:
    """Return the program headers; None if the file is no dynamically linked program or library, or another kind."""
    if len(head) < _HEADER.size or not head.startswith(_IDENT):
        return None
    *_, headers_offset, _, _, _, header_size, count = _HEADER.unpack_from(head)
    if header_size != _PROGRAM_HEADER.size or headers_offset + count * header_size > len(head):
        return None
    segments, dynamic = [], None
    for number in range(count):
        kind, flags, offset, address, _, size_bytes, _, _ = _PROGRAM_HEADER.unpack_from(
            head, headers_offset + number * header_size
        )
        if kind == _PT_LOAD:
            segments.append(Segment(flags, offset, address, size_bytes))
        elif kind == _PT_DYNAMIC:
            dynamic = Part(offset, min(size_bytes, _MAX_DYNAMIC_BYTES))
    return Program(segments, dynamic) if segments and dynamic is not None else None


def parse_dynamic(program: Program, data: bytes) -> Needed | None:
    """Return the needed libraries from the bytes of `program.dynamic`; None if there are none."""
    names: list[int] = []
    address, size_bytes = None, 0
    for tag, value in _DYNAMIC.iter_unpack(data[: len(data) - len(data) % _DYNAMIC.size]):
        if tag == _DT_NULL:
            break
        if tag == _DT_NEEDED and len(names) < _MAX_NEEDED:
            names.append(value)
        elif tag == _DT_STRTAB:
            address = value
        elif tag == _DT_STRSZ:
            size_bytes = value
    if not names or address is None:
        return None
    for segment in program.segments:
        if segment.address <= address < segment.address + segment.size_bytes:
            first, end = min(names), min(max(names) + _MAX_NAME_BYTES, size_bytes)
            offset = address - segment.address + segment.offset + first
            return Needed(Part(offset, min(end - first, _MAX_STRINGS_BYTES)), [name - first for name in names])
    return None


def names_of(needed: Needed, strings: bytes) -> list[bytes]:
    """Return the names of the libraries from the bytes of `needed.strings`."""
    ends = [(start, strings.find(b"\0", start)) for start in needed.names if start < len(strings)]
    return [strings[start:end] for start, end in ends if end > start]
