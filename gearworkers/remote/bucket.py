"""Blobs in S3 or in memory: what obstore reaches.

Keys: `blob_name` for blobs, `versions.version_name` for documents.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
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
from gearworkers.remote.blobstore import Document, blob_name
from gearworkers.remote.documents import directory_name, newest, put_version, version_name, versions_among


class Bucket:
    """A `BlobStore` over one of obstore's stores; tries once, waits as long as it takes: for decorators to better."""

    _used_by = 0

    def __init__(self, name: str, store: ObjectStore) -> None:
        """
        Args:
            name: What errors call it.
            store: Of obstore's.
        """
        self.where = name
        self._unchecked_store = store

    # -- blobs

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """One HEAD each."""
        found = set()
        for digest in digests:
            try:
                with self._asked(f"look for {digest.hex()} in"):
                    obstore.head(self._store(), blob_name(digest))
            except NotFound:
                continue
            found.add(digest)
        return found

    def get(self, digest: bytes) -> bytes:
        """One GET."""
        with self._asked(f"get {digest.hex()} from"):
            return obstore.get(self._store(), blob_name(digest)).bytes().to_bytes()

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """One after the other."""
        for digest in digests:
            try:
                yield digest, self.get(digest)
            except NotFound:
                continue

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """One after the other."""
        with self._asked(f"put {len(blobs)} blobs into", missing="there is no such bucket"):
            for digest, blob in blobs:
                obstore.put(self._store(), blob_name(digest), blob)

    # -- documents

    def get_document(self, name: str) -> Document | None:
        """List, then get the newest."""
        return newest(self, name)

    def put_document(self, name: str, document: Document) -> None:
        """List, create, delete what is too old."""
        put_version(self, name, document)

    def versions(self, name: str) -> list[int]:
        """One listing."""
        with self._asked(f"list document {name} of"):
            found = obstore.list_with_delimiter(self._store(), directory_name(name))["objects"]
        return versions_among(item["path"].rpartition("/")[2] for item in found)

    def read_version(self, name: str, version: int) -> bytes:
        """One GET."""
        with self._asked(f"get document {name} from"):
            return obstore.get(self._store(), version_name(name, version)).bytes().to_bytes()

    def create_version(self, name: str, document: Document) -> None:
        """One conditional PUT."""
        with self._asked(f"put document {name} into"):
            obstore.put(self._store(), version_name(name, document.version), document.data, mode="create")

    def remove_version(self, name: str, version: int) -> None:
        """One DELETE."""
        try:
            obstore.delete(self._store(), version_name(name, version))
        except (foreign.BaseError, OSError):
            pass  # it is gone, or it is garbage

    def close(self) -> None:
        """Nothing is held: obstore's connections end with the object."""

    # -- the store

    def _asked(self, tried: str, missing: str = "it is not there") -> AbstractContextManager[None]:
        """Around what is asked of obstore."""
        return translated(f"{tried} {self.where}", missing)

    def _store(self) -> ObjectStore:
        """
        Raises:
            FailedPrecondition: This process was forked from one that had used obstore, whose threads it lacks: it
                would wait for ever.
        """
        if Bucket._used_by not in (0, os.getpid()):
            raise FailedPrecondition(f"{self.where}: process {Bucket._used_by} used it before this one was forked")
        Bucket._used_by = os.getpid()
        return self._unchecked_store


def in_memory() -> Bucket:
    """A store that ends with the process."""
    return Bucket("memory", MemoryStore())


@contextmanager
def translated(tried: str, missing: str = "it is not there") -> Iterator[None]:
    """Tell obstore's errors in ours; *missing* is what it means that something is not found."""
    try:
        yield
    except FileNotFoundError as exc:
        raise NotFound(f"{tried}: {missing}") from exc
    except OSError as exc:
        raise from_os_error(exc, tried) from exc
    except foreign.BaseError as exc:
        raise _in_our_words(exc, tried) from exc


def _in_our_words(exc: foreign.BaseError, tried: str) -> GearError:
    """What the store said, without its debug print."""
    said, _, _ = str(exc).partition("\n")
    text = f"{tried}: {said}"
    if isinstance(exc, foreign.AlreadyExistsError | foreign.PreconditionError):
        return AlreadyExists(text)
    if isinstance(exc, foreign.NotFoundError):
        return NotFound(text)
    if isinstance(exc, foreign.PermissionDeniedError | foreign.UnauthenticatedError):
        return FailedPrecondition(f"{text}; see to the credentials")
    if isinstance(exc, foreign.InvalidPathError | foreign.NotSupportedError | foreign.UnknownConfigurationKeyError):
        return InvalidInput(text)
    return Unavailable(text)
