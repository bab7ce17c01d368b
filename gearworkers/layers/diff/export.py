"""Write the tar of a read-write layer, or of any tree against another: the tar that ``docker commit`` stores.

Every file is read through the merged view. So metadata-only copies and renamed directories have their bytes, and the
tar contains the files as the container sees them. The upper only determines the names.

The same trees always give the same bytes: names are sorted, access times are omitted, and nothing depends on the clock.
Only the marker of a private layer precedes all other entries. Names that begin with ``.wh.`` cannot be expressed in a
layer's tar and are omitted. Sockets and paths that are too long are omitted as well.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Protocol

from gearworkers.errors import InvalidInput, NotFound, from_os_error
from gearworkers.layers.diff.changes import ChangeKind, tree_changes
from gearworkers.layers.diff.upperdir import EntryState, UpperEntry, join, lstat_at, open_beneath, walk_upper
from gearworkers.layers.diff.xattrs import kept_xattrs, kept_xattrs_of
from gearworkers.layers.idmap import IdMaps
from gearworkers.tar.entry import BLOCK, CHAR, DIR, FIFO, HARDLINK, REG, SYMLINK, TarEntry, shown
from gearworkers.tar.private_marker import MARKER
from gearworkers.tar.whiteouts import OPAQUE, PREFIX, whiteout_name
from gearworkers.tar.writer import END, header, padding
from gearworkers.util.fs import MAX_PATH_BYTES, opened_directory

PIECE_BYTES = 1 << 20
"""The size of reads from large files, and the largest size of buffered writes."""

BUFFERED_BYTES = 64 << 10
"""Smaller pieces are buffered and written together."""

_OPEN_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_WHITEOUT_MODE = 0o600
_TYPES = {
    stat.S_IFDIR: DIR,
    stat.S_IFLNK: SYMLINK,
    stat.S_IFCHR: CHAR,
    stat.S_IFBLK: BLOCK,
    stat.S_IFIFO: FIFO,
    stat.S_IFREG: REG,
}
_VANISHED_ERRORS = frozenset((errno.ENOENT, errno.ELOOP, errno.ENXIO, errno.ENOTDIR))


class Writable(Protocol):
    """Receives a tar."""

    def write(self, data: bytes | bytearray | memoryview, /) -> object:
        """Write all of *data*; the caller may change it afterwards."""
        ...


def write_diff(
    upper: Path, merged_fd: int, parent_fd: int | None, out: Writable, ids: IdMaps, max_mtime_ns: int | None = None
) -> None:
    """Write the tar of the read-write layer *upper* against its parent.

    Args:
        upper: The upper directory.
        merged_fd: Root of the overlay with the upper.
        parent_fd: Root of the overlay without the upper; None if the layer has no parent.
        out: Receives the tar; its errors pass through unchanged.
        ids: Maps the host's owners to the tar's.
        max_mtime_ns: SOURCE_DATE_EPOCH. Times after it are set to it; whiteouts get this time. None keeps all times.

    A file that grows or shrinks meanwhile keeps the length that it had when it was opened: its content is truncated or
    padded with zeros. A file that vanishes is omitted.

    Raises:
        NotFound: The object of a file is not in the object store.
        GearError: A file cannot be read, or an owner is outside the id ranges. The tar is then unfinished.
    """
    tar = _DiffWriter(out, ids, max_mtime_ns)
    with opened_directory(upper) as upper_fd:
        if lstat_at(upper_fd, MARKER) is not None:
            tar.add_private_marker(merged_fd)
    for found in _steps(upper, merged_fd, parent_fd):
        if found.state is EntryState.PRESENT and found.status is not None:
            tar.add(found.path, found.merged_dir_fd, found.name, found.status)
        elif found.state is EntryState.REMOVED:
            tar.add_whiteout(_whiteout_path(found.path))
        elif found.state is EntryState.OPAQUE:
            tar.add_whiteout(join(found.path, OPAQUE))
    tar.finish()


def write_tree_diff(
    new_fd: int | None, old_fd: int | None, out: Writable, ids: IdMaps, max_mtime_ns: int | None = None
) -> None:
    """Write the tar that turns the old tree into the new one, for any two trees; None is an empty tree.

    Changed files are written whole, and missing files become whiteouts. `tree_changes` determines the changes. Other
    arguments and errors are as for `write_diff`.
    """
    tar = _DiffWriter(out, ids, max_mtime_ns)
    changes = tree_changes(new_fd, old_fd)
    if new_fd is not None and any(change.path[1:] == MARKER for change in changes):
        tar.add_private_marker(new_fd)
    for change in changes:
        path = change.path[1:]
        if change.kind is ChangeKind.DELETE:
            tar.add_whiteout(_whiteout_path(path))
        elif new_fd is not None:
            _add_below(tar, new_fd, path)
    tar.finish()


def _steps(upper: Path, merged_fd: int, parent_fd: int | None) -> Iterator[UpperEntry]:
    with _ReadErrors(os.fsencode(upper)), opened_directory(upper) as upper_fd:
        yield from walk_upper(upper_fd, merged_fd, parent_fd)


def _add_below(tar: _DiffWriter, root_fd: int, path: bytes) -> None:
    directory, _, name = path.rpartition(b"/")
    with _ReadErrors(path):
        dir_fd = open_beneath(root_fd, directory)
    if dir_fd is None:
        return
    try:
        status = lstat_at(dir_fd, name)
        if status is not None:
            tar.add(path, dir_fd, name, status)
    finally:
        os.close(dir_fd)


def _whiteout_path(path: bytes) -> bytes:
    directory, _, name = path.rpartition(b"/")
    return join(directory, whiteout_name(name))


class _ReadErrors:
    """Context that translates OSError of reading *path*. A class, for speed: it is entered several times per file."""

    __slots__ = ("_path",)

    def __init__(self, path: bytes) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(exc, OSError):
            raise from_os_error(exc, f"read {shown(self._path)} for a layer's tar") from exc


class _DiffWriter:
    """Writes one tar and keeps the hard links in it."""

    def __init__(self, out: Writable, ids: IdMaps, max_mtime_ns: int | None) -> None:
        self._out = out
        self._ids = ids
        self._max_mtime_ns = max_mtime_ns
        self._buffered = bytearray()
        self._buffer = memoryview(bytearray(PIECE_BYTES))
        self._has_private_marker = False
        self._written: dict[tuple[int, int], bytes] = {}
        """The path in the tar by (device, inode), for files with several names."""

    def add(self, path: bytes, dir_fd: int, name: bytes, status: os.stat_result) -> None:
        """Write the entry *name* of a directory; omit it if a tar cannot contain it or it has vanished."""
        if b"/" + PREFIX in b"/" + path or (self._has_private_marker and path == MARKER) or len(path) > MAX_PATH_BYTES:
            return
        kind = _TYPES.get(stat.S_IFMT(status.st_mode))
        if kind is None:
            return
        first = self._written.get((status.st_dev, status.st_ino)) if status.st_nlink > 1 else None
        if first is not None and kind != DIR:
            self._add_contentless(path, dir_fd, name, HARDLINK, status, linkname=first)
        elif kind == REG:
            self._add_file(path, dir_fd, name)
        else:
            self._add_contentless(path, dir_fd, name, kind, status)

    def add_private_marker(self, root_fd: int) -> None:
        """Write the marker of a private layer, if it exists, before all contents."""
        with _ReadErrors(MARKER):
            status = lstat_at(root_fd, MARKER)
        if status is not None:
            self.add(MARKER, root_fd, MARKER, status)
            self._has_private_marker = True

    def add_whiteout(self, path: bytes) -> None:
        """Write a whiteout or an opaque marker: an empty file."""
        if len(path) <= MAX_PATH_BYTES + len(PREFIX):
            self._put(header(TarEntry(path, REG, mode=_WHITEOUT_MODE, mtime_ns=self._max_mtime_ns or 0)))

    def finish(self) -> None:
        """Write the end of the tar."""
        self._put(END)
        self._flush()

    def _add_file(self, path: bytes, dir_fd: int, name: bytes) -> None:
        with _ReadErrors(path):
            fd = _open_file(path, dir_fd, name)
        if fd is None:
            return
        try:
            with _ReadErrors(path):
                status = os.fstat(fd)
                xattrs = kept_xattrs_of(fd)
            if stat.S_ISREG(status.st_mode):
                entry = self._entry(path, REG, status, xattrs=xattrs)
                self._remember(path, status)
                self._put(header(entry))
                self._copy(path, fd, entry.size_bytes)
        finally:
            os.close(fd)

    def _add_contentless(
        self, path: bytes, dir_fd: int, name: bytes, kind: int, status: os.stat_result, linkname: bytes = b""
    ) -> None:
        """Write an entry without content. A hard link repeats its xattrs: setting the owner removes a capability."""
        try:
            with _ReadErrors(path):
                if kind == SYMLINK:
                    linkname = os.readlink(name, dir_fd=dir_fd)
                xattrs = kept_xattrs(dir_fd, name)
        except (NotFound, InvalidInput):  # the entry has vanished or is not a symlink any more
            return
        if kind not in (DIR, HARDLINK):
            self._remember(path, status)
        shown_path = path + b"/" if kind == DIR else path
        self._put(header(self._entry(shown_path, kind, status, linkname=linkname, xattrs=xattrs)))

    def _entry(
        self,
        path: bytes,
        kind: int,
        status: os.stat_result,
        *,
        linkname: bytes = b"",
        xattrs: dict[bytes, bytes] | None = None,
    ) -> TarEntry:
        try:
            uid, gid = self._ids.to_container(status.st_uid, status.st_gid)
        except InvalidInput as exc:
            raise InvalidInput(f"the owner of {shown(path)}: {exc}") from exc
        is_device, limit_ns = kind in (CHAR, BLOCK), self._max_mtime_ns
        return TarEntry(
            path,
            kind,
            linkname,
            stat.S_IMODE(status.st_mode),
            uid,
            gid,
            size_bytes=status.st_size if kind == REG else 0,
            mtime_ns=status.st_mtime_ns if limit_ns is None else min(status.st_mtime_ns, limit_ns),
            devmajor=os.major(status.st_rdev) if is_device else 0,
            devminor=os.minor(status.st_rdev) if is_device else 0,
            xattrs=xattrs or None,
        )

    def _remember(self, path: bytes, status: os.stat_result) -> None:
        if status.st_nlink > 1:
            self._written[status.st_dev, status.st_ino] = path

    def _copy(self, path: bytes, fd: int, size_bytes: int) -> None:
        """Write exactly *size_bytes* of the open file, with zeros if it ends early, and the padding."""
        left_bytes = size_bytes
        while left_bytes:
            piece = self._buffer[: min(left_bytes, PIECE_BYTES)]
            with _ReadErrors(path):
                read_bytes = os.readv(fd, (piece,))
            if not read_bytes:
                piece[:] = bytes(len(piece))
                read_bytes = len(piece)
            self._put(piece[:read_bytes])
            left_bytes -= read_bytes
        self._put(padding(size_bytes))

    def _put(self, data: bytes | memoryview) -> None:
        """Buffer small pieces; write large pieces without a copy."""
        if len(self._buffered) + len(data) > PIECE_BYTES:
            self._flush()
        if len(data) >= BUFFERED_BYTES:
            self._flush()
            self._out.write(data)
        else:
            self._buffered += data

    def _flush(self) -> None:
        if self._buffered:
            self._out.write(self._buffered)
            self._buffered = bytearray()


def _open_file(path: bytes, dir_fd: int, name: bytes) -> int | None:
    """Open a file for reading; None if it has vanished or is not a regular file any more.

    Raises:
        NotFound: The file exists, but the object of its index entry does not.
    """
    try:
        return os.open(name, _OPEN_FILE, dir_fd=dir_fd)
    except OSError as exc:
        if exc.errno not in _VANISHED_ERRORS:
            raise
        status = lstat_at(dir_fd, name)
        if exc.errno == errno.ENOENT and status is not None and stat.S_ISREG(status.st_mode):
            raise NotFound(
                f"{shown(path)}: its object is missing from the object store; `gear fsck` names the object"
            ) from exc
        return None
