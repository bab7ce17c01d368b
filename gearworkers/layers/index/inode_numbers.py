"""Inode numbers that no two layers of a GEAR_ROOT share, and that no file of its file system has.

Docker's archive code, containerd's copying and BuildKit tell hard links by the inode number alone, without the
device: two files with several names and one number would become one file. A container shows files of many indexes,
and of an upper on the file system of GEAR_ROOT, so each index takes its numbers from a range of its own, in a window
above those that the file system gives.

The file `inode-numbers` holds the gap that the next ranges come from. When it is used up, or lost, the indexes of all
layers say which numbers are taken, and the largest gap between them is next. So numbers of removed layers are used
again at some time, and a range that a crash left unused is lost until then.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from gearworkers.errors import ResourceExhausted
from gearworkers.layers.index.erofs import END_OF_NUMBERS, SLOTS_PER_BLOCK, ImageWriter, read_label
from gearworkers.util import syscalls
from gearworkers.util.locks import locked_file

NUMBERS_FILE = "inode-numbers"
INDEX_FILE = "index.erofs"

_RECORD_BYTES = 48
_EXT4, _XFS = 0xEF53, 0x58465342
_LEAST_XFS_INODE_BYTES = 512
_32_BITS = 1 << 32


class InodeNumbers:
    """The numbers of one GEAR_ROOT's layers; any process of the node may have one at the same time."""

    def __init__(self, root: Path, places: Iterable[Path]) -> None:
        """
        Args:
            root: GEAR_ROOT.
            places: Directories of layers, in the order in which a layer moves through them.
        """
        self._root = root
        self._places = tuple(places)

    def write(self, image: ImageWriter, path: Path) -> None:
        """Write *image* to the new file *path*, in a directory of a layer, with numbers that no other layer has.

        Raises:
            ResourceExhausted: So many numbers are not free.
            OSError: The file cannot be written.

        Crash: leaves a part of the file, and the numbers unused until all layers are looked through.
        """
        with locked_file(self._root / NUMBERS_FILE) as gap_fd:
            first, end = _read_gap(gap_fd)
            if end - first < image.slots:
                first, end = self._largest_gap(image.slots)
            _write_gap(gap_fd, first + image.slots, end)
            # Still under the lock: who looks through the layers sees a label for every range that was given away.
            with open(path, "xb") as file:
                image.write(file, first)

    def _largest_gap(self, slots: int) -> tuple[int, int]:
        start, stop = window(self._root)
        gaps = []
        for first, end in sorted((*self._taken(), (stop, stop))):
            if first > start:
                gaps.append((min(first, stop) - start, start))
            start = max(start, end)
        length, first = max(gaps, default=(0, 0))
        if length < slots:
            raise ResourceExhausted(
                f"{slots} inode numbers are needed for a layer's files, and at most {length} in a row are free; "
                "remove images"
            )
        return first, first + length

    def _taken(self) -> Iterator[tuple[int, int]]:
        for place in self._places:
            for path in place.glob(f"*/{INDEX_FILE}"):
                try:
                    label = read_label(path)
                except (FileNotFoundError, NotADirectoryError):
                    continue  # it moved on or was removed
                if label is not None:
                    yield label.first, label.first + label.slots


def window(root: Path) -> tuple[int, int]:
    """The numbers that layers may have: the least, and the end.

    They are below 2^32, for programs of 32 bits, if the file system of *root* can have none from 2^31 on.
    """
    highest = _highest_inode(root)
    if highest < _32_BITS // 2:
        return _32_BITS // 2, _32_BITS
    start = max(_32_BITS, 1 << highest.bit_length())
    return min(start, END_OF_NUMBERS // 2), END_OF_NUMBERS


def _highest_inode(root: Path) -> int:
    """What no inode number of the file system exceeds, END_OF_NUMBERS if nothing bounds them.

    ext4 numbers its inodes from 1 on; XFS by their place on the disk, with less than one bit unused; btrfs by a counter
    that uses no number twice while it is mounted, and a build host makes 2^31 files in weeks.
    """
    status = os.statvfs(root)
    kind = syscalls.statfs_type(root)
    if kind == _EXT4:
        return status.f_files
    if kind == _XFS:
        return 2 * status.f_blocks * status.f_frsize // _LEAST_XFS_INODE_BYTES
    return END_OF_NUMBERS


def _read_gap(fd: int) -> tuple[int, int]:
    """The next number and the end; an empty gap if the file says none."""
    try:
        first, end = (int(word) for word in os.pread(fd, _RECORD_BYTES, 0).split())
    except ValueError:
        return 0, 0
    is_one = 0 < first <= end <= END_OF_NUMBERS and first % SLOTS_PER_BLOCK == 0
    return (first, end) if is_one else (0, 0)


def _write_gap(fd: int, first: int, end: int) -> None:
    os.pwrite(fd, b"%23d %23d\n" % (first, end), 0)
