"""Find mounts in /proc/self/mountinfo, without accessing the mounted file system.

If the server of the lazy file system is dead, stat would wait for the next server.
"""

from __future__ import annotations

import os
import re
import select
import time
from pathlib import Path

from gearworkers.errors import FailedPrecondition

_MOUNTINFO = "/proc/self/mountinfo"
_MOUNT_POINT_FIELD = 4


def is_mount_point(target: Path) -> bool:
    """Whether *target* is a mount point in this process's mount namespace; its parents may be symlinks."""
    path = os.fsencode(_resolved(target))
    with open(_MOUNTINFO, "rb") as mounts:
        return any(_unescaped(line.split(b" ", 5)[_MOUNT_POINT_FIELD]) == path for line in mounts)


def wait_until_mounted(target: Path, timeout_s: float) -> None:
    """Wait until the lazy file system is mounted at *target*.

    Raises:
        FailedPrecondition: The lazy file system is not mounted within *timeout_s*.

    Source: proc_pid_mounts(5): poll on the descriptor reports changes of the mounts.
    """
    deadline_s = time.monotonic() + timeout_s
    with open(_MOUNTINFO, "rb") as mounts:
        changes = select.poll()
        changes.register(mounts, select.POLLERR | select.POLLPRI)
        while not is_mount_point(target):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                raise FailedPrecondition(f"the lazy file system is not mounted at {target}; start `gear lazyfs`")
            changes.poll(left_s * 1000)


def is_data_layer(path: Path) -> bool:
    """Whether an overlay in this process's mount namespace has *path* as a data layer.

    The parents of *path* may be symlinks. The kernel shows the resolved path or, before Linux 6.13, the given path.
    """
    texts = {b"datadir+=" + os.fsencode(shown) for shown in (_resolved(path), path)}
    with open(_MOUNTINFO, "rb") as mounts:
        options = (option for line in mounts for option in line.rstrip().partition(b" - overlay ")[2].split(b","))
        return any(_unescaped(option) in texts for option in options)


def _resolved(path: Path) -> Path:
    """Resolve symlinks in the parents only: a dead server's file system may be mounted at *path*."""
    return path.parent.resolve() / path.name


def _unescaped(text: bytes) -> bytes:
    """Replace the octal escapes of spaces, commas and other separators."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes((int(found[1], 8),)), text)
