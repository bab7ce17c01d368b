"""What a process of ours asks of the kernel about itself."""

from __future__ import annotations

import ctypes
import os
import signal

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
