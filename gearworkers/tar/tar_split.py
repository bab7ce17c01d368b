"""Write and read `stream.zst`: a layer's tar without the file contents, from which the exact bytes are reproduced.

The file is one zstd frame and a trailer. The frame contains records; each is a tag, lengths as little-endian integers,
and data. RAW: bytes of the tar. CONTENT: digest and length of a whole object. SLICE: digest, offset and length within
an object. END: the length of the tar. The trailer has the lengths of frame and tar, so that a truncated file is
detected before its bytes are used. It also has the frame's checksum, since zstd does not verify its own checksum if the
flag of the last block is lost.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO, Protocol, cast
from zlib import crc32

import msgspec
import zstandard

from gearworkers.errors import IntegrityError

_MAGIC = b"GEARTAR2"
_TRAILER_MAGIC = b"2RATRAEG"
_TRAILER = struct.Struct("<QIQ8s")
"""Length of the frame, its CRC-32, length of the tar, magic."""
_RAW, _CONTENT, _SLICE, _END = 1, 2, 3, 4
_RAW_RECORD = struct.Struct("<BI")
_CONTENT_RECORD = struct.Struct("<B32sQ")
_SLICE_RECORD = struct.Struct("<B32sQQ")
_END_RECORD = struct.Struct("<BQ")

_LEVEL = 1
_BATCH_BYTES = 1 << 17
_MAX_RAW_BYTES = 1 << 30
_PIECE_BYTES = 1 << 20


class Sink(Protocol):
    """Receives the stream file."""

    def write(self, data: bytes, /) -> int:
        """Write all of *data*."""


class TarSplitWriter:
    """Writes a `stream.zst`. Call the methods in the order of the tar's bytes.

    `size_bytes` is the length of the tar so far. Errors of the file (OSError) pass through. After an error, and until
    `close` has returned, the file is invalid; discard it. A call takes less than a microsecond.
    """

    def __init__(self, file: Sink, *, level: int = _LEVEL) -> None:
        self._file = file
        self._frame = zstandard.ZstdCompressor(level=level, write_content_size=False).compressobj()
        self._batch = bytearray()
        self._frame_bytes = self._frame_crc = 0
        self.size_bytes = 0
        file.write(_MAGIC)

    def raw(self, data: bytes | memoryview) -> None:
        """Add the next bytes of the tar; they are copied before the call returns."""
        size_bytes = len(data)
        if size_bytes > _MAX_RAW_BYTES:
            raise ValueError(f"{size_bytes} bytes do not fit in one record")
        batch = self._batch
        batch += _RAW_RECORD.pack(_RAW, size_bytes)
        batch += data
        self.size_bytes += size_bytes
        if len(batch) > _BATCH_BYTES:
            self._write_batch()

    def content(self, digest: bytes, size_bytes: int) -> None:
        """Add a whole object, which is the next *size_bytes* of the tar."""
        self._batch += _CONTENT_RECORD.pack(_CONTENT, digest, size_bytes)
        self._add_content(size_bytes)

    def slice(self, digest: bytes, offset_bytes: int, length_bytes: int) -> None:
        """Add a part of an object, which is the next *length_bytes* of the tar."""
        self._batch += _SLICE_RECORD.pack(_SLICE, digest, offset_bytes, length_bytes)
        self._add_content(length_bytes)

    def close(self) -> None:
        """Write the rest and the trailer; then the stream is complete. The file stays open."""
        self._batch += _END_RECORD.pack(_END, self.size_bytes)
        self._write_batch()
        self._write(self._frame.flush())
        self._file.write(_TRAILER.pack(self._frame_bytes, self._frame_crc, self.size_bytes, _TRAILER_MAGIC))

    def _add_content(self, size_bytes: int) -> None:
        self.size_bytes += size_bytes
        if len(self._batch) > _BATCH_BYTES:
            self._write_batch()

    def _write_batch(self) -> None:
        self._write(self._frame.compress(self._batch))
        self._batch.clear()

    def _write(self, data: bytes) -> None:
        if data:
            self._frame_bytes += len(data)
            self._frame_crc = crc32(data, self._frame_crc)
            self._file.write(data)


class RawBytes(msgspec.Struct, frozen=True, gc=False):
    """Bytes of the tar that are stored in the stream file."""

    data: bytes


class ObjectBytes(msgspec.Struct, frozen=True, gc=False):
    """A part of an object that is at this place in the tar: the whole object, except for sparse files."""

    digest: bytes
    offset_bytes: int
    length_bytes: int


class TarSplitReader:
    """Reads a `stream.zst`, in bounded memory.

    `tar_bytes` is the length of the tar.

    Raises:
        IntegrityError: The file is not a stream, or it was truncated or altered. The constructor checks the trailer;
            iteration checks the rest, at the latest at the end.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._frame_bytes, self._frame_crc, self.tar_bytes = _trailer(file)
        self._file = file
        self._data = b""
        self._at = 0
        self._frame: zstandard.ZstdDecompressionReader | None = None

    def __iter__(self) -> Iterator[RawBytes | ObjectBytes]:
        """Yield the pieces of the tar in order, from the start each time."""
        self._file.seek(len(_MAGIC))
        self._data, self._at = b"", 0
        # zstandard only calls read(), although its stub requires a BinaryIO.
        frame = _Frame(self._file, self._frame_bytes)
        self._frame = zstandard.ZstdDecompressor().stream_reader(cast(BinaryIO, frame), closefd=False)
        try:
            yield from self._pieces()
        except zstandard.ZstdError as exc:
            raise IntegrityError(f"a layer's stream file is damaged: {exc}") from exc
        if frame.whole_crc() != self._frame_crc:
            raise IntegrityError("a layer's stream file is damaged: its checksum differs")

    def _pieces(self) -> Iterator[RawBytes | ObjectBytes]:
        seen_bytes = 0
        while True:
            tag = self._peek_tag()
            if tag == _RAW:
                _, length = _RAW_RECORD.unpack(self._take(_RAW_RECORD.size))
                seen_bytes += length
                yield from self._raw(length)
            elif tag == _CONTENT:
                _, digest, length = _CONTENT_RECORD.unpack(self._take(_CONTENT_RECORD.size))
                seen_bytes += length
                yield ObjectBytes(digest, 0, length)
            elif tag == _SLICE:
                _, digest, offset, length = _SLICE_RECORD.unpack(self._take(_SLICE_RECORD.size))
                seen_bytes += length
                yield ObjectBytes(digest, offset, length)
            else:
                return self._check_end(tag, seen_bytes)

    def _raw(self, length_bytes: int) -> Iterator[RawBytes]:
        while length_bytes:
            size_bytes = min(length_bytes, _PIECE_BYTES)
            yield RawBytes(self._take(size_bytes))
            length_bytes -= size_bytes

    def _check_end(self, tag: int, seen_bytes: int) -> None:
        if tag != _END:
            raise IntegrityError(f"a layer's stream file is damaged: it has a record of kind {tag}")
        _, tar_bytes = _END_RECORD.unpack(self._take(_END_RECORD.size))
        if self._at < len(self._data) or self._read():
            raise IntegrityError("a layer's stream file is damaged: it has data after its end")
        if not tar_bytes == seen_bytes == self.tar_bytes:
            raise IntegrityError(f"a layer's stream file has {seen_bytes} bytes of tar instead of {self.tar_bytes}")

    def _peek_tag(self) -> int:
        if self._at == len(self._data):
            self._data, self._at = self._read(), 0
        return self._data[self._at] if self._data else 0

    def _take(self, size_bytes: int) -> bytes:
        end = self._at + size_bytes
        while len(self._data) < end:
            more = self._read()
            if not more:
                raise IntegrityError("a layer's stream file is damaged: it ends inside a record")
            self._data = self._data[self._at :] + more
            end -= self._at
            self._at = 0
        taken = self._data[self._at : end]
        self._at = end
        return taken

    def _read(self) -> bytes:
        assert self._frame is not None
        return self._frame.read(_PIECE_BYTES)


def _trailer(file: BinaryIO) -> tuple[int, int, int]:
    """Return the frame's length and checksum, and the tar's length; check them against the file's length."""
    file.seek(0)
    magic = file.read(len(_MAGIC))
    file_bytes = file.seek(0, 2)
    fixed_bytes = len(_MAGIC) + _TRAILER.size
    if magic == _MAGIC and file_bytes >= fixed_bytes:
        file.seek(-_TRAILER.size, 2)
        frame_bytes, frame_crc, tar_bytes, trailer_magic = _TRAILER.unpack(file.read(_TRAILER.size))
        if trailer_magic == _TRAILER_MAGIC and frame_bytes + fixed_bytes == file_bytes:
            return frame_bytes, frame_crc, tar_bytes
    raise IntegrityError(f"a layer's stream file ({file_bytes} bytes) is truncated, damaged or not a stream")


class _Frame:
    """The zstd frame in the file. Without this limit, zstd would read the trailer as another frame."""

    def __init__(self, file: BinaryIO, size_bytes: int) -> None:
        self._file = file
        self._left_bytes = size_bytes
        self._crc = 0

    def read(self, size_bytes: int) -> bytes:
        data = self._file.read(min(size_bytes, self._left_bytes))
        self._left_bytes -= len(data)
        self._crc = crc32(data, self._crc)
        return data

    def whole_crc(self) -> int:
        """Read the rest of the frame, which zstd did not need; return the checksum of the whole frame."""
        while self.read(_PIECE_BYTES):
            pass
        return self._crc
