"""The label of an index: its inode numbers, and the digest of the image.

The label is not part of EROFS; it is in block 0, in a part that EROFS ignores. The digest covers head and area (see
`erofs`), so verification does not read the hole between them.
"""

from __future__ import annotations

import os
import struct
from hashlib import sha256
from pathlib import Path
from typing import BinaryIO, NamedTuple

from gearworkers.errors import IntegrityError
from gearworkers.layers.index.erofs_format import BLOCK_BYTES, offset_of

_LABEL = struct.Struct("<8sQQQ32s")
_LABEL_MAGIC = b"gearinos"
_LABEL_OFFSET = 2048
LABEL_END = _LABEL_OFFSET + _LABEL.size
_DIGEST_OFFSET = LABEL_END - 32
_MAX_HEAD_BYTES = 2 << 30
"""Size of the directories of a layer with the largest number of files."""
_PIECE_BYTES = 1 << 20


class IndexLabel(NamedTuple):
    """The content of a label."""

    first: int
    """The lowest inode number of the area."""
    slots: int
    """The number of inode numbers that the area takes, a multiple of SLOTS_PER_BLOCK."""
    head_bytes: int
    digest: bytes
    """SHA-256 of head and area; the digest itself counts as zeros."""


def write_label(head: bytearray, area: bytearray, first: int, slots: int) -> None:
    """Write the label of an image into its finished head."""
    label = (_LABEL_MAGIC, first, slots, len(head))
    _LABEL.pack_into(head, _LABEL_OFFSET, *label, bytes(32))
    hasher = sha256(head)
    hasher.update(area)
    _LABEL.pack_into(head, _LABEL_OFFSET, *label, hasher.digest())


def read_label(path: Path) -> IndexLabel | None:
    """Return the label of the image *path*; None for an image of gearworkers 0.1, whose inodes count from 1.

    Raises:
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        return _label_in(file)


def verify_index(path: Path) -> None:
    """Read the image *path*, except its hole, and compare it with the digest in its label.

    Raises:
        IntegrityError: The image is damaged or has no label.
        OSError: The file cannot be read.
    """
    with open(path, "rb") as file:
        label = _label_in(file)
        if label is None or not _fits(label, os.fstat(file.fileno()).st_size):
            raise IntegrityError(f"{path} is damaged: its label does not fit its size")
        head = bytearray(os.pread(file.fileno(), label.head_bytes, 0))
        head[_DIGEST_OFFSET:LABEL_END] = bytes(32)
        hasher = sha256(head)
        file.seek(offset_of(label.first))
        while piece := file.read(_PIECE_BYTES):
            hasher.update(piece)
    if hasher.digest() != label.digest:
        raise IntegrityError(f"{path} is damaged: its bytes differ from the digest in its label")


def _label_in(file: BinaryIO) -> IndexLabel | None:
    packed = os.pread(file.fileno(), _LABEL.size, _LABEL_OFFSET)
    if len(packed) < _LABEL.size:
        return None
    magic, *fields = _LABEL.unpack(packed)
    return IndexLabel(*fields) if magic == _LABEL_MAGIC else None


def _fits(label: IndexLabel, file_bytes: int) -> bool:
    """Whether head and area make up the whole file, so that no hole is read."""
    end_matches = file_bytes == offset_of(label.first + label.slots)
    return end_matches and BLOCK_BYTES <= label.head_bytes <= min(_MAX_HEAD_BYTES, offset_of(label.first))
