"""The on-disk structures of EROFS that indexes use, and the encodings of their fields.

All inodes have the extended form. The block size is 4096.

Source: Linux fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst (on-disk format).
"""

from __future__ import annotations

import stat
import struct

from gearworkers.digest import METACOPY_XATTR
from gearworkers.errors import InvalidInput

BLOCK_BITS = 12
BLOCK_BYTES = 1 << BLOCK_BITS
SLOT_BYTES = 32
"""An inode number counts slots of this size from the start of the image."""
SLOTS_PER_BLOCK = BLOCK_BYTES // SLOT_BYTES
END_OF_NUMBERS = (1 << 39) - 8 * SLOTS_PER_BLOCK
"""Limit of inode numbers: EROFS counts blocks in 32 bits, and the largest file of ext4 has that number of blocks."""

MAGIC = 0xE0F5E1E2
SUPERBLOCK_OFFSET = 1024
SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
SHARED_XATTRS_OFFSET = SUPERBLOCK_OFFSET + 128
FEATURE_CHUNKED_FILE = 4

INODE = struct.Struct("<HHHHQIIIIqII16x")
_EXTENDED = 1
FLAT_PLAIN, FLAT_INLINE, CHUNK_BASED = (_EXTENDED | layout << 1 for layout in (0, 2, 4))
NO_BLOCK = 0xFFFFFFFF
HOLE = struct.pack("<I", NO_BLOCK)
"""The only entry in the chunk map of a regular file."""
_MAX_CHUNK_BITS = 31

DIRENT = struct.Struct("<QHBB")
FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}

IBODY_HEADER = struct.Struct("<IB7x")
_XATTR = struct.Struct("<BBH")
_SHARED_ID = struct.Struct("<I")
_MAX_XATTR_BYTES = BLOCK_BYTES * 15
_PREFIXES = (
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
)


def offset_of(nid: int) -> int:
    """Return the offset in the image of the inode with this number."""
    return nid * SLOT_BYTES


def chunk_format(size_bytes: int) -> int:
    """Return the chunk format of a file of this size that is one chunk."""
    return min(max((size_bytes - 1).bit_length() - BLOCK_BITS, 0), _MAX_CHUNK_BITS)


def encode_device(major: int, minor: int) -> int:
    """Return a device number in the form of the kernel's new_encode_dev."""
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)


def encode_xattrs(xattrs: dict[bytes, bytes], *, metacopy: bool = False) -> bytes:
    """Return the encoded attributes of an inode; empty if there are none.

    Args:
        xattrs: Values by full name.
        metacopy: Whether to add a reference to the overlay attribute metacopy, which all inodes share.

    Raises:
        InvalidInput: EROFS cannot store a name, or an attribute is too long.
    """
    if not xattrs and not metacopy:
        return b""
    parts = [
        IBODY_HEADER.pack(0, 1) + _SHARED_ID.pack(SHARED_XATTRS_OFFSET // 4) if metacopy else IBODY_HEADER.pack(0, 0)
    ]
    parts += [_xattr_entry(name, value) for name, value in xattrs.items()]
    encoded = b"".join(parts)
    if len(encoded) > _MAX_XATTR_BYTES:
        raise InvalidInput("its extended attributes take more than 60 KiB")
    return encoded


def _xattr_entry(name: bytes, value: bytes) -> bytes:
    for prefix, index in _PREFIXES:
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            if len(rest) > 255 or len(value) > 0xFFFF or (index in (2, 3)) != (not rest):
                break
            entry = _XATTR.pack(len(rest), index, len(value)) + rest + value
            return entry + bytes(-len(entry) % 4)
    raise InvalidInput(f"its extended attribute {name[:100]!r} cannot be stored")


def is_storable(name: bytes) -> bool:
    """Whether EROFS can store an attribute of this name."""
    return any(name.startswith(prefix) for prefix, _ in _PREFIXES)


METACOPY = METACOPY_XATTR.encode()
METACOPY_ENTRY = _xattr_entry(METACOPY, b"")
