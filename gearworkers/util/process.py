"""The lifetime of a process: end with the parent, notify systemd."""

from __future__ import annotations

import ctypes
import os
import signal
import socket

from gearworkers.errors import from_os_error

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent(parent_pid: int, with_signal: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal when the thread that started it ends, so that it does not outlive a killed parent.

    Args:
        parent_pid: The expected parent; if it has ended already, this process exits at once.
        with_signal: The signal.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, with_signal)
    if os.getppid() != parent_pid:
        os._exit(1)


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
