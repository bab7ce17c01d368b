"""The sizes that containers are held to: a project each, whose files and limit the file system keeps.

A project's number is free while no file belongs to it, whatever limit it has. So nothing must be kept but the number
of a layer's own project, and what a crash leaves is a limit that the next user of the number replaces.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gearworkers.errors import FailedPrecondition, ResourceExhausted, from_os_error
from gearworkers.mounts import quotactl
from gearworkers.mounts.probe import backing_fs_name
from gearworkers.util.fs import opened_directory

_FIRST = 1 << 20
"""Docker's overlay2 and its volumes count from 1."""
_MOUNT_BYTES = 4 << 20
"""Of which an overlay takes one directory; xfs asks for more before it begins."""
_LAST = (1 << 32) - 2


class Quotas:
    """Those of one root's containers; from any thread of the one process of the node that makes them."""

    def __init__(self, containers: Path) -> None:
        self._containers = containers
        self._lock = threading.Lock()
        self._next = _FIRST  # only grows: a number that is just given back is nobody's for a while

    def require(self) -> None:
        """Make sure that sizes can be enforced.

        Raises:
            FailedPrecondition: The file system does not, or its administrator has a project for all of GEAR_ROOT.
        """
        try:
            with opened_directory(self._containers) as dir_fd:
                is_enforced = quotactl.is_enforced(dir_fd)
                project = quotactl.project_of(dir_fd) if is_enforced else None
        except OSError as exc:
            raise from_os_error(exc, f"ask for project quotas in {self._containers}") from exc
        if project is None:
            raise FailedPrecondition(
                f"--storage-opt size: {self._containers} is on {backing_fs_name(self._containers)} without project "
                "quotas; use xfs mounted with pquota, or ext4 made with -O project,quota and mounted with prjquota"
            )
        if project.is_inherited:
            raise FailedPrecondition(
                f"--storage-opt size: what is in {self._containers} belongs to project {project.id} already; take "
                "that from the directory (chattr -P) to limit single containers"
            )

    def limit(self, directory: Path, size_bytes: int) -> int:
        """Let what will be made in the empty *directory* take *size_bytes* at most; its project.

        Raises:
            GearError: The file system refuses.

        Crash: a limit of a project without files, or an empty directory in build/.
        """
        try:
            with opened_directory(directory) as dir_fd, self._lock:
                project = self._free_project(dir_fd)
                quotactl.limit(dir_fd, project, size_bytes)
                quotactl.assign(dir_fd, project)
                self._next = project + 1
                return project
        except OSError as exc:
            raise from_os_error(exc, f"limit {directory} to {size_bytes} bytes") from exc

    @contextmanager
    def raised_limit(self, project: int, size_bytes: int) -> Iterator[None]:
        """Within it the project may take a little more: a full container's overlay would be mounted read-only.

        Raises:
            FailedPrecondition: The file system is no longer mounted so that it limits.

        Crash: it may until the next time.
        """
        self.require()
        with opened_directory(self._containers) as dir_fd:
            quotactl.limit(dir_fd, project, size_bytes + _MOUNT_BYTES)
            try:
                yield
            finally:
                quotactl.limit(dir_fd, project, size_bytes)

    def release(self, project: int) -> None:
        """The project's files are gone: its limit goes, too."""
        with suppress(OSError), opened_directory(self._containers) as dir_fd:
            quotactl.limit(dir_fd, project, 0)

    def _free_project(self, dir_fd: int) -> int:
        for project in range(self._next, _LAST):
            if not quotactl.is_used(dir_fd, project):
                return project
        raise ResourceExhausted("--storage-opt size: no project number is left; restart the gateway")
