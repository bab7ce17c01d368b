"""Unix sockets that the gateway listens on."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from gearworkers.errors import FailedPrecondition, from_os_error

BACKLOG = 4096
"""dockerd starts some hundred containers at once after a boot, and takes a full backlog (EAGAIN) for an error."""


def listen(path: Path) -> socket.socket:
    """A non-blocking listening socket at *path*, for root alone; its directory is made.

    A socket that nobody listens on, as a crash leaves it, is replaced.

    Raises:
        FailedPrecondition: Somebody listens there.
        GearError: The kernel refuses.
    """
    try:
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        if _is_live(path):
            raise FailedPrecondition(f"listen on {path}: another gateway answers there; stop it, or set another path")
        path.unlink(missing_ok=True)
        return _bound(path)
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
            return True  # who listens there does not accept; a connect that blocks would wait for it
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
