"""The format of blobs, which hold contents and layouts.

The first byte of a blob is its kind:
    R  a content, uncompressed
    Z  a content as one zstd frame that states its size
    L  a layout: SHA-256 of the object's digest and the rest of the blob, then records of a chunk's size (u32,
       little-endian) and its SHA-256, in the order of the object
Objects of LARGE_BYTES and more have a layout. So the blob of any object fits in memory; a layout takes 0.05 % of its
object.
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
"""Objects of this size and above are stored in chunks."""

MAX_CONTENT_BYTES = 4 << 20
"""Largest content that a reader unpacks from a blob."""

MAX_BLOB_BYTES = 128 << 20
"""Largest blob that a reader accepts: the layout of an object of about 250 GB."""

_RAW, _ZSTD, _LAYOUT = b"R", b"Z", b"L"
_RECORD = struct.Struct(f"<I{DIGEST_BYTES}s")
RECORD_BYTES = _RECORD.size
"""Size of a chunk's record in a layout."""
_LEVEL = 3


class _PerThread(threading.local):
    """zstd's contexts, each for one thread at a time; creating one takes longer than compressing a small content."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_zstd = _PerThread()


def encode(content: bytes | memoryview) -> bytes:
    """Return the blob of a content, compressed if that makes it smaller."""
    packed = _zstd.compressor.compress(content)
    if len(packed) < len(content):
        return _ZSTD + packed
    return _RAW + bytes(content)


def encode_layout(digest: bytes, chunks: Iterable[tuple[int, bytes]]) -> bytes:
    """Return the blob of a large object, given the (size in bytes, digest) of its chunks in order."""
    records = b"".join(_RECORD.pack(size_bytes, chunk_digest) for size_bytes, chunk_digest in chunks)
    return _LAYOUT + _layout_sum(digest, records) + records


def _layout_sum(digest: bytes, records: bytes | memoryview) -> bytes:
    """Return the checksum that shows damage before any chunk is fetched."""
    hasher = hashlib.sha256(digest)
    hasher.update(records)
    return hasher.digest()


def is_layout(blob: bytes) -> bool:
    """Return whether *blob* is a layout."""
    return blob[:1] == _LAYOUT


def decode(digest: bytes, blob: bytes) -> bytes:
    """Return the verified content of a blob.

    Raises:
        IntegrityError: The blob is damaged, holds another content, or is a layout.
    """
    content = _unpacked(digest, blob)
    if hashlib.sha256(content).digest() != digest:
        raise IntegrityError(f"content {digest.hex()}: {len(content)} bytes of another content are stored")
    return content


def decode_layout(digest: bytes, blob: bytes) -> list[Chunk]:
    """Return the chunks of a large object; their contents verify the object's digest.

    Raises:
        IntegrityError: The blob is damaged or not a layout.
    """
    return list(iter_layout(digest, blob))


def iter_layout(digest: bytes, blob: bytes) -> Iterator[Chunk]:
    """Yield the chunks of `decode_layout` one by one, for callers that must not hold a list of a million chunks."""
    records = memoryview(blob)[1 + DIGEST_BYTES :]
    is_valid = is_layout(blob) and len(records) > 0 and len(records) % _RECORD.size == 0
    if not is_valid or blob[1 : 1 + DIGEST_BYTES] != _layout_sum(digest, records):
        raise IntegrityError(f"layout of {digest.hex()}: damaged, {len(blob)} bytes")
    offset = 0
    for size_bytes, chunk_digest in _RECORD.iter_unpack(records):
        if not 0 < size_bytes <= MAX_CONTENT_BYTES:
            raise IntegrityError(f"layout of {digest.hex()}: a chunk of {size_bytes} bytes")
        yield Chunk(offset, size_bytes, chunk_digest)
        offset += size_bytes


def verify(digest: bytes, blob: bytes) -> None:
    """Verify a blob without reading others: a content by its digest, a layout by its checksum.

    Raises:
        IntegrityError: The blob is wrong.
    """
    if is_layout(blob):
        object_size(digest, blob)
    else:
        decode(digest, blob)


def object_size(digest: bytes, blob: bytes) -> int:
    """Return the size in bytes of a large object, given its layout.

    Raises:
        IntegrityError: The blob is damaged or not a layout.
    """
    return sum(chunk.size_bytes for chunk in iter_layout(digest, blob))


def _unpacked(digest: bytes, blob: bytes) -> bytes:
    kind, payload = blob[:1], memoryview(blob)[1:]
    if kind == _RAW:
        return bytes(payload)
    if kind != _ZSTD:
        raise IntegrityError(f"content {digest.hex()}: the blob has an unknown kind, {blob[:1]!r}")
    try:
        size_bytes = zstandard.frame_content_size(payload)
        if not 0 <= size_bytes <= MAX_CONTENT_BYTES:
            raise IntegrityError(f"content {digest.hex()}: unpacks to {size_bytes} bytes")
        return _zstd.decompressor.decompress(payload)
    except zstandard.ZstdError as exc:
        raise IntegrityError(f"content {digest.hex()}: damaged ({exc})") from exc
