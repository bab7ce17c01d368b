"""A store that retries failed calls."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from gearworkers.errors import GearError
from gearworkers.remote.blobstore import BlobStore, Document
from gearworkers.util.retry import retried


class RetryingStore:
    """A `BlobStore` that retries retryable errors within the limits of `util.retry`; resumes interrupted streams."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    @retried
    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """Ask the store."""
        return self._blobs.present(digests)

    @retried
    def get(self, digest: bytes) -> bytes:
        """Ask the store."""
        return self._blobs.get(digest)

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Ask the store; after an error, only for the missing blobs. Each received blob resets the attempts."""
        missing = dict.fromkeys(digests)
        stream: Iterator[tuple[bytes, bytes]] | None = None

        @retried
        def advance() -> tuple[bytes, bytes] | None:
            nonlocal stream
            if stream is None:
                stream = self._blobs.get_many(list(missing)) if missing else iter(())
            try:
                return next(stream, None)
            except GearError:
                stream = None
                raise

        try:
            while (found := advance()) is not None:
                missing.pop(found[0], None)
                yield found
        finally:
            if isinstance(stream, Generator):
                stream.close()

    @retried
    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """Put them into the store."""
        self._blobs.put_many(blobs)

    @retried
    def get_document(self, name: str) -> Document | None:
        """Ask the store."""
        return self._blobs.get_document(name)

    @retried
    def put_document(self, name: str, document: Document) -> None:
        """Put it into the store; AlreadyExists may mean that an earlier attempt succeeded."""
        self._blobs.put_document(name, document)

    def close(self) -> None:
        """Close the store."""
        self._blobs.close()
