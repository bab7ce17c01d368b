"""The files of an image archive, which is a directory or a tar; tars are read in place."""

from __future__ import annotations

import os
import stat
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gearworkers.errors import InvalidInput, NotFound, from_os_error

_MAX_LINKS = 8


class FileSlice:
    """A file, or a part of one; closed when it is garbage collected."""

    def __init__(self, fd: int, offset: int, size_bytes: int) -> None:
        """
        Args:
            fd: Descriptor of the file; the slice owns it.
            offset: First byte of the slice.
            size_bytes: Length of the slice.
        """
        self._fd = fd
        self._offset = offset
        self._end = offset + size_bytes
        self.size_bytes = size_bytes

    def __del__(self) -> None:
        os.close(self._fd)

    def readinto(self, buffer: memoryview, /) -> int:
        """Fill part of *buffer* from the current position; return the number of bytes, 0 at the end.

        Raises:
            GearError: The file system fails.
        """
        try:
            count = os.preadv(self._fd, [buffer[: self._end - self._offset]], self._offset)
        except OSError as exc:
            raise from_os_error(exc, "read an image's file") from exc
        self._offset += count
        return count


class ArchiveFiles(Protocol):
    """The files of an archive, by name."""

    @property
    def path(self) -> Path:
        """Path of the directory or tar."""

    def open(self, name: str) -> FileSlice:
        """Open a file of the archive.

        Raises:
            NotFound: The archive has no file of this name.
            InvalidInput: The name is outside the archive, or names something other than a regular file.
        """


def open_archive(text: str) -> tuple[ArchiveFiles, str]:
    """Open the archive of ``PATH[:TAG]``; return it and the tag.

    Both may contain colons: the longest existing path is the archive.

    Raises:
        NotFound: No such path exists.
        InvalidInput: The file is not a tar.
    """
    path, tag = text, ""
    while not Path(path).exists() and ":" in path:
        path = path.rpartition(":")[0]
        tag = text[len(path) + 1 :]
    if not Path(path).exists():
        raise NotFound(f"{text}: no such directory or archive")
    return (_DirectoryFiles(Path(path)) if Path(path).is_dir() else _TarFiles.read(Path(path))), tag


@dataclass(frozen=True, slots=True)
class _DirectoryFiles:
    path: Path

    def open(self, name: str) -> FileSlice:
        if os.path.isabs(name) or ".." in name.split("/"):
            raise InvalidInput(f"{self.path}: {name} is outside the archive")
        try:
            fd = os.open(self.path / name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as exc:
            raise from_os_error(exc, f"{self.path}: open {name}") from exc
        file = FileSlice(fd, 0, os.fstat(fd).st_size)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidInput(f"{self.path}: {name} is not a regular file")
        return file


@dataclass(frozen=True, slots=True)
class _TarFiles:
    path: Path
    members: dict[str, tarfile.TarInfo]

    @classmethod
    def read(cls, path: Path) -> _TarFiles:
        try:
            with tarfile.open(path, "r:") as tar:
                return cls(path, {os.path.normpath(member.name): member for member in tar})
        except tarfile.TarError as exc:
            raise InvalidInput(f"{path}: {exc}; if it is compressed, decompress it first") from exc
        except OSError as exc:
            raise from_os_error(exc, f"read {path}") from exc

    def open(self, name: str) -> FileSlice:
        """Open a member; follow links.

        Older versions of `docker save` share layers through symbolic links. tar turns these into hard links when their
        directory is packed again.
        """
        found = os.path.normpath(name)
        for _ in range(_MAX_LINKS):
            member = self.members.get(found)
            if member is None:
                break
            if member.isreg():
                return FileSlice(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC), member.offset_data, member.size)
            origin = os.path.dirname(found) if member.issym() else ""
            found = os.path.normpath(os.path.join(origin, member.linkname))
        raise NotFound(f"{self.path}: the archive has no file {name}")
