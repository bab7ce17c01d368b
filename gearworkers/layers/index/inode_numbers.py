"""Inode numbers that are unique over all layers of a GEAR_ROOT and over the files of its file system.

Docker's archive code, containerd's copying and BuildKit recognize hard links by the inode number alone, without the
device. Two files with several names and the same number would become one file. A container shows files of many indexes
and of an upper on the file system of GEAR_ROOT. So each index takes its numbers from a range of its own, in a window
above the numbers that the file system uses.

The file `inode-numbers` contains the gap from which the next ranges are taken. When the gap is used up or the file is
lost, the labels of all indexes show the numbers in use, and the largest gap between them is used next. So the numbers
of removed layers are reused eventually, and so is a range that a crash left unused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from gearworkers.errors import ResourceExhausted
from gearworkers.layers.index.erofs import ImageWriter
from gearworkers.layers.index.erofs_format import END_OF_NUMBERS, SLOTS_PER_BLOCK
from gearworkers.layers.index.erofs_label import read_label
from gearworkers.util import syscalls
from gearworkers.util.locks import locked_file

NUMBERS_FILE = "inode-numbers"
INDEX_FILE = "index.erofs"

_RECORD_BYTES = 48
_EXT4, _XFS = 0xEF53, 0x58465342
_MIN_XFS_INODE_BYTES = 512
_32_BITS = 1 << 32


class InodeNumbers:
    """The inode numbers of the layers of one GEAR_ROOT. Several processes of the node may use them at once."""

    def __init__(self, root: Path, layer_parents: Iterable[Path]) -> None:
        """
        Args:
            root: GEAR_ROOT.
            layer_parents: Directories that contain layers, in the order in which a layer moves through them.
        """
        self._root = root
        self._layer_parents = tuple(layer_parents)

    def write_index(self, image: ImageWriter, path: Path) -> None:
        """Write *image* to the new file *path* in a layer's directory, with numbers that no other layer has.

        Raises:
            ResourceExhausted: Not enough numbers are free.
            OSError: The file cannot be written.

        Crash: leaves a part of the file; the numbers stay unused until all labels are read again.
        """
        with locked_file(self._root / NUMBERS_FILE) as gap_fd:
            first, end = _read_gap(gap_fd)
            if end - first < image.slots:
                first, end = self._largest_gap(image.slots)
            _write_gap(gap_fd, first + image.slots, end)
            # Under the lock, so that a process that reads all labels finds one for every range in use.
            with open(path, "xb") as file:
                image.write(file, first)

    def _largest_gap(self, slots: int) -> tuple[int, int]:
        start, stop = number_window(self._root)
        gaps = []
        for first, end in sorted((*self._ranges_in_use(), (stop, stop))):
            if first > start:
                gaps.append((min(first, stop) - start, start))
            start = max(start, end)
        length, first = max(gaps, default=(0, 0))
        if length < slots:
            raise ResourceExhausted(
                f"a layer needs {slots} consecutive inode numbers, but at most {length} are free; remove images"
            )
        return first, first + length

    def _ranges_in_use(self) -> Iterator[tuple[int, int]]:
        for parent in self._layer_parents:
            for path in parent.glob(f"*/{INDEX_FILE}"):
                try:
                    label = read_label(path)
                except (FileNotFoundError, NotADirectoryError):
                    continue  # the layer moved on or was removed
                if label is not None:
                    yield label.first, label.first + label.slots


def number_window(root: Path) -> tuple[int, int]:
    """Return the lowest inode number that layers may have, and the end of the range.

    The numbers are below 2^32, for programs of 32 bits, if the file system of *root* has no numbers from 2^31 on.
    """
    highest = _highest_inode(root)
    if highest < _32_BITS // 2:
        return _32_BITS // 2, _32_BITS
    start = max(_32_BITS, 1 << highest.bit_length())
    return min(start, END_OF_NUMBERS // 2), END_OF_NUMBERS


def _highest_inode(root: Path) -> int:
    """Return an upper bound of the file system's inode numbers; END_OF_NUMBERS if they have no bound.

    ext4 numbers its inodes from 1 on. XFS derives the number from the position on the disk and leaves less than one bit
    unused. btrfs counts up and does not reuse numbers while it is mounted; a build host creates 2^31 files in weeks.
    """
    status = os.statvfs(root)
    kind = syscalls.statfs_type(root)
    if kind == _EXT4:
        return status.f_files
    if kind == _XFS:
        return 2 * status.f_blocks * status.f_frsize // _MIN_XFS_INODE_BYTES
    return END_OF_NUMBERS


def _read_gap(fd: int) -> tuple[int, int]:
    """Return the next number and the end of the gap; an empty gap if the file is empty or damaged."""
    try:
        first, end = (int(word) for word in os.pread(fd, _RECORD_BYTES, 0).split())
    except ValueError:
        return 0, 0
    is_valid = 0 < first <= end <= END_OF_NUMBERS and first % SLOTS_PER_BLOCK == 0
    return (first, end) if is_valid else (0, 0)


def _write_gap(fd: int, first: int, end: int) -> None:
    os.pwrite(fd, b"%23d %23d\n" % (first, end), 0)
