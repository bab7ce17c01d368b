"""Tars for tests: read, rebuilt from their stream, and corrupted on purpose."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass

from gearworkers.tar.entry import TarEntry
from gearworkers.tar.reader import TarReader
from gearworkers.tar.tar_split import RawBytes, TarSplitReader, TarSplitWriter


@dataclass(frozen=True)
class ReadTar:
    """Every entry of a tar with its content (sparse files expanded), and the stream made from the tar."""

    files: list[tuple[TarEntry, bytes]]
    objects: dict[bytes, bytes]
    stream: bytes

    @property
    def entries(self) -> list[TarEntry]:
        return [entry for entry, _ in self.files]

    def content(self, name: bytes) -> bytes:
        return next(content for entry, content in self.files if entry.name == name)

    def rebuilt(self) -> bytes:
        """Rebuild the tar from stream and objects; return its bytes."""
        pieces = TarSplitReader(io.BytesIO(self.stream))
        return b"".join(
            piece.data
            if isinstance(piece, RawBytes)
            else self.objects[piece.digest][piece.offset_bytes : piece.offset_bytes + piece.length_bytes]
            for piece in pieces
        )


class Trickle:
    """A source that returns only a few bytes per read, like a slow socket."""

    def __init__(self, data: bytes, step_bytes: int) -> None:
        self._file = io.BytesIO(data)
        self._step_bytes = step_bytes

    def readinto(self, buffer: memoryview, /) -> int:
        return self._file.readinto(buffer[: self._step_bytes])


def read_tar(data: bytes, *, buffer_bytes: int = 1 << 16, step_bytes: int = 1 << 20) -> ReadTar:
    """Read the tar *data* as an import does: contents become objects, the rest becomes the stream."""
    file = io.BytesIO()
    log = TarSplitWriter(file)
    reader = TarReader(Trickle(data, step_bytes), log, buffer_bytes=buffer_bytes)
    files: list[tuple[TarEntry, bytes]] = []
    objects: dict[bytes, bytes] = {}
    for entry in reader:
        whole = reader.payload()
        stored = bytes(whole) if whole is not None else b"".join(bytes(piece) for piece in reader.chunks())
        content = stored if entry.sparse is None else expand(entry, stored)
        digest = hashlib.sha256(content).digest()
        objects[digest] = content
        log_content(log, entry, digest, len(stored))
        files.append((entry, content))
    reader.finish()
    log.close()
    return ReadTar(files, objects, file.getvalue())


def log_content(log: TarSplitWriter, entry: TarEntry, digest: bytes, stored_bytes: int) -> None:
    """Record in the stream that the content just read is the object *digest*."""
    if entry.sparse is None:
        if stored_bytes:
            log.content(digest, stored_bytes)
        return
    for offset_bytes, length_bytes in entry.sparse:
        log.slice(digest, offset_bytes, length_bytes)


def expand(entry: TarEntry, stored: bytes) -> bytes:
    """Return a sparse file's content from its stored segments."""
    content = bytearray(entry.size_bytes)
    at = 0
    for offset_bytes, length_bytes in entry.sparse or ():
        content[offset_bytes : offset_bytes + length_bytes] = stored[at : at + length_bytes]
        at += length_bytes
    return bytes(content)


def with_checksum(block: bytes | bytearray) -> bytes:
    """Return the header *block* with a correct checksum."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def with_header_bytes(tar: bytes, at: int, new: bytes) -> bytes:
    """Return *tar* with *new* at offset *at* of its first header, and a correct checksum."""
    return with_checksum(tar[:at] + new + tar[at + len(new) : 512]) + tar[512:]
