"""Memory and CPU time of a stack's processes."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.support.stack import Stack

_CPU_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass
class Workers:
    """Memory of the import worker's processes while they ran."""

    peak_bytes: int = 0
    """The largest process; shared pages counted in full."""
    together_bytes: int = 0
    """All processes at one time; shared pages counted once."""


@contextmanager
def watched(stack: Stack) -> Iterator[Workers]:
    """Sample the import worker's processes ten times a second: its writer process ends with the import."""
    found, ended = Workers(), threading.Event()
    leader = stack.daemons["import"].pid

    def sample() -> None:
        while not ended.wait(0.1):
            sizes = [resident_sizes(pid) for pid in session(leader)]
            found.peak_bytes = max(found.peak_bytes, *(resident for resident, _ in sizes))
            found.together_bytes = max(found.together_bytes, sum(share for _, share in sizes))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def resident_sizes(pid: int) -> tuple[int, int]:
    """Return peak resident bytes, and resident bytes with shared pages divided; zeros for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        smaps = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0, 0
    return _kilobytes(status, "VmHWM:") * 1024, _kilobytes(smaps, "Pss:") * 1024


def _kilobytes(text: str, key: str) -> int:
    return next((int(line.split()[1]) for line in text.splitlines() if line.startswith(key)), 0)


def session(leader: int) -> list[int]:
    """Return the pids of all processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            if int(path.read_text().rsplit(")", 1)[1].split()[3]) == leader:
                found.append(int(path.parent.name))
    return found


def cpu_seconds(leader: int) -> float:
    """Return the CPU seconds of a session's processes so far, those that have ended and were waited for included."""
    ticks = 0
    for pid in session(leader):
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
            ticks += sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    return ticks / _CPU_TICKS_PER_S
