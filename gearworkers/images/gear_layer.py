"""Write a Gear layer: a tar that names the contents of its files, which go to the remote.

In a Gear layer's tar a regular file has no payload, and two PAX records name its content: GEAR.sha256 and GEAR.size.
All other fields that Docker reads are kept. The same layer always gives the same bytes.

A program that does not know Gear layers would unpack such a layer to empty files. So its first entry is a guard: a
hard link with a missing target, marked by a PAX record. Docker's own drivers, containerd and others fail to unpack it
and show its name in the error.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from gearworkers.errors import ResourceExhausted
from gearworkers.images.layer_records import INLINE_BYTES
from gearworkers.images.upload import SMALL_BYTES, ContentUploader, unnamed_file
from gearworkers.tar import writer
from gearworkers.tar.entry import HARDLINK, REG, TarEntry, shown
from gearworkers.tar.private_marker import is_marker, reject_late_marker
from gearworkers.tar.reader import Readable, TarReader
from gearworkers.tar.sparse import expanded, zeros
from gearworkers.util.fs import free_bytes
from gearworkers.util.writing import write_all

_GUARD = TarEntry(
    name=b".gear-image",
    type=HARDLINK,
    linkname=b"this is a Gear image, without file contents: "
    b"it needs the storage driver of gearworkers (dockerd -s gear)",
    guard=True,
)
READ_BUFFER_BYTES = 4 << 20
_GZIP_LEVEL = 6
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_COMPRESS_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class GearTar:
    """The digests and sizes of a written Gear layer."""

    digest: str
    """Digest of the compressed tar."""
    size_bytes: int
    diff_id: str
    """Digest of the tar."""
    files: int
    """Number of regular files, without hard links."""


def write_gear_layer(
    tar: Readable, out: BinaryIO, contents: ContentUploader, inline_bytes: int = INLINE_BYTES
) -> GearTar:
    """Write the Gear layer of *tar* to *out*, compressed with gzip, and pass its contents to *contents*.

    Args:
        tar: A layer's tar; read to its end.
        out: Receives the compressed tar.
        contents: Receives the contents; call its `finish` before publishing the layer.
        inline_bytes: Contents up to this size stay in the tar.

    Raises:
        InvalidInput, IntegrityError: The tar is malformed or ends early, or the layer is private; the message names
            the entry.
    """
    out_tar = _TarWriter(out)
    reader = TarReader(tar, buffer_bytes=READ_BUFFER_BYTES)
    files = 0
    out_tar.write(writer.header(_GUARD))
    while (entry := reader.next()) is not None:
        if is_marker(entry.name):
            reject_late_marker(entry)
        if entry.type == REG:
            files += 1
            _write_file(entry, reader, out_tar, contents, inline_bytes)
        else:
            out_tar.write(_header(entry))
    reader.finish()
    out_tar.write(writer.END)
    return out_tar.finish(files)


def _write_file(
    entry: TarEntry, reader: TarReader, out_tar: _TarWriter, contents: ContentUploader, inline_bytes: int
) -> None:
    if entry.gear is not None:
        _keep_named_content(entry, reader, contents)
    elif entry.size_bytes > inline_bytes:
        _name_content(entry, reader, contents)
    else:
        # bytes() copies a piece of content, and creates the zeros of a hole from its length.
        data = b"".join(bytes(piece) for piece in expanded(reader.chunks(), entry.sparse, entry.size_bytes))
        out_tar.write(_header(entry) + data + writer.padding(len(data)))
        return
    out_tar.write(_header(entry))


def _keep_named_content(entry: TarEntry, reader: TarReader, contents: ContentUploader) -> None:
    """Handle a file of a Gear layer, which names its content; if it also holds bytes, these take precedence."""
    assert entry.gear is not None
    if entry.stored_bytes:
        entry.gear = None
        _name_content(entry, reader, contents)
    elif entry.gear[1]:
        contents.require(*entry.gear)


def _name_content(entry: TarEntry, reader: TarReader, contents: ContentUploader) -> None:
    payload = reader.payload() if entry.sparse is None and entry.size_bytes < SMALL_BYTES else None
    if payload is not None:
        digest = hashlib.sha256(payload).digest()
        contents.add(digest, payload)
    else:
        digest = _upload_from_file(entry, reader, contents)
    entry.gear = digest, entry.size_bytes
    entry.stored_bytes = 0


def _upload_from_file(entry: TarEntry, reader: TarReader, contents: ContentUploader) -> bytes:
    """Upload a large or sparse content through an unnamed file; return its digest."""
    hasher = hashlib.sha256()
    with unnamed_file("a content", contents.directory) as file:
        fd = file.fileno()
        if entry.sparse is not None and entry.size_bytes > free_bytes(fd):
            raise ResourceExhausted(
                f"tar entry {shown(entry.name)}: a sparse file of {entry.size_bytes} bytes does not fit into the "
                f"{free_bytes(fd)} free bytes of {contents.directory}"
            )
        for piece in expanded(reader.chunks(), entry.sparse, entry.size_bytes):
            if isinstance(piece, int):
                for hole in zeros(piece):
                    hasher.update(hole)
                os.lseek(fd, piece, os.SEEK_CUR)
            else:
                hasher.update(piece)
                write_all(fd, piece)
        os.ftruncate(fd, entry.size_bytes)
        contents.add_file(hasher.digest(), os.dup(fd), entry.size_bytes)
    return hasher.digest()


def _header(entry: TarEntry) -> bytes:
    """Return the entry's header without access times, which Docker ignores."""
    entry.atime_ns = None
    entry.name = entry.name or b"./"
    return writer.header(entry)


class _TarWriter:
    """Hashes a tar, compresses it with zlib in pieces of a fixed size, and hashes the result."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._compressor = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
        self._buffer = bytearray()
        self._diff_hasher = hashlib.sha256()
        self._hasher = hashlib.sha256()
        self._size_bytes = 0

    def write(self, data: bytes) -> None:
        """Write the next bytes of the tar."""
        self._buffer += data
        while len(self._buffer) >= _COMPRESS_BYTES:
            self._compress(bytes(self._buffer[:_COMPRESS_BYTES]))
            del self._buffer[:_COMPRESS_BYTES]

    def finish(self, files: int) -> GearTar:
        """Write the end of the tar; return the layer's digests and sizes."""
        self._compress(bytes(self._buffer))
        self._emit(self._compressor.flush())
        return GearTar(
            f"sha256:{self._hasher.hexdigest()}", self._size_bytes, f"sha256:{self._diff_hasher.hexdigest()}", files
        )

    def _compress(self, data: bytes) -> None:
        self._diff_hasher.update(data)
        self._emit(self._compressor.compress(data))

    def _emit(self, data: bytes) -> None:
        self._hasher.update(data)
        self._out.write(data)
        self._size_bytes += len(data)
