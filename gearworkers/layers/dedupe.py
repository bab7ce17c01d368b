"""Deduplicate a finished read-write layer: move its contents to the object store.

BuildKit creates layers by Create, writes them through a mount and registers them by their Diff, without ApplyDiff. This
module replaces their files, each by one atomic rename, with index files: same metadata, but the bytes are objects. A
mount above the layer sees no difference.

Order of writes: objects, the file `times` with the directories' times, the list `objects` that keeps the objects from
the garbage collector, the names, the times again. Last, `times` is removed.
Crash: leaves some files replaced, with their objects listed, and `times`. `locked_for_diff` restores the directories'
times, which are part of the layer's Diff. The next `dedupe_layer` replaces the rest of the files.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from gearworkers.cas.collector import publishing
from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.refs import OBJECTS_FILE, RefWriter, read_refs
from gearworkers.cas.store import ObjectStore
from gearworkers.digest import METACOPY_XATTR, REDIRECT_XATTR, object_path
from gearworkers.errors import Unavailable, from_os_error
from gearworkers.layers.diff.upperdir import directories, open_beneath
from gearworkers.util import syscalls as kernel
from gearworkers.util.fs import opened_directory
from gearworkers.util.locks import locked_directory
from gearworkers.util.writing import replace_file

_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_PIECE_BYTES = 1 << 20

TIMES_FILE = "times"
"""In a layer that is not deduplicated yet, or not completely: the times of its directories."""


class _DirectoryTimes(msgspec.Struct, frozen=True, array_like=True):
    """The times of a directory, to be restored."""

    path: bytes
    atime_ns: int
    mtime_ns: int


class _StoredContent(NamedTuple):
    """The digest of an inode's bytes, and values that show later changes of the inode."""

    digest: bytes
    identity: tuple[int, int, int]


def dedupe_layer(
    layer: Path, upper: Path, build: Path, store: ObjectStore, push_queue: PushQueue | None, root: Path
) -> int:
    """Replace the regular files in *upper* by index files; return the number of names replaced.

    Continues after a crash or an error.

    Args:
        layer: The layer's directory; receives the list `objects`.
        upper: The layer's tree, not mounted for writing.
        build: An empty directory on the same file system that only this call uses.
        store: Receives the contents.
        push_queue: Receives new objects; None if there is no remote.
        root: GEAR_ROOT.

    Raises:
        Unavailable: A Diff of the layer is running, which may take long; the layer is unchanged.
        GearError: The file system refuses; the layer is undamaged.
    """
    try:
        refs = RefWriter(build)
        try:
            for digest, size_bytes in read_refs(layer / OBJECTS_FILE):  # of files replaced before a crash
                refs.add(digest, size_bytes)
            contents = _stored(upper, build, store, refs, push_queue)
            refs.seal()
        finally:
            refs.close()
        with opened_directory(build) as build_fd, locked_directory(layer, fcntl.LOCK_EX | fcntl.LOCK_NB):
            _restore_times(layer, upper)
            times = msgspec.msgpack.encode(list(_directory_times(upper)))
            replace_file(layer / TIMES_FILE, times, sync=False)
            with publishing(root, store):  # otherwise the collector may miss the list while it moves
                os.rename(build / OBJECTS_FILE, layer / OBJECTS_FILE)
            kernel.syncfs(build_fd)
            count = _replaced(upper, build_fd, contents)
            _restore_times(layer, upper)
            (layer / TIMES_FILE).unlink()
            return count
    except BlockingIOError as exc:
        raise Unavailable(
            f"cannot move the contents of layer {layer.name} to the object store: a Diff is reading them; retry later"
        ) from exc
    except OSError as exc:
        raise from_os_error(exc, f"move the contents of layer {layer.name} to the object store") from exc


def is_deduped(layer: Path) -> bool:
    """Whether `dedupe_layer` has finished."""
    return (layer / OBJECTS_FILE).exists() and not (layer / TIMES_FILE).exists()


@contextmanager
def locked_for_diff(layer: Path, upper: Path) -> Iterator[None]:
    """Keep `dedupe_layer` from changing the layer; first restore directory times that a crash left changed."""
    if (layer / TIMES_FILE).exists():
        with locked_directory(layer, fcntl.LOCK_EX):
            _restore_times(layer, upper)
    with locked_directory(layer, fcntl.LOCK_SH):
        yield


def _restore_times(layer: Path, upper: Path) -> None:
    """Set the recorded times. A file that a power cut left half written is older than all changes: ignore it."""
    try:
        recorded = msgspec.msgpack.decode((layer / TIMES_FILE).read_bytes(), type=list[_DirectoryTimes])
    except (FileNotFoundError, msgspec.DecodeError):
        return
    with opened_directory(upper, os.O_NOFOLLOW) as upper_fd:
        for directory in recorded:
            fd = open_beneath(upper_fd, directory.path)
            if fd is not None:
                try:
                    os.utime(fd, ns=(directory.atime_ns, directory.mtime_ns))
                finally:
                    os.close(fd)


def _directory_times(upper: Path) -> Iterator[_DirectoryTimes]:
    with opened_directory(upper, os.O_NOFOLLOW) as upper_fd:
        for path, dir_fd in directories(upper_fd):
            status = os.fstat(dir_fd)
            yield _DirectoryTimes(path, status.st_atime_ns, status.st_mtime_ns)


def _stored(
    upper: Path, build: Path, store: ObjectStore, refs: RefWriter, push_queue: PushQueue | None
) -> dict[int, _StoredContent]:
    """Store every content as an object; return digests by inode."""
    contents: dict[int, _StoredContent] = {}
    with opened_directory(build) as build_fd:
        for dir_fd, name, status in _files(upper):
            if status.st_ino in contents:
                continue
            fd = os.open(name, _READ, dir_fd=dir_fd)
            try:
                digest = _digest(fd)
                refs.add(digest, status.st_size)
                if not store.has(digest):
                    if push_queue is not None:
                        push_queue.announce(digest)
                    _store(fd, digest, store, build_fd)
                    if push_queue is not None and store.has(digest):
                        push_queue.add(digest)
                contents[status.st_ino] = _StoredContent(digest, _identity(status))
            finally:
                os.close(fd)
    return contents


def _replaced(upper: Path, build_fd: int, contents: dict[int, _StoredContent]) -> int:
    """Replace files by index files; skip files that were changed meanwhile. Return the number of names replaced."""
    index_files: dict[int, bytes] = {}
    count = 0
    for dir_fd, name, status in _files(upper):
        content = contents.get(status.st_ino)
        if content is None or content.identity != _identity(status):
            continue
        index = index_files.get(status.st_ino)
        if index is None:
            index = index_files[status.st_ino] = b"index-%d" % status.st_ino
            _make_index(build_fd, index, dir_fd, name, status, content.digest)
        os.link(index, b"link", src_dir_fd=build_fd, dst_dir_fd=build_fd)
        os.rename(b"link", name, src_dir_fd=build_fd, dst_dir_fd=dir_fd)
        count += 1
    return count


def _make_index(build_fd: int, index: bytes, dir_fd: int, name: bytes, status: os.stat_result, digest: bytes) -> None:
    source_fd = os.open(name, _READ, dir_fd=dir_fd)
    try:
        fd = os.open(index, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=build_fd)
        try:
            os.ftruncate(fd, status.st_size)
            os.setxattr(fd, METACOPY_XATTR, b"")
            os.setxattr(fd, REDIRECT_XATTR, object_path(digest))
            os.fchown(fd, status.st_uid, status.st_gid)
            for xattr in os.listxattr(source_fd):
                if not xattr.startswith("trusted.overlay."):
                    os.setxattr(fd, xattr, os.getxattr(source_fd, xattr))
            os.fchmod(fd, stat.S_IMODE(status.st_mode))
            os.utime(fd, ns=(status.st_atime_ns, status.st_mtime_ns))
        finally:
            os.close(fd)
    finally:
        os.close(source_fd)


def _digest(fd: int) -> bytes:
    hasher = hashlib.sha256()
    offset = 0
    while piece := os.pread(fd, _PIECE_BYTES, offset):
        hasher.update(piece)
        offset += len(piece)
    return hasher.digest()


def _store(fd: int, digest: bytes, store: ObjectStore, build_fd: int) -> None:
    """Copy the bytes of *fd* to an object; hash them again, since the file may have changed meanwhile."""
    hasher = hashlib.sha256()
    offset = 0
    with store.create(build_fd) as pending:
        while piece := os.pread(fd, _PIECE_BYTES, offset):
            hasher.update(piece)
            pending.write(memoryview(piece))
            offset += len(piece)
        if hasher.digest() == digest:
            pending.publish(digest)


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_ino, status.st_size, status.st_mtime_ns


def _files(directory: Path) -> Iterator[tuple[int, bytes, os.stat_result]]:
    """Yield (directory descriptor, name, status) of the regular files that are not index files and not empty."""
    with opened_directory(directory, os.O_NOFOLLOW) as root_fd:
        for _, dir_fd in directories(root_fd):
            for text in os.listdir(dir_fd):
                name = os.fsencode(text)
                status = os.lstat(name, dir_fd=dir_fd)
                if stat.S_ISREG(status.st_mode) and status.st_size and not _is_index(dir_fd, name):
                    yield dir_fd, name, status


def _is_index(dir_fd: int, name: bytes) -> bool:
    fd = os.open(name, _READ, dir_fd=dir_fd)
    try:
        return METACOPY_XATTR in os.listxattr(fd)
    finally:
        os.close(fd)
