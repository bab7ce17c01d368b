"""One layer becomes a Gear layer: the same tar with names in the place of contents, the contents in the remote.

In a Gear layer's tar a regular file's payload is empty, and two PAX records name what it was: GEAR.sha256 and
GEAR.size. All else that Docker reads of an entry stays as it was. The same layer always gives the same bytes.

Whoever takes such a layer for a common one would make empty files of it. So its first entry is a guard: a hard link
that leads nowhere, marked by a PAX record. Docker's own drivers, containerd and others fail at it while they unpack,
and show its name as the reason.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from dataclasses import dataclass
from typing import BinaryIO

from gearworkers.errors import ResourceExhausted
from gearworkers.images.upload import SMALL_BYTES, Contents, nameless_file
from gearworkers.tar import writer
from gearworkers.tar.entry import HARDLINK, REG, TarEntry, shown
from gearworkers.tar.private_marker import is_mark, reject_late_mark
from gearworkers.tar.reader import Readable, TarReader
from gearworkers.tar.sparse import expanded, zeros
from gearworkers.util.fs import free_bytes
from gearworkers.util.writing import write_all

FORMAT = 2
"""Raise it when the same layer would give other bytes."""
INLINE_BYTES = 256
"""Contents of up to this size stay in the layer. Of a Debian root file system, 94 MB compressed, the Gear layer has
708 KB with 0, 703 KB with 128, 712 KB with 256 and 1,037 KB with 1024; 256 spares 8 % of the objects."""

_GUARD = TarEntry(
    name=b".gear-image",
    type=HARDLINK,
    linkname=b"this is a Gear image, without file contents: "
    b"it needs the storage driver of gearworkers (dockerd -s gear)",
    guard=True,
)
_BUFFER_BYTES = 4 << 20
_GZIP_LEVEL = 6
_GZIP_WINDOW = 16 + zlib.MAX_WBITS
_PACK_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class GearTar:
    """What was written of a Gear layer."""

    digest: str
    """Of the compressed tar."""
    size_bytes: int
    diff_id: str
    """Of the tar."""
    files: int
    """Regular files, hard links not counted."""


def write_gear_layer(tar: Readable, out: BinaryIO, contents: Contents, inline_bytes: int = INLINE_BYTES) -> GearTar:
    """Write the Gear layer of *tar* to *out*, gzip compressed, and hand its contents to *contents*.

    Args:
        tar: A layer's tar; read to its clean end.
        out: Where the compressed tar goes.
        contents: Whoever calls waits for it before the layer is shown to anyone.
        inline_bytes: Contents of up to this size stay in the tar.

    Raises:
        InvalidInput, IntegrityError: The tar is malformed or ends early, or its layer is private; the message names
            the entry.
    """
    packed = _Packed(out)
    reader = TarReader(tar, buffer_bytes=_BUFFER_BYTES)
    files = 0
    packed.write(writer.header(_GUARD))
    while (entry := reader.next()) is not None:
        if is_mark(entry.name):
            reject_late_mark(entry)
        if entry.type == REG:
            files += 1
            _write_file(entry, reader, packed, contents, inline_bytes)
        else:
            packed.write(_header(entry))
    reader.finish()
    packed.write(writer.END)
    return packed.finish(files)


def _write_file(entry: TarEntry, reader: TarReader, packed: _Packed, contents: Contents, inline_bytes: int) -> None:
    if entry.gear is not None:
        _keep_gear(entry, reader, contents)
    elif entry.size_bytes > inline_bytes:
        _name_content(entry, reader, contents)
    else:
        # bytes() copies a piece of content, and makes as many zeros as a hole is long.
        data = b"".join(bytes(piece) for piece in expanded(reader.chunks(), entry.sparse, entry.size_bytes))
        packed.write(_header(entry) + data + writer.padding(len(data)))
        return
    packed.write(_header(entry))


def _keep_gear(entry: TarEntry, reader: TarReader, contents: Contents) -> None:
    """A file that names its content already; one that holds it too is taken at its bytes."""
    assert entry.gear is not None
    if entry.stored_bytes:
        entry.gear = None
        _name_content(entry, reader, contents)
    elif entry.gear[1]:
        contents.name(*entry.gear)


def _name_content(entry: TarEntry, reader: TarReader, contents: Contents) -> None:
    payload = reader.payload() if entry.sparse is None and entry.size_bytes < SMALL_BYTES else None
    if payload is not None:
        digest = hashlib.sha256(payload).digest()
        contents.add(digest, payload)
    else:
        digest = _spool(entry, reader, contents)
    entry.gear = digest, entry.size_bytes
    entry.stored_bytes = 0


def _spool(entry: TarEntry, reader: TarReader, contents: Contents) -> bytes:
    """A content that is large or sparse goes to the remote by way of a file without a name."""
    hasher = hashlib.sha256()
    with nameless_file("a content", contents.directory) as file:
        fd = file.fileno()
        if entry.sparse is not None and entry.size_bytes > free_bytes(fd):
            raise ResourceExhausted(
                f"tar entry {shown(entry.name)}: it is a sparse file of {entry.size_bytes} bytes, "
                f"and {free_bytes(fd)} are free in {contents.directory}"
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
    """Without what Docker does not look at: access times, and the content of what has none."""
    entry.atime_ns = None
    entry.name = entry.name or b"./"
    return writer.header(entry)


class _Packed:
    """A tar on its way out: hashed, compressed by zlib in pieces of a fixed size, hashed again."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._compressor = zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP_WINDOW)
        self._buffer = bytearray()
        self._diff_hasher = hashlib.sha256()
        self._hasher = hashlib.sha256()
        self._size_bytes = 0

    def write(self, data: bytes) -> None:
        """Some more of the tar."""
        self._buffer += data
        while len(self._buffer) >= _PACK_BYTES:
            self._pack(bytes(self._buffer[:_PACK_BYTES]))
            del self._buffer[:_PACK_BYTES]

    def finish(self, files: int) -> GearTar:
        """The tar's end."""
        self._pack(bytes(self._buffer))
        self._emit(self._compressor.flush())
        return GearTar(
            f"sha256:{self._hasher.hexdigest()}", self._size_bytes, f"sha256:{self._diff_hasher.hexdigest()}", files
        )

    def _pack(self, data: bytes) -> None:
        self._diff_hasher.update(data)
        self._emit(self._compressor.compress(data))

    def _emit(self, data: bytes) -> None:
        self._hasher.update(data)
        self._out.write(data)
        self._size_bytes += len(data)
