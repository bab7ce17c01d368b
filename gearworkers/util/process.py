"""What a process of ours tells the kernel, systemd and others like it about itself."""

from __future__ import annotations

import ctypes
import os
import signal
import socket

from gearworkers.errors import from_os_error

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
