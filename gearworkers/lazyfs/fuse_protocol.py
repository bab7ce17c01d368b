"""Requests and answers of /dev/fuse, as far as a read-only file system of objects needs them.

Source: Linux include/uapi/linux/fuse.h, protocol 7.31 (Linux 5.4) to 7.45.
"""

from __future__ import annotations

import stat
import struct
from dataclasses import dataclass
from enum import IntEnum, IntFlag

ROOT_NODE = 1
REQUEST_BYTES = 1 << 17
"""Buffer size for reads of /dev/fuse; the kernel requires room for the longest request."""
FOREVER_S = 1 << 30
MAX_READ_BYTES = 1 << 20

_IN = struct.Struct("<IIQQIIIHH")
_OUT = struct.Struct("<IiQ")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_ENTRY = struct.Struct("<QQQQII")
_ATTR_VALID = struct.Struct("<QII")
_OPEN = struct.Struct("<QIi")
_READ = struct.Struct("<QQI")
_FORGET = struct.Struct("<Q")
_INIT_IN = struct.Struct("<IIIII")
_INIT_OUT = struct.Struct("<IIIIHHIIHHIIH22x")
_INVALIDATE_ENTRY = struct.Struct("<QII")
_STATFS = struct.Struct("<QQQQQIIII24x")

_NOTIFY_INVALIDATE_ENTRY = 3
_NOTIFY_RESEND = 7
_PAGE_BYTES = 4096
_TIMES_GRANULARITY_NS = 1
_MAX_BACKGROUND = 256
_CONGESTION = 192


class Op(IntEnum):
    """FUSE_* operations that are answered, or that need no answer."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    OPEN = 14
    READ = 15
    STATFS = 17
    RELEASE = 18
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42


class InitFlag(IntFlag):
    """Features that both sides announce at the start; bits from 32 on are sent in flags2."""

    ASYNC_READ = 1 << 0
    PARALLEL_DIROPS = 1 << 18
    MAX_PAGES = 1 << 22
    INIT_EXT = 1 << 30
    PASSTHROUGH = 1 << 37
    HAS_RESEND = 1 << 39


_WANTED = (
    InitFlag.ASYNC_READ
    | InitFlag.PARALLEL_DIROPS
    | InitFlag.MAX_PAGES
    | InitFlag.INIT_EXT
    | InitFlag.PASSTHROUGH
    | InitFlag.HAS_RESEND
)

KEEP_CACHE = 1 << 1
"""In the answer to OPEN: keep the cached pages of earlier opens."""
NO_FLUSH = 1 << 5
"""In the answer to OPEN: closing sends no request, so it does not wait while no server runs."""
PASSTHROUGH = 1 << 7
"""In the answer to OPEN: reads go to a backing file; requires NO_FLUSH."""


@dataclass(frozen=True, slots=True)
class FuseRequest:
    """One request as the kernel wrote it."""

    op: int
    unique: int
    node: int
    pid: int
    """The calling thread in the server's PID namespace; 0 if it is not in that namespace."""
    body: memoryview


def parse(raw: memoryview) -> FuseRequest:
    """Parse the result of a read of /dev/fuse."""
    length, op, unique, node, _uid, _gid, pid, _extensions, _padding = _IN.unpack_from(raw)
    return FuseRequest(op, unique, node, pid, raw[_IN.size : length])


def answer(unique: int, body_bytes: int, error: int = 0) -> bytes:
    """Return the header of an answer; *error* is a positive errno and requires an empty body."""
    return _OUT.pack(_OUT.size + body_bytes, -error, unique)


def resend() -> bytes:
    """Return a notification that makes the kernel send every unanswered request again.

    The kernel sets the top bit of their numbers (Linux 6.9).
    """
    return _OUT.pack(_OUT.size, _NOTIFY_RESEND, 0)


def invalidate_entry(parent: int, name: bytes) -> bytes:
    """Return a notification that makes the kernel forget the entry of this name."""
    body = _INVALIDATE_ENTRY.pack(parent, len(name), 0) + name + b"\0"
    return _OUT.pack(_OUT.size + len(body), _NOTIFY_INVALIDATE_ENTRY, 0) + body


# -- bodies of requests


def name_of(body: memoryview) -> bytes:
    """Return the name of a LOOKUP."""
    return bytes(body[:-1])


def read_range(body: memoryview) -> tuple[int, int]:
    """Return offset and size in bytes of a READ."""
    _handle, offset, size_bytes = _READ.unpack_from(body)
    return offset, size_bytes


def interrupted(body: memoryview) -> int:
    """Return the number of the interrupted request of an INTERRUPT."""
    unique: int = _FORGET.unpack_from(body)[0]
    return unique


def released(body: memoryview) -> int:
    """Return the handle of a RELEASE, which is that of the answer to OPEN."""
    handle: int = _FORGET.unpack_from(body)[0]
    return handle


def forgotten(op: int, node: int, body: memoryview) -> list[tuple[int, int]]:
    """Return (node, number of lookups to take back) for each node of a FORGET or BATCH_FORGET."""
    if op == Op.FORGET:
        return [(node, _FORGET.unpack_from(body)[0])]
    return list(struct.iter_unpack("<QQ", body[8:]))


# -- bodies of answers


def init_body(body: memoryview) -> tuple[bytes, InitFlag]:
    """Return the answer to INIT, and the features that both the kernel and this program have."""
    _major, minor, readahead_bytes, flags, flags2 = _INIT_IN.unpack_from(bytes(body) + bytes(4))
    kernel_flags = flags | (flags2 << 32 if flags & InitFlag.INIT_EXT else 0)
    common = InitFlag(kernel_flags) & _WANTED
    out = _INIT_OUT.pack(
        7,
        min(minor, 45),
        readahead_bytes,
        common & 0xFFFFFFFF,
        _MAX_BACKGROUND,
        _CONGESTION,
        _PAGE_BYTES,
        _TIMES_GRANULARITY_NS,
        MAX_READ_BYTES // _PAGE_BYTES,
        0,
        common >> 32,
        1 if common & InitFlag.PASSTHROUGH else 0,  # backing files are not on a stacked file system
        0,
    )
    return out, common


def directory(node: int) -> bytes:
    """Return the attributes of a directory."""
    return _ATTR.pack(node, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o555, 2, 0, 0, 0, _PAGE_BYTES, 0)


def regular(node: int, size_bytes: int) -> bytes:
    """Return the attributes of an object; the overlay takes owner, mode and times from the index."""
    blocks = (size_bytes + 511) // 512
    return _ATTR.pack(node, size_bytes, blocks, 0, 0, 0, 0, 0, 0, stat.S_IFREG | 0o444, 1, 0, 0, 0, _PAGE_BYTES, 0)


def entry_body(node: int, attributes: bytes) -> bytes:
    """Return the answer to a successful LOOKUP; the kernel may cache it forever."""
    return _ENTRY.pack(node, 0, FOREVER_S, FOREVER_S, 0, 0) + attributes


def attributes_body(attributes: bytes) -> bytes:
    """Return the answer to GETATTR."""
    return _ATTR_VALID.pack(FOREVER_S, 0, 0) + attributes


def open_body(flags: int, *, handle: int = 0, backing: int = 0) -> bytes:
    """Return the answer to OPEN and OPENDIR."""
    return _OPEN.pack(handle, flags, backing)


def statfs_body() -> bytes:
    """Return the answer to STATFS."""
    return _STATFS.pack(0, 0, 0, 0, 0, _PAGE_BYTES, 255, _PAGE_BYTES, 0)
