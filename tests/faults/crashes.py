"""Child processes that are killed before their n-th step: a call, or an SQL statement, that changes the disk."""

from __future__ import annotations

import io
import os
import select
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

from gearworkers.util import syscalls as kernel

_CHANGING_EVENTS = frozenset(
    (
        "open",
        "os.mkdir",
        "os.rename",
        "os.link",
        "os.remove",
        "os.rmdir",
        "os.setxattr",
        "os.truncate",
        "os.utime",
        "fcntl.ioctl",
    )
)
_UNAUDITED = (
    (os, "write"),
    (os, "pwrite"),
    (os, "fsync"),
    (kernel, "renameat2"),
    (kernel, "syncfs"),
    (kernel, "move_mount"),
    (kernel, "umount2"),
    (kernel, "quotactl_fd"),
)
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT

_Result = TypeVar("_Result")

Report = Callable[[bytes], None]


class Outcome:
    """The words that a child reported, and how it ended."""

    def __init__(self, reported: bytes, status: int) -> None:
        self.reported = reported.split()
        self.was_killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        self.failed = not self.was_killed and os.waitstatus_to_exitcode(status) != 0


def killed_at_every_step(work: Callable[[Report], None], *, stride: int = 1) -> Iterator[Outcome]:
    """Run *work* in children that are killed before step 1, 1 + *stride* and so on, until one of them finishes.

    Args:
        work: Receives a function that reports a word to the parent.
        stride: Number of steps between the kills of two children.
    """
    step = 1
    while True:
        outcome = run_child(partial(_work_until, work, step))
        assert not outcome.failed, f"the child to be killed at step {step} failed: {outcome.reported}"
        yield outcome
        if not outcome.was_killed:
            return
        step += stride


def run_child(work: Callable[[Report], None]) -> Outcome:
    """Run *work* in a forked child and wait for its end."""
    pid, reader = start_child(work)
    return finish_child(pid, reader)


def start_child(work: Callable[[Report], None]) -> tuple[int, int]:
    """Fork; return the child's pid and a descriptor with its output."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    write = os.write
    code = 1
    try:
        work(lambda word: _report(write, writer, word))
        code = 0
    except BaseException as exc:
        write(writer, f" {type(exc).__name__}:{str(exc).replace(' ', '_')}".encode())
    finally:
        os._exit(code)


def finish_child(pid: int, reader: int) -> Outcome:
    """Wait for the child; return its output and exit status."""
    reported = b""
    while data := os.read(reader, 65536):
        reported += data
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    return Outcome(reported, status)


def has_output(reader: int) -> bool:
    """Return whether the child has written output or ended."""
    return bool(select.select([reader], [], [], 0)[0])


def _report(write: Callable[[int, bytes], int], writer: int, word: bytes) -> None:
    write(writer, b" " + word)


def _work_until(work: Callable[[Report], None], step: int, report: Report) -> None:
    remaining = step

    def count() -> None:
        nonlocal remaining
        remaining -= 1
        if not remaining:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _CHANGING_EVENTS and (event != "open" or _writes(arguments)):
            count()

    for module, name in _UNAUDITED:
        setattr(module, name, _counted(getattr(module, name), count))
    setattr(sqlite3, "connect", partial(sqlite3.connect, factory=_counting_connection(count)))  # noqa: B010 - typed
    sys.addaudithook(audit)
    work(report)


def _counting_connection(count: Callable[[], None]) -> type[sqlite3.Connection]:
    """Return a connection class that counts the statements of `execute` except queries."""

    class CountingConnection(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if not sql.startswith("SELECT"):
                count()
            return super().execute(sql, *values)

    return CountingConnection


def _counted(call: Callable[..., Any], count: Callable[[], None]) -> Callable[..., Any]:
    def counted(*arguments: Any, **keywords: Any) -> Any:
        count()
        return call(*arguments, **keywords)

    return counted


def _writes(arguments: tuple[Any, ...]) -> bool:
    flags = arguments[2]
    return isinstance(flags, int) and bool(flags & _WRITING)


class Interrupted(Generic[_Result]):
    """A tar that calls *meanwhile* between its two parts."""

    def __init__(self, first: bytes, meanwhile: Callable[[], _Result | None], second: bytes) -> None:
        self._parts = [first, second]
        self._meanwhile = meanwhile
        self._file = io.BytesIO(first)
        self.outcome: _Result | None = None

    def readinto(self, buffer: memoryview, /) -> int:
        taken = self._file.readinto(buffer)
        if not taken and len(self._parts) == 2:
            self.outcome = self._meanwhile()
            self._file = io.BytesIO(self._parts.pop())
            taken = self._file.readinto(buffer)
        return taken
