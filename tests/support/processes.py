"""Daemons for tests, with a log file; and waiting for conditions."""

from __future__ import annotations

import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_S = 0.02
PATIENCE_S = 90.0
"""A limit for a busy machine; a condition that holds is noticed at once."""


class NotReady(AssertionError):
    """A condition did not hold in time; the text contains the end of the process's log."""


def wait_until(
    condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S, found: Callable[[], str] = str
) -> None:
    """Return as soon as *condition* holds; *what* and *found* describe the expected and the actual state.

    Raises:
        NotReady: The condition did not hold within *timeout_s*.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise NotReady(f"not within {timeout_s:g} s: {what} {found()}".rstrip())
        time.sleep(POLL_S)


def listens(path: Path) -> bool:
    """Return whether a process listens on the Unix socket *path*."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@dataclass
class Daemon:
    """A long-running process; its output goes to *log*, to which a restart appends."""

    command: Sequence[str]
    log: Path
    environ: Mapping[str, str]
    cwd: Path | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    log_start_bytes: int = field(default=0, init=False)
    """Size of the log when the current run began."""

    @property
    def pid(self) -> int:
        """The process id."""
        assert self.process is not None, f"{self.command[0]} was not started"
        return self.process.pid

    def is_running(self) -> bool:
        """Return whether the process was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the process in its own session, so that Ctrl-C does not reach it."""
        with self.log.open("ab") as log:
            self.log_start_bytes = log.tell()
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=dict(self.environ),
                cwd=self.cwd,
                start_new_session=True,
            )

    def wait_until(self, condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Return as soon as *condition* holds; fail at once, with the end of the log, if the process ends.

        Raises:
            NotReady: The process ended, or the condition did not hold within *timeout_s*.
        """

        def holds() -> bool:
            if not self.is_running():
                raise NotReady(f"{self.command[0]} ended while waiting for {what}:\n{self.log_tail()}")
            return condition()

        try:
            wait_until(holds, what, timeout_s)
        except NotReady as exc:
            raise NotReady(f"{exc}\n{self.log_tail()}") from None

    def stop(self, timeout_s: float = 30.0) -> None:
        """Send SIGTERM and wait; kill the process after *timeout_s*."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None

    def kill(self) -> None:
        """Send SIGKILL and wait."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self.process = None

    def log_count(self, text: bytes) -> int:
        """Return how often the current run has written *text*."""
        return self.log.read_bytes()[self.log_start_bytes :].count(text)

    def log_tail(self, size_bytes: int = 4000) -> str:
        """Return the end of the log."""
        return self.log.read_bytes()[-size_bytes:].decode(errors="replace") if self.log.exists() else ""
