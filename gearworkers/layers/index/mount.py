"""Mount a layer's index, an EROFS image in a file, for use by overlays.

Source: Linux Documentation/filesystems/erofs.rst. Linux 6.12 and newer mount the file directly; older kernels need a
loop device.
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from gearworkers.errors import from_os_error
from gearworkers.mounts.overlay import is_mounted
from gearworkers.util import syscalls
from gearworkers.util.locks import locked_directory

_NO_BLOCK_DEVICE = frozenset((errno.ENOTBLK, errno.EINVAL))


def mount_index(image: Path, target: Path, *, prepare: Callable[[], None] = lambda: None) -> None:
    """Mount *image* at the directory *target* unless it is mounted. Many processes may call at once.

    Args:
        image: The file.
        target: The mount point; its parent directory is locked meanwhile.
        prepare: Called under the lock before *image* is mounted.

    Raises:
        NotFound: The image or the directory is missing.
        GearError: The kernel refused the mount.
    """
    if is_mounted(target):
        return
    try:
        with locked_directory(target.parent):
            if not is_mounted(target):
                prepare()
                _mount(image, target)
    except OSError as exc:
        raise from_os_error(exc, f"mount {image}: {exc.strerror}") from exc


def _mount(image: Path, target: Path) -> None:
    context_fd = syscalls.fsopen("erofs")
    try:
        syscalls.fsconfig_string(context_fd, "source", os.fsencode(image))
        syscalls.fsconfig_flag(context_fd, "ro")
        try:
            syscalls.fsconfig_create(context_fd)
        except OSError as exc:
            if exc.errno not in _NO_BLOCK_DEVICE:
                raise
            _mount_by_loop(image, target, exc)
            return
        mount_fd = syscalls.fsmount(context_fd, syscalls.MOUNT_ATTR_RDONLY)
        try:
            syscalls.move_mount(mount_fd, target)
        finally:
            os.close(mount_fd)
    finally:
        os.close(context_fd)


def _mount_by_loop(image: Path, target: Path, cause: OSError) -> None:
    """Mount on a kernel that mounts block devices only: mount(8) sets up a loop device that the unmount releases."""
    command = ["mount", "-t", "erofs", "-o", "ro,loop", str(image), str(target)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise OSError(cause.errno, f"{cause.strerror}; with a loop device: {result.stderr.strip()}")
