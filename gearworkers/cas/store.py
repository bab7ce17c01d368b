"""A store of objects: distinct contents, each stored once per host.

Glossary: an *object* is a file (mode 0400) whose name is derived from the SHA-256 of its bytes. A *cache* is a
directory of objects, divided into 64 *shards*. *Staging* is a directory on the same file system for files that do not
have their final name yet.
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
_SMALL_SHARD_BYTES = 1 << 16
"""In ext4, the size of a directory of some 2,000 objects."""


class ObjectState(Enum):
    """The state of the file under an object's name."""

    WHOLE = auto()
    UNFINISHED = auto()
    """A file without digest: an import is writing it, or was killed meanwhile (`inplace`)."""
    ABSENT = auto()


_WHOLE = ObjectState.WHOLE  # a look-up in the class takes 0.2 µs, twice per content of an import


class ObjectStore:
    """One cache directory. Many processes may use it at once, and every method is idempotent.

    An object is visible only when it is whole: its xattr is set after its bytes are written.
    """

    def __init__(self, cache: Path) -> None:
        self.cache = cache
        self._prefix = os.fsencode(cache)

    def prepare(self) -> None:
        """Create the cache's directories. Call once per host before all other methods."""
        self.cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        for shard in self.shards():
            Path(os.fsdecode(shard)).mkdir(mode=0o700, exist_ok=True)

    def drop_empty_shards(self) -> None:
        """Remove empty shards, and the cache if all are empty. No process may store objects any more."""
        for path in (*self.shards(), self._prefix):
            try:
                os.rmdir(path)
            except OSError as exc:
                if exc.errno not in (errno.ENOTEMPTY, errno.ENOENT):
                    raise from_os_error(exc, f"remove {os.fsdecode(path)}") from exc

    def shards(self) -> Iterator[bytes]:
        """Yield the absolute paths of the cache's 64 shards."""
        return (self._prefix + b"/" + RESERVED + bytes((char,)) for char in ALPHABET)

    def path(self, digest: bytes) -> bytes:
        """Return the path of the object with this 32-byte digest, whether it exists or not."""
        return self._prefix + object_path(digest)

    def has(self, digest: bytes) -> bool:
        """Whether the whole object is in the store.

        Raises:
            IntegrityError: Another content is stored under the object's name.
        """
        return self.find(digest) is _WHOLE

    def find(self, digest: bytes) -> ObjectState:
        """Return the state of an object.

        Raises:
            IntegrityError: Another content is stored under the object's name.
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
            raise IntegrityError(f"object {digest.hex()}: {os.fsdecode(path)} is object {found.hex()}; run `gear fsck`")
        return _WHOLE

    def open(self, digest: bytes) -> int:
        """Return a read-only descriptor of the object.

        Raises:
            NotFound: The object is not in the store.
            IntegrityError: Another content is stored under the object's name.
        """
        try:
            fd = os.open(self.path(digest), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno == errno.ENOENT:
                raise NotFound(f"object {digest.hex()} is not in {self.cache}; run `gear fsck`") from exc
            raise from_os_error(exc, f"open object {digest.hex()}") from exc
        try:
            if os.getxattr(fd, DIGEST_XATTR) != digest:
                raise IntegrityError(
                    f"object {digest.hex()}: another content is stored under its name; run `gear fsck`"
                )
        except BaseException:
            os.close(fd)
            raise
        return fd

    def put(self, digest: bytes, data: memoryview, staging_fd: int) -> bool:
        """Store *data* under its SHA-256, which the caller has computed; return whether the object is new.

        Args:
            digest: SHA-256 of data.
            data: The whole content.
            staging_fd: A directory on the cache's file system; a crash may leave a file in it.

        Raises:
            ResourceExhausted: No space or inodes are left; nothing is visible.
        """
        with self.create(staging_fd) as pending:
            pending.write(data)
            return pending.publish(digest)

    def create(self, staging_fd: int) -> PendingObject:
        """Return a new object whose digest is not known yet; use as a context manager."""
        return PendingObject(self, staging_fd)

    def adopt(self, fd: int, staging_fd: int, name: bytes, digest: bytes) -> bool:
        """Make a finished file an object. The caller has verified its bytes.

        Args:
            fd: The open file.
            staging_fd: The directory that contains the file, on the cache's file system.
            name: The file's name there. The file is moved to the cache if the object is new.
            digest: SHA-256 of the file's bytes.

        Returns:
            Whether the object is new. If another import has stored it, the file stays in the staging directory.

        Raises:
            IntegrityError: Another content is stored under the object's name.
        """
        path = self.path(digest)
        try:
            os.setxattr(fd, DIGEST_XATTR, digest)
            try:
                kernel.renameat2(staging_fd, name, -1, path, kernel.Rename.NOREPLACE)
            except FileExistsError:
                if self.has(digest):
                    return False
                os.rename(name, path, src_dir_fd=staging_fd)  # replaces the rest of an interrupted `inplace` write
        except OSError as exc:
            raise from_os_error(exc, f"store object {digest.hex()}") from exc
        return True

    def remove(self, digest: bytes) -> None:
        """Remove the object; idempotent."""
        try:
            os.unlink(self.path(digest))
        except FileNotFoundError:
            pass

    def names(self, shard: bytes) -> Iterable[bytes]:
        """Return the names of the files in a shard, in any order; none if the shard does not exist."""
        try:
            return os.listdir(shard)
        except FileNotFoundError:
            return ()

    def names_if_few(self, shard: bytes) -> set[bytes] | None:
        """Return the names of the files in a shard, as `names`; None if it has too many to list them quickly."""
        try:
            is_small = os.stat(shard).st_size <= _SMALL_SHARD_BYTES
        except FileNotFoundError:
            return set()
        return set(self.names(shard)) if is_small else None


class PendingObject:
    """An object being written: write, then publish. Leaving the context without `publish` removes it."""

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
        """Give the bytes the object's name.

        Returns:
            Whether the object is new; False if another import has stored it.

        Raises:
            IntegrityError: Another content is stored under the object's name.
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
    """Read the file *fd* and compare its SHA-256 with *digest*.

    Raises:
        IntegrityError: They differ.
    """
    hasher = hashlib.sha256()
    offset = 0
    while chunk := os.pread(fd, _READ_BYTES, offset):
        hasher.update(chunk)
        offset += len(chunk)
    if hasher.digest() != digest:
        raise IntegrityError(f"object {digest.hex()}: its bytes have SHA-256 {hasher.hexdigest()}")
