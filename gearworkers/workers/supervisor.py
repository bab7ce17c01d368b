"""Fork the workers of a node, and fork a worker anew when it ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Collection, Iterator, Sequence

import structlog

from gearworkers.util.process import end_with_parent

_log = structlog.stdlib.get_logger(__name__)

_RESTART_DELAY_S = 1.0
_STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}


def supervise(names: Sequence[str]) -> str | None:
    """Fork a process for each name; return its name in it, and None here once all have ended after SIGTERM.

    A process that ends earlier is forked anew after _RESTART_DELAY_S. All of them get SIGTERM when this process
    receives one of _STOPS or dies. This process must have no other threads.
    """
    old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*_STOPS, signal.SIGCHLD})
    running: dict[int, str] = {}
    due_s = dict.fromkeys(names, 0.0)  # when to fork those that do not run
    while True:
        for name in [name for name, at_s in due_s.items() if at_s <= time.monotonic()]:
            pid = _fork(old_mask)
            if not pid:
                return name
            running[pid] = name
            del due_s[name]
        if _next_signal(due_s.values()) in _STOPS:
            break
        for name, code in _ended(running):
            _log.error("a worker has ended and will be started again", worker=name, status=code)
            due_s[name] = time.monotonic() + _RESTART_DELAY_S
    for pid in running:
        os.kill(pid, signal.SIGTERM)
    for pid in running:
        os.waitpid(pid, 0)
    return None


def _fork(mask: Collection[int]) -> int:
    """Fork; return the child's pid here, and 0 in the child, which ends with this process and has this signal mask."""
    parent_pid = os.getpid()
    pid = os.fork()
    if not pid:
        end_with_parent(parent_pid)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return pid


def _next_signal(due_s: Collection[float]) -> int | None:
    """Wait for a signal; return None at the first time in *due_s*."""
    signals = {*_STOPS, signal.SIGCHLD}
    if not due_s:
        return signal.sigwait(signals)
    received = signal.sigtimedwait(signals, max(min(due_s) - time.monotonic(), 0))
    return None if received is None else received.si_signo


def _ended(running: dict[int, str]) -> Iterator[tuple[str, int]]:
    """Remove the ended processes from *running*; yield their names and exit codes, negative for a signal."""
    for pid in list(running):
        ended_pid, status = os.waitpid(pid, os.WNOHANG)
        if ended_pid:
            yield running.pop(pid), os.waitstatus_to_exitcode(status)
