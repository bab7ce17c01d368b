"""Many blobs in one HTTP body: (SHA-256, size as little-endian u32, blob), one after the other, to the end."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

from gearworkers.digest import DIGEST_BYTES
from gearworkers.errors import InvalidInput
from gearworkers.remote.encoding import MOST_BLOB_BYTES

CONTENT_TYPE = "application/vnd.gearworkers.blobs"
HEADER = struct.Struct(f"<{DIGEST_BYTES}sI")


def frame(digest: bytes, blob: bytes) -> bytes:
    """One blob with its header."""
    return HEADER.pack(digest, len(blob)) + blob


def header(raw: bytes) -> tuple[bytes, int]:
    """(digest, size in bytes) of the blob that follows.

    Raises:
        InvalidInput: It is too large to be one.
    """
    digest, size_bytes = HEADER.unpack(raw)
    if size_bytes > MOST_BLOB_BYTES:
        raise InvalidInput(f"blob {digest.hex()}: {size_bytes} bytes are more than any has")
    return digest, size_bytes


def read_frames(read: Callable[[int], bytes]) -> Iterator[tuple[bytes, bytes]]:
    """(digest, blob) of a body.

    Args:
        read: Gives so many bytes; fewer only at the end.

    Raises:
        InvalidInput: The body ends within a frame.
    """
    while raw := read(HEADER.size):
        if len(raw) < HEADER.size:
            raise InvalidInput(f"a stream of blobs ends within a header, after {len(raw)} bytes")
        digest, size_bytes = header(raw)
        blob = read(size_bytes)
        if len(blob) < size_bytes:
            raise InvalidInput(f"blob {digest.hex()}: the stream ends after {len(blob)} of {size_bytes} bytes")
        yield digest, blob
