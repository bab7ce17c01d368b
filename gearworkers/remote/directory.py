"""Blobs in a directory, local or on NFS, through plain system calls: a conversion creates thousands of files a second.

Paths: `blob_name` for blobs, `documents.version_name` for documents, as the keys of a bucket; ``staging/…`` for
temporary files.

Order of writes: temporary files, sync, names, sync of the names. So neither a crash nor a power cut shows a partial
blob.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gearworkers.errors import NotFound, Unavailable, from_os_error
from gearworkers.remote.blobstore import Document, blob_name
from gearworkers.remote.documents import directory_name, newest_version, put_version, version_name, versions_among
from gearworkers.util import syscalls as kernel
from gearworkers.util.writing import write_all

_STAGING = "staging"
_DATA_DIRECTORIES = ("objects", "documents")
_STALE_S = 24 * 3600
_MAX_FSYNCS = 8
"""Up to this many files are synced one by one; for more, the whole file system is synced."""
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

_Rename = Callable[[str, str], None]


class DirectoryStore:
    """A `BlobStore` in a directory; it neither retries nor limits the time of a call."""

    def __init__(self, path: Path, markers: Path | None = None) -> None:
        """
        Args:
            path: The directory. It must exist: the administrator creates it for a new remote.
            markers: As `MountCheck` takes it.
        """
        self._mount = MountCheck(path, markers)
        self.location = str(path)
        self._made: set[str] = set()
        self._is_tidied = False

    # -- blobs

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """Stat each."""
        with self._translated("look for blobs in"):
            found = {digest for digest in digests if _exists(self._path(digest))}
            if len(found) < len(digests):
                self._mount.check()
        return found

    def get(self, digest: bytes) -> bytes:
        """Read the file."""
        with self._translated(f"get {digest.hex()} from"):
            return _read(self._path(digest))

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Read one after the other."""
        for digest in digests:
            try:
                yield digest, self.get(digest)
            except NotFound:
                continue

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """Write all, sync them together, rename them, sync the names."""
        if not blobs:
            return
        with self._translated(f"put {len(blobs)} blobs into"):
            self._publish([(self._path(digest), blob) for digest, blob in blobs], os.rename)

    # -- documents

    def get_document(self, name: str) -> Document | None:
        """List the versions, then read the newest."""
        return newest_version(self, name)

    def put_document(self, name: str, document: Document) -> None:
        """List the versions, create the new one, remove old ones."""
        put_version(self, name, document)

    def versions(self, name: str) -> list[int]:
        """List the document's directory."""
        with self._translated(f"list document {name} of"):
            try:
                return versions_among(os.listdir(f"{self.location}/{directory_name(name)}"))
            except (FileNotFoundError, NotADirectoryError):
                self._mount.check()
                return []

    def read_version(self, name: str, version: int) -> bytes:
        """Read the file."""
        with self._translated(f"get document {name} from"):
            return _read(self._version_path(name, version))

    def create_version(self, name: str, document: Document) -> None:
        """Write it as a blob, but link it: a link never replaces another writer's version."""
        with self._translated(f"put document {name} into"):
            self._publish([(self._version_path(name, document.version), document.data)], _rename_new)

    def remove_version(self, name: str, version: int) -> None:
        """Unlink the file."""
        _remove(self._version_path(name, version))

    def close(self) -> None:
        """Do nothing: the store holds no resources."""

    # -- steps

    @contextmanager
    def _translated(self, action: str) -> Iterator[None]:
        """Translate OSErrors; a missing file may mean that its file system is not mounted."""
        try:
            yield
        except FileNotFoundError as exc:
            self._mount.check()
            raise NotFound(f"{action} {self.location}: not found") from exc
        except NotADirectoryError as exc:
            self._mount.check()
            raise from_os_error(exc, f"{action} {self.location}") from exc
        except OSError as exc:
            raise from_os_error(exc, f"{action} {self.location}") from exc

    def _publish(self, files: Sequence[tuple[str, bytes]], rename: _Rename) -> None:
        """Create the files (path, content): `os.rename` replaces existing ones, `_rename_new` fails on them."""
        try:
            self._publish_once(files, rename)
        except FileNotFoundError:  # a directory was removed after this process had made it
            self._made.clear()
            self._publish_once(files, rename)

    def _publish_once(self, files: Sequence[tuple[str, bytes]], rename: _Rename) -> None:
        self._mount.check()
        self._tidy()
        self._make(f"{self.location}/{_STAGING}")
        batch = secrets.token_hex(12)
        staged = [f"{self.location}/{_STAGING}/{batch}-{number}" for number in range(len(files))]
        try:
            for temporary, (_, data) in zip(staged, files, strict=True):
                _write(temporary, data)
            self._sync(staged)
            for temporary, (path, _) in zip(staged, files, strict=True):
                self._make(os.path.dirname(path))
                rename(temporary, path)
            self._sync(list({os.path.dirname(path) for path, _ in files}))
            self._mount.mark()
        except BaseException:
            for temporary in staged:
                _remove(temporary)
            raise

    def _make(self, directory: str) -> None:
        if directory not in self._made:
            os.makedirs(directory, exist_ok=True)
            self._made.add(directory)

    def _sync(self, paths: Sequence[str]) -> None:
        """Sync files, or directories and their parents, so that contents and names survive a power cut."""
        if len(paths) > _MAX_FSYNCS:
            _with_open(self.location, kernel.syncfs)
            return
        for path in paths:
            _with_open(path, os.fsync)
            while os.path.isdir(path) and path != self.location:
                path = os.path.dirname(path)
                _with_open(path, os.fsync)

    def _tidy(self) -> None:
        """Remove the files that crashed writers have left in staging; once per process."""
        if self._is_tidied:
            return
        self._is_tidied = True
        before_s = time.time() - _STALE_S
        try:
            with os.scandir(f"{self.location}/{_STAGING}") as entries:
                stale = [entry.path for entry in entries if entry.stat(follow_symlinks=False).st_mtime < before_s]
        except FileNotFoundError:
            return
        for path in stale:
            _remove(path)

    def _path(self, digest: bytes) -> str:
        return f"{self.location}/{blob_name(digest)}"

    def _version_path(self, name: str, version: int) -> str:
        return f"{self.location}/{version_name(name, version)}"


class MountCheck:
    """Detects that the file system of a remote's directory is not mounted.

    Files written to the bare mount point would be on the local disk, hidden from all other nodes, and reads would find
    nothing. So the directory is never created, and a directory that has held blobs and is empty counts as not mounted.
    """

    def __init__(self, path: Path, markers: Path | None = None) -> None:
        """
        Args:
            path: The directory.
            markers: A local directory for the marker file of remotes that have held blobs. None: record that
                in memory only.
        """
        self._path = path
        self._marker = None if markers is None else markers / hashlib.sha256(os.fsencode(path)).hexdigest()
        self._is_marked = False

    def check(self) -> None:
        """Check that the directory is mounted.

        Raises:
            Unavailable: Its file system is not mounted, or the directory of a new remote does not exist.
        """
        try:
            if any((self._path / name).is_dir() for name in _DATA_DIRECTORIES):
                self.mark()
                return
            exists = self._path.is_dir()
        except OSError as exc:
            raise from_os_error(exc, f"look at {self._path}") from exc
        if not exists:
            raise Unavailable(
                f"{self._path} does not exist: mount its file system, or create the directory for a new remote"
            )
        if self._is_marked or (self._marker is not None and self._marker.exists()):
            raise Unavailable(
                f"{self._path} held objects and is empty: mount its file system; to start a new remote here, "
                f"create {self._path / _DATA_DIRECTORIES[0]}"
            )

    def mark(self) -> None:
        """Record that the directory holds blobs; if the marker cannot be written, only this process remembers it."""
        if self._is_marked:
            return
        self._is_marked = True
        if self._marker is not None:
            try:
                self._marker.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._marker.touch()
            except OSError:
                pass


def _exists(path: str) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return False
    return True


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, _CREATE, 0o644)
    try:
        write_all(fd, data)
    finally:
        os.close(fd)


def _rename_new(temporary: str, path: str) -> None:
    """Rename, but fail with FileExistsError instead of replacing a file."""
    os.link(temporary, path)
    os.unlink(temporary)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # it is already removed, or a later run removes it


def _with_open(path: str, call: Callable[[int], None]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        call(fd)
    finally:
        os.close(fd)
