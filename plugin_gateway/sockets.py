"""The Unix sockets on which the gateway listens."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from gearworkers.errors import FailedPrecondition, from_os_error

BACKLOG = 4096
"""After a boot dockerd starts hundreds of containers at once, and it treats a full backlog (EAGAIN) as an error."""


def listen(path: Path) -> socket.socket:
    """Return a non-blocking socket that listens at *path*, for root only; create its directory.

    A socket file without a listener is a leftover of a crash, and is replaced.

    Raises:
        FailedPrecondition: Another process listens at *path*.
        GearError: The kernel refuses.
    """
    require_unused(path)
    try:
        return _bound(path)
    except OSError as exc:
        raise from_os_error(exc, f"listen on {path}") from exc


def require_unused(path: Path) -> None:
    """Make the directory of *path* and remove the socket of a dead process, for a server that binds the path itself.

    Raises:
        FailedPrecondition: Another process listens there.
        GearError: The kernel refuses.
    """
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if _is_live(path):
            raise FailedPrecondition(f"listen on {path}: another gateway answers there; stop it, or set another path")
        path.unlink(missing_ok=True)
    except OSError as exc:
        raise from_os_error(exc, f"listen on {path}") from exc


def _is_live(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except BlockingIOError:
            return True  # the listener does not accept, so a blocking connect would hang
        return True


def _bound(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        listener.bind(str(path))
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(umask)
    listener.listen(BACKLOG)
    listener.setblocking(False)
    return listener
