"""A remote: contents and documents over a store of blobs; every content is verified, going in and coming out."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

import structlog

from gearworkers.cas.store import verify_file
from gearworkers.errors import AlreadyExists, IntegrityError, InvalidInput, NotFound, from_os_error
from gearworkers.fetch.source import BytesOrLayout, Chunk
from gearworkers.remote import encoding
from gearworkers.remote.blobstore import MOST_DOCUMENT_BYTES, BlobStore, Document, checked_name
from gearworkers.remote.chunking import chunks_of

_log = structlog.get_logger(__name__)

_PUT_CHUNKS = 64
_WINDOW_BYTES = 1 << 20
_WINDOWS_AT_ONCE = 3
_BATCH_ITEMS = 256
_BATCH_BYTES = 4 << 20
_RACES = 20

_T = TypeVar("_T")


class Remote:
    """Where objects are kept for all nodes; implements `sources.Source`. All methods from any thread.

    Idempotent; an object is visible only when whole, and durable when the call that put it has returned.
    """

    def __init__(self, blobs: BlobStore) -> None:
        self.blobs = blobs

    # -- putting

    def has(self, digests: Sequence[bytes]) -> list[bytes]:
        """Those of *digests* that are there, in their order."""
        present = self.blobs.present(digests)
        return [digest for digest in digests if digest in present]

    def put(self, digest: bytes, source_fd: int) -> None:
        """Store the bytes of *source_fd*, from its beginning to its end; its offset stays.

        Raises:
            IntegrityError: Its SHA-256 is not *digest*; nothing is visible.
            Unavailable: The store does not answer, after bounded retries.

        Crash: may leave chunks that no layout names yet; the next put uses them.
        """
        if self.blobs.present([digest]):
            return
        verify_file(source_fd, digest)
        if os.fstat(source_fd).st_size < encoding.LARGE_BYTES:
            self.blobs.put_many([(digest, encoding.encode(_read_all(source_fd)))])
            return
        layout = list(self._put_chunks(source_fd))
        self.blobs.put_many([(digest, encoding.encode_layout(digest, layout))])

    def put_many(self, contents: Iterable[tuple[bytes, bytes]]) -> int:
        """Store each (digest, content) that is not there; how many were new. For small ones: below LARGE_BYTES.

        Raises:
            IntegrityError: A content is not what its digest says.
            InvalidInput: One is too large.
        """
        new = 0
        for batch in _batches(contents, lambda content: len(content[1]), _BATCH_BYTES):
            blobs = [
                (digest, _checked_encoded(digest, content))
                for digest, content in _missing(batch, self.blobs.present([digest for digest, _ in batch]))
            ]
            if blobs:
                self.blobs.put_many(blobs)
            new += len(blobs)
        return new

    def _put_chunks(self, source_fd: int) -> Iterator[tuple[int, bytes]]:
        """Store the chunks that are missing; (size in bytes, digest) of all, in order.

        A few windows are on their way at once: one is cut and hashed while others are packed, sent and synced.
        """
        pieces = ((hashlib.sha256(piece).digest(), bytes(piece)) for piece in chunks_of(source_fd))
        under_way: deque[Future[None]] = deque()
        with ThreadPoolExecutor(_WINDOWS_AT_ONCE, thread_name_prefix="put") as threads:
            while window := list(islice(pieces, _PUT_CHUNKS)):
                if len(under_way) == _WINDOWS_AT_ONCE:
                    under_way.popleft().result()
                under_way.append(threads.submit(self._put_window, window))
                yield from ((len(piece), digest) for digest, piece in window)
            for future in under_way:
                future.result()

    def _put_window(self, window: Sequence[tuple[bytes, bytes]]) -> None:
        missing = _missing(window, self.blobs.present([digest for digest, _ in window]))
        if missing:
            self.blobs.put_many([(digest, encoding.encode(piece)) for digest, piece in missing])

    # -- fetching

    def size_bytes(self, digest: bytes) -> int:
        """The object's size.

        Raises:
            NotFound: It is not there.
        """
        blob = self.blobs.get(digest)
        if encoding.is_layout(blob):
            return encoding.layout_bytes(digest, blob)
        return len(encoding.decode(digest, blob))

    def fetch(self, digest: bytes) -> Iterator[bytes]:
        """The object's bytes in pieces, each verified; that they make it up is known at the end.

        Raises:
            NotFound: It is not there.
            IntegrityError: What is there is another content.
            Unavailable: The store does not answer, after bounded retries.
        """
        blob = self.blobs.get(digest)
        if not encoding.is_layout(blob):
            yield encoding.decode(digest, blob)
            return
        hasher = hashlib.sha256()
        for _, piece in self.pieces(encoding.chunks_in(digest, blob)):
            hasher.update(piece)
            yield piece
        if hasher.digest() != digest:
            raise IntegrityError(f"object {digest.hex()}: its chunks make up {hasher.hexdigest()}")

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, BytesOrLayout]]:
        """(digest, content or layout) of those that are there, verified; what is damaged is left out and logged."""
        for digest, blob in self.blobs.get_many(digests):
            try:
                yield (
                    digest,
                    encoding.decode_layout(digest, blob) if encoding.is_layout(blob) else encoding.decode(digest, blob),
                )
            except IntegrityError as exc:
                _log.error("a remote gave wrong bytes", error=str(exc))

    def layout(self, digest: bytes) -> list[Chunk] | None:
        """The chunks of an object in order of offset; None if it is kept whole or not at all."""
        try:
            blob = self.blobs.get(digest)
        except NotFound:
            return None
        return encoding.decode_layout(digest, blob) if encoding.is_layout(blob) else None

    def chunk(self, digest: bytes) -> bytes:
        """One chunk by its own digest, verified.

        Raises:
            NotFound, IntegrityError, Unavailable: As `fetch`.
        """
        return encoding.decode(digest, self.blobs.get(digest))

    def pieces(self, chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, bytes]]:
        """Chunks with their bytes, verified, in order; a few windows of them are in memory or on their way at a time.

        Raises:
            NotFound, IntegrityError, Unavailable: As `fetch`.
        """
        windows = _batches(chunks, lambda chunk: chunk.size_bytes, _WINDOW_BYTES)
        coming: deque[Future[list[tuple[Chunk, bytes]]]] = deque()
        threads = ThreadPoolExecutor(_WINDOWS_AT_ONCE, thread_name_prefix="get")
        try:
            while True:
                while len(coming) < _WINDOWS_AT_ONCE and (window := next(windows, None)):
                    coming.append(threads.submit(self._window, window))
                if not coming:
                    return
                yield from coming.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)  # whoever ends early waits for nothing

    def _window(self, window: Sequence[Chunk]) -> list[tuple[Chunk, bytes]]:
        blobs = dict(self.blobs.get_many(list({chunk.digest for chunk in window})))
        pieces = []
        for chunk in window:
            if chunk.digest not in blobs:
                raise NotFound(f"chunk {chunk.digest.hex()} is not there")
            piece = encoding.decode(chunk.digest, blobs[chunk.digest])
            if len(piece) != chunk.size_bytes:
                raise IntegrityError(f"chunk {chunk.digest.hex()}: its layout says {chunk.size_bytes} bytes")
            pieces.append((chunk, piece))
        return pieces

    def close(self) -> None:
        """Let go of connections and threads; nothing is asked after that."""
        self.blobs.close()

    # -- documents

    def document(self, name: str) -> bytes | None:
        """What the document holds now; None if there is none.

        Raises:
            InvalidInput: No document can have this name.
        """
        found = self.versioned(name)
        return None if found is None else found.data

    def versioned(self, name: str) -> Document | None:
        """As `document`, with its version."""
        return self.blobs.get_document(checked_name(name))

    def put_document(self, name: str, data: bytes) -> None:
        """Have the document hold *data*, whatever it held; atomic, durable, the last one wins.

        Raises:
            InvalidInput: No document can have this name or size.
        """
        for _ in range(_RACES):
            found = self.versioned(name)
            try:
                self.replace_document(name, data, found.version if found else 0)
                return
            except AlreadyExists:
                continue
        raise AlreadyExists(f"document {name}: others kept replacing it")

    def replace_document(self, name: str, data: bytes, version: int) -> None:
        """Have the document hold *data* if its version is still *version*; 0 if there was none.

        Raises:
            AlreadyExists: Somebody has replaced it meanwhile.
            InvalidInput: As `put_document`.
        """
        if len(data) > MOST_DOCUMENT_BYTES:
            raise InvalidInput(f"document {name}: {len(data)} bytes; {MOST_DOCUMENT_BYTES} are allowed")
        self.blobs.put_document(checked_name(name), Document(data, version + 1))


def _missing(contents: Sequence[tuple[bytes, bytes]], present: set[bytes]) -> list[tuple[bytes, bytes]]:
    return list({digest: content for digest, content in contents if digest not in present}.items())


def _checked_encoded(digest: bytes, content: bytes) -> bytes:
    if len(content) > encoding.LARGE_BYTES:
        raise InvalidInput(f"object {digest.hex()}: {len(content)} bytes are too many to be put among many")
    if hashlib.sha256(content).digest() != digest:
        raise IntegrityError(f"object {digest.hex()}: its bytes have SHA-256 {hashlib.sha256(content).hexdigest()}")
    return encoding.encode(content)


def _batches(items: Iterable[_T], size_bytes: Callable[[_T], int], most_bytes: int) -> Iterator[list[_T]]:
    """*items* in their order, a few at a time: until they have so many bytes, or are _BATCH_ITEMS."""
    batch: list[_T] = []
    batch_bytes = 0
    for item in items:
        batch.append(item)
        batch_bytes += size_bytes(item)
        if len(batch) >= _BATCH_ITEMS or batch_bytes >= most_bytes:
            yield batch
            batch, batch_bytes = [], 0
    if batch:
        yield batch


def _read_all(fd: int) -> bytes:
    parts = []
    at = 0
    try:
        while part := os.pread(fd, encoding.LARGE_BYTES, at):
            parts.append(part)
            at += len(part)
    except OSError as exc:
        raise from_os_error(exc, "read an object") from exc
    return b"".join(parts)
