"""Format entries as tar headers: a ustar header, after a PAX extended header if a value does not fit.

The same entry always gives the same bytes. Go's archive/tar, GNU tar and bsdtar read these headers, including names
that are not UTF-8.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header".
"""

from __future__ import annotations

from gearworkers.errors import InvalidInput
from gearworkers.tar import pax
from gearworkers.tar.entry import BLOCK_BYTES, REG, TarEntry, shown

END = bytes(2 * BLOCK_BYTES)
"""The end of a tar."""

_NAME_BYTES = 100
_PREFIX_BYTES = 155
_MAX_OCTAL_7 = 0o7777777
_MAX_OCTAL_11 = 0o77777777777
_NS = 1_000_000_000
_PAX_DIRECTORY = b"PaxHeaders.0/"
_MAGIC = b"ustar\x0000"
_BLANK_CHECKSUM = b" " * 8
_REST_BYTES = 12


def header(entry: TarEntry) -> bytes:
    """Return all header blocks of *entry*; the stored content and its `padding` follow them.

    The size is `size_bytes`, or `stored_bytes` if `gear` is set. `sparse` is ignored: write the content expanded.

    Raises:
        InvalidInput: A name is empty or contains a NUL byte, or the name of an xattr contains a NUL byte or "=".
    """
    records = _records(entry)
    blocks = b""
    if records:
        content = pax.format_records(records)
        blocks = _pax_block(entry, len(content)) + content + padding(len(content))
    return blocks + _block(
        _name_fields(entry.name, b"path" in records),
        entry.type,
        linkname=b"" if b"linkpath" in records else entry.linkname,
        mode=entry.mode,
        numbers=(
            0 if b"uid" in records else entry.uid,
            0 if b"gid" in records else entry.gid,
            0 if b"size" in records else _stored_bytes(entry),
            _bounded_seconds(entry.mtime_ns),
        ),
        device=(entry.devmajor, entry.devminor),
    )


def padding(size_bytes: int) -> bytes:
    """Return the zeros that follow a content of *size_bytes*."""
    return bytes(-size_bytes % BLOCK_BYTES)


def _stored_bytes(entry: TarEntry) -> int:
    if entry.type != REG:
        return 0
    return entry.stored_bytes if entry.gear else entry.size_bytes


def _records(entry: TarEntry) -> pax.Records:
    """Return records for the values that do not fit into the ustar header."""
    if not entry.name or b"\0" in entry.name or b"\0" in entry.linkname:
        raise InvalidInput(f"{shown(entry.name)} -> {shown(entry.linkname)}: a tar cannot contain this name")
    records: pax.Records = {}
    if _split(entry.name) is None:
        records[b"path"] = entry.name
    if len(entry.linkname) > _NAME_BYTES or not entry.linkname.isascii():
        records[b"linkpath"] = entry.linkname
    if not (_is_utf8(entry.name) and _is_utf8(entry.linkname)):
        records[b"hdrcharset"] = b"BINARY"
    for key, value, limit in (
        (b"uid", entry.uid, _MAX_OCTAL_7),
        (b"gid", entry.gid, _MAX_OCTAL_7),
        (b"size", _stored_bytes(entry), _MAX_OCTAL_11),
    ):
        if not 0 <= value <= limit:
            records[key] = b"%d" % value
    seconds, fraction_ns = divmod(entry.mtime_ns, _NS)
    if fraction_ns or not 0 <= seconds <= _MAX_OCTAL_11:
        records[b"mtime"] = _format_time(entry.mtime_ns)
    if entry.atime_ns is not None:
        records[b"atime"] = _format_time(entry.atime_ns)
    if entry.gear is not None:
        records[pax.GEAR_DIGEST] = entry.gear[0].hex().encode()
        records[pax.GEAR_SIZE] = b"%d" % entry.gear[1]
    if entry.guard:
        records[pax.GEAR_GUARD] = b"1"
    for xattr, content in (entry.xattrs or {}).items():
        if b"=" in xattr or b"\0" in xattr:
            raise InvalidInput(f"{shown(entry.name)}: a tar cannot contain an xattr with the name {shown(xattr)}")
        records[pax.XATTR_PREFIX + xattr] = content
    return records


def _is_utf8(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _format_time(time_ns: int) -> bytes:
    """Return decimal seconds; the fraction has no trailing zeros."""
    seconds, fraction_ns = divmod(abs(time_ns), _NS)
    sign = b"-" if time_ns < 0 else b""
    fraction = b".%09d" % fraction_ns if fraction_ns else b""
    return sign + b"%d" % seconds + fraction.rstrip(b"0")


def _bounded_seconds(time_ns: int) -> int:
    return min(max(time_ns // _NS, 0), _MAX_OCTAL_11)


def _split(name: bytes) -> tuple[bytes, bytes] | None:
    """Split *name* into ustar's (prefix, name); None if it does not fit or is not ASCII."""
    if not name.isascii():
        return None
    if len(name) <= _NAME_BYTES:
        return b"", name
    slash = name.rfind(b"/", 0, min(_PREFIX_BYTES + 1, len(name) - 1))
    if slash <= 0 or len(name) - slash - 1 > _NAME_BYTES:
        return None
    return name[:slash], name[slash + 1 :]


def _name_fields(name: bytes, in_records: bool) -> tuple[bytes, bytes]:
    """Return the ustar fields. If a PAX record has the name, return a similar one for readers without PAX."""
    found = None if in_records else _split(name)
    return found or (b"", _ascii(name)[:_NAME_BYTES])


def _ascii(name: bytes) -> bytes:
    return bytes(byte for byte in name[: 2 * _NAME_BYTES] if byte < 0x80)


def _pax_block(entry: TarEntry, size_bytes: int) -> bytes:
    base = _ascii(entry.name.rstrip(b"/")[-_NAME_BYTES:].rpartition(b"/")[2])
    name = (_PAX_DIRECTORY + base)[:_NAME_BYTES]
    return _block((b"", name), ord("x"), mode=0o644, numbers=(0, 0, size_bytes, 0))


def _block(
    name: tuple[bytes, bytes],
    kind: int,
    *,
    linkname: bytes = b"",
    mode: int,
    numbers: tuple[int, int, int, int],
    device: tuple[int, int] = (0, 0),
) -> bytes:
    uid, gid, size_bytes, mtime_s = numbers
    head = name[1].ljust(_NAME_BYTES, b"\0")
    head += b"%07o\0%07o\0%07o\0%011o\0%011o\0" % (mode & 0o7777, uid, gid, size_bytes, mtime_s)
    tail = bytes((kind,)) + linkname.ljust(_NAME_BYTES, b"\0") + _MAGIC + bytes(64)
    tail += _device(device[0]) + _device(device[1])
    tail += name[0].ljust(_PREFIX_BYTES, b"\0") + bytes(_REST_BYTES)
    checksum = sum(head) + sum(_BLANK_CHECKSUM) + sum(tail)
    return head + b"%06o\0 " % checksum + tail


def _device(number: int) -> bytes:
    """Return octal digits, or GNU's base-256, since PAX has no record for device numbers."""
    if 0 <= number <= _MAX_OCTAL_7:
        return b"%07o\0" % number
    return b"\x80" + number.to_bytes(7, "big")
