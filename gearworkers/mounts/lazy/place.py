"""Where the lazy file system is mounted and who looks into it, as mountinfo tells: the file system is not asked.

Its server may be dead, and then a stat would wait for the next one.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from gearworkers.errors import FailedPrecondition

_MOUNTINFO = "/proc/self/mountinfo"
_MOUNT_POINT_FIELD = 4
_STEP_S = 0.02


def is_mount_point(target: Path) -> bool:
    """Whether something is mounted at *target* in this process's mount namespace."""
    escaped = os.fsencode(target).replace(b"\\", b"\\134").replace(b" ", b"\\040")
    with open(_MOUNTINFO, "rb") as mounts:
        return any(line.split(b" ", 5)[_MOUNT_POINT_FIELD] == escaped for line in mounts)


def wait_until_mounted(target: Path, timeout_s: float) -> None:
    """Return when the lazy file system is there.

    Raises:
        FailedPrecondition: Nobody has mounted it in that time.
    """
    deadline_s = time.monotonic() + timeout_s
    while not is_mount_point(target):
        if time.monotonic() > deadline_s:
            raise FailedPrecondition(f"the lazy file system is not mounted at {target}; start `gear lazyfs`")
        time.sleep(_STEP_S)


def is_data_layer(path: Path) -> bool:
    """Whether an overlay of this process's mount namespace has *path* among its data layers."""
    escaped = os.fsencode(path)
    with open(_MOUNTINFO, "rb") as mounts:
        return any(escaped in line.partition(b" - overlay ")[2] for line in mounts)
