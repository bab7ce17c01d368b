"""Blobs in S3 or in memory: what obstore reaches.

Keys: ``objects/ab/abcd…`` (SHA-256 in hex) for blobs, ``documents/<name>/@<version>`` for documents.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import obstore
from obstore import exceptions as foreign
from obstore.store import MemoryStore, ObjectStore

from gearworkers.errors import (
    AlreadyExists,
    FailedPrecondition,
    GearError,
    InvalidInput,
    NotFound,
    Unavailable,
    from_os_error,
)
from gearworkers.objects.remotes.blobs import Document

_OS_ERROR = re.compile(r"\(os error (\d+)\)")


class Bucket:
    """A `BlobStore` over one of obstore's stores; tries once, waits as long as it takes: for decorators to better."""

    _used_by = 0

    def __init__(self, name: str, make_store: Callable[[], ObjectStore]) -> None:
        """
        Args:
            name: What errors call it.
            make_store: Called at first use.
        """
        self._name = name
        self._make_store = make_store
        self._made: ObjectStore | None = None

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
        """One after the other."""
        with self._asked(f"put {len(blobs)} blobs into"):
            for digest, blob in blobs:
                obstore.put(self._store(), _key(digest), blob)

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
            obstore.put(self._store(), _document_key(name, document.version), document.data, mode="create")
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

    def _asked(self, tried: str) -> AbstractContextManager[None]:
        """Around what is asked of obstore."""
        return translated(f"{tried} {self._name}")

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

    def _delete(self, key: str) -> None:
        try:
            obstore.delete(self._store(), key)
        except (foreign.BaseError, OSError):
            pass  # it is gone, or it is garbage


def in_memory() -> Bucket:
    """A store that ends with the process."""
    return Bucket("memory", MemoryStore)


def _key(digest: bytes) -> str:
    name = digest.hex()
    return f"objects/{name[:2]}/{name}"


def _document_key(name: str, version: int) -> str:
    return f"documents/{name}/@{version:010d}"


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
