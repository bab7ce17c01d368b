"""Daemons of the harness: started with a log file, waited for by a condition, ended for sure."""

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
"""An upper bound for a busy machine; the condition is noticed at once."""


class NotReady(AssertionError):
    """The awaited condition did not come; the text holds the end of the process's log."""


def wait_until(
    condition: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S, found: Callable[[], str] = str
) -> None:
    """Return as soon as *condition* holds; *found* describes the state instead.

    Raises:
        NotReady: It did not within *timeout_s*.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise NotReady(f"not within {timeout_s:g} s: {what} {found()}".rstrip())
        time.sleep(POLL_S)


def listens(path: Path) -> bool:
    """Whether someone accepts connections on the Unix socket *path*."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(path)) == 0


@dataclass
class Daemon:
    """One long-running process; its output goes to *log*, which a restart continues."""

    command: Sequence[str]
    log: Path
    environ: Mapping[str, str]
    cwd: Path | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, init=False)
    log_start_bytes: int = field(default=0, init=False)
    """Where in the log the present run begins."""

    @property
    def pid(self) -> int:
        """The running process's id."""
        assert self.process is not None, f"{self.command[0]} was not started"
        return self.process.pid

    def is_running(self) -> bool:
        """Whether it was started and has not ended."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it in a session of its own, so that a Ctrl-C reaches only whoever stops it in order."""
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
        """As the function; fails at once, with the log's end, if the process dies meanwhile."""

        def holds() -> bool:
            if not self.is_running():
                raise NotReady(f"{self.command[0]} ended while waiting for {what}:\n{self.log_tail()}")
            return condition()

        try:
            wait_until(holds, what, timeout_s)
        except NotReady as exc:
            raise NotReady(f"{exc}\n{self.log_tail()}") from None

    def stop(self, timeout_s: float = 30.0) -> None:
        """SIGTERM and wait; SIGKILL when that takes longer than *timeout_s*."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None

    def kill(self) -> None:
        """SIGKILL and wait."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        self.process = None

    def log_count(self, text: bytes) -> int:
        """How often the present run has written *text*."""
        return self.log.read_bytes()[self.log_start_bytes :].count(text)

    def log_tail(self, size_bytes: int = 4000) -> str:
        """The end of its log."""
        return self.log.read_bytes()[-size_bytes:].decode(errors="replace") if self.log.exists() else ""
