"""A layer's directory tree from the entries of a tar, inside a directory nobody else writes to.

What a name means is what Docker's overlay2 makes of it: cleaned lexically, ``..`` stops at the layer's root, a
parent that is a symlink is followed inside the layer, missing parents are made (0755), the last entry of a name
wins, ``.wh.x`` becomes a 0:0 device and ``.wh..wh..opq`` marks its directory opaque. Every step goes by directory
descriptor, so no name leads out of the tree.

A regular file in the tree is a sparse inode: size, owner, mode, times and xattrs are the layer's, its bytes are
an object's, named by the overlay marks metacopy and redirect.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from typing import NamedTuple

from gearworkers.archive import whiteouts
from gearworkers.archive.entry import BLOCK, CHAR, DIR, FIFO, HARDLINK, REG, SYMLINK, Entry, shown
from gearworkers.digest import METACOPY_XATTR, OPAQUE_XATTR, REDIRECT_XATTR, RESERVED, object_path
from gearworkers.errors import InvalidInput, from_os_error
from gearworkers.layers.idmap import IdMaps
from gearworkers.layers.size import tree_size
from gearworkers.mounts import sys as kernel

_CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OPEN_DIRECTORIES = 256
_SPECIAL_FORMATS = {CHAR: stat.S_IFCHR, BLOCK: stat.S_IFBLK, FIFO: stat.S_IFIFO}
_SET_ID_BITS = stat.S_ISUID | stat.S_ISGID
_FORBIDDEN_XATTRS = (b"trusted.overlay.", b"trusted.gear.")
_GONE_ERRORS = frozenset((errno.ENOENT, errno.ENOTDIR, errno.ELOOP))
_XATTR_IGNORED_ERRORS = frozenset((errno.ENOTSUP, errno.EPERM))


class _Metadata(NamedTuple):
    """A directory's, set when nothing is put into it any more."""

    inode: int
    """Of the directory the entry was for; another may stand at its path in the end."""
    uid: int
    gid: int
    mode: int
    atime_ns: int
    mtime_ns: int
    xattrs: dict[bytes, bytes] | None


class TreeBuilder:
    """Fills an empty directory entry by entry; `finish` sets what entries would disturb.

    Not for use by two threads. The process's umask must be 0 while it is used. After an error the tree is
    unfinished and to be thrown away.
    """

    def __init__(self, root_fd: int, ids: IdMaps) -> None:
        self._root_fd = root_fd
        self._ids = ids
        self._open: dict[bytes, int] = {}
        self._directories: dict[bytes, _Metadata] = {}
        self._size_bytes = 0
        self._replaced = False

    def add(self, entry: Entry, digest: bytes | None) -> None:
        """Put *entry* into the tree.

        Args:
            entry: As the reader gave it.
            digest: SHA-256 of a regular file's content; None for an empty one and for all other types.

        Raises:
            InvalidInput: Docker would refuse it too, or it would reach into the object store.
            GearError: The file system's refusal, by kind.
        """
        parent, name = clean_name(entry.name)
        if not name:
            return
        try:
            self._add(entry, parent, name, digest)
        except OSError as exc:
            raise from_os_error(exc, f"tar entry {shown(entry.name)}") from exc
        except InvalidInput as exc:
            raise InvalidInput(f"tar entry {shown(entry.name)}: {exc}") from exc

    def finish(self) -> int:
        """Set the directories' metadata; the layer's size in bytes, as `size.tree_size`."""
        for path, metadata in self._directories.items():
            try:
                fd = self._opened(path, os.O_NOFOLLOW)
            except OSError as exc:
                if exc.errno in _GONE_ERRORS:
                    continue
                raise from_os_error(exc, f"set the metadata of directory {shown(path)}") from exc
            try:
                if os.fstat(fd).st_ino == metadata.inode:
                    self._set_directory(fd, metadata)
            finally:
                os.close(fd)
        return tree_size(self._root_fd) if self._replaced else self._size_bytes

    def close(self) -> None:
        """Close the directories that were kept open."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    # -- entries by type

    def _add(self, entry: Entry, parent: bytes, name: bytes, digest: bytes | None) -> None:
        if entry.xattrs:
            _check_xattrs(entry.xattrs)
        dir_fd = self._directory(parent)
        if name.startswith(whiteouts.PREFIX):
            self._add_whiteout(entry, dir_fd, name)
            return
        if name.startswith(RESERVED):
            self._refuse_reserved(dir_fd)
        try:
            self._create(entry, dir_fd, parent, name, digest)
        except FileExistsError:
            self._make_way(dir_fd, name)
            self._create(entry, self._directory(parent), parent, name, digest)

    def _create(self, entry: Entry, dir_fd: int, parent: bytes, name: bytes, digest: bytes | None) -> None:
        kind = entry.type
        if kind == REG:
            self._create_file(entry, dir_fd, name, digest)
        elif kind == DIR:
            self._create_directory(entry, dir_fd, parent + b"/" + name if parent else name, name)
        elif kind == HARDLINK:
            self._create_link(entry, dir_fd, name)
        elif kind == SYMLINK:
            os.symlink(entry.linkname, name, dir_fd=dir_fd)
            self._size_bytes += len(entry.linkname)
            self._set_by_name(entry, dir_fd, name, chmod=False)
        else:
            device = os.makedev(entry.devmajor, entry.devminor) if kind != FIFO else 0
            os.mknod(name, entry.mode | _SPECIAL_FORMATS[kind], device, dir_fd=dir_fd)
            self._set_by_name(entry, dir_fd, name, chmod=True)

    def _create_file(self, entry: Entry, dir_fd: int, name: bytes, digest: bytes | None) -> None:
        mode, mtime_ns = entry.mode, entry.mtime_ns
        fd = os.open(name, _CREATE, mode, dir_fd=dir_fd)
        try:
            if digest is not None:
                os.ftruncate(fd, entry.size_bytes)
                os.setxattr(fd, METACOPY_XATTR, b"")
                os.setxattr(fd, REDIRECT_XATTR, object_path(digest))
                self._size_bytes += entry.size_bytes
            uid, gid = self._owner(entry)
            if uid or gid:
                os.fchown(fd, uid, gid)
                if mode & _SET_ID_BITS:
                    os.fchmod(fd, mode)
            if entry.xattrs:
                _set_xattrs(fd, entry.xattrs)
            atime_ns = entry.atime_ns
            os.utime(fd, ns=(mtime_ns if atime_ns is None or atime_ns < mtime_ns else atime_ns, mtime_ns))
        finally:
            os.close(fd)

    def _create_directory(self, entry: Entry, dir_fd: int, path: bytes, name: bytes) -> None:
        with contextlib.suppress(FileExistsError):
            os.mkdir(name, 0o700, dir_fd=dir_fd)
        status = os.lstat(name, dir_fd=dir_fd)
        if not stat.S_ISDIR(status.st_mode):
            raise FileExistsError
        uid, gid = self._owner(entry)
        self._directories[path] = _Metadata(
            status.st_ino, uid, gid, entry.mode, _atime_ns(entry), entry.mtime_ns, entry.xattrs
        )

    def _create_link(self, entry: Entry, dir_fd: int, name: bytes) -> None:
        target_parent, target_name = clean_name(entry.linkname)
        if not target_name:
            raise InvalidInput("it is a hard link to the layer's root")
        target_fd = self._opened(target_parent) if target_parent else os.dup(self._root_fd)
        try:
            os.link(target_name, name, src_dir_fd=target_fd, dst_dir_fd=dir_fd, follow_symlinks=False)
        except FileNotFoundError as exc:
            raise InvalidInput(f"it is a hard link to {shown(entry.linkname)}, which is not in this layer") from exc
        finally:
            os.close(target_fd)
        is_symlink = stat.S_ISLNK(os.lstat(name, dir_fd=dir_fd).st_mode)
        self._set_by_name(entry, dir_fd, name, chmod=not is_symlink)

    def _add_whiteout(self, entry: Entry, dir_fd: int, name: bytes) -> None:
        if whiteouts.is_opaque(name):
            os.setxattr(dir_fd, OPAQUE_XATTR, b"y")
            return
        hidden = whiteouts.removed_name(name)
        if hidden is None:
            return
        if hidden.startswith(RESERVED):
            self._refuse_reserved(dir_fd)
        try:
            os.mknod(hidden, stat.S_IFCHR, 0, dir_fd=dir_fd)
        except FileExistsError as exc:
            raise InvalidInput("it is a whiteout of a name that the same layer holds") from exc
        os.chown(hidden, *self._owner(entry), dir_fd=dir_fd, follow_symlinks=False)

    # -- what stands in the way

    def _make_way(self, dir_fd: int, name: bytes) -> None:
        """Remove what an earlier entry made of this name."""
        self._replaced = True
        _remove(dir_fd, name)
        self.close()

    def _refuse_reserved(self, dir_fd: int) -> None:
        if os.path.samestat(os.fstat(dir_fd), os.fstat(self._root_fd)):
            raise InvalidInput("a top-level name must not begin with the byte 0x01: the object store is reached by it")

    # -- directories

    def _directory(self, path: bytes) -> int:
        """A descriptor of the directory *path*, made with its parents if it is missing."""
        if not path:
            return self._root_fd
        fd = self._open.get(path)
        if fd is None:
            try:
                fd = self._opened(path)
            except FileNotFoundError:
                fd = self._made(path)
            if len(self._open) >= _OPEN_DIRECTORIES:
                self.close()
            self._open[path] = fd
        return fd

    def _opened(self, path: bytes, flags: int = 0) -> int:
        return kernel.openat2(self._root_fd, path, _DIRECTORY | flags, 0, kernel.Resolve.IN_ROOT)

    def _made(self, path: bytes) -> int:
        """Make *path* and its missing parents, as `mkdir -p` inside the layer would."""
        parent, _, name = path.rpartition(b"/")
        dir_fd = self._directory(parent)
        if name.startswith(RESERVED):
            self._refuse_reserved(dir_fd)
        try:
            os.mkdir(name, 0o755, dir_fd=dir_fd)
        except FileExistsError as exc:
            raise InvalidInput(f"its parent {shown(path)} leads nowhere inside the layer") from exc
        if self._ids.root != (0, 0):
            os.chown(name, *self._ids.root, dir_fd=dir_fd, follow_symlinks=False)
        return self._opened(path)

    def _set_directory(self, fd: int, metadata: _Metadata) -> None:
        if metadata.uid or metadata.gid:
            os.fchown(fd, metadata.uid, metadata.gid)
        os.fchmod(fd, metadata.mode)
        if metadata.xattrs:
            _set_xattrs(fd, metadata.xattrs)
        os.utime(fd, ns=(metadata.atime_ns, metadata.mtime_ns))

    # -- metadata

    def _owner(self, entry: Entry) -> tuple[int, int]:
        return self._ids.to_host(entry.uid, entry.gid)

    def _set_by_name(self, entry: Entry, dir_fd: int, name: bytes, *, chmod: bool) -> None:
        os.chown(name, *self._owner(entry), dir_fd=dir_fd, follow_symlinks=False)
        if entry.xattrs:
            _set_xattrs(b"/proc/self/fd/%d/%s" % (dir_fd, name), entry.xattrs, follow_symlinks=False)
        if chmod:
            os.chmod(name, entry.mode, dir_fd=dir_fd)
        os.utime(name, ns=(_atime_ns(entry), entry.mtime_ns), dir_fd=dir_fd, follow_symlinks=False)


def clean_name(name: bytes) -> tuple[bytes, bytes]:
    """Parent and last component of *name*, cleaned as a path below the layer's root; ``..`` stops there.

    Returns:
        Both empty for the root itself.
    """
    if b"//" in name or b"/." in name or name.startswith(b"."):
        kept: list[bytes] = []
        for part in name.split(b"/"):
            if part == b"..":
                del kept[-1:]
            elif part and part != b".":
                kept.append(part)
        name = b"/".join(kept)
    parent, _, last = name.strip(b"/").rpartition(b"/")
    return parent, last


def _atime_ns(entry: Entry) -> int:
    """The access time Docker sets: never before the modification time."""
    return entry.mtime_ns if entry.atime_ns is None else max(entry.atime_ns, entry.mtime_ns)


def _check_xattrs(xattrs: dict[bytes, bytes]) -> None:
    for name in xattrs:
        if name.startswith(_FORBIDDEN_XATTRS):
            raise InvalidInput(f"its extended attribute {shown(name)} would redirect reads to other layers' files")


def _set_xattrs(target: int | bytes, xattrs: dict[bytes, bytes], *, follow_symlinks: bool = True) -> None:
    """Set them; what the file system does not know or forbids is left out, as Docker does."""
    for name, value in xattrs.items():
        try:
            os.setxattr(target, name, value, follow_symlinks=follow_symlinks)
        except OSError as exc:
            if exc.errno not in _XATTR_IGNORED_ERRORS:
                raise from_os_error(exc, f"set its extended attribute {shown(name)}") from exc


def _remove(dir_fd: int, name: bytes) -> None:
    try:
        os.unlink(name, dir_fd=dir_fd)
    except IsADirectoryError:
        fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=dir_fd)
        try:
            for child in os.listdir(fd):
                _remove(fd, os.fsencode(child))
        finally:
            os.close(fd)
        os.rmdir(name, dir_fd=dir_fd)
