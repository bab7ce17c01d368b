"""Where objects lie until they are whole.

A small one has a file of any name while it is written. A large one has a sparse file, named by its digest in hex, and
beside it its layout; a crash leaves both, for the next process to go on with.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

from gearworkers.digest import DIGEST_BYTES
from gearworkers.errors import IntegrityError, from_os_error
from gearworkers.fetch.source import Chunk, checked_layout
from gearworkers.util.open_file import File
from gearworkers.util.writing import replace_file

_RECORD = struct.Struct(f"<QQ{DIGEST_BYTES}s")
_LAYOUT_SUFFIX = ".layout"
_CHUNK_INDEX = "chunks.sqlite"
_READ_WRITE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC


class Staging:
    """A directory of one process's own, on the store's file system; all methods from any thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.chunk_index = path / _CHUNK_INDEX
        """Where chunks lie (`objects.chunkindex`)."""
        self.fd = -1
        """The directory, open once it is prepared."""

    def prepare(self) -> None:
        """Make it; remove what a crash left there, but for large objects on their way.

        Raises:
            GearError: It cannot be used.
        """
        try:
            self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in self._path.iterdir():
                is_large = path.suffix == _LAYOUT_SUFFIX or path.with_name(path.name + _LAYOUT_SUFFIX).exists()
                if not is_large and not path.name.startswith(_CHUNK_INDEX):
                    path.unlink()
            self.fd = os.open(self._path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as exc:
            raise from_os_error(exc, f"prepare {self._path}") from exc

    # -- large objects

    def name(self, digest: bytes) -> bytes:
        """Of the object's file."""
        return digest.hex().encode()

    def layout(self, digest: bytes, size_bytes: int) -> Sequence[Chunk] | None:
        """What `keep` was given; None if there is none or a power cut has spoilt it."""
        try:
            raw = self._layout_path(digest).read_bytes()
            return checked_layout([Chunk(*fields) for fields in _RECORD.iter_unpack(raw)], size_bytes)
        except (FileNotFoundError, struct.error, IntegrityError):
            return None

    def keep(self, digest: bytes, size_bytes: int, layout: Sequence[Chunk]) -> File:
        """The object's file, which may have bytes already; its layout is kept beside it.

        Raises:
            GearError: There is no room, or what else is wrong.
        """
        try:
            records = b"".join(_RECORD.pack(chunk.offset, chunk.size_bytes, chunk.digest) for chunk in layout)
            replace_file(self._layout_path(digest), records, sync=False)  # `layout` rejects one that a power cut spoilt
            file = File(os.open(self._file_path(digest), _READ_WRITE, 0o400))
            os.ftruncate(file.fd, size_bytes)
        except OSError as exc:
            raise from_os_error(exc, f"keep object {digest.hex()}") from exc
        return file

    def open(self, digest: bytes) -> File | None:
        """The object's file as far as it has arrived, to be read; None if it is not on its way.

        Raises:
            GearError: It cannot be opened.
        """
        try:
            return File(os.open(self._file_path(digest), os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise from_os_error(exc, f"open object {digest.hex()} on its way") from exc

    def kept(self) -> list[bytes]:
        """The digests of the objects whose layout is here."""
        return [bytes.fromhex(path.stem) for path in self._path.glob("*" + _LAYOUT_SUFFIX)]

    def remove(self, digest: bytes) -> None:
        """Whatever is here of the object; nothing being here is fine."""
        self._file_path(digest).unlink(missing_ok=True)
        self._layout_path(digest).unlink(missing_ok=True)

    def _file_path(self, digest: bytes) -> Path:
        return self._path / digest.hex()

    def _layout_path(self, digest: bytes) -> Path:
        return self._path / (digest.hex() + _LAYOUT_SUFFIX)
