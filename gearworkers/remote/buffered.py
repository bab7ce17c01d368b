"""A store that turns many small puts into a few large ones."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

from gearworkers.errors import GearError
from gearworkers.remote import encoding
from gearworkers.remote.blobstore import BlobStore, Document


class BufferedStore:
    """A `BlobStore` whose puts are visible and durable only after `flush`, for callers that need that only at the end.

    The buffer is limited in bytes. Layouts are put after all contents that were put before them, so a visible layout
    never lacks its chunks.
    """

    def __init__(self, blobs: BlobStore, *, buffer_bytes: int) -> None:
        """
        Args:
            blobs: Stores the flushed blobs.
            buffer_bytes: A put that fills the buffer beyond this size flushes it.
        """
        self._blobs = blobs
        self._max_bytes = buffer_bytes
        self._buffer: dict[bytes, bytes] = {}
        self._buffered_bytes = 0
        self._lock = threading.Lock()
        self._flushing = threading.Lock()
        self._failure: GearError | None = None

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """Return the digests whose blobs are buffered or stored."""
        with self._lock:
            buffered = {digest for digest in digests if digest in self._buffer}
        others = [digest for digest in digests if digest not in buffered]
        return buffered | self._blobs.present(others) if others else buffered

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """Add them to the buffer; flush it if it is full."""
        with self._lock:
            for digest, blob in blobs:
                if digest not in self._buffer:
                    self._buffer[digest] = blob
                    self._buffered_bytes += len(blob)
            is_full = self._buffered_bytes > self._max_bytes
        if is_full:
            self.flush()

    def flush(self) -> None:
        """Put all buffered blobs into the store; after an error all later flushes fail as well."""
        with self._flushing:
            if self._failure is not None:
                raise self._failure
            with self._lock:
                buffer, self._buffer, self._buffered_bytes = self._buffer, {}, 0
            layouts = [(digest, blob) for digest, blob in buffer.items() if encoding.is_layout(blob)]
            contents = [(digest, blob) for digest, blob in buffer.items() if not encoding.is_layout(blob)]
            try:
                for part in (contents, layouts):
                    if part:
                        self._blobs.put_many(part)
            except GearError as exc:
                self._failure = exc
                raise

    def get(self, digest: bytes) -> bytes:
        """Ask the store."""
        return self._blobs.get(digest)

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Ask the store."""
        return self._blobs.get_many(digests)

    def get_document(self, name: str) -> Document | None:
        """Ask the store."""
        return self._blobs.get_document(name)

    def put_document(self, name: str, document: Document) -> None:
        """Put it into the store at once."""
        self._blobs.put_document(name, document)

    def close(self) -> None:
        """Leave the store open: it belongs to the caller."""
