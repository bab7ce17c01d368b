"""The shared store that new objects are pushed to: a directory, local or on NFS."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from gearworkers.errors import from_os_error
from gearworkers.objects.retry import retried
from gearworkers.objects.spool import PushSpool
from gearworkers.objects.store import verify_file

_PIECE_BYTES = 1 << 20


class DirectoryRemote:
    """Objects under their full digest in hex, ``ab/abcd…``; many nodes may push to one at the same time."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, digest: bytes) -> Path:
        """Where the object lies or would lie."""
        name = digest.hex()
        return self._root / name[:2] / name

    @retried
    def put(self, digest: bytes, source_fd: int) -> None:
        """Store the bytes of *source_fd*, verified; idempotent, durable, visible only when whole.

        Raises:
            IntegrityError: The source's bytes are not what the digest says; nothing is visible.
            Unavailable: The directory does not answer, after bounded retries.
        """
        path = self.path(digest)
        try:
            if path.exists() and path.stat().st_size == os.fstat(source_fd).st_size:
                return
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
            try:
                _copy(source_fd, temporary, digest)
                os.rename(temporary, path)
                _sync_directory(path.parent)
            finally:
                temporary.unlink(missing_ok=True)
        except OSError as exc:
            raise from_os_error(exc, f"push object {digest.hex()} to {self._root}") from exc


def push_pending(spool: PushSpool, remote: DirectoryRemote) -> int:
    """Push all that waits in the spool; how many objects.

    A spool entry goes only when the remote has confirmed the object, so a crash pushes it once more, never less.

    Raises:
        Unavailable: The remote does not answer; what is left stays in the spool.
    """
    pushed = 0
    for digest in spool.pending():
        try:
            fd = spool.open(digest)
        except FileNotFoundError:
            continue
        try:
            remote.put(digest, fd)
        finally:
            os.close(fd)
        spool.done(digest)
        pushed += 1
    return pushed


def _copy(source_fd: int, target: Path, digest: bytes) -> None:
    with open(target, "xb") as file:
        offset = 0
        while data := os.pread(source_fd, _PIECE_BYTES, offset):
            file.write(data)
            offset += len(data)
        file.flush()
        os.fsync(file.fileno())
    copy_fd = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        verify_file(copy_fd, digest)
    finally:
        os.close(copy_fd)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
