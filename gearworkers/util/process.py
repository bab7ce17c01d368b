"""The lifetime, name and memory of a process."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
from contextlib import suppress

from gearworkers.errors import from_os_error

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PR_SET_NAME = 15


def end_with_parent(parent_pid: int, with_signal: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal when the thread that started it ends, so that it does not outlive a killed parent.

    Args:
        parent_pid: The expected parent; if it has ended already, this process exits at once.
        with_signal: The signal.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, with_signal)
    if os.getppid() != parent_pid:
        os._exit(1)


def set_name(name: str) -> None:
    """Set this process's name in `ps -e` and `top`, cut to 15 bytes; its arguments stay as they are."""
    ctypes.CDLL(None).prctl(_PR_SET_NAME, name.encode(), 0, 0, 0)


def return_free_memory() -> None:
    """Return memory that C's allocator holds for reuse to the system; does nothing with another libc than glibc."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def notify_ready(notify_socket: str) -> None:
    """Notify systemd that this process is ready.

    Args:
        notify_socket: The value of NOTIFY_SOCKET; empty: do nothing.

    Raises:
        GearError: The socket cannot be written to.

    Source: sd_notify(3), "READY=1", and "Notes" for the socket's name.
    """
    if not notify_socket:
        return
    address = "\0" + notify_socket[1:] if notify_socket.startswith("@") else notify_socket
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        try:
            client.sendto(b"READY=1", address)
        except OSError as exc:
            raise from_os_error(exc, f"notify systemd at {notify_socket}") from exc
