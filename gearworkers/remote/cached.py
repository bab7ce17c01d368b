"""A store with a cache in front of it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import structlog

from gearworkers.errors import GearError, IntegrityError
from gearworkers.remote import encoding
from gearworkers.remote.blobstore import BlobStore, Document

_log = structlog.get_logger(__name__)

CACHE_PAUSE_S = 30.0
"""Time for which a cache that has failed is not used."""


class CachedStore:
    """A `BlobStore` that reads from a cache first, and adds every blob that it gets or puts to the cache.

    The cache may fail or return wrong bytes. After a failure it is not used for `pause_s`, so only the first of many
    readers waits for it.
    """

    def __init__(self, cache: BlobStore, origin: BlobStore, *, pause_s: float = CACHE_PAUSE_S) -> None:
        self._cache = cache
        self._origin = origin
        self._pause_s = pause_s
        self._paused_until_s = 0.0

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """Ask the origin: the cache may be emptied at any time."""
        return self._origin.present(digests)

    def get(self, digest: bytes) -> bytes:
        """Return the cache's blob if it is valid, else the origin's."""
        found = self._from_cache([digest])
        if digest in found:
            return found[digest]
        blob = self._origin.get(digest)
        self._fill([(digest, blob)])
        return blob

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Yield the cache's valid blobs, then those of the origin."""
        found = self._from_cache(digests)
        missing = [digest for digest in digests if digest not in found]
        yield from found.items()
        found.clear()
        for digest, blob in self._origin.get_many(missing) if missing else ():
            self._fill([(digest, blob)])
            yield digest, blob

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """Put them into the origin, then into the cache."""
        self._origin.put_many(blobs)
        self._fill(blobs)

    def get_document(self, name: str) -> Document | None:
        """Ask the origin: documents change."""
        return self._origin.get_document(name)

    def put_document(self, name: str, document: Document) -> None:
        """Put it into the origin."""
        self._origin.put_document(name, document)

    def close(self) -> None:
        """Close both stores."""
        self._cache.close()
        self._origin.close()

    def _from_cache(self, digests: Sequence[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        if self._is_paused():
            return found
        try:
            for digest, blob in self._cache.get_many(digests):
                if _is_valid(digest, blob):
                    found[digest] = blob
        except GearError as exc:
            self._pause("the cache of the remote does not answer; reading from the remote", exc)
        return found

    def _fill(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        if self._is_paused():
            return
        valid = [(digest, blob) for digest, blob in blobs if _is_valid(digest, blob)]
        try:
            self._cache.put_many(valid)
        except GearError as exc:
            self._pause("the cache of the remote does not store a blob", exc)

    def _is_paused(self) -> bool:
        return time.monotonic() < self._paused_until_s

    def _pause(self, event: str, error: GearError) -> None:
        self._paused_until_s = time.monotonic() + self._pause_s
        _log.warning(event, error=str(error), pause_s=self._pause_s)


def _is_valid(digest: bytes, blob: bytes) -> bool:
    try:
        encoding.verify(digest, blob)
    except IntegrityError as exc:
        _log.error("a store returned wrong bytes", error=str(exc))
        return False
    return True
