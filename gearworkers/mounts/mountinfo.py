"""Where the lazy file system is mounted and who looks into it, as mountinfo tells: the file system is not asked.

Its server may be dead, and then a stat would wait for the next one.
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
    """Whether something is mounted at *target* in this process's mount namespace; its parents may be symlinks."""
    wanted = os.fsencode(_resolved(target))
    with open(_MOUNTINFO, "rb") as mounts:
        return any(_unescaped(line.split(b" ", 5)[_MOUNT_POINT_FIELD]) == wanted for line in mounts)


def wait_until_mounted(target: Path, timeout_s: float) -> None:
    """Return when the lazy file system is there.

    Raises:
        FailedPrecondition: Nobody has mounted it in that time.

    Source: proc_pid_mounts(5): a descriptor that polls when the mounts have changed.
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
    """Whether an overlay of this process's mount namespace has *path* among its data layers.

    Its parents may be symlinks: the kernel tells where it lies or, before Linux 6.13, as what it was given.
    """
    wanted = {b"datadir+=" + os.fsencode(one) for one in (_resolved(path), path)}
    with open(_MOUNTINFO, "rb") as mounts:
        options = (option for line in mounts for option in line.rstrip().partition(b" - overlay ")[2].split(b","))
        return any(_unescaped(option) in wanted for option in options)


def _resolved(path: Path) -> Path:
    """Without symlinks above it; the last name, where a dead server's file system may be mounted, is not looked at."""
    return path.parent.resolve() / path.name


def _unescaped(text: bytes) -> bytes:
    """As the kernel meant it: spaces, commas and what else would end a field are octal."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes((int(found[1], 8),)), text)
