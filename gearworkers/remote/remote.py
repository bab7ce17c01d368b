"""A remote: contents and documents over a store of blobs; every content is verified on its way in and out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence

import structlog

from gearworkers.cas.store import verify_file
from gearworkers.errors import AlreadyExists, IntegrityError, InvalidInput, NotFound, from_os_error
from gearworkers.fetch.source import BytesOrLayout, Chunk
from gearworkers.remote import chunk_transfer, encoding
from gearworkers.remote.blobstore import MAX_DOCUMENT_BYTES, BlobStore, Document, checked_document_name

_log = structlog.get_logger(__name__)

_PUT_BATCH_BYTES = 4 << 20
_REPLACE_ATTEMPTS = 20


class Remote:
    """Keeps objects and documents for all nodes; a `fetch.source.ObjectSource`. Any thread may call its methods.

    Puts are idempotent. An object is visible only when whole, and durable when the call that put it has returned.
    """

    def __init__(self, blobs: BlobStore) -> None:
        self.blobs = blobs

    # -- putting

    def has(self, digests: Sequence[bytes]) -> list[bytes]:
        """Return the *digests* that are present, in their order."""
        present = self.blobs.present(digests)
        return [digest for digest in digests if digest in present]

    def put(self, digest: bytes, source_fd: int) -> None:
        """Store all bytes of *source_fd*; its offset does not move.

        Raises:
            IntegrityError: Its SHA-256 is not *digest*; nothing is visible.
            Unavailable: The store does not answer, after bounded retries.

        Crash: may leave chunks that no layout names; the next put uses them.
        """
        if self.blobs.present([digest]):
            return
        verify_file(source_fd, digest)
        if os.fstat(source_fd).st_size < encoding.LARGE_BYTES:
            self.blobs.put_many([(digest, encoding.encode(_read_all(source_fd)))])
            return
        layout = list(chunk_transfer.put_chunks(self.blobs, source_fd))
        self.blobs.put_many([(digest, encoding.encode_layout(digest, layout))])

    def put_many(self, contents: Iterable[tuple[bytes, bytes]]) -> int:
        """Store each (digest, content) that is absent, and return their number; for contents up to LARGE_BYTES.

        Raises:
            IntegrityError: The SHA-256 of a content is not its digest.
            InvalidInput: A content is too large.
        """
        new = 0
        for batch in chunk_transfer.batches(contents, lambda item: len(item[1]), _PUT_BATCH_BYTES):
            blobs = [
                (digest, _verified_blob(digest, content))
                for digest, content in chunk_transfer.absent(self.blobs, batch)
            ]
            if blobs:
                self.blobs.put_many(blobs)
            new += len(blobs)
        return new

    # -- fetching

    def size_bytes(self, digest: bytes) -> int:
        """Return the object's size.

        Raises:
            NotFound: The remote lacks the object.
        """
        blob = self.blobs.get(digest)
        if encoding.is_layout(blob):
            return encoding.object_size(digest, blob)
        return len(encoding.decode(digest, blob))

    def fetch(self, digest: bytes) -> Iterator[bytes]:
        """Yield the object's bytes in pieces. Each piece is verified; the end verifies the whole.

        Raises:
            NotFound: The remote lacks the object.
            IntegrityError: The remote holds another content under the digest.
            Unavailable: The store does not answer, after bounded retries.
        """
        blob = self.blobs.get(digest)
        if not encoding.is_layout(blob):
            yield encoding.decode(digest, blob)
            return
        hasher = hashlib.sha256()
        for _, data in self.fetch_chunks(encoding.iter_layout(digest, blob)):
            hasher.update(data)
            yield data
        if hasher.digest() != digest:
            raise IntegrityError(f"object {digest.hex()}: its chunks have SHA-256 {hasher.hexdigest()}")

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, BytesOrLayout]]:
        """Yield (digest, verified content or layout) of the present objects; log and skip damaged ones."""
        for digest, blob in self.blobs.get_many(digests):
            try:
                yield (
                    digest,
                    encoding.decode_layout(digest, blob) if encoding.is_layout(blob) else encoding.decode(digest, blob),
                )
            except IntegrityError as exc:
                _log.error("a remote returned wrong bytes", error=str(exc))

    def layout(self, digest: bytes) -> list[Chunk] | None:
        """Return the chunks of an object in order of offset; None if it is stored whole or absent."""
        try:
            blob = self.blobs.get(digest)
        except NotFound:
            return None
        return encoding.decode_layout(digest, blob) if encoding.is_layout(blob) else None

    def chunk(self, digest: bytes) -> bytes:
        """Return one verified chunk, by its own digest.

        Raises:
            NotFound, IntegrityError, Unavailable: As `fetch`.
        """
        return encoding.decode(digest, self.blobs.get(digest))

    def fetch_chunks(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, bytes]]:
        """Yield each chunk with its verified bytes, in order; a few windows of chunks are in memory at a time.

        Raises:
            NotFound, IntegrityError, Unavailable: As `fetch`.
        """
        return chunk_transfer.fetch_chunks(self.blobs, chunks)

    def close(self) -> None:
        """Release connections and threads; no call may follow."""
        self.blobs.close()

    # -- documents

    def document(self, name: str) -> bytes | None:
        """Return the document's current content; None if there is no such document.

        Raises:
            InvalidInput: The name is invalid.
        """
        found = self.get_document(name)
        return None if found is None else found.data

    def get_document(self, name: str) -> Document | None:
        """Return the document's current content and version; else as `document`."""
        return self.blobs.get_document(checked_document_name(name))

    def put_document(self, name: str, data: bytes) -> None:
        """Replace the document's content, whatever its version; atomic and durable, the last writer wins.

        Raises:
            InvalidInput: The name or the size is invalid.
        """
        for _ in range(_REPLACE_ATTEMPTS):
            found = self.get_document(name)
            try:
                self.replace_document(name, data, found.version if found else 0)
                return
            except AlreadyExists:
                continue
        raise AlreadyExists(f"document {name}: others kept replacing it")

    def replace_document(self, name: str, data: bytes, version: int) -> None:
        """Replace the document's content if *version* is its current version; 0 for a new document.

        Raises:
            AlreadyExists: Another writer has replaced it meanwhile.
            InvalidInput: As `put_document`.
        """
        if len(data) > MAX_DOCUMENT_BYTES:
            raise InvalidInput(f"document {name}: {len(data)} bytes exceed the maximum of {MAX_DOCUMENT_BYTES}")
        self.blobs.put_document(checked_document_name(name), Document(data, version + 1))


def _verified_blob(digest: bytes, content: bytes) -> bytes:
    if len(content) > encoding.LARGE_BYTES:
        raise InvalidInput(f"object {digest.hex()}: {len(content)} bytes are too many for put_many")
    if hashlib.sha256(content).digest() != digest:
        raise IntegrityError(f"object {digest.hex()}: its bytes have SHA-256 {hashlib.sha256(content).hexdigest()}")
    return encoding.encode(content)


def _read_all(fd: int) -> bytes:
    parts = []
    offset = 0
    try:
        while part := os.pread(fd, encoding.LARGE_BYTES, offset):
            parts.append(part)
            offset += len(part)
    except OSError as exc:
        raise from_os_error(exc, "read an object") from exc
    return b"".join(parts)
