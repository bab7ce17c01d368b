"""Walk a read-write layer against the view below it; used for the list of changes and for the tar.

The walk reads names, whiteouts and marks from the upper directory. It reads file types and metadata from the merged
view, where the kernel has resolved metadata-only copies and redirects. So it visits three directories in step: *upper*,
*merged* (the container's view) and *parent* (the same view without the upper).

The walk uses descriptors only and follows no symlink, so a running container can at most hide its own files. One
directory is open at a time, however deep the tree.

Source: Linux Documentation/filesystems/overlayfs.rst, "whiteouts and opaque directories", "renaming directories".
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from enum import Enum, auto
from typing import NamedTuple

from gearworkers.digest import OPAQUE_XATTR, REDIRECT_XATTR
from gearworkers.util import syscalls

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NO_DIRECTORY_ERRORS = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG))


class EntryState(Enum):
    """The state of a path in the layer."""

    PRESENT = auto()
    """The layer has an entry here: new, changed, or a directory that was copied up for one of its files."""
    REMOVED = auto()
    """A whiteout hides the parent's entry."""
    OPAQUE = auto()
    """The directory hides all entries of the parent's directory; follows PRESENT of the directory."""
    HIDDEN = auto()
    """The parent has an entry in a hidden directory, and the layer does not replace it; implied by OPAQUE."""


class UpperEntry(NamedTuple):
    """One step of the walk. The descriptors are valid until the next step."""

    state: EntryState
    path: bytes
    """Relative to the root, without a leading slash."""
    name: bytes
    """The last component of path; empty for OPAQUE."""
    merged_dir_fd: int
    """The directory that contains name, in the merged view. For OPAQUE: the directory itself."""
    parent_dir_fd: int | None
    """The same directory in the parent view; None if it does not exist there."""
    status: os.stat_result | None
    """lstat in the merged view, for PRESENT."""


class _PendingDirectory(NamedTuple):
    path: bytes
    whole: bool
    """Whether the directory is below a redirect. It is listed in the merged view, since the upper has only a part."""
    hidden: bool
    """Whether this opaque directory, or one above, hides the parent's entries."""
    has_parent: bool


class _OpenedDirectory(NamedTuple):
    listed_fd: int
    merged_fd: int
    parent_fd: int | None
    whole: bool
    hidden: bool
    newly_hidden: bool


def walk_upper(upper_fd: int, merged_fd: int, parent_fd: int | None) -> Iterator[UpperEntry]:
    """Yield the entries of the upper: those of a directory sorted by name, then those of its subdirectories.

    The root is omitted. Files that vanish during the walk are omitted, and so are the files in a directory whose path
    is longer than the kernel accepts.

    Args:
        upper_fd: The upper directory's root.
        merged_fd: The root of the overlay with the upper as its upper or topmost lower.
        parent_fd: The root of the same overlay without the upper; None if the layer has no parent.
    """
    pending = [_PendingDirectory(b"", whole=False, hidden=False, has_parent=parent_fd is not None)]
    while pending:
        directory = pending.pop()
        with contextlib.ExitStack() as stack:
            opened = _open_views(stack, directory, upper_fd, merged_fd, parent_fd)
            if opened is None:
                continue
            subdirectories: list[_PendingDirectory] = []
            yield from _walk_directory(directory.path, opened, subdirectories)
        pending.extend(reversed(subdirectories))


def open_beneath(root_fd: int, path: bytes) -> int | None:
    """Open the directory *path* below *root_fd* without following symlinks; None if it is missing or too deep."""
    try:
        return syscalls.openat2(
            root_fd, path or b".", _DIRECTORY, 0, syscalls.Resolve.BENEATH | syscalls.Resolve.NO_SYMLINKS
        )
    except OSError as exc:
        if exc.errno in _NO_DIRECTORY_ERRORS:
            return None
        raise


def directories(root_fd: int) -> Iterator[tuple[bytes, int]]:
    """Yield the path of every directory from the root down, and a descriptor that is valid until the next step.

    One directory is open at a time, however deep the tree. Directories that `open_beneath` cannot open are omitted.
    """
    pending = [b""]
    while pending:
        path = pending.pop()
        fd = open_beneath(root_fd, path)
        if fd is None:
            continue
        try:
            yield path, fd
            with os.scandir(fd) as entries:
                below = [os.fsencode(entry.name) for entry in entries if entry.is_dir(follow_symlinks=False)]
            pending += [join(path, name) for name in below]
        finally:
            os.close(fd)


def lstat_at(dir_fd: int | None, name: bytes) -> os.stat_result | None:
    """Return lstat of *name* in the directory; None if one of them does not exist."""
    if dir_fd is None:
        return None
    try:
        return os.stat(name, dir_fd=dir_fd, follow_symlinks=False)
    except FileNotFoundError:
        return None


def sorted_names(dir_fd: int) -> list[bytes]:
    """Return the names in the directory, sorted as bytes."""
    return sorted(map(os.fsencode, os.listdir(dir_fd)))


def join(directory: bytes, name: bytes) -> bytes:
    """Return the path of *name* below *directory*, which is empty for the root."""
    return directory + b"/" + name if directory else name


def _open_views(
    stack: contextlib.ExitStack, directory: _PendingDirectory, upper_fd: int, merged_fd: int, parent_fd: int | None
) -> _OpenedDirectory | None:
    """Open the directory in each view; None if it has vanished."""
    merged = _kept_open(stack, merged_fd, directory.path)
    upper = None if directory.whole else _kept_open(stack, upper_fd, directory.path)
    if merged is None or (upper is None and not directory.whole):
        return None
    parent = None
    if directory.has_parent and parent_fd is not None:
        parent = _kept_open(stack, parent_fd, directory.path)
    redirected = upper is not None and directory.path != b"" and _xattr(upper, REDIRECT_XATTR) is not None
    covers = redirected or (upper is not None and _xattr(upper, OPAQUE_XATTR) == b"y")
    whole = directory.whole or redirected
    listed = upper if upper is not None and not whole else merged
    hidden = directory.hidden or covers
    return _OpenedDirectory(listed, merged, parent, whole, hidden, newly_hidden=covers and not directory.hidden)


def _kept_open(stack: contextlib.ExitStack, root_fd: int, path: bytes) -> int | None:
    fd = open_beneath(root_fd, path)
    if fd is not None:
        stack.callback(os.close, fd)
    return fd


def _walk_directory(
    path: bytes, opened: _OpenedDirectory, subdirectories: list[_PendingDirectory]
) -> Iterator[UpperEntry]:
    """Yield the entries of one directory; add its subdirectories to *subdirectories*."""
    if opened.newly_hidden and opened.parent_fd is not None:
        yield UpperEntry(EntryState.OPAQUE, path, b"", opened.merged_fd, opened.parent_fd, None)
    for name in _names(opened):
        child = join(path, name)
        state, status = _state_of(opened, name)
        if state is None:
            continue
        yield UpperEntry(state, child, name, opened.merged_fd, opened.parent_fd, status)
        if status is not None and stat.S_ISDIR(status.st_mode):
            has_parent = opened.parent_fd is not None
            subdirectories.append(_PendingDirectory(child, opened.whole, opened.hidden, has_parent))


def _names(opened: _OpenedDirectory) -> list[bytes]:
    names = sorted_names(opened.listed_fd)
    if opened.hidden and opened.parent_fd is not None:
        return sorted({*names, *sorted_names(opened.parent_fd)})
    return names


def _state_of(opened: _OpenedDirectory, name: bytes) -> tuple[EntryState | None, os.stat_result | None]:
    """Return the state of *name*, and its lstat if it is present; (None, None) to omit the name."""
    status = lstat_at(opened.merged_fd, name)
    if status is not None:
        return EntryState.PRESENT, status
    if lstat_at(opened.parent_fd, name) is None:
        return None, None
    if opened.hidden:
        return EntryState.HIDDEN, None
    # In the parent view but not in the merged view: a whiteout, unless the file has vanished just now.
    return (EntryState.REMOVED, None) if _is_whiteout(opened.listed_fd, name) else (None, None)


def _is_whiteout(dir_fd: int, name: bytes) -> bool:
    status = lstat_at(dir_fd, name)
    return status is not None and stat.S_ISCHR(status.st_mode) and status.st_rdev == 0


def _xattr(fd: int, name: str) -> bytes | None:
    try:
        return os.getxattr(fd, name)
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.ENOTSUP):
            return None
        raise
