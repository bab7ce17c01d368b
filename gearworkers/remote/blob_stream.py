"""Many blobs in one HTTP body: (SHA-256, size as little-endian u32, blob), repeated to the end of the body."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from gearworkers.digest import DIGEST_BYTES
from gearworkers.errors import InvalidInput
from gearworkers.remote.encoding import MAX_BLOB_BYTES

CONTENT_TYPE = "application/vnd.gearworkers.blobs"
HEADER = struct.Struct(f"<{DIGEST_BYTES}sI")


def frame(digest: bytes, blob: bytes) -> bytes:
    """Return a blob behind its header."""
    return HEADER.pack(digest, len(blob)) + blob


def parse_header(raw: bytes) -> tuple[bytes, int]:
    """Return the digest and the size in bytes of the blob that follows.

    Raises:
        InvalidInput: The size exceeds MAX_BLOB_BYTES.
    """
    digest, size_bytes = HEADER.unpack(raw)
    if size_bytes > MAX_BLOB_BYTES:
        raise InvalidInput(f"blob {digest.hex()}: {size_bytes} bytes exceed the maximum of {MAX_BLOB_BYTES}")
    return digest, size_bytes


def read_blobs(read: Callable[[int], bytes]) -> Iterator[tuple[bytes, bytes]]:
    """Yield each (digest, blob) of a body.

    Args:
        read: Returns that many bytes of the body; fewer only at its end.

    Raises:
        InvalidInput: The body ends within a header or a blob.
    """
    while raw := read(HEADER.size):
        if len(raw) < HEADER.size:
            raise InvalidInput(f"a stream of blobs ends within a header, after {len(raw)} bytes")
        digest, size_bytes = parse_header(raw)
        blob = read(size_bytes)
        if len(blob) < size_bytes:
            raise InvalidInput(f"blob {digest.hex()}: the stream ends after {len(blob)} of {size_bytes} bytes")
        yield digest, blob
