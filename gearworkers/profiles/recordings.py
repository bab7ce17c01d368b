"""Run the recordings of a node: a `profiles.recorder` process for each recording, watched by a thread."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import msgspec
import structlog

from gearworkers.errors import GearError
from gearworkers.lazyfs.client import ProfileStatus, report_image
from gearworkers.settings import Settings
from gearworkers.util.syscalls import watch_opens

_log = structlog.get_logger(__name__)

MAX_RECORDINGS = 4
"""Limit of concurrent recordings; further starts are not recorded."""
_HEAD_START_S = 1.0
"""Seconds in which only the container uses the processors; the kernel queues its opens meanwhile."""
_END_TIMEOUT_S = 5.0
_RECORDER = (sys.executable, "-m", "gearworkers.profiles.recorder")


@dataclass(frozen=True, slots=True)
class Recording:
    """The input of a recorder process."""

    settings: Settings
    image: str
    """The topmost image layer."""
    merged: Path
    """The container's mount point."""

    def encode(self) -> bytes:
        """Encode for the recorder's standard input."""
        return msgspec.msgpack.encode(self, enc_hook=os.fspath)

    @classmethod
    def decode(cls, data: bytes) -> Recording:
        """Decode the result of `encode`."""
        return msgspec.msgpack.decode(data, type=cls, dec_hook=_convert)


class Recordings:
    """The recordings of one process's mounts. Call from any thread. All recordings end soon after the process."""

    def __init__(
        self,
        *,
        watch: Callable[[Path], int] = watch_opens,
        recorder: Sequence[str] = _RECORDER,
        end_timeout_s: float = _END_TIMEOUT_S,
    ) -> None:
        """
        Args:
            watch: Returns a descriptor with the opens of files on the file system mounted at a path.
            recorder: The command of a recorder; the number of that descriptor is appended.
            end_timeout_s: Seconds after which `close` kills a recorder.
        """
        self._watch = watch
        self._recorder = recorder
        self._end_timeout_s = end_timeout_s
        self._lock = threading.Lock()
        self._ends: dict[str, FileIO] = {}  # for each container the writing end of a pipe; closed when it ends
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._running = 0  # includes recordings whose container has ended
        self._is_closed = False

    def begin(self, id: str, recording: Recording) -> None:
        """Begin to watch a container that is mounted and not started yet. Do nothing at the limit or on an error."""
        with self._lock:
            if self._is_closed or id in self._ends or self._running >= MAX_RECORDINGS:
                return
            try:
                group_fd, stop_fd, end_fd = self._watched(recording.merged)
            except OSError as exc:
                _log.warning("cannot record a start", container=id, error=f"{exc}")
                return
            end = self._ends[id] = FileIO(end_fd, "w")
            self._running += 1
        threading.Thread(
            target=self._run, args=(id, recording, group_fd, stop_fd, end), name="recording", daemon=True
        ).start()

    def end(self, id: str) -> None:
        """End the recording of a container that has ended; its result is saved."""
        with self._lock:
            end = self._ends.pop(id, None)
        if end is not None:
            end.close()

    def close(self) -> None:
        """End all recordings without a result."""
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
                process.wait(self._end_timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()  # it waits for a lazy file server that hangs

    def _watched(self, merged: Path) -> tuple[int, int, int]:
        """Return a descriptor that watches the mount point, and both ends of a pipe.

        Raises:
            OSError: A descriptor cannot be created; none is left open.
        """
        group_fd = self._watch(merged)
        try:
            stop_fd, end_fd = os.pipe()
        except OSError:
            os.close(group_fd)
            raise
        return group_fd, stop_fd, end_fd

    def _run(self, id: str, recording: Recording, group_fd: int, stop_fd: int, end: FileIO) -> None:
        try:
            if _is_used(group_fd, stop_fd, recording.settings.profile_window_s) and not _has_profile(recording):
                self._record(recording, group_fd, stop_fd)
        except OSError as exc:
            _log.warning("cannot record a start", container=id, error=f"{exc}")
        finally:
            os.close(group_fd)
            os.close(stop_fd)
            with self._lock:
                self._running -= 1
                if self._ends.get(id) is end:
                    del self._ends[id]
            end.close()

    def _record(self, recording: Recording, group_fd: int, stop_fd: int) -> None:
        """Run the recorder until it has ended."""
        with self._lock:
            if self._is_closed:
                return
            command = (*self._recorder, str(group_fd))
            process = subprocess.Popen(command, stdin=subprocess.PIPE, bufsize=0, pass_fds=[group_fd])
            self._processes.add(process)
        try:
            assert process.stdin is not None
            data = recording.encode()
            with suppress(BrokenPipeError):  # the process was ended meanwhile; poll reports it
                process.stdin.write(b"%d\n" % len(data) + data)
            poll = select.poll()
            poll.register(stop_fd, select.POLLIN)
            poll.register(process.stdin, 0)  # reports when the process has ended
            poll.poll()
            process.stdin.close()
            process.wait()
        finally:
            with self._lock:
                self._processes.discard(process)


def _is_used(group_fd: int, stop_fd: int, window_s: float) -> bool:
    """Wait until a file is opened, then a moment longer unless the container ends; return whether one was opened."""
    poll = select.poll()
    poll.register(group_fd, select.POLLIN)
    poll.register(stop_fd, select.POLLIN)
    is_used = any(fd == group_fd for fd, _ in poll.poll(window_s * 1000))
    if is_used:
        poll.unregister(group_fd)
        poll.poll(min(_HEAD_START_S, window_s) * 1000)
    return is_used


def _has_profile(recording: Recording) -> bool:
    """Whether the lazy file server has found a profile in the meantime."""
    try:
        status = report_image(recording.settings.lazyfs_socket, recording.image, starts=True)
        return status is ProfileStatus.FOUND
    except GearError:
        return False


def _convert(kind: type, text: str) -> Any:
    """Make a value of a type that MessagePack lacks: Path is the only one in a recording."""
    return kind(text)
