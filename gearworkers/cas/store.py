"""The public cache: distinct contents, each stored once per host.

Glossary: an *object* is a file (mode 0400) whose bytes have the SHA-256 it is named by; a *cache* is a
directory of objects; *staging* is a directory on the same file system where bytes lie before they have a name.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from enum import Enum, auto
from pathlib import Path

from gearworkers.digest import ALPHABET, DIGEST_XATTR, RESERVED, object_path
from gearworkers.errors import IntegrityError, NotFound, from_os_error
from gearworkers.util import syscalls as kernel
from gearworkers.util.writing import write_all

_CREATE = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC
_HOLE_BYTES = 64 * 1024
_READ_BYTES = 1 << 20


class ObjectState(Enum):
    """What stands at an object's name."""

    WHOLE = auto()
    UNFINISHED = auto()
    """A file without digest: an import is writing it, or was killed while it did (`inplace`)."""
    ABSENT = auto()


_WHOLE = ObjectState.WHOLE  # a look-up in the class takes 0.2 µs, twice for each content of an import


class ObjectStore:
    """One cache directory; safe to use from many processes at once.

    Every method is idempotent. An object is visible only when whole: bytes and xattr first, then the name.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._prefix = os.fsencode(cache)

    def prepare(self) -> None:
        """Make the cache's directories; call once per host before anything else."""
        self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        for shard in self.shards():
            Path(os.fsdecode(shard)).mkdir(mode=0o700, exist_ok=True)

    def drop_empty_shards(self) -> None:
        """Remove the directories that hold nothing, and the cache if it has no other; no object can come any more."""
        for path in (*self.shards(), self._prefix):
            try:
                os.rmdir(path)
            except OSError as exc:
                if exc.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise from_os_error(exc, f"remove {os.fsdecode(path)}") from exc

    def shards(self) -> Iterator[bytes]:
        """The cache's 64 directories, as absolute paths."""
        return (self._prefix + b"/" + RESERVED + bytes((char,)) for char in ALPHABET)

    def path(self, digest: bytes) -> bytes:
        """Where the object of this 32-byte digest lies or would lie."""
        return self._prefix + object_path(digest)

    def has(self, digest: bytes) -> bool:
        """Whether the object is here, whole.

        Raises:
            IntegrityError: Another content stands at its name.
        """
        return self.find(digest) is _WHOLE

    def find(self, digest: bytes) -> ObjectState:
        """What stands at the object's name.

        Raises:
            IntegrityError: Another content does.
        """
        path = self.path(digest)
        try:
            found = os.getxattr(path, DIGEST_XATTR)
        except OSError as exc:
            if exc.errno == errno.ENOENT:
                return ObjectState.ABSENT
            if exc.errno == errno.ENODATA:
                return ObjectState.UNFINISHED
            raise from_os_error(exc, f"look up object {digest.hex()}") from exc
        if found != digest:
            raise IntegrityError(f"object {digest.hex()}: {os.fsdecode(path)} holds {found.hex()}; run `gear fsck`")
        return _WHOLE

    def open(self, digest: bytes) -> int:
        """A read-only descriptor of the object.

        Raises:
            NotFound: It is not here.
            IntegrityError: Another content stands at its name.
        """
        try:
            fd = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno == errno.ENOENT:
                raise NotFound(f"object {digest.hex()} is not in {self.cache}; run `gear fsck`") from exc
            raise from_os_error(exc, f"open object {digest.hex()}") from exc
        try:
            if os.getxattr(fd, DIGEST_XATTR) != digest:
                raise IntegrityError(f"object {digest.hex()}: another content stands at its name; run `gear fsck`")
        except BaseException:
            os.close(fd)
            raise
        return fd

    def put(self, digest: bytes, data: memoryview, staging_fd: int) -> bool:
        """Store *data*, whose SHA-256 the caller has computed, unless it is here; whether it is new.

        Args:
            digest: SHA-256 of data.
            data: The whole content.
            staging_fd: A directory on the cache's file system; a crash may leave a file in it.

        Raises:
            ResourceExhausted: No space or inodes; nothing is visible.
        """
        with self.create(staging_fd) as pending:
            pending.write(data)
            return pending.publish(digest)

    def create(self, staging_fd: int) -> PendingObject:
        """A new object whose digest is not known yet; use as a context manager."""
        return PendingObject(self, staging_fd)

    def adopt(self, fd: int, staging_fd: int, name: bytes, digest: bytes) -> bool:
        """Make a finished file an object, its bytes verified by the caller; the one place where a file enters a cache.

        Args:
            fd: The file, open.
            staging_fd: The directory it lies in, on the cache's file system.
            name: Its name there, gone if it is new.
            digest: SHA-256 of its bytes.

        Returns:
            Whether the object is new; if another was first, the file stays where it is.

        Raises:
            IntegrityError: Another content stands at its name.
        """
        path = self.path(digest)
        try:
            os.setxattr(fd, DIGEST_XATTR, digest)
            try:
                kernel.renameat2(staging_fd, name, -1, path, kernel.Rename.NOREPLACE)
            except FileExistsError:
                if self.has(digest):
                    return False
                os.rename(name, path, src_dir_fd=staging_fd)  # over what a broken-off `inplace` write left
        except OSError as exc:
            raise from_os_error(exc, f"store object {digest.hex()}") from exc
        return True

    def remove(self, digest: bytes) -> None:
        """Remove the object's name; not being there is fine."""
        try:
            os.unlink(self.path(digest))
        except FileNotFoundError:
            pass

    def names(self, shard: bytes) -> Iterable[bytes]:
        """Names of the files in one of `shards()`, in no order; none if it is not there."""
        try:
            return os.listdir(shard)
        except FileNotFoundError:
            return ()


class PendingObject:
    """Bytes on their way into a store: write, then publish; gone when the block ends without it."""

    _serial = itertools.count(1)

    def __init__(self, store: ObjectStore, staging_fd: int) -> None:
        self._store = store
        self._dir_fd = staging_fd
        self._name = b"object-%d-%d" % (os.getpid(), next(PendingObject._serial))
        self._size_bytes = 0
        self._published = False
        try:
            self._fd = os.open(self._name, _CREATE, 0o400, dir_fd=staging_fd)
        except OSError as exc:
            raise from_os_error(exc, "create an object") from exc

    def __enter__(self) -> PendingObject:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)
        if not self._published:
            os.unlink(self._name, dir_fd=self._dir_fd)

    def write(self, data: memoryview) -> None:
        """Append *data*; long runs of zeros become holes."""
        try:
            if len(data) >= _HOLE_BYTES and data[0] == 0 and data[-1] == 0 and _is_zero(data):
                os.lseek(self._fd, len(data), os.SEEK_CUR)
            else:
                write_all(self._fd, data)
        except OSError as exc:
            raise from_os_error(exc, "write an object") from exc
        self._size_bytes += len(data)

    def write_zeros(self, size_bytes: int) -> None:
        """Append a hole of this many bytes."""
        os.lseek(self._fd, size_bytes, os.SEEK_CUR)
        self._size_bytes += size_bytes

    def publish(self, digest: bytes) -> bool:
        """Give the bytes their name.

        Returns:
            Whether the object is new; False if another import was first.

        Raises:
            IntegrityError: Another content stands at its name.
        """
        try:
            if os.lseek(self._fd, 0, os.SEEK_CUR) != os.fstat(self._fd).st_size:
                os.ftruncate(self._fd, self._size_bytes)
        except OSError as exc:
            raise from_os_error(exc, f"store object {digest.hex()}") from exc
        self._published = self._store.adopt(self._fd, self._dir_fd, self._name, digest)
        return self._published


def _is_zero(data: memoryview) -> bool:
    return data.tobytes().count(0) == len(data)


def verify_file(fd: int, digest: bytes) -> None:
    """Read the whole of *fd* and compare.

    Raises:
        IntegrityError: Its SHA-256 is not *digest*.
    """
    hasher = hashlib.sha256()
    offset = 0
    while chunk := os.pread(fd, _READ_BYTES, offset):
        hasher.update(chunk)
        offset += len(chunk)
    if hasher.digest() != digest:
        raise IntegrityError(f"object {digest.hex()}: its bytes have SHA-256 {hasher.hexdigest()}")
