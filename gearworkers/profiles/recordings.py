"""Who records the starts of containers: a process for each recording (`profiles.recorder`), watched by a thread."""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
import threading
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

import structlog

from gearworkers.errors import GearError
from gearworkers.lazyfs.client import ProfileStatus, report_image
from gearworkers.settings import Settings
from gearworkers.util.syscalls import watch_opens

_log = structlog.get_logger(__name__)

_MAX_AT_ONCE = 4
_HEAD_START_S = 1.0
"""So long the container has the processors for itself; the kernel keeps what it opens meanwhile."""
_END_S = 5.0


@dataclass(frozen=True, slots=True)
class Recording:
    """What the recorder is told."""

    settings: Settings
    image: str
    """The topmost image layer."""
    merged: Path
    """Where the container is mounted."""


class Recordings:
    """The recordings of one process's mounts; all methods from any thread. None outlives the process for long."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: dict[str, FileIO] = {}  # the writing end of a pipe for each; closed when the container ends
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._under_way = 0  # also those whose container has ended
        self._is_closed = False

    def begin(self, id: str, recording: Recording) -> None:
        """Watch a container that is mounted and not started yet; it is left out if it cannot be, or too many are."""
        with self._lock:
            if self._is_closed or id in self._ends or self._under_way >= _MAX_AT_ONCE:
                return
            try:
                group_fd, stop_fd, end_fd = _watched(recording.merged)
            except OSError as exc:
                _log.warning("a start cannot be recorded", container=id, error=f"{exc}")
                return
            end = self._ends[id] = FileIO(end_fd, "w")
            self._under_way += 1
        threading.Thread(
            target=self._run, args=(id, recording, group_fd, stop_fd, end), name="recording", daemon=True
        ).start()

    def end(self, id: str) -> None:
        """The container has ended: what it opened is recorded."""
        with self._lock:
            end = self._ends.pop(id, None)
        if end is not None:
            end.close()

    def close(self) -> None:
        """End all of them without a result."""
        with self._lock:
            self._is_closed = True
            ends, self._ends = list(self._ends.values()), {}
            processes = list(self._processes)
        for process in processes:
            process.terminate()
        for end in ends:
            end.close()
        for process in processes:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()  # it waits for a lazy file server that hangs

    def _run(self, id: str, recording: Recording, group_fd: int, stop_fd: int, end: FileIO) -> None:
        try:
            if _is_used(group_fd, stop_fd, recording.settings.profile_window_s) and not _is_known(recording):
                self._record(recording, group_fd, stop_fd)
        except OSError as exc:
            _log.warning("a start cannot be recorded", container=id, error=f"{exc}")
        finally:
            os.close(group_fd)
            os.close(stop_fd)
            with self._lock:
                self._under_way -= 1
                if self._ends.get(id) is end:
                    del self._ends[id]
            end.close()

    def _record(self, recording: Recording, group_fd: int, stop_fd: int) -> None:
        """Start the recorder, and return when it has ended."""
        command = [sys.executable, "-m", "gearworkers.profiles.recorder", str(group_fd)]
        with self._lock:
            if self._is_closed:
                return
            process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[group_fd])
            self._processes.add(process)
        try:
            assert process.stdin is not None
            process.stdin.write(pickle.dumps(recording))
            process.stdin.flush()
            poll = select.poll()
            poll.register(stop_fd, select.POLLIN)
            poll.register(process.stdin, 0)  # tells when the process has ended
            poll.poll()
            process.stdin.close()
            process.wait()
        finally:
            with self._lock:
                self._processes.discard(process)


def _watched(merged: Path) -> tuple[int, int, int]:
    """A group that watches what is mounted there, and both ends of a pipe.

    Raises:
        OSError: There is none; nothing is left open.
    """
    group_fd = watch_opens(merged)
    try:
        stop_fd, end_fd = os.pipe()
    except OSError:
        os.close(group_fd)
        raise
    return group_fd, stop_fd, end_fd


def _is_used(group_fd: int, stop_fd: int, window_s: float) -> bool:
    """Wait until something was opened, and a moment longer unless the container ends; whether anything was."""
    poll = select.poll()
    poll.register(group_fd, select.POLLIN)
    poll.register(stop_fd, select.POLLIN)
    is_used = any(fd == group_fd for fd, _ in poll.poll(window_s * 1000))
    if is_used:
        poll.unregister(group_fd)
        poll.poll(min(_HEAD_START_S, window_s) * 1000)
    return is_used


def _is_known(recording: Recording) -> bool:
    """Whether a profile has been found in the meantime."""
    try:
        return report_image(recording.settings.lazyfs_socket, recording.image, starts=True) is ProfileStatus.FOUND
    except GearError:
        return False
