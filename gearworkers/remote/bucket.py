"""Blobs in S3 or in memory, through obstore.

Keys: `blob_name` for blobs, `documents.version_name` for documents.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import obstore
from obstore import exceptions as foreign
from obstore.store import MemoryStore
from obstore.store import ObjectStore as Obstore

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
from gearworkers.remote.documents import directory_name, newest_version, put_version, version_name, versions_among


class BucketStore:
    """A `BlobStore` over a store of obstore; it neither retries nor limits the time of a call."""

    _used_by = 0

    def __init__(self, location: str, store: Obstore) -> None:
        """
        Args:
            location: Its name in errors.
            store: A store of obstore.
        """
        self.location = location
        self._unchecked_store = store

    # -- blobs

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """Send a HEAD for each."""
        found = set()
        for digest in digests:
            try:
                with self._translated(f"look for {digest.hex()} in"):
                    obstore.head(self._store(), blob_name(digest))
            except NotFound:
                continue
            found.add(digest)
        return found

    def get(self, digest: bytes) -> bytes:
        """Send a GET."""
        with self._translated(f"get {digest.hex()} from"):
            return obstore.get(self._store(), blob_name(digest)).bytes().to_bytes()

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Get one after the other."""
        for digest in digests:
            try:
                yield digest, self.get(digest)
            except NotFound:
                continue

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """Put one after the other."""
        with self._translated(f"put {len(blobs)} blobs into", not_found="the bucket does not exist"):
            for digest, blob in blobs:
                obstore.put(self._store(), blob_name(digest), blob)

    # -- documents

    def get_document(self, name: str) -> Document | None:
        """List the versions, then get the newest."""
        return newest_version(self, name)

    def put_document(self, name: str, document: Document) -> None:
        """List the versions, create the new one, delete old ones."""
        put_version(self, name, document)

    def versions(self, name: str) -> list[int]:
        """Send a list request."""
        with self._translated(f"list document {name} of"):
            found = obstore.list_with_delimiter(self._store(), directory_name(name))["objects"]
        return versions_among(item["path"].rpartition("/")[2] for item in found)

    def read_version(self, name: str, version: int) -> bytes:
        """Send a GET."""
        with self._translated(f"get document {name} from"):
            return obstore.get(self._store(), version_name(name, version)).bytes().to_bytes()

    def create_version(self, name: str, document: Document) -> None:
        """Send a conditional PUT."""
        with self._translated(f"put document {name} into"):
            obstore.put(self._store(), version_name(name, document.version), document.data, mode="create")

    def remove_version(self, name: str, version: int) -> None:
        """Send a DELETE."""
        try:
            obstore.delete(self._store(), version_name(name, version))
        except (foreign.BaseError, OSError):
            pass  # it is already removed, or the next put removes it

    def close(self) -> None:
        """Do nothing: obstore's connections end with the object."""

    # -- the store

    def _translated(self, action: str, not_found: str = "not found") -> AbstractContextManager[None]:
        return translated(f"{action} {self.location}", not_found)

    def _store(self) -> Obstore:
        """Return obstore's store.

        Raises:
            FailedPrecondition: An ancestor of this process used obstore before the fork. The threads of obstore do not
                exist in this process, so a call would never return.
        """
        if BucketStore._used_by not in (0, os.getpid()):
            raise FailedPrecondition(
                f"{self.location}: process {BucketStore._used_by} used obstore before this one was forked"
            )
        BucketStore._used_by = os.getpid()
        return self._unchecked_store


def memory_store() -> BucketStore:
    """Return a store that ends with the process."""
    return BucketStore("memory", MemoryStore())


@contextmanager
def translated(tried: str, not_found: str = "not found") -> Iterator[None]:
    """Translate the errors of obstore that the context raises.

    Args:
        tried: The attempted call, the first half of the message.
        not_found: The meaning of "not found" for this call.
    """
    try:
        yield
    except FileNotFoundError as exc:
        raise NotFound(f"{tried}: {not_found}") from exc
    except OSError as exc:
        raise from_os_error(exc, tried) from exc
    except foreign.BaseError as exc:
        raise _from_obstore_error(exc, tried) from exc


def _from_obstore_error(exc: foreign.BaseError, tried: str) -> GearError:
    """Return our error with the message of the store, without its debug output."""
    message, _, _ = str(exc).partition("\n")
    text = f"{tried}: {message}"
    if isinstance(exc, foreign.AlreadyExistsError | foreign.PreconditionError):
        return AlreadyExists(text)
    if isinstance(exc, foreign.NotFoundError):
        return NotFound(text)
    if isinstance(exc, foreign.PermissionDeniedError | foreign.UnauthenticatedError):
        return FailedPrecondition(f"{text}; check the credentials")
    if isinstance(exc, foreign.InvalidPathError | foreign.NotSupportedError | foreign.UnknownConfigurationKeyError):
        return InvalidInput(text)
    return Unavailable(text)
