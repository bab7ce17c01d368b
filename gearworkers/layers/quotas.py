"""Size limits of containers: each limited container is a project with a quota, which the file system enforces.

A project's number is free while no file belongs to the project, even if the project has a limit. So only the layer's
record stores the number. A crash may leave a limit, which the next use of the number replaces.
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

FIRST_PROJECT = 1 << 20
"""The lowest project number; far above the numbers of Docker's overlay2 and volumes, which start at 1."""
_MOUNT_BYTES = 4 << 20
"""Extra space for a mount. The overlay creates one directory, and xfs reserves more space than that in advance."""
_LAST_PROJECT = (1 << 32) - 2


class Quotas:
    """The size limits of one GEAR_ROOT. Only one process of a node may set limits; call from any thread."""

    def __init__(self, containers: Path) -> None:
        self._containers = containers
        self._lock = threading.Lock()
        self._next = FIRST_PROJECT  # only grows, so that a released number is not reused at once

    def require(self) -> None:
        """Check that the file system enforces size limits.

        Raises:
            FailedPrecondition: It does not, or all of GEAR_ROOT belongs to one project.
        """
        try:
            with opened_directory(self._containers) as dir_fd:
                is_enforced = quotactl.is_enforced(dir_fd)
                project = quotactl.project_of(dir_fd) if is_enforced else None
        except OSError as exc:
            raise from_os_error(exc, f"query project quotas in {self._containers}") from exc
        if project is None:
            raise FailedPrecondition(
                f"--storage-opt size: {self._containers} is on {backing_fs_name(self._containers)} without project "
                "quotas; use xfs mounted with pquota, or ext4 made with -O project,quota and mounted with prjquota"
            )
        if project.is_inherited:
            raise FailedPrecondition(
                f"--storage-opt size: all files in {self._containers} belong to project {project.id}; remove the "
                "inheritance from the directory (chattr -P) to limit single containers"
            )

    def limit(self, directory: Path, size_bytes: int) -> int:
        """Limit the future content of the empty *directory* to *size_bytes*; return the new project.

        Raises:
            GearError: The file system refuses the limit.

        Crash: leaves the limit of a project without files, or an empty directory in build/.
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
        """Raise the project's limit a little while its overlay is mounted; at its limit it would be mounted read-only.

        Raises:
            FailedPrecondition: The file system does not enforce limits any more.

        Crash: leaves the raised limit until the next mount.
        """
        self.require()
        with opened_directory(self._containers) as dir_fd:
            quotactl.limit(dir_fd, project, size_bytes + _MOUNT_BYTES)
            try:
                yield
            finally:
                quotactl.limit(dir_fd, project, size_bytes)

    def remove_limit(self, project: int) -> None:
        """Remove the limit of a project whose files are removed."""
        with suppress(OSError), opened_directory(self._containers) as dir_fd:
            quotactl.limit(dir_fd, project, 0)

    def _free_project(self, dir_fd: int) -> int:
        for project in range(self._next, _LAST_PROJECT):
            if not quotactl.is_used(dir_fd, project):
                return project
        raise ResourceExhausted("--storage-opt size: all project numbers are used; restart the gateway")
