"""Blobs in a directory, in S3 or in memory: all that obstore can reach.

Keys: ``objects/ab/abcd…`` (SHA-256 in hex) for blobs, ``documents/<name>/@<version>`` for documents, ``staging/…``.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import obstore
from obstore import exceptions as foreign
from obstore.store import LocalStore, MemoryStore, ObjectStore

from gearworkers.errors import (
    AlreadyExists,
    FailedPrecondition,
    GearError,
    InvalidInput,
    NotFound,
    Unavailable,
    from_os_error,
)
from gearworkers.mounts import sys as kernel
from gearworkers.objects.remotes.blobs import Document
from gearworkers.objects.remotes.root import Root

_STAGING = "staging"
_LEFT_BEHIND = timedelta(days=1)
_SYNC_EACH = 8
"""So many files are synced one by one; of more, the whole file system at once."""

_OS_ERROR = re.compile(r"\(os error (\d+)\)")

_Mode = Literal["create", "overwrite"]
_Item = tuple[str, bytes]


class Bucket:
    """A `BlobStore` over one of obstore's stores; tries once, waits as long as it takes: for decorators to better."""

    _used_by = 0

    def __init__(self, name: str, make_store: Callable[[], ObjectStore], root: Root | None = None) -> None:
        """
        Args:
            name: What errors call it.
            make_store: Called at first use, and again until it works: it may wait for a file system.
            root: Where the store lies, if it is a directory: its writes are synced before they have a name.
        """
        self._name = name
        self._make_store = make_store
        self._root = root
        self._made: ObjectStore | None = None
        self._tidied = root is None

    # -- blobs

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """One HEAD or stat each."""
        found = set()
        for digest in digests:
            try:
                with self._asked(f"look for {digest.hex()} in"):
                    obstore.head(self._store(), _key(digest))
            except NotFound:
                continue
            found.add(digest)
        return found

    def get(self, digest: bytes) -> bytes:
        """One GET or read."""
        with self._asked(f"get {digest.hex()} from"):
            return obstore.get(self._store(), _key(digest)).bytes().to_bytes()

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """One after the other."""
        for digest in digests:
            try:
                yield digest, self.get(digest)
            except NotFound:
                continue

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """One after the other; in a directory they are synced together."""
        with self._asked(f"put {len(blobs)} blobs into"):
            self._place([(_key(digest), blob) for digest, blob in blobs], "overwrite")

    # -- documents

    def get_document(self, name: str) -> Document | None:
        """List, then get the newest."""
        while True:
            version = max(self._versions(name), default=0)
            if not version:
                return None
            try:
                with self._asked(f"get document {name} from"):
                    data = obstore.get(self._store(), _document_key(name, version)).bytes().to_bytes()
            except NotFound:
                continue  # replaced twice since it was listed
            return Document(data, version)

    def put_document(self, name: str, document: Document) -> None:
        """Create, then remove what is older than the version before: somebody may be about to read that.

        Crash: may leave older versions, which the next put removes.
        """
        versions = self._versions(name)
        if any(version >= document.version for version in versions):
            raise AlreadyExists(f"document {name} of {self._name} has version {max(versions)} already")
        with self._asked(f"put document {name} into"):
            self._place([(_document_key(name, document.version), document.data)], "create")
            for version in versions:
                if version < document.version - 1:
                    self._delete(_document_key(name, version))

    def close(self) -> None:
        """Nothing is held: obstore's connections end with the object."""
        self._made = None

    def _versions(self, name: str) -> list[int]:
        with self._asked(f"list document {name} of"):
            found = obstore.list_with_delimiter(self._store(), f"documents/{name}")["objects"]
        last = [item["path"].rpartition("/")[2] for item in found]
        return [int(part[1:]) for part in last if part[:1] == "@" and part[1:].isdigit()]

    # -- the store

    @contextmanager
    def _asked(self, tried: str) -> Iterator[None]:
        """Around what is asked of obstore; what is not to be found may be away with its whole file system."""
        try:
            with translated(f"{tried} {self._name}"):
                yield
        except NotFound:
            if self._root is not None:
                self._root.check()
            raise

    def _store(self) -> ObjectStore:
        """Made when first needed.

        Raises:
            FailedPrecondition: This process was forked from one that had used obstore, whose threads it lacks: it
                would wait for ever.
        """
        if Bucket._used_by not in (0, os.getpid()):
            raise FailedPrecondition(f"{self._name}: process {Bucket._used_by} used it before this one was forked")
        Bucket._used_by = os.getpid()
        if self._made is None:
            self._made = self._make_store()
        return self._made

    def _place(self, items: Sequence[_Item], mode: _Mode) -> None:
        """Give bytes their names. In a directory: temporary files, sync, rename, sync the names."""
        if self._root is None:
            for key, data in items:
                obstore.put(self._store(), key, data, mode=mode)
            return
        self._root.check()
        self._tidy()
        staged = [(f"{_STAGING}/{secrets.token_hex(12)}", key) for key, _ in items]
        try:
            for (temporary, _), (_, data) in zip(staged, items, strict=True):
                obstore.put(self._store(), temporary, data)
            _sync(self._root.path, [temporary for temporary, _ in staged])
            for temporary, key in staged:
                obstore.rename(self._store(), temporary, key, overwrite=mode == "overwrite")
            _sync(self._root.path, list({os.path.dirname(key) for _, key in staged}))
            self._root.note()
        except BaseException:
            for temporary, _ in staged:
                self._delete(temporary)
            raise

    def _delete(self, key: str) -> None:
        try:
            obstore.delete(self._store(), key)
        except (foreign.BaseError, OSError):
            pass  # it is gone, or it is garbage

    def _tidy(self) -> None:
        """Once, remove what crashed writers have left in staging."""
        if self._tidied:
            return
        self._tidied = True
        before = datetime.now(UTC) - _LEFT_BEHIND
        for items in obstore.list(self._store(), prefix=_STAGING):
            for item in items:
                if item["last_modified"] < before:
                    self._delete(item["path"])


def in_memory() -> Bucket:
    """A store that ends with the process."""
    return Bucket("memory", MemoryStore)


def in_directory(path: Path, notes: Path | None = None) -> Bucket:
    """A directory, local or on NFS; see `Root` for one that is not there."""
    root = Root(path, notes)

    def made() -> ObjectStore:
        root.check()
        return LocalStore(path)

    return Bucket(str(path), made, root)


def _key(digest: bytes) -> str:
    name = digest.hex()
    return f"objects/{name[:2]}/{name}"


def _document_key(name: str, version: int) -> str:
    return f"documents/{name}/@{version:010d}"


def _sync(root: Path, keys: Sequence[str]) -> None:
    """Have files, or directories with the names in them and above, survive a power cut."""
    if len(keys) > _SYNC_EACH:
        _with_open(root, kernel.syncfs)
        return
    for key in keys:
        path = root / key
        while path != root.parent:
            _with_open(path, os.fsync)
            if path.is_file():
                break
            path = path.parent


def _with_open(path: Path, call: Callable[[int], None]) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        call(fd)
    finally:
        os.close(fd)


@contextmanager
def translated(tried: str) -> Iterator[None]:
    """Tell obstore's errors in ours."""
    try:
        yield
    except GearError:
        raise
    except FileNotFoundError as exc:
        raise NotFound(f"{tried}: it is not there") from exc
    except OSError as exc:
        raise from_os_error(exc, tried) from exc
    except foreign.BaseError as exc:
        raise _in_our_words(exc, tried) from exc


def _in_our_words(exc: foreign.BaseError, tried: str) -> GearError:
    """What the store said, without its debug print; a directory's errors have their errno in the text only."""
    said = str(exc).partition("\n")[0]
    text = f"{tried}: {said}"
    if isinstance(exc, foreign.AlreadyExistsError | foreign.PreconditionError):
        return AlreadyExists(text)
    if isinstance(exc, foreign.NotFoundError):
        return NotFound(text)
    if isinstance(exc, foreign.PermissionDeniedError | foreign.UnauthenticatedError):
        return FailedPrecondition(f"{text}; see to the credentials")
    if isinstance(exc, foreign.InvalidPathError | foreign.NotSupportedError | foreign.UnknownConfigurationKeyError):
        return InvalidInput(text)
    by_kernel = _OS_ERROR.search(said)
    if by_kernel:
        return from_os_error(OSError(int(by_kernel[1]), ""), tried)
    return Unavailable(text)
