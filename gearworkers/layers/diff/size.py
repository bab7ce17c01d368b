"""Compute a layer's size as Docker's overlay2 counts it: st_size of all except directories, each inode once."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress

from gearworkers.errors import from_os_error
from gearworkers.layers.diff.changes import Change, ChangeKind
from gearworkers.layers.diff.upperdir import directories

_BLOCK_BYTES = 512


def tree_size(root_fd: int) -> int:
    """Return the size in bytes of the files below the directory *root_fd*."""
    try:
        return _total(_statuses(root_fd))
    except OSError as exc:
        raise from_os_error(exc, "measure a layer") from exc


def tree_usage(root_fd: int) -> tuple[int, int]:
    """Return the bytes on disk and the number of inodes of the tree *root_fd*, its top included, each inode once."""
    try:
        used = {(status.st_dev, status.st_ino): status.st_blocks for status in _statuses(root_fd, directories_too=True)}
    except OSError as exc:
        raise from_os_error(exc, "measure a layer") from exc
    return sum(used.values()) * _BLOCK_BYTES, len(used)


def changed_size(root_fd: int, changes: Iterable[Change]) -> int:
    """Return the size in bytes of the files that *changes* add or modify in the tree *root_fd*."""
    return _total(_changed(root_fd, changes))


def _total(statuses: Iterable[os.stat_result]) -> int:
    return sum({(status.st_dev, status.st_ino): status.st_size for status in statuses}.values())


def _changed(root_fd: int, changes: Iterable[Change]) -> Iterator[os.stat_result]:
    for change in changes:
        if change.kind is ChangeKind.DELETE:
            continue
        try:
            status = os.lstat(change.path.lstrip(b"/") or b".", dir_fd=root_fd)
        except FileNotFoundError:
            continue
        if not stat.S_ISDIR(status.st_mode):
            yield status


def _statuses(root_fd: int, *, directories_too: bool = False) -> Iterator[os.stat_result]:
    for _, dir_fd in directories(root_fd):
        if directories_too:
            yield os.fstat(dir_fd)
        with os.scandir(dir_fd) as entries:
            for found in entries:
                with suppress(FileNotFoundError):
                    if not found.is_dir(follow_symlinks=False):
                        yield found.stat(follow_symlinks=False)
