"""Decides how each large file is opened: through the server while it arrives, directly (FUSE passthrough) afterwards.

The kernel refuses (EIO) to open a node directly while it is open through the server, and the reverse, and it refuses
two backing files for one node. So each node is first opened through the server. When the object is whole and the node
is not open, the next open is direct, and so are all later ones until the kernel forgets the node. A successor must know
these nodes. So the id of each backing file is saved, before the first direct open is answered, in a directory that
exists as long as the mount.
The number of opens through a dead server is lost, so a node that was open through it is never opened directly.

Crash: leaves an unused registered backing file until the file system is unmounted.

Source: Linux Documentation/filesystems/fuse-passthrough.rst; fs/fuse/iomode.c; from 6.9 on.
"""

from __future__ import annotations

import fcntl
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import structlog

from gearworkers.lazyfs import fuse_protocol
from gearworkers.util.writing import replace_file

_BACKING_OPEN = 0x4010E501
_BACKING_CLOSE = 0x4004E502
_MAP = struct.Struct("<iIQ")
_ID = struct.Struct("<I")
_SERVED = 1
_PASSED = 2

_log = structlog.get_logger(__name__)


class OpenFile(Protocol):
    """A file that stays open while it is referenced."""

    fd: int


class OpenNodes:
    """The nodes of one connection; any thread may call all methods."""

    def __init__(self, fuse_fd: int, directory: Path) -> None:
        self._fuse_fd = fuse_fd
        self._directory = directory
        self._lock = threading.Lock()
        self._lookups: dict[int, int] = {}
        self._served: dict[int, int] = {}
        self._passed: dict[int, int] = {}

    def prepare(self, *, is_new: bool) -> None:
        """Load the nodes that a dead server opened directly; remove the list if the mount is new."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in self._directory.iterdir():
            if is_new or path.suffix:
                path.unlink()
            else:
                self._passed[int(path.name, 16)] = int(path.read_text())

    def looked_up(self, node: int) -> None:
        """Count a lookup; call it before the answer is sent."""
        with self._lock:
            self._lookups[node] = self._lookups.get(node, 0) + 1
            if self._lookups[node] == 1 and node not in self._passed:
                self._served[node] = 0

    def open(self, node: int, get_whole: Callable[[], OpenFile | None]) -> bytes:
        """Return the answer to OPEN.

        Args:
            node: The node of a large object.
            get_whole: Returns the file of the whole object; None while it arrives.
        """
        with self._lock:
            if node not in self._passed and self._served.get(node) == 0:
                whole = get_whole()
                if whole is not None:
                    self._pass(node, whole)
            backing = self._passed.get(node)
            if backing is not None:
                return fuse_protocol.open_body(
                    fuse_protocol.PASSTHROUGH | fuse_protocol.NO_FLUSH, handle=_PASSED, backing=backing
                )
            if node in self._served:
                self._served[node] += 1
            return fuse_protocol.open_body(fuse_protocol.KEEP_CACHE | fuse_protocol.NO_FLUSH, handle=_SERVED)

    def release(self, node: int, handle: int) -> None:
        """Count a close."""
        with self._lock:
            if handle == _SERVED and self._served.get(node, 0) > 0:
                self._served[node] -= 1

    def forget(self, node: int, lookups: int) -> bool:
        """Subtract lookups; return whether the kernel has forgotten the node."""
        with self._lock:
            left = self._lookups.get(node, 0) - lookups
            if left > 0:
                self._lookups[node] = left
                return False
            self._lookups.pop(node, None)
            self._served.pop(node, None)
            backing = self._passed.pop(node, None)
            if backing is not None:
                self._path(node).unlink(missing_ok=True)
                fcntl.ioctl(self._fuse_fd, _BACKING_CLOSE, _ID.pack(backing))
            return True

    def _pass(self, node: int, whole: OpenFile) -> None:
        """Register the backing file; do nothing if the kernel refuses it or its id cannot be saved for a successor."""
        try:
            backing = fcntl.ioctl(self._fuse_fd, _BACKING_OPEN, bytearray(_MAP.pack(whole.fd, 0, 0)))
        except OSError:
            return
        try:
            replace_file(self._path(node), b"%d" % backing, sync=False)  # a reboot ends the mount as well
        except OSError as exc:
            _log.warning("cannot save a backing file's id; reading the object through the server", error=str(exc))
            fcntl.ioctl(self._fuse_fd, _BACKING_CLOSE, _ID.pack(backing))
            return
        del self._served[node]
        self._passed[node] = backing

    def _path(self, node: int) -> Path:
        return self._directory / f"{node:016x}"
