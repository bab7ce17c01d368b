"""Parse the 512 bytes of a header block: v7, ustar, star and GNU, as Go's archive/tar reads them.

Source: POSIX.1-2017, pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".
"""

from __future__ import annotations

import struct
from functools import lru_cache
from zlib import adler32

from gearworkers.errors import InvalidInput
from gearworkers.tar.entry import BLOCK_BYTES, CONTENTLESS, TarEntry, shown

ZERO_BLOCK = bytes(BLOCK_BYTES)

_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"LZIP": "lzip",
    b"\x5d\0\0": "lzma",
    b"\x1f\x9d": "compress",
}
"""Compression formats by the first bytes of their data."""
_USTAR_MAGIC = b"ustar\0"
_GNU_MAGIC, _GNU_VERSION = b"ustar ", b" \0"
_V7, _USTAR, _GNU = range(3)
_STAR_TRAILER = b"tar\0"
_STAR_PREFIX_BYTES = 131
_STAR_ATIME = slice(476, 488)
_GNU_ATIME = slice(345, 357)
_GNU_CTIME = slice(357, 369)
_CHECKSUM = slice(148, 156)
_NAME = slice(0, 100)
_OWNER = slice(100, 124)  # mode, uid, gid
_SIZE = slice(124, 136)
_MTIME = slice(136, 148)
_TYPE = 156
_LINKNAME = slice(157, 257)
_FORMAT = slice(257, 345)  # magic, version, uname, gname, devmajor, devminor
_PREFIX = slice(345, 500)
_TRAILER = slice(508, 512)
_NS = 1_000_000_000


def parse_header(block: bytes, offset: int) -> TarEntry:
    """Parse the header *block* at byte *offset* of the tar, after `parse_type` has verified its checksum.

    Returns:
        The entry. `type` has the header's value, not normalised; `size_bytes` is the size field; `stored_bytes` is the
        number of bytes that follow the header.

    Raises:
        InvalidInput: A number is malformed, or the size is negative.
    """
    kind = block[_TYPE]
    try:
        mode, uid, gid = _parse_owner(block[_OWNER])
        format, major, minor = _parse_format(block[_FORMAT])
        size_bytes = parse_number(block[_SIZE])
        entry = TarEntry(
            c_string(block[_NAME]),
            kind,
            c_string(block[_LINKNAME]) if block[_LINKNAME.start] else b"",
            mode,
            uid,
            gid,
            size_bytes,
            parse_number(block[_MTIME]) * _NS,
            None,
            major,
            minor,
        )
        if format:
            prefix = block[_PREFIX]
            if format == _GNU:
                prefix = _gnu_extras(entry, block, prefix)
            elif block[_TRAILER] == _STAR_TRAILER:
                prefix = _star_extras(entry, block, prefix)
            if prefix[0]:
                entry.name = c_string(prefix) + b"/" + entry.name
    except ValueError as exc:
        raise InvalidInput(f"tar entry {shown(c_string(block[_NAME]))} at byte {offset}: {exc}") from exc
    entry.header_offset = offset
    if kind not in CONTENTLESS:
        if size_bytes < 0:
            raise InvalidInput(f"tar entry {shown(entry.name)} at byte {offset}: its size is negative")
        entry.stored_bytes = size_bytes
    return entry


def parse_type(block: bytes, offset: int) -> int:
    """Verify the checksum of a header block and return its type.

    Raises:
        InvalidInput: The checksum is wrong.
    """
    if not _checksum_matches(block):
        if not offset:
            reject_compressed(block)
        raise InvalidInput(f"tar header at byte {offset}: the checksum is wrong; the stream is damaged or not a tar")
    return block[_TYPE]


def reject_compressed(beginning: bytes) -> None:
    """Reject a compressed stream. Call only for a stream that is not a tar: a name in a tar may begin the same way.

    Raises:
        InvalidInput: The stream is compressed; the message names the format.
    """
    for magic, name in _COMPRESSIONS.items():
        if beginning.startswith(magic):
            raise InvalidInput(
                f"the data is not a tar, it is compressed with {name}; a layer is a tar, optionally compressed once "
                "with gzip or zstd"
            )


def parse_size(block: bytes) -> int:
    """Return the size field of a header block; -1 if it is malformed, which `parse_header` reports."""
    try:
        return parse_number(block[_SIZE])
    except ValueError:
        return -1


@lru_cache(maxsize=1024)
def _parse_owner(fields: bytes) -> tuple[int, int, int]:
    """Return mode, uid and gid."""
    return parse_number(fields[:8]) & 0o7777, parse_number(fields[8:16]), parse_number(fields[16:])


@lru_cache(maxsize=1024)
def _parse_format(fields: bytes) -> tuple[int, int, int]:
    """Return the format, and the major and minor device numbers, which are 0 in v7."""
    if fields[:6] == _USTAR_MAGIC:
        format = _USTAR
    elif fields[:8] == _GNU_MAGIC + _GNU_VERSION:
        format = _GNU
    else:
        return _V7, 0, 0
    return format, parse_number(fields[72:80]), parse_number(fields[80:])


def is_gnu(block: bytes) -> bool:
    """Whether the header block has GNU tar's own format, the only format with old sparse maps."""
    return block[257:265] == _GNU_MAGIC + _GNU_VERSION


def c_string(field: bytes) -> bytes:
    """Return the bytes before the first NUL, or all bytes."""
    end = field.find(0)
    return field if end < 0 else field[:end]


@lru_cache(maxsize=8192)
def parse_number(field: bytes) -> int:
    """Parse a numeric field: octal, or base-256, which may be negative; blank is 0.

    Raises:
        ValueError: The field is malformed or does not fit in 64 bits.
    """
    if field[0] & 0x80:
        return _parse_base256(field)
    digits = c_string(field.strip(b" \0"))
    if not digits:
        return 0
    if not digits.isdigit() or b"8" in digits or b"9" in digits:
        raise ValueError(f"the numeric field {field!r} is not octal")
    return int(digits, 8)


def _parse_base256(field: bytes) -> int:
    negative = bool(field[0] & 0x40)
    bits = 8 * len(field) - 1
    value = int.from_bytes(field, "big") & ((1 << bits) - 1)
    if negative:
        value ^= (1 << bits) - 1
    if value >> 63:
        raise ValueError(f"the numeric field {field!r} does not fit in 64 bits")
    return ~value if negative else value


def _checksum_matches(block: bytes) -> bool:
    # The low half of Adler-32 is 1 + the sum of the bytes modulo 65521. The bytes of half a block add up to less, so
    # this is exact. It is eight times as fast as sum().
    halves = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF)
    return halves == _checksum_halves(block[_CHECKSUM]) or _signed_checksum_matches(block)


@lru_cache(maxsize=8192)
def _checksum_halves(field: bytes) -> int:
    """Return the sum of the halves in `_checksum_matches` for a correct checksum *field*; -1 if it is malformed."""
    try:
        return 2 + _parse_octal_only(field) + sum(field) - 8 * ord(" ")
    except ValueError:
        return -1


def _signed_checksum_matches(block: bytes) -> bool:
    """Whether the checksum is correct for signed bytes, as in old Sun tars."""
    try:
        expected = _parse_octal_only(block[_CHECKSUM])
    except ValueError:
        return False
    blanked = block[:148] + b" " * 8 + block[156:]
    total: int = sum(struct.unpack("512b", blanked))
    return expected == total


def _parse_octal_only(field: bytes) -> int:
    if field[0] & 0x80:
        raise ValueError("a checksum is octal")
    return parse_number(field)


def _star_extras(entry: TarEntry, block: bytes, prefix: bytes) -> bytes:
    entry.atime_ns = parse_number(block[_STAR_ATIME]) * _NS
    return prefix[:_STAR_PREFIX_BYTES]


def _gnu_extras(entry: TarEntry, block: bytes, prefix: bytes) -> bytes:
    """Set GNU's access time; return the name's prefix, which is empty in GNU's format.

    Before version 1.8, Go's writer wrote a prefix in place of GNU's times. Malformed times that are ASCII text are
    such a prefix.
    """
    try:
        if block[_GNU_ATIME][0]:
            entry.atime_ns = parse_number(block[_GNU_ATIME]) * _NS
        if block[_GNU_CTIME][0]:
            parse_number(block[_GNU_CTIME])
    except ValueError:
        entry.atime_ns = None
        text = c_string(prefix)
        return prefix if text.isascii() else b"\0"
    return b"\0"
