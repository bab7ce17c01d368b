"""An EROFS image of a tree that holds names, metadata and extended attributes, and no file contents.

An image has two parts with a hole between them. The *head* holds block 0 (superblock, the shared attribute metacopy,
our own label, and the root's inode if it fits), whole directory blocks and long symlink targets. The *area* holds all
other inodes, each followed by its attributes and by small data: symlink targets, the tail of a directory. A regular
file is one chunk that is a hole.

The number of an EROFS inode is its place in the image, counted in slots of 32 bytes. So the area's place decides the
numbers, and the image is a sparse file: an area that begins at number 2^31 lies at 64 GiB.

Source: Linux fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst (on-disk format); every inode is of the
extended form, block size 4096.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from gearworkers.errors import IntegrityError, InvalidInput

BLOCK_BYTES = 4096
MAGIC = 0xE0F5E1E2

_SUPERBLOCK_OFFSET = 1024
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
_INODE = struct.Struct("<HHHHQIIIIqII16x")
_DIRENT = struct.Struct("<QHBB")
_IBODY_HEADER = struct.Struct("<IB7x")
_XATTR = struct.Struct("<BBH")
_SHARED_ID = struct.Struct("<I")

_BLOCK_BITS = 12
_SLOT_BYTES = 32
_FEATURE_CHUNKED_FILE = 4
_EXTENDED = 1
_FLAT_PLAIN, _FLAT_INLINE, _CHUNK_BASED = (_EXTENDED | layout << 1 for layout in (0, 2, 4))
_NO_BLOCK = 0xFFFFFFFF
_HOLE = struct.pack("<I", _NO_BLOCK)
_MAX_CHUNK_BITS = 31
_SHARED_OFFSET = _SUPERBLOCK_OFFSET + 128
_LABEL_OFFSET = 2048
_LABEL = struct.Struct("<8sQQQ32s")
_LABEL_MAGIC = b"gearinos"
_DIGEST_OFFSET = _LABEL_OFFSET + _LABEL.size - 32
_ROOT_OFFSET = _LABEL_OFFSET + _LABEL.size
"""In block 0, where it takes no block of its own; a root that does not fit begins at the next one."""
_MAX_HEAD_BYTES = 2 << 30
"""Of the directories of as many files as a layer may have."""
_PIECE_BYTES = 1 << 20

SLOTS_PER_BLOCK = BLOCK_BYTES // _SLOT_BYTES
END_OF_NUMBERS = (1 << 39) - 8 * SLOTS_PER_BLOCK
"""EROFS counts blocks in 32 bits, and the largest file of ext4 has as many."""

_PREFIXES = (
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"user.", 1),
    (b"trusted.", 4),
    (b"security.", 6),
)
_FILE_TYPES = {
    stat.S_IFREG: 1,
    stat.S_IFDIR: 2,
    stat.S_IFCHR: 3,
    stat.S_IFBLK: 4,
    stat.S_IFIFO: 5,
    stat.S_IFSOCK: 6,
    stat.S_IFLNK: 7,
}


class ErofsInode(Protocol):
    """An inode of the tree to write; `nid` is set by the writer."""

    mode: int
    """Type and permissions, as st_mode."""
    uid: int
    gid: int
    mtime_ns: int
    size_bytes: int
    """Of a regular file."""
    nlink: int
    rdev: int
    """Of a device, as new_encode_dev makes it of major and minor."""
    target: bytes
    """Of a symlink."""
    xattrs: bytes
    """As `encode_xattrs` made them."""
    nid: int

    @property
    def children(self) -> Mapping[bytes, ErofsInode] | None:
        """Of a directory."""


def encode_xattrs(xattrs: dict[bytes, bytes], *, metacopy: bool = False) -> bytes:
    """The attributes as they follow an inode; empty for none.

    Args:
        xattrs: By full name.
        metacopy: Also carry the overlay mark metacopy, which all inodes share.

    Raises:
        InvalidInput: A name is of no kind that EROFS stores, or something is too long.
    """
    if not xattrs and not metacopy:
        return b""
    parts = [_IBODY_HEADER.pack(0, 1) + _SHARED_ID.pack(_SHARED_OFFSET // 4) if metacopy else _IBODY_HEADER.pack(0, 0)]
    parts += [_xattr_entry(name, value) for name, value in xattrs.items()]
    encoded = b"".join(parts)
    if len(encoded) > BLOCK_BYTES * 15:
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
    """Whether an attribute of this name can be stored at all."""
    return any(name.startswith(prefix) for prefix, _ in _PREFIXES)


METACOPY = b"trusted.overlay.metacopy"
METACOPY_ENTRY = _xattr_entry(METACOPY, b"")


class _DirectoryBlocks:
    """A directory's dirents cut into blocks: the whole ones, and a tail that follows the inode."""

    __slots__ = ("blocks", "tail_bytes")

    def __init__(self, names: list[bytes], inode_bytes: int) -> None:
        self.blocks: list[list[bytes]] = []
        block: list[bytes] = []
        used = 0
        for name in names:
            need = _DIRENT.size + len(name)
            if used + need > BLOCK_BYTES:
                self.blocks.append(block)
                block, used = [], 0
            block.append(name)
            used += need
        self.blocks.append(block)
        # One byte more: the kernel reads a lone name to its NUL.
        self.tail_bytes = used if inode_bytes + used + 1 <= BLOCK_BYTES else 0

    @property
    def whole_blocks(self) -> int:
        return len(self.blocks) - (1 if self.tail_bytes else 0)


class Label(NamedTuple):
    """What an image says of itself; block 0 holds it."""

    first: int
    """The least inode number of the area."""
    slots: int
    """How many numbers the area takes, a multiple of SLOTS_PER_BLOCK."""
    head_bytes: int
    digest: bytes
    """SHA-256 of head, without this digest, and area."""


class ImageWriter:
    """Makes the image of one tree; `write` may be called once."""

    def __init__(self, root: ErofsInode, *, uuid: bytes, time_ns: int) -> None:
        self._root = root
        self._uuid = uuid
        self._time_ns = time_ns
        self._order: list[tuple[ErofsInode, ErofsInode]] = []  # inode, and of a directory its parent
        self._placed: dict[int, _DirectoryBlocks] = {}
        self._end_bytes = _ROOT_OFFSET  # of what is placed so far: of the head, then of the area
        self._data_blocks = 0
        self._place_one(root, root)
        self._data_start = -(-self._end_bytes // BLOCK_BYTES)
        self._end_bytes = 0
        self._place_others()
        self.slots = max(1, -(-self._end_bytes // BLOCK_BYTES)) * SLOTS_PER_BLOCK
        """How many inode numbers the image needs; some for an empty tree, too, since they say where the image ends."""

    def write(self, file: BinaryIO, first: int) -> None:
        """Write the image to an empty file; all inodes but the root's get numbers from *first* on.

        Args:
            file: Seekable; a file system with sparse files is meant.
            first: A multiple of SLOTS_PER_BLOCK, so high that the area lies behind the head; first + slots is at most
                END_OF_NUMBERS.

        Raises:
            OSError: The file cannot be written.
        """
        self._head = bytearray((self._data_start + self._data_blocks) * BLOCK_BYTES)
        self._area = bytearray(self.slots * _SLOT_BYTES)
        self._first = first
        for node, _ in self._order[1:]:
            node.nid += first
        next_block = self._data_start
        for node, parent in self._order:
            next_block = self._write(node, parent, next_block)
        self._write_superblock(_offset(first + self.slots))
        self._write_label()
        file.write(self._head)
        file.seek(_offset(first))
        file.write(self._area)

    # -- placing

    def _place_others(self) -> None:
        """Give every inode below the root its number relative to the area, in the order of a walk."""
        stack: list[tuple[ErofsInode, ErofsInode]] = [
            (child, self._root) for child in (self._root.children or {}).values()
        ]
        while stack:
            node, parent = stack.pop()
            if node.nid:
                continue
            self._place_one(node, parent)
            if node.children:
                stack += [(child, node) for child in node.children.values() if not child.nid]

    def _place_one(self, node: ErofsInode, parent: ErofsInode) -> None:
        size_bytes = _INODE.size + len(node.xattrs)
        inline_bytes = 0
        if node.children is not None:
            placed = _DirectoryBlocks(sorted([b".", b"..", *node.children]), size_bytes)
            self._placed[id(node)] = placed
            self._data_blocks += placed.whole_blocks
            inline_bytes = placed.tail_bytes + 1 if placed.tail_bytes else 0
        elif stat.S_ISLNK(node.mode):
            if size_bytes + len(node.target) <= BLOCK_BYTES - 1:
                inline_bytes = len(node.target)
            else:
                self._data_blocks += 1
        elif stat.S_ISREG(node.mode) and node.size_bytes:
            size_bytes += len(_HOLE)
        size_bytes += inline_bytes
        start = -(-self._end_bytes // _SLOT_BYTES) * _SLOT_BYTES
        if not start:
            start = _SLOT_BYTES  # number 0 would look like none
        if inline_bytes and start // BLOCK_BYTES != (start + size_bytes - 1) // BLOCK_BYTES:
            start = -(-start // BLOCK_BYTES) * BLOCK_BYTES
        node.nid = start // _SLOT_BYTES
        self._end_bytes = start + size_bytes
        self._order.append((node, parent))

    # -- writing

    def _write(self, node: ErofsInode, parent: ErofsInode, next_block: int) -> int:
        """Write an inode and its data; the next free block of the head."""
        xattr_count = (len(node.xattrs) - _IBODY_HEADER.size) // 4 + 1 if node.xattrs else 0
        layout, size_bytes, first = _FLAT_PLAIN, 0, 0
        behind = b""
        mode = node.mode
        if node.children is not None:
            layout, size_bytes, first, behind, next_block = self._write_directory(node, parent, next_block)
        elif stat.S_ISREG(mode):
            if node.size_bytes:
                layout, size_bytes, behind = _CHUNK_BASED, node.size_bytes, _HOLE
                first = _chunk_bits(size_bytes)
        elif stat.S_ISLNK(mode):
            size_bytes = len(node.target)
            if _INODE.size + len(node.xattrs) + size_bytes <= BLOCK_BYTES - 1:
                layout, first, behind = _FLAT_INLINE, _NO_BLOCK, node.target
            else:
                first = next_block
                self._head[first * BLOCK_BYTES : first * BLOCK_BYTES + size_bytes] = node.target
                next_block += 1
        else:
            first = node.rdev
        seconds, nanoseconds = divmod(node.mtime_ns, 1_000_000_000)
        record = (
            _INODE.pack(
                layout,
                xattr_count,
                mode,
                0,
                size_bytes,
                first,
                node.nid & 0xFFFFFFFF,
                node.uid,
                node.gid,
                seconds,
                nanoseconds,
                node.nlink,
            )
            + node.xattrs
            + behind
        )
        if node is self._root:
            offset = _offset(node.nid)
            self._head[offset : offset + len(record)] = record
        else:
            offset = _offset(node.nid - self._first)
            self._area[offset : offset + len(record)] = record
        return next_block

    def _write_directory(
        self, node: ErofsInode, parent: ErofsInode, next_block: int
    ) -> tuple[int, int, int, bytes, int]:
        assert node.children is not None
        placed = self._placed.pop(id(node))
        first = next_block if placed.whole_blocks else _NO_BLOCK
        filled = [_dirents(names, node, parent) for names in placed.blocks]
        for block in filled[: placed.whole_blocks]:
            self._head[next_block * BLOCK_BYTES : next_block * BLOCK_BYTES + len(block)] = block
            next_block += 1
        size_bytes = (len(filled) - 1) * BLOCK_BYTES + len(filled[-1])
        if placed.tail_bytes:
            return _FLAT_INLINE, size_bytes, first, filled[-1], next_block
        return _FLAT_PLAIN, size_bytes, first, b"", next_block

    def _write_superblock(self, image_bytes: int) -> None:
        seconds, nanoseconds = divmod(self._time_ns, 1_000_000_000)
        _SUPERBLOCK.pack_into(
            self._head,
            _SUPERBLOCK_OFFSET,
            MAGIC,
            0,  # no checksum
            0,
            _BLOCK_BITS,
            0,
            self._root.nid,
            len(self._order),
            seconds,
            nanoseconds,
            image_bytes // BLOCK_BYTES,
            0,  # inodes are counted from block 0
            0,  # shared attributes are counted from block 0
            self._uuid,
            b"",
            _FEATURE_CHUNKED_FILE,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        )
        self._head[_SHARED_OFFSET : _SHARED_OFFSET + len(METACOPY_ENTRY)] = METACOPY_ENTRY

    def _write_label(self) -> None:
        label = (_LABEL_MAGIC, self._first, self.slots, len(self._head))
        _LABEL.pack_into(self._head, _LABEL_OFFSET, *label, bytes(32))
        hasher = sha256(self._head)
        hasher.update(self._area)
        _LABEL.pack_into(self._head, _LABEL_OFFSET, *label, hasher.digest())


def read_label(path: Path) -> Label | None:
    """The label of the image *path*; None for an image of the first format, whose inodes count from 1.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        return _label_in(file)


def check_image(path: Path) -> None:
    """Read the image *path*, without its hole, and compare it with its label.

    Raises:
        IntegrityError: It is damaged, or has no label.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        label = _label_in(file)
        if label is None or not _is_plausible(label, os.fstat(file.fileno()).st_size):
            raise IntegrityError(f"{path} is damaged: its label does not fit its size")
        head = bytearray(os.pread(file.fileno(), label.head_bytes, 0))
        head[_DIGEST_OFFSET : _LABEL_OFFSET + _LABEL.size] = bytes(32)
        hasher = sha256(head)
        file.seek(_offset(label.first))
        while piece := file.read(_PIECE_BYTES):
            hasher.update(piece)
    if hasher.digest() != label.digest:
        raise IntegrityError(f"{path} is damaged: its bytes differ from the digest in its label")


def _label_in(file: BinaryIO) -> Label | None:
    packed = os.pread(file.fileno(), _LABEL.size, _LABEL_OFFSET)
    if len(packed) < _LABEL.size:
        return None
    magic, *fields = _LABEL.unpack(packed)
    return Label(*fields) if magic == _LABEL_MAGIC else None


def _is_plausible(label: Label, file_bytes: int) -> bool:
    """Whether the two parts make up the file, so that no hole is read."""
    ends_well = file_bytes == _offset(label.first + label.slots)
    return ends_well and BLOCK_BYTES <= label.head_bytes <= min(_MAX_HEAD_BYTES, _offset(label.first))


def _offset(nid: int) -> int:
    return nid * _SLOT_BYTES


def _dirents(names: list[bytes], node: ErofsInode, parent: ErofsInode) -> bytes:
    """One directory block: the dirents, then their names."""
    children = node.children or {}
    name_offset = len(names) * _DIRENT.size
    heads = []
    for name in names:
        child = children.get(name) or (node if name == b"." else parent)
        heads.append(_DIRENT.pack(child.nid, name_offset, _FILE_TYPES[child.mode & 0o170000], 0))
        name_offset += len(name)
    return b"".join(heads) + b"".join(names)


def _chunk_bits(size_bytes: int) -> int:
    """The chunk format for one chunk that holds this many bytes."""
    return min(max((size_bytes - 1).bit_length() - _BLOCK_BITS, 0), _MAX_CHUNK_BITS)


def encode_device(major: int, minor: int) -> int:
    """A device number as the kernel's new_encode_dev."""
    return (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
