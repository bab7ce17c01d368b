"""Write an EROFS image of a tree: names, metadata and extended attributes, but no file contents.

Glossary: an image has two parts with a hole between them. The *head* contains block 0 (superblock, the shared
attribute metacopy, our label, and the inode of the root if it fits), whole directory blocks and long symlink targets.
The *area* contains all other inodes. Each inode is followed by its attributes and by small data: a symlink target or
the tail of a directory. A regular file is one chunk that is a hole.

The number of an EROFS inode is its offset in the image, counted in slots of 32 bytes. So the offset of the area
determines the numbers, and the image is a sparse file: an area that begins at number 2^31 is at 64 GiB.

Source: Linux fs/erofs/erofs_fs.h and Documentation/filesystems/erofs.rst (on-disk format).
"""

from __future__ import annotations

import stat
from collections.abc import Mapping
from typing import BinaryIO, Protocol

from gearworkers.layers.index.erofs_format import (
    BLOCK_BITS,
    BLOCK_BYTES,
    CHUNK_BASED,
    DIRENT,
    FEATURE_CHUNKED_FILE,
    FILE_TYPES,
    FLAT_INLINE,
    FLAT_PLAIN,
    HOLE,
    IBODY_HEADER,
    INODE,
    MAGIC,
    METACOPY_ENTRY,
    NO_BLOCK,
    SHARED_XATTRS_OFFSET,
    SLOT_BYTES,
    SLOTS_PER_BLOCK,
    SUPERBLOCK,
    SUPERBLOCK_OFFSET,
    chunk_format,
    offset_of,
)
from gearworkers.layers.index.erofs_label import LABEL_END, write_label

_ROOT_OFFSET = LABEL_END
"""In block 0, where the root's inode takes no block of its own. A root that does not fit begins at the next block."""


class ErofsInode(Protocol):
    """An inode of the tree to write."""

    mode: int
    """Type and permissions, as st_mode."""
    uid: int
    gid: int
    mtime_ns: int
    size_bytes: int
    """Size of a regular file."""
    nlink: int
    rdev: int
    """Device number, as returned by `encode_device`."""
    target: bytes
    """Target of a symlink."""
    xattrs: bytes
    """Attributes, as returned by `encode_xattrs`."""
    nid: int
    """Inode number; the writer sets it."""

    @property
    def children(self) -> Mapping[bytes, ErofsInode] | None:
        """Entries of a directory."""


class _DirectoryBlocks:
    """The names of a directory, divided into whole blocks and a tail that follows the inode."""

    __slots__ = ("blocks", "tail_bytes")

    def __init__(self, names: list[bytes], inode_bytes: int) -> None:
        self.blocks: list[list[bytes]] = []
        block: list[bytes] = []
        used = 0
        for name in names:
            need = DIRENT.size + len(name)
            if used + need > BLOCK_BYTES:
                self.blocks.append(block)
                block, used = [], 0
            block.append(name)
            used += need
        self.blocks.append(block)
        # One byte more, since the kernel reads a single name up to a NUL.
        self.tail_bytes = used if inode_bytes + used + 1 <= BLOCK_BYTES else 0

    @property
    def whole_blocks(self) -> int:
        return len(self.blocks) - (1 if self.tail_bytes else 0)


class ImageWriter:
    """Writes the image of one tree; `write` may be called once."""

    def __init__(self, root: ErofsInode, *, uuid: bytes, time_ns: int) -> None:
        self._root = root
        self._uuid = uuid
        self._time_ns = time_ns
        self._order: list[tuple[ErofsInode, ErofsInode]] = []  # each inode with its parent
        self._placed: dict[int, _DirectoryBlocks] = {}
        self._end_bytes = _ROOT_OFFSET  # end of the inodes placed so far: first in the head, then in the area
        self._data_blocks = 0
        self._place_one(root, root)
        self._data_start = -(-self._end_bytes // BLOCK_BYTES)
        self._end_bytes = 0
        self._place_others()
        self.slots = max(1, -(-self._end_bytes // BLOCK_BYTES)) * SLOTS_PER_BLOCK
        """The number of inode numbers that the image needs. Never 0, since the area determines the end of the image."""

    def write(self, file: BinaryIO, first: int) -> None:
        """Write the image to an empty file. All inodes except the root get numbers from *first* on.

        Args:
            file: A seekable file; its file system should support sparse files.
            first: A multiple of SLOTS_PER_BLOCK that places the area after the head; first + slots is at most
                END_OF_NUMBERS.

        Raises:
            OSError: The file cannot be written.
        """
        self._head = bytearray((self._data_start + self._data_blocks) * BLOCK_BYTES)
        self._area = bytearray(self.slots * SLOT_BYTES)
        self._first = first
        for node, _ in self._order[1:]:
            node.nid += first
        next_block = self._data_start
        for node, parent in self._order:
            next_block = self._write(node, parent, next_block)
        self._write_superblock(offset_of(first + self.slots))
        write_label(self._head, self._area, first, self.slots)
        file.write(self._head)
        file.seek(offset_of(first))
        file.write(self._area)

    # -- placing

    def _place_others(self) -> None:
        """Give every inode below the root a number relative to the area, in the order of a walk."""
        children = (self._root.children or {}).values()
        stack: list[tuple[ErofsInode, ErofsInode]] = [(child, self._root) for child in children]
        while stack:
            node, parent = stack.pop()
            if node.nid:
                continue
            self._place_one(node, parent)
            if node.children:
                stack += [(child, node) for child in node.children.values() if not child.nid]

    def _place_one(self, node: ErofsInode, parent: ErofsInode) -> None:
        size_bytes = INODE.size + len(node.xattrs)
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
            size_bytes += len(HOLE)
        size_bytes += inline_bytes
        start = -(-self._end_bytes // SLOT_BYTES) * SLOT_BYTES
        if not start:
            start = SLOT_BYTES  # number 0 means "not placed"
        if inline_bytes and start // BLOCK_BYTES != (start + size_bytes - 1) // BLOCK_BYTES:
            start = -(-start // BLOCK_BYTES) * BLOCK_BYTES
        node.nid = start // SLOT_BYTES
        self._end_bytes = start + size_bytes
        self._order.append((node, parent))

    # -- writing

    def _write(self, node: ErofsInode, parent: ErofsInode, next_block: int) -> int:
        """Write an inode and its data; return the next free block of the head."""
        xattr_count = (len(node.xattrs) - IBODY_HEADER.size) // 4 + 1 if node.xattrs else 0
        layout, size_bytes, first, behind = FLAT_PLAIN, 0, 0, b""
        mode = node.mode
        if node.children is not None:
            layout, size_bytes, first, behind, next_block = self._write_directory(node, parent, next_block)
        elif stat.S_ISREG(mode):
            if node.size_bytes:
                layout, size_bytes, behind = CHUNK_BASED, node.size_bytes, HOLE
                first = chunk_format(size_bytes)
        elif stat.S_ISLNK(mode):
            size_bytes = len(node.target)
            if INODE.size + len(node.xattrs) + size_bytes <= BLOCK_BYTES - 1:
                layout, first, behind = FLAT_INLINE, NO_BLOCK, node.target
            else:
                first = next_block
                self._head[first * BLOCK_BYTES : first * BLOCK_BYTES + size_bytes] = node.target
                next_block += 1
        else:
            first = node.rdev
        record = _inode_record(node, layout, xattr_count, size_bytes, first) + node.xattrs + behind
        if node is self._root:
            offset = offset_of(node.nid)
            self._head[offset : offset + len(record)] = record
        else:
            offset = offset_of(node.nid - self._first)
            self._area[offset : offset + len(record)] = record
        return next_block

    def _write_directory(
        self, node: ErofsInode, parent: ErofsInode, next_block: int
    ) -> tuple[int, int, int, bytes, int]:
        assert node.children is not None
        placed = self._placed.pop(id(node))
        first = next_block if placed.whole_blocks else NO_BLOCK
        filled = [_dirents(names, node, parent) for names in placed.blocks]
        for block in filled[: placed.whole_blocks]:
            self._head[next_block * BLOCK_BYTES : next_block * BLOCK_BYTES + len(block)] = block
            next_block += 1
        size_bytes = (len(filled) - 1) * BLOCK_BYTES + len(filled[-1])
        if placed.tail_bytes:
            return FLAT_INLINE, size_bytes, first, filled[-1], next_block
        return FLAT_PLAIN, size_bytes, first, b"", next_block

    def _write_superblock(self, image_bytes: int) -> None:
        seconds, nanoseconds = divmod(self._time_ns, 1_000_000_000)
        SUPERBLOCK.pack_into(
            self._head,
            SUPERBLOCK_OFFSET,
            MAGIC,
            0,  # no checksum
            0,
            BLOCK_BITS,
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
            FEATURE_CHUNKED_FILE,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        )
        self._head[SHARED_XATTRS_OFFSET : SHARED_XATTRS_OFFSET + len(METACOPY_ENTRY)] = METACOPY_ENTRY


def _inode_record(node: ErofsInode, layout: int, xattr_count: int, size_bytes: int, first: int) -> bytes:
    seconds, nanoseconds = divmod(node.mtime_ns, 1_000_000_000)
    return INODE.pack(
        layout,
        xattr_count,
        node.mode,
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


def _dirents(names: list[bytes], node: ErofsInode, parent: ErofsInode) -> bytes:
    """Return one directory block: the dirents, then their names."""
    children = node.children or {}
    name_offset = len(names) * DIRENT.size
    heads = []
    for name in names:
        child = children.get(name) or (node if name == b"." else parent)
        heads.append(DIRENT.pack(child.nid, name_offset, FILE_TYPES[child.mode & 0o170000], 0))
        name_offset += len(name)
    return b"".join(heads) + b"".join(names)
