"""What a process of ours tells the kernel, systemd and others like it about itself."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gearworkers.errors import FailedPrecondition, from_os_error

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent_pid: int, with_signal: signal.Signals = signal.SIGTERM) -> None:
    """Have this process get a signal when the thread that started it ends, so that none outlives a killed parent.

    Args:
        parent_pid: Who it should be; if it is gone already, this process ends at once.
        with_signal: Which.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, with_signal)
    if os.getppid() != parent_pid:
        os._exit(1)


@contextmanager
def alone(path: Path, what: str) -> Iterator[None]:
    """Be the only process that is in such a block with the lock file *path*; once only in one process.

    It is no longer in it when it has ended, whatever children it leaves.

    Raises:
        FailedPrecondition: Another one is.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        raise from_os_error(exc, f"open {path}") from exc
    try:
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a child does not inherit it
        except (BlockingIOError, PermissionError) as exc:
            raise FailedPrecondition(f"{what} runs already ({path} is locked)") from exc
        yield
    finally:
        os.close(fd)


def tell_ready(notify_socket: str) -> None:
    """Tell systemd that this process answers.

    Args:
        notify_socket: Where it waits for that; empty if nobody does.

    Raises:
        GearError: It cannot be told.

    Source: sd_notify(3), "READY=1", and "Notes" for the socket's name.
    """
    if not notify_socket:
        return
    address = "\0" + notify_socket[1:] if notify_socket.startswith("@") else notify_socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        try:
            line.sendto(b"READY=1", address)
        except OSError as exc:
            raise from_os_error(exc, f"tell systemd at {notify_socket} that all is ready") from exc
