"""Find mounts in /proc/PID/mountinfo, without accessing the mounted file system.

If the server of the lazy file system is dead, stat would wait for the next server.

Source: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
import select
import time
from pathlib import Path
from typing import NamedTuple

from gearworkers.errors import FailedPrecondition

_MOUNTINFO = "/proc/self/mountinfo"
_MOUNT_POINT_FIELD = 4
_FIRST_TAG_FIELD = 6


class Propagation(NamedTuple):
    """A mount, and where the mounts below it propagate."""

    mount_id: int
    """Unique on the host: a copy of the mount in another mount namespace has another number."""
    group: int
    """The peer group of the mount, from and to which mounts propagate; 0 for none."""
    masters: tuple[int, ...]
    """The peer groups from which it receives mounts."""


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


def propagation_at(path: Path, pid: int) -> Propagation:
    """Return the propagation of the mount that contains the absolute *path* for the process *pid*.

    Raises:
        OSError: There is no such process.
    """
    wanted = os.fsencode(_resolved(path))
    found, length = Propagation(0, 0, ()), -1
    with open(f"/proc/{pid}/mountinfo", "rb") as mounts:
        for line in mounts:
            fields = line.partition(b" - ")[0].split()
            point = _unescaped(fields[_MOUNT_POINT_FIELD]).rstrip(b"/")
            # A later mount covers an earlier one at the same place.
            if (wanted + b"/").startswith(point + b"/") and len(point) >= length:
                found, length = _propagation(fields), len(point)
    return found


def is_data_layer(path: Path) -> bool:
    """Whether an overlay in this process's mount namespace has *path* as a data layer.

    The parents of *path* may be symlinks. The kernel shows the resolved path or, before Linux 6.13, the given path.
    """
    texts = {b"datadir+=" + os.fsencode(shown) for shown in (_resolved(path), path)}
    with open(_MOUNTINFO, "rb") as mounts:
        options = (option for line in mounts for option in line.rstrip().partition(b" - overlay ")[2].split(b","))
        return any(_unescaped(option) in texts for option in options)


def _propagation(fields: list[bytes]) -> Propagation:
    tags = (tag.partition(b":") for tag in fields[_FIRST_TAG_FIELD:])
    values = {name: int(number) for name, _, number in tags if number}
    masters = (values[name] for name in (b"master", b"propagate_from") if name in values)
    return Propagation(int(fields[0]), values.get(b"shared", 0), tuple(masters))


def _resolved(path: Path) -> Path:
    """Resolve symlinks in the parents only: a dead server's file system may be mounted at *path*."""
    return path.parent.resolve() / path.name


def _unescaped(text: bytes) -> bytes:
    """Replace the octal escapes of spaces, commas and other separators."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes((int(found[1], 8),)), text)
