"""List the changes between two trees, as ``docker diff`` shows them.

Source: moby pkg/archive, Changes and ChangesDirs, for the kinds and for the compared attributes.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from gearworkers.errors import from_os_error
from gearworkers.layers.diff.upperdir import (
    EntryState,
    UpperEntry,
    join,
    lstat_at,
    open_beneath,
    sorted_names,
    walk_upper,
)
from gearworkers.layers.diff.xattrs import kept_xattrs
from gearworkers.util.fs import opened_directory


class ChangeKind(IntEnum):
    """The kind of a change, with the numbers of the graphdriver protocol."""

    MODIFY = 0
    ADD = 1
    DELETE = 2


@dataclass(frozen=True, slots=True, order=True)
class Change:
    """One path that differs."""

    path: bytes
    """Absolute: ``/etc/hosts``."""
    kind: ChangeKind


def upper_changes(upper: Path, merged_fd: int, parent_fd: int | None) -> list[Change]:
    """Return the changes of the read-write layer *upper* to its parent, sorted by path.

    A file in the upper, even a metadata-only copy, is MODIFY if the parent has a file of its name, else ADD. A
    directory is MODIFY if its mode, owner, time or xattrs differ or an entry in it changed. A whiteout is DELETE. A
    file that an opaque or renamed directory hides and does not replace is also DELETE.

    Args:
        upper: The upper directory.
        merged_fd: Root of the overlay with the upper.
        parent_fd: Root of the overlay without the upper; None if the layer has no parent.

    Raises:
        GearError: A directory cannot be read.
    """
    changes: dict[bytes, ChangeKind] = {}
    try:
        with opened_directory(upper) as upper_fd:
            for found in walk_upper(upper_fd, merged_fd, parent_fd):
                kind = _kind_of(found)
                if kind is not None:
                    _record(changes, found.path, kind)
    except OSError as exc:
        raise from_os_error(exc, f"compare {upper} with its parent") from exc
    return _sorted(changes)


def tree_changes(new_fd: int | None, old_fd: int | None) -> list[Change]:
    """Return the differences between any two trees, sorted by path; None is an empty tree.

    The comparison covers type, mode, owner, device number, time, the xattrs that a tar contains, the target of a
    symlink and, except for directories, size. As in Docker, a change of content that keeps size and time is not
    noticed.

    Raises:
        GearError: A directory cannot be read.
    """
    changes: dict[bytes, ChangeKind] = {}
    pending = [b""]
    try:
        while pending:
            pending.extend(_compare_directory(new_fd, old_fd, pending.pop(), changes))
    except OSError as exc:
        raise from_os_error(exc, "compare two trees") from exc
    return _sorted(changes)


def _kind_of(found: UpperEntry) -> ChangeKind | None:
    if found.state is EntryState.OPAQUE:
        return ChangeKind.MODIFY
    if found.status is None:
        return ChangeKind.DELETE
    old = lstat_at(found.parent_dir_fd, found.name)
    if old is None:
        return ChangeKind.ADD
    if stat.S_ISDIR(old.st_mode) and stat.S_ISDIR(found.status.st_mode):
        is_changed = _differs(found.merged_dir_fd, found.parent_dir_fd, found.name, found.status, old)
        return ChangeKind.MODIFY if is_changed else None
    return ChangeKind.MODIFY


def _compare_directory(
    new_root: int | None, old_root: int | None, path: bytes, changes: dict[bytes, ChangeKind]
) -> list[bytes]:
    """Record the differences in one directory; return the subdirectories to compare next."""
    new_dir = None if new_root is None else open_beneath(new_root, path)
    old_dir = None if old_root is None else open_beneath(old_root, path)
    try:
        new_names = [] if new_dir is None else sorted_names(new_dir)
        deleted = set() if old_dir is None else set(sorted_names(old_dir)).difference(new_names)
        if path and new_dir is None:
            deleted.clear()  # the directory became a file, which is one MODIFY
        for name in deleted:
            _record(changes, join(path, name), ChangeKind.DELETE)
        subdirectories = []
        for name in new_names:
            new = lstat_at(new_dir, name)
            if new is None:
                continue
            old = lstat_at(old_dir, name)
            if old is None:
                _record(changes, join(path, name), ChangeKind.ADD)
            elif _differs(new_dir, old_dir, name, new, old):
                _record(changes, join(path, name), ChangeKind.MODIFY)
            if stat.S_ISDIR(new.st_mode):
                subdirectories.append(join(path, name))
        return subdirectories
    finally:
        for fd in (new_dir, old_dir):
            if fd is not None:
                os.close(fd)


def _differs(new_dir: int | None, old_dir: int | None, name: bytes, new: os.stat_result, old: os.stat_result) -> bool:
    if _identity(new) != _identity(old) or new.st_mtime_ns != old.st_mtime_ns:
        return True
    if not stat.S_ISDIR(new.st_mode) and new.st_size != old.st_size:
        return True
    if new_dir is None or old_dir is None or os.path.samestat(new, old):
        return False
    if stat.S_ISLNK(new.st_mode) and os.readlink(name, dir_fd=new_dir) != os.readlink(name, dir_fd=old_dir):
        return True
    return kept_xattrs(new_dir, name) != kept_xattrs(old_dir, name)


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """Return mode with file type, owner, group and device number."""
    return status.st_mode, status.st_uid, status.st_gid, status.st_rdev


def _record(changes: dict[bytes, ChangeKind], path: bytes, kind: ChangeKind) -> None:
    """Record a change, and MODIFY for every directory above it."""
    changes[path] = kind
    directory = path.rpartition(b"/")[0]
    while directory and directory not in changes:
        changes[directory] = ChangeKind.MODIFY
        directory = directory.rpartition(b"/")[0]


def _sorted(changes: dict[bytes, ChangeKind]) -> list[Change]:
    return [Change(b"/" + path, changes[path]) for path in sorted(changes)]
