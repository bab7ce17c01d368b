"""Read the blobs of images: verify them on the way, and decompress layers."""

from __future__ import annotations

import hashlib
import io
import itertools
import queue
import re
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

import zstandard
from isal import igzip_lib, isal_zlib

from gearworkers.errors import IntegrityError
from gearworkers.tar.reader import Readable

_PIECE_BYTES = 256 << 10
_PIECE_OUT_BYTES = 1 << 20
_MAX_QUEUED_PIECES = 16
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_GZIP_MAGIC = b"\x1f\x8b"
_ZSTD_MAGIC = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")
"""Magic number of a frame, or of a skippable frame, which may come first."""
_ZSTD_MAX_WINDOW_BYTES = 128 << 20
MAGIC_BYTES = 4
"""Number of bytes at a blob's start that reveal its compression."""


class VerifiedBlob:
    """A blob that reports its end only if its bytes match the digest."""

    def __init__(self, source: Readable, digest: str, size_bytes: int | None) -> None:
        self._source = source
        self._digest = digest
        self._size_bytes = size_bytes
        self._hasher = hashlib.sha256()
        self.read_bytes = 0

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill part of *buffer*; return the number of bytes, 0 at the end.

        Raises:
            IntegrityError: At the end, the bytes differ from the digest; or the blob is longer than its size.
        """
        count = self._source.readinto(buffer) or 0
        if count:
            self._hasher.update(buffer[:count])
            self.read_bytes += count
            if self._size_bytes is not None and self.read_bytes > self._size_bytes:
                raise IntegrityError(f"blob {self._digest}: longer than its {self._size_bytes} bytes")
            return count
        found = f"sha256:{self._hasher.hexdigest()}"
        if found != self._digest or self._size_bytes not in (None, self.read_bytes):
            raise IntegrityError(
                f"blob {self._digest} of {self._size_bytes} bytes: received {self.read_bytes} bytes with digest {found}"
            )
        return 0


class TarPreview:
    """The first bytes of a layer's tar, decompressed as by `unpacked`, but without verification and read-ahead."""

    def __init__(self, blob: Readable) -> None:
        self._pieces = _tar_pieces(blob)
        self._piece = memoryview(b"")

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill part of *buffer*; return the number of bytes, 0 at the end.

        Raises:
            IntegrityError: The compressed data are damaged or truncated.
        """
        self._piece = self._piece or memoryview(next(self._pieces, b""))
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        return count


class UnpackedLayer:
    """A layer's tar, decompressed from a gzip, zstd or plain blob; a thread decompresses ahead of the reader.

    Created by `unpacked`, which ends the thread.
    """

    def __init__(self, blob: Readable, diff_id: str) -> None:
        self.digest = ""
        """SHA-256 of the tar, once `readinto` has returned 0."""
        self.read_bytes = 0
        """Bytes of the tar that `readinto` has returned."""
        self._blob = blob
        self._diff_id = diff_id
        self._pieces: queue.Queue[bytes | BaseException | None] = queue.Queue(_MAX_QUEUED_PIECES)
        self._piece = memoryview(b"")
        self._stopped = False
        self._ended = False
        self._thread = threading.Thread(target=self._work, name="unpack", daemon=True)
        self._thread.start()

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill part of *buffer*; return the number of bytes, 0 at the end.

        Raises:
            IntegrityError: Blob or tar differs from its digest, or the compressed data are damaged or truncated.
        """
        if not self._piece and not self._next():
            return 0
        count = min(len(buffer), len(self._piece))
        buffer[:count] = self._piece[:count]
        self._piece = self._piece[count:]
        self.read_bytes += count
        return count

    def close(self) -> None:
        """End the thread, even before the end of the blob."""
        self._stopped = True
        while self._thread.is_alive():
            try:
                self._pieces.get(timeout=0.1)
            except queue.Empty:
                pass

    def _next(self) -> bool:
        if self._ended:
            return False
        piece = self._pieces.get()
        if isinstance(piece, bytes):
            self._piece = memoryview(piece)
            return True
        self._ended = True
        if piece is not None:
            raise piece
        return False

    def _work(self) -> None:
        end: BaseException | None = None
        hasher = hashlib.sha256()
        try:
            for piece in _tar_pieces(self._blob):
                if self._stopped:
                    return
                hasher.update(piece)
                self._pieces.put(piece)
            self.digest = f"sha256:{hasher.hexdigest()}"
            self._check(self.digest)
        except BaseException as exc:
            end = exc
        if not self._stopped:
            self._pieces.put(end)

    def _check(self, found: str) -> None:
        if self._diff_id and found != self._diff_id:
            raise IntegrityError(f"a layer's tar has the digest {found}, but the image's config names {self._diff_id}")


@contextmanager
def unpacked(blob: Readable, diff_id: str = "") -> Iterator[UnpackedLayer]:
    """Yield the tar in *blob*; its digest must be *diff_id* unless that is empty."""
    tar = UnpackedLayer(blob, diff_id)
    try:
        yield tar
    finally:
        tar.close()


def read_all(blob: Readable) -> bytes:
    """Read a small blob to its end."""
    found = io.BytesIO()
    for piece in _pieces(blob):
        found.write(piece)
    return found.getvalue()


def compression_of(head: bytes) -> str:
    """Return ``gzip``, ``zstd``, or an empty string, by a blob's first MAGIC_BYTES."""
    if head.startswith(_GZIP_MAGIC):
        return "gzip"
    return "zstd" if _ZSTD_MAGIC.match(head) else ""


def _pieces(blob: Readable) -> Iterator[bytes]:
    buffer = memoryview(bytearray(_PIECE_BYTES))
    while count := blob.readinto(buffer):
        yield bytes(buffer[:count])


def _tar_pieces(blob: Readable) -> Iterator[bytes]:
    try:
        yield from _decompressed(_pieces(blob))
    except (igzip_lib.IsalError, zstandard.ZstdError) as exc:  # type: ignore[misc]  # isal types its class wrong
        raise IntegrityError(f"a layer's compressed data are damaged: {exc}") from exc


def _decompressed(blob: Iterator[bytes]) -> Iterator[bytes]:
    head = b""
    for piece in blob:
        head += piece
        if len(head) >= MAGIC_BYTES:
            break
    whole = itertools.chain((head,), blob)
    match compression_of(head):
        case "gzip":
            return _gunzipped(whole)
        case "zstd":
            return _unzstd(whole)
    return whole


def _gunzipped(blob: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress successive gzip members; skip zeros between and after them, which are padding, as gzip does."""
    inflater = isal_zlib.decompressobj(_GZIP_WINDOW)
    for data in blob:
        while data:
            if inflater.eof:
                data = data.lstrip(b"\0")
                if not data:
                    break
                inflater = isal_zlib.decompressobj(_GZIP_WINDOW)
            found = inflater.decompress(data, _PIECE_OUT_BYTES)
            while found:
                yield found
                full = len(found) == _PIECE_OUT_BYTES and not inflater.eof and not inflater.unconsumed_tail
                found = inflater.decompress(b"", _PIECE_OUT_BYTES) if full else b""
            data = inflater.unused_data if inflater.eof else inflater.unconsumed_tail
    if not inflater.eof:
        raise IntegrityError("a layer's compressed data are truncated")


def _unzstd(blob: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress successive zstd frames; a truncated frame yields its first bytes without an error."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_MAX_WINDOW_BYTES)
    reader = decompressor.stream_reader(cast(IO[bytes], _PieceReader(blob)), read_across_frames=True)
    while found := reader.read(_PIECE_OUT_BYTES):
        yield found


class _PieceReader(io.RawIOBase):
    """A file of pieces for zstandard: a read returns the next bytes, at most as many as requested."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def read(self, size: int = -1, /) -> bytes:
        data = self._rest or next(self._pieces, b"")
        self._rest = data[size:] if size >= 0 else b""
        return data[:size] if size >= 0 else data
