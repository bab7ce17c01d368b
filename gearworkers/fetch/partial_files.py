"""The directory of objects that are incomplete.

A small object has a file with an arbitrary name while it is written. A large object has a sparse file, named by its
digest in hex, and a layout file with the suffix `.layout`. A crash leaves both, and the next process resumes them.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

from gearworkers.digest import DIGEST_BYTES
from gearworkers.errors import IntegrityError, from_os_error
from gearworkers.fetch.source import Chunk, checked_layout
from gearworkers.util.open_file import ObjectFile
from gearworkers.util.writing import replace_file

_RECORD = struct.Struct(f"<QQ{DIGEST_BYTES}s")
_LAYOUT_SUFFIX = ".layout"
_CHUNK_INDEX = "chunks.sqlite"
_READ_WRITE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC


class PartialFiles:
    """A directory that one process owns, on the store's file system; any thread may call all methods."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.chunk_index = path / _CHUNK_INDEX
        """The file of the chunk index."""
        self.fd = -1
        """The descriptor of the directory, after `prepare`."""

    def prepare(self) -> None:
        """Create the directory; remove leftovers of a crash, except large objects that can be resumed.

        Raises:
            GearError: The directory cannot be used.
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

    def name(self, digest: bytes) -> bytes:
        """Return the name of a large object's file in this directory."""
        return digest.hex().encode()

    def layout(self, digest: bytes, size_bytes: int) -> Sequence[Chunk] | None:
        """Return the layout that `create` stored; None if there is none or a power cut damaged it."""
        try:
            raw = self._layout_path(digest).read_bytes()
            return checked_layout([Chunk(*fields) for fields in _RECORD.iter_unpack(raw)], size_bytes)
        except (FileNotFoundError, struct.error, IntegrityError):
            return None

    def create(self, digest: bytes, size_bytes: int, layout: Sequence[Chunk]) -> ObjectFile:
        """Store *layout* and open the object's sparse file, which an earlier process may have filled in part.

        Raises:
            GearError: The files cannot be written.
        """
        try:
            records = b"".join(_RECORD.pack(chunk.offset, chunk.size_bytes, chunk.digest) for chunk in layout)
            replace_file(self._layout_path(digest), records, sync=False)  # a power cut may damage it: `layout` checks
            file = ObjectFile(os.open(self._file_path(digest), _READ_WRITE, 0o400))
            os.ftruncate(file.fd, size_bytes)
        except OSError as exc:
            raise from_os_error(exc, f"create a partial file of object {digest.hex()}") from exc
        return file

    def open(self, digest: bytes) -> ObjectFile | None:
        """Open the object's sparse file for reading; None if there is none.

        Raises:
            GearError: It cannot be opened.
        """
        try:
            return ObjectFile(os.open(self._file_path(digest), os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise from_os_error(exc, f"open the partial file of object {digest.hex()}") from exc

    def digests(self) -> list[bytes]:
        """Return the digests of all objects that have a layout here."""
        return [bytes.fromhex(path.stem) for path in self._path.glob("*" + _LAYOUT_SUFFIX)]

    def remove(self, digest: bytes) -> None:
        """Remove the object's files; idempotent."""
        self._file_path(digest).unlink(missing_ok=True)
        self._layout_path(digest).unlink(missing_ok=True)

    def _file_path(self, digest: bytes) -> Path:
        return self._path / digest.hex()

    def _layout_path(self, digest: bytes) -> Path:
        return self._path / (digest.hex() + _LAYOUT_SUFFIX)
