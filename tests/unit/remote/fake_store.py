"""A store of blobs for tests of decorators."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence

from gearworkers.errors import GearError, NotFound, Unavailable
from gearworkers.remote import encoding
from gearworkers.remote.blobstore import Document


class FakeStore:
    """A `BlobStore` in memory that records its calls and fails or hangs on demand."""

    def __init__(self) -> None:
        self.stored: dict[bytes, bytes] = {}
        self.documents: dict[str, Document] = {}
        self.errors: list[GearError] = []
        self.break_after: int | None = None
        self.calls: list[list[bytes]] = []
        self.running = self.max_running = 0
        self.lock = threading.Lock()
        self.hang: threading.Event | None = None

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        self._record(digests)
        return {digest for digest in digests if digest in self.stored}

    def get(self, digest: bytes) -> bytes:
        self._record([digest])
        if digest not in self.stored:
            raise NotFound(digest.hex())
        return self.stored[digest]

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        self._record(digests)
        for number, digest in enumerate(digests):
            if number == self.break_after:
                raise Unavailable("interrupted")
            if digest in self.stored:
                yield digest, self.stored[digest]

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        self._record([digest for digest, _ in blobs])
        self.stored.update(blobs)

    def get_document(self, name: str) -> Document | None:
        self._record([])
        return self.documents.get(name)

    def put_document(self, name: str, document: Document) -> None:
        self._record([])
        self.documents[name] = document

    def close(self) -> None:
        pass

    def _record(self, digests: Sequence[bytes]) -> None:
        with self.lock:
            self.calls.append(list(digests))
            self.running += 1
            self.max_running = max(self.max_running, self.running)
            error = self.errors.pop(0) if self.errors else None
        if self.hang is not None:
            self.hang.wait(60)
        with self.lock:
            self.running -= 1
        if error is not None:
            raise error


def blobs(count: int) -> dict[bytes, bytes]:
    """Return the blobs of *count* different contents, by digest."""
    contents = [b"content %d" % number for number in range(count)]
    return {hashlib.sha256(content).digest(): encoding.encode(content) for content in contents}
