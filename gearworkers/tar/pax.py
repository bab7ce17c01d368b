"""PAX extended headers: parse records, apply records to an entry, and format records.

Source: POSIX.1-2017, pax, "pax Extended Header"; accepts the same records as Go's archive/tar.
"""

from __future__ import annotations

import binascii
import re

from gearworkers.tar.entry import TarEntry

Records = dict[bytes, bytes]

MAX_SPECIAL_BYTES = 1 << 20
"""Limit of an extended header, a GNU long name or a sparse map; the same as in Go and libarchive."""

XATTR_PREFIX = b"SCHILY.xattr."
GEAR_DIGEST = b"GEAR.sha256"
GEAR_SIZE = b"GEAR.size"
GEAR_GUARD = b"GEAR.guard"
SPARSE_MAP = b"GNU.sparse.map"
_SPARSE_OFFSET = b"GNU.sparse.offset"
_SPARSE_NUMBYTES = b"GNU.sparse.numbytes"

_GEAR_RECORDS = re.compile(rb"80 GEAR\.sha256=([0-9a-f]{64})\n([0-9]{2}) GEAR\.size=([0-9]{1,18})\n")
_C_STRINGS = frozenset((b"path", b"linkpath", b"uname", b"gname"))
_PLAIN_TIME = re.compile(rb"([0-9]{1,18})\.([0-9]{1,9})[0-9]*\Z")
_INTEGER = re.compile(rb"[+-]?[0-9]+\Z")
_TIME = re.compile(rb"([+-]?[0-9]+)(?:\.([0-9]*))?\Z")
_TENS: tuple[int, ...] = tuple(10 ** (9 - digits) for digits in range(10))
_INT64 = 1 << 63
_NS = 1_000_000_000
_MAX_INTEGER_DIGITS = 40


def parse_records(data: bytes) -> Records:
    """Return the records of one extended header; the last value of a key applies.

    GNU's sparse format 0.0, which repeats keys, is converted to format 0.1: one GNU.sparse.map.

    Raises:
        ValueError: A record is malformed, or a name contains a NUL byte.
    """
    records: Records = {}
    sparse: list[bytes] = []
    at = 0
    while at < len(data):
        key, value, at = _parse_record(data, at)
        if key in (_SPARSE_OFFSET, _SPARSE_NUMBYTES):
            if (key == _SPARSE_NUMBYTES) != (len(sparse) % 2 == 1) or b"," in value:
                raise ValueError("its PAX sparse map is out of order")
            sparse.append(value)
        else:
            records[key] = value
    if sparse:
        records[SPARSE_MAP] = b",".join(sparse)
    return records


def _parse_record(data: bytes, at: int) -> tuple[bytes, bytes, int]:
    space = data.find(b" ", at, at + 24)
    digits = data[at:space]
    if space < 0 or not digits.isdigit():
        raise ValueError("a PAX record does not begin with its length")
    end = at + int(digits)
    equals = data.find(b"=", space, end)
    if end > len(data) or end <= space + 1 or data[end - 1] != 0x0A or equals < 0:
        raise ValueError("a PAX record's length is wrong, or it has no key")
    key, value = data[space + 1 : equals], data[equals + 1 : end - 1]
    if b"\0" in (value if key in _C_STRINGS else key):
        raise ValueError(f"the PAX record {key!r} contains a NUL byte")
    return key, value, end


def parse_gear_records(data: bytes) -> tuple[bytes, int] | None:
    """Return the digest and the size in bytes that an extended header names; None if it has other records as well.

    Most files of a Gear layer have only these records. The result is the same as that of `parse_records` and `merge`,
    which take four times as long.
    """
    found = _GEAR_RECORDS.fullmatch(data)
    if found is None or found.end() - found.start(2) != int(found[2]):
        return None
    return binascii.unhexlify(found[1]), int(found[3])


def merge(entry: TarEntry, records: Records) -> None:
    """Override the header's fields with *records*. An empty value leaves a field unchanged, but is valid for an xattr.

    Raises:
        ValueError: A number, a time or a Gear record is malformed.
    """
    for key, value in records.items():
        if key.startswith(XATTR_PREFIX):
            if entry.xattrs is None:
                entry.xattrs = {}
            entry.xattrs[key[len(XATTR_PREFIX) :]] = value
        elif value:
            _merge_field(entry, key, value)
    if GEAR_DIGEST in records or GEAR_SIZE in records:
        entry.gear = _gear(records)
    entry.guard = GEAR_GUARD in records


def _merge_field(entry: TarEntry, key: bytes, value: bytes) -> None:
    match key:
        case b"path":
            entry.name = value
        case b"linkpath":
            entry.linkname = value
        case b"mtime":
            entry.mtime_ns = parse_time_ns(value)
        case b"atime":
            entry.atime_ns = parse_time_ns(value)
        case b"ctime":
            parse_time_ns(value)
        case b"size":
            entry.size_bytes = parse_integer(value)
        case b"uid":
            entry.uid = parse_integer(value)
        case b"gid":
            entry.gid = parse_integer(value)


def _gear(records: Records) -> tuple[bytes, int]:
    try:
        digest = binascii.unhexlify(records[GEAR_DIGEST])
        size_bytes = parse_integer(records[GEAR_SIZE])
    except (KeyError, ValueError) as exc:
        raise ValueError(f"its Gear records are malformed ({exc!r})") from exc
    if len(digest) != 32 or size_bytes < 0:
        raise ValueError("its Gear records are not a SHA-256 and a size")
    return digest, size_bytes


def parse_integer(value: bytes) -> int:
    """Parse a decimal number of 64 bits.

    Raises:
        ValueError: The value is malformed.
    """
    if len(value) > _MAX_INTEGER_DIGITS or not _INTEGER.match(value):
        raise ValueError(f"{value[:_MAX_INTEGER_DIGITS]!r} in a PAX record is not a number")
    number = int(value)
    if not -_INT64 <= number < _INT64:
        raise ValueError(f"{value!r} in a PAX record does not fit in 64 bits")
    return number


def parse_time_ns(value: bytes) -> int:
    """Parse seconds with an optional fraction, truncated to nanoseconds.

    Raises:
        ValueError: The value is malformed.
    """
    plain = _PLAIN_TIME.match(value)
    if plain:
        seconds, fraction = plain.groups()
        fraction_ns = int(fraction) * _TENS[len(fraction)]
        return int(seconds) * _NS + fraction_ns
    found = _TIME.match(value)
    if not found:
        raise ValueError(f"{value[:_MAX_INTEGER_DIGITS]!r} in a PAX record is not a time")
    seconds, fraction = found[1], found[2] or b""
    fraction_ns = int(fraction[:9].ljust(9, b"0"))
    if seconds.startswith(b"-"):
        fraction_ns = -fraction_ns
    time_ns = parse_integer(seconds) * _NS + fraction_ns
    if time_ns < -_INT64 * _NS:
        raise ValueError(f"{value[:_MAX_INTEGER_DIGITS]!r} in a PAX record does not fit in 64 bits")
    return time_ns


def format_records(records: Records) -> bytes:
    """Return the content of an extended header with *records*, sorted by key."""
    return b"".join(_format_record(key, records[key]) for key in sorted(records))


def _format_record(key: bytes, value: bytes) -> bytes:
    body = len(key) + len(value) + 3
    length = body + len(str(body))
    length = body + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)
