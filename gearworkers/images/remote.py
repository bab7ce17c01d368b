"""The remote that conversions put contents and records into.

Glossary: a *transfer* is many objects put together, which become visible together, when they are durable: one wait
for the disk a layer, not one an object.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gearworkers.errors import FailedPrecondition, InvalidInput, from_os_error
from gearworkers.mounts import sys as kernel
from gearworkers.objects.remote import DirectoryRemote
from gearworkers.objects.retry import retried
from gearworkers.settings import Settings

_DOCUMENTS = "documents"
_INCOMING = ".incoming"
_ABANDONED_S = 24 * 3600
_COPY_BYTES = 1 << 30


class Transfer(Protocol):
    """Objects on their way to a remote; put from many threads at once, published by one when they are done."""

    def put(self, digest: bytes, data: bytes) -> None:
        """Send an object that the caller has just hashed."""

    def put_file(self, digest: bytes, source_fd: int) -> None:
        """The same, of all the bytes of a file."""

    def publish(self) -> None:
        """Make all that was put visible; when this returns it is durable."""

    def close(self) -> None:
        """Drop what was not published."""


class Remote(Protocol):
    """A shared store of objects and small documents; called from many threads at once.

    It retries by itself what is worth it, within bounds, and raises Unavailable then; NotFound is no error of its
    methods. Every method is idempotent.
    """

    def has(self, digests: Sequence[bytes]) -> Collection[bytes]:
        """Which of *digests* are there."""

    def transfer(self) -> Transfer:
        """Begin to put objects."""

    def document(self, name: str) -> bytes | None:
        """A small document; None if there is none of that name."""

    def put_document(self, name: str, data: bytes) -> None:
        """Store a small document, whole or not at all, durable; the last one of a name counts."""


def open_remote(settings: Settings) -> Remote:
    """The remote of GEAR_REMOTE.

    Raises:
        FailedPrecondition: There is none.
        InvalidInput: It is not an absolute directory.
    """
    if not settings.remote:
        raise FailedPrecondition("GEAR_REMOTE is not set: the contents of Gear images need a place to be fetched from")
    root = Path(settings.remote)
    if not root.is_absolute():
        raise InvalidInput(f"GEAR_REMOTE={settings.remote}: an absolute directory is needed")
    return DirectoryStore(root)


@dataclass(frozen=True, slots=True)
class DirectoryStore:
    """A directory, local or on NFS: the objects of `DirectoryRemote`, with documents beside them."""

    root: Path

    @retried
    def has(self, digests: Sequence[bytes]) -> list[bytes]:
        """As `Remote.has`."""
        objects = DirectoryRemote(self.root)
        return [digest for digest in digests if objects.path(digest).exists()]

    def transfer(self) -> Transfer:
        """As `Remote.transfer`.

        Crash: leaves a directory under .incoming, which a transfer a day later removes.
        """
        incoming = self.root / _INCOMING / secrets.token_hex(8)
        with _told(f"begin a transfer to {self.root}"):
            incoming.mkdir(parents=True)
            _remove_abandoned(incoming.parent)
        return _DirectoryTransfer(self.root, incoming)

    @retried
    def document(self, name: str) -> bytes | None:
        """As `Remote.document`."""
        with _told(f"read document {name} of {self.root}"):
            try:
                return (self.root / _DOCUMENTS / name).read_bytes()
            except FileNotFoundError:
                return None

    @retried
    def put_document(self, name: str, data: bytes) -> None:
        """As `Remote.put_document`."""
        path = self.root / _DOCUMENTS / name
        temporary = path.with_name(f".{name}.{secrets.token_hex(4)}")
        with _told(f"write document {name} of {self.root}"):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.rename(temporary, path)
                _sync(path.parent, os.fsync)
            finally:
                temporary.unlink(missing_ok=True)


class _DirectoryTransfer:
    """Files under .incoming, then a sync of the file system, their names, and another sync."""

    def __init__(self, root: Path, incoming: Path) -> None:
        self._root = root
        self._incoming = incoming

    def put(self, digest: bytes, data: bytes) -> None:
        with _told(f"put object {digest.hex()} into {self._root}"):
            (self._incoming / digest.hex()).write_bytes(data)

    def put_file(self, digest: bytes, source_fd: int) -> None:
        with (
            _told(f"put object {digest.hex()} into {self._root}"),
            open(self._incoming / digest.hex(), "wb", buffering=0) as file,
        ):
            offset = 0
            while count := os.sendfile(file.fileno(), source_fd, offset, _COPY_BYTES):
                offset += count

    @retried
    def publish(self) -> None:
        objects = DirectoryRemote(self._root)
        with _told(f"publish objects in {self._root}"):
            _sync(self._incoming, kernel.syncfs)
            for name in sorted(os.listdir(self._incoming)):
                path = objects.path(bytes.fromhex(name))
                path.parent.mkdir(exist_ok=True)
                os.rename(self._incoming / name, path)
            _sync(self._incoming, kernel.syncfs)

    def close(self) -> None:
        shutil.rmtree(self._incoming, ignore_errors=True)


def _remove_abandoned(incoming: Path) -> None:
    """What transfers that died have left, a day after."""
    for path in incoming.iterdir():
        try:
            if path.stat().st_mtime < time.time() - _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            pass  # somebody else was faster


def _sync(directory: Path, how: _Sync) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how(fd)
    finally:
        os.close(fd)


class _Sync(Protocol):
    def __call__(self, fd: int, /) -> None: ...


@contextmanager
def _told(tried: str) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise from_os_error(exc, tried) from exc
