"""Many small puts become a few large ones: for who needs to know only at the end that all is durable."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from gearworkers.errors import GearError
from gearworkers.remote import encoding
from gearworkers.remote.blobstore import BlobStore, Document


class Gathered:
    """A `BlobStore` whose puts are visible and durable only after `flush`; what waits is bounded in bytes.

    Layouts are put when all contents before them are there, so none is ever seen without its chunks.
    """

    def __init__(self, blobs: BlobStore, *, most_bytes: int) -> None:
        """
        Args:
            blobs: Where they go.
            most_bytes: When more wait, whoever puts flushes; others who put wait for it.
        """
        self._blobs = blobs
        self._most_bytes = most_bytes
        self._waiting: dict[bytes, bytes] = {}
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._broken: GearError | None = None

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """Those that wait, too."""
        with self._lock:
            waiting = {digest for digest in digests if digest in self._waiting}
        others = [digest for digest in digests if digest not in waiting]
        return waiting | self._blobs.present(others) if others else waiting

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """Have them wait."""
        with self._lock:
            for digest, blob in blobs:
                if digest not in self._waiting:
                    self._waiting[digest] = blob
                    self._waiting_bytes += len(blob)
            is_full = self._waiting_bytes > self._most_bytes
        if is_full:
            self.flush()

    def flush(self) -> None:
        """Put all that waits; after an error nothing is put any more."""
        with self._flushing:
            if self._broken is not None:
                raise self._broken
            with self._lock:
                waiting, self._waiting, self._waiting_bytes = self._waiting, {}, 0
            layouts = [(digest, blob) for digest, blob in waiting.items() if encoding.is_layout(blob)]
            contents = [(digest, blob) for digest, blob in waiting.items() if not encoding.is_layout(blob)]
            try:
                for part in (contents, layouts):
                    if part:
                        self._blobs.put_many(part)
            except GearError as exc:
                self._broken = exc
                raise

    def get(self, digest: bytes) -> bytes:
        """As the store's."""
        return self._blobs.get(digest)

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """As the store's."""
        return self._blobs.get_many(digests)

    def get_document(self, name: str) -> Document | None:
        """As the store's."""
        return self._blobs.get_document(name)

    def put_document(self, name: str, document: Document) -> None:
        """As the store's, at once."""
        self._blobs.put_document(name, document)

    def close(self) -> None:
        """The store is somebody else's."""
