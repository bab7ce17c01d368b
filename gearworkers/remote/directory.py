"""Blobs in a directory, local or on NFS, by plain system calls: a conversion makes thousands of files in a second.

Paths: `blob_name` for blobs, `versions.version_name` for documents, as the keys of a bucket; ``staging/…``.

Order of writes: temporary files, sync, names, sync of the names; so neither a crash nor a power cut shows a blob in
part.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gearworkers.errors import NotFound, from_os_error
from gearworkers.remote.blobstore import Document, blob_name
from gearworkers.remote.directory_root import Root
from gearworkers.remote.documents import directory_name, newest, put_version, version_name, versions_among
from gearworkers.util import syscalls as kernel
from gearworkers.util.writing import write_all

_STAGING = "staging"
_LEFT_BEHIND_S = 24 * 3600
_SYNC_EACH = 8
"""So many files are synced one by one; of more, the whole file system at once."""
_Name = Callable[[str, str], None]
_CREATE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC


class Directory:
    """A `BlobStore` in a directory; tries once, waits as long as the file system does: for decorators to better."""

    def __init__(self, path: Path, notes: Path | None = None) -> None:
        """
        Args:
            path: Where it lies; it must be there (`Root`).
            notes: As `Root` takes it.
        """
        self._root = Root(path, notes)
        self.where = str(path)
        self._made: set[str] = set()
        self._tidied = False

    # -- blobs

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """One stat each."""
        with self._asked("look for blobs in"):
            found = {digest for digest in digests if _exists(self._path(digest))}
            if len(found) < len(digests):
                self._root.check()
        return found

    def get(self, digest: bytes) -> bytes:
        """One read."""
        with self._asked(f"get {digest.hex()} from"):
            return _read(self._path(digest))

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """One after the other."""
        for digest in digests:
            try:
                yield digest, self.get(digest)
            except NotFound:
                continue

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """Written, synced together, named, the names synced."""
        if not blobs:
            return
        with self._asked(f"put {len(blobs)} blobs into"):
            self._place([(self._path(digest), blob) for digest, blob in blobs], os.rename)

    # -- documents

    def get_document(self, name: str) -> Document | None:
        """List, then read the newest."""
        return newest(self, name)

    def put_document(self, name: str, document: Document) -> None:
        """List, create, remove what is too old."""
        put_version(self, name, document)

    def versions(self, name: str) -> list[int]:
        """One listing."""
        with self._asked(f"list document {name} of"):
            try:
                return versions_among(os.listdir(f"{self.where}/{directory_name(name)}"))
            except (FileNotFoundError, NotADirectoryError):
                self._root.check()
                return []

    def read_version(self, name: str, version: int) -> bytes:
        """One read."""
        with self._asked(f"get document {name} from"):
            return _read(self._version_path(name, version))

    def create_version(self, name: str, document: Document) -> None:
        """As a blob, but by link: never over another's."""
        with self._asked(f"put document {name} into"):
            self._place([(self._version_path(name, document.version), document.data)], _link)

    def remove_version(self, name: str, version: int) -> None:
        """One unlink."""
        _remove(self._version_path(name, version))

    def close(self) -> None:
        """Nothing is held."""

    # -- steps

    @contextmanager
    def _asked(self, tried: str) -> Iterator[None]:
        """What is not to be found may be away with its whole file system."""
        try:
            yield
        except FileNotFoundError as exc:
            self._root.check()
            raise NotFound(f"{tried} {self.where}: it is not there") from exc
        except NotADirectoryError as exc:
            self._root.check()
            raise from_os_error(exc, f"{tried} {self.where}") from exc
        except OSError as exc:
            raise from_os_error(exc, f"{tried} {self.where}") from exc

    def _place(self, items: Sequence[tuple[str, bytes]], name: _Name) -> None:
        """Give bytes their names, by rename or, if the name must be new, by link."""
        try:
            self._place_below_made(items, name)
        except FileNotFoundError:  # somebody removed a directory that was made
            self._made.clear()
            self._place_below_made(items, name)

    def _place_below_made(self, items: Sequence[tuple[str, bytes]], name: _Name) -> None:
        self._root.check()
        self._tidy()
        self._make(f"{self.where}/{_STAGING}")
        batch = secrets.token_hex(12)
        staged = [f"{self.where}/{_STAGING}/{batch}-{number}" for number in range(len(items))]
        try:
            for temporary, (_, data) in zip(staged, items, strict=True):
                _write(temporary, data)
            self._sync(staged)
            for temporary, (path, _) in zip(staged, items, strict=True):
                self._make(os.path.dirname(path))
                name(temporary, path)
            self._sync(list({os.path.dirname(path) for path, _ in items}))
            self._root.note()
        except BaseException:
            for temporary in staged:
                _remove(temporary)
            raise

    def _make(self, directory: str) -> None:
        if directory not in self._made:
            os.makedirs(directory, exist_ok=True)
            self._made.add(directory)

    def _sync(self, paths: Sequence[str]) -> None:
        """Have files, or directories with the names in them and above, survive a power cut."""
        if len(paths) > _SYNC_EACH:
            _with_open(self.where, kernel.syncfs)
            return
        for path in paths:
            _with_open(path, os.fsync)
            while os.path.isdir(path) and path != self.where:
                path = os.path.dirname(path)
                _with_open(path, os.fsync)

    def _tidy(self) -> None:
        """Once, remove what crashed writers have left in staging."""
        if self._tidied:
            return
        self._tidied = True
        before_s = time.time() - _LEFT_BEHIND_S
        try:
            with os.scandir(f"{self.where}/{_STAGING}") as entries:
                left = [entry.path for entry in entries if entry.stat(follow_symlinks=False).st_mtime < before_s]
        except FileNotFoundError:
            return
        for path in left:
            _remove(path)

    def _path(self, digest: bytes) -> str:
        return f"{self.where}/{blob_name(digest)}"

    def _version_path(self, name: str, version: int) -> str:
        return f"{self.where}/{version_name(name, version)}"


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


def _link(temporary: str, path: str) -> None:
    """As rename, but never over another's."""
    os.link(temporary, path)
    os.unlink(temporary)


def _remove(path: str) -> None:
    try:
        os.unlink(path)
    except OSError:
        pass  # it is gone, or it is garbage


def _with_open(path: str, call: Callable[[int], None]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        call(fd)
    finally:
        os.close(fd)
