"""Blobs: how contents and layouts are written.

A blob begins with one byte that says what follows:
    R  a content as it is
    Z  a content as one zstd frame that tells its size
    L  a layout: SHA-256 of the object's digest and all that follows, then records of a chunk's size (u32,
       little-endian) and its SHA-256, in the order of the object
A content is LARGE_BYTES long at most: what is longer has a layout. So a blob of any object is read whole into
memory; a layout takes 0.05 % of its object.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from collections.abc import Iterable, Iterator

import zstandard

from gearworkers.digest import DIGEST_BYTES
from gearworkers.errors import IntegrityError
from gearworkers.fetch.source import Chunk

LARGE_BYTES = 1 << 20
"""From this size on an object is kept in chunks."""

MOST_CONTENT_BYTES = 4 << 20
"""What a reader lets a blob unpack to."""

MOST_BLOB_BYTES = 128 << 20
"""What a reader takes for a blob: the layout of an object of some 250 GB."""

_RAW, _ZSTD, _LAYOUT = b"R", b"Z", b"L"
_RECORD = struct.Struct(f"<I{DIGEST_BYTES}s")
RECORD_BYTES = _RECORD.size
"""What a chunk takes in a layout."""
_LEVEL = 3


class _PerThread(threading.local):
    """zstd's contexts serve one thread at a time, and take longer to make than a small content to compress."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _PerThread()


def encode(content: bytes | memoryview) -> bytes:
    """The blob of a content, whichever is smaller."""
    packed = _zstd.compressor.compress(content)
    if len(packed) < len(content):
        return _ZSTD + packed
    return _RAW + bytes(content)


def encode_layout(digest: bytes, chunks: Iterable[tuple[int, bytes]]) -> bytes:
    """The blob of a large object, given (size in bytes, digest) of its chunks in order."""
    records = b"".join(_RECORD.pack(size_bytes, chunk_digest) for size_bytes, chunk_digest in chunks)
    return _LAYOUT + _layout_sum(digest, records) + records


def _layout_sum(digest: bytes, records: bytes | memoryview) -> bytes:
    """So that a damaged layout is known before its chunks are fetched."""
    hasher = hashlib.sha256(digest)
    hasher.update(records)
    return hasher.digest()


def is_layout(blob: bytes) -> bool:
    """Whether it is a large object's."""
    return blob[:1] == _LAYOUT


def decode(digest: bytes, blob: bytes) -> bytes:
    """The content of a blob, verified.

    Raises:
        IntegrityError: It is not what *digest* says, or no content at all.
    """
    content = _unpacked(digest, blob)
    if hashlib.sha256(content).digest() != digest:
        raise IntegrityError(f"content {digest.hex()}: {len(content)} bytes of another content are stored")
    return content


def decode_layout(digest: bytes, blob: bytes) -> list[Chunk]:
    """The chunks of a large object; that they make it up is known when all of them are there.

    Raises:
        IntegrityError: The blob is no layout, or damaged.
    """
    return list(chunks_in(digest, blob))


def chunks_in(digest: bytes, blob: bytes) -> Iterator[Chunk]:
    """As `decode_layout`, one after the other: for those who take any object, and hold no list of a million chunks."""
    records = memoryview(blob)[1 + DIGEST_BYTES :]
    is_whole = is_layout(blob) and len(records) > 0 and len(records) % _RECORD.size == 0
    if not is_whole or blob[1 : 1 + DIGEST_BYTES] != _layout_sum(digest, records):
        raise IntegrityError(f"layout of {digest.hex()}: damaged, {len(blob)} bytes")
    at = 0
    for size_bytes, chunk_digest in _RECORD.iter_unpack(records):
        if not 0 < size_bytes <= MOST_CONTENT_BYTES:
            raise IntegrityError(f"layout of {digest.hex()}: a chunk of {size_bytes} bytes")
        yield Chunk(at, size_bytes, chunk_digest)
        at += size_bytes


def check(digest: bytes, blob: bytes) -> None:
    """See that a blob is what its digest says, as far as it can be seen from the blob alone.

    Raises:
        IntegrityError: It is not.
    """
    if is_layout(blob):
        layout_bytes(digest, blob)
    else:
        decode(digest, blob)


def layout_bytes(digest: bytes, blob: bytes) -> int:
    """The size of a large object, given its blob.

    Raises:
        IntegrityError: The blob is no layout.
    """
    return sum(chunk.size_bytes for chunk in chunks_in(digest, blob))


def _unpacked(digest: bytes, blob: bytes) -> bytes:
    kind, payload = blob[:1], memoryview(blob)[1:]
    if kind == _RAW:
        return bytes(payload)
    if kind != _ZSTD:
        raise IntegrityError(f"content {digest.hex()}: a blob of an unknown kind, {blob[:1]!r}")
    try:
        size_bytes = zstandard.frame_content_size(payload)
        if not 0 <= size_bytes <= MOST_CONTENT_BYTES:
            raise IntegrityError(f"content {digest.hex()}: unpacks to {size_bytes} bytes")
        return _zstd.decompressor.decompress(payload)
    except zstandard.ZstdError as exc:
        raise IntegrityError(f"content {digest.hex()}: damaged ({exc})") from exc
