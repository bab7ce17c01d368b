"""Project quotas: limit the disk space of the files in one directory.

Glossary: a *project* is a number that files inherit from their directory. The file system counts the space of each
project's files and enforces the project's limit. xfs does so if it is mounted with ``pquota``; ext4 if it was created
with ``-O project,quota`` and is mounted with ``prjquota``.

Every function takes the descriptor of a directory, opened without O_PATH. Except `is_enforced`, they raise OSError.

Sources: quotactl(2); linux/quota.h, `struct if_dqblk`; linux/dqblk_xfs.h, `struct fs_quota_statv`; linux/fs.h,
`struct fsxattr`. The ioctl numbers are those of all architectures except MIPS, PowerPC and SPARC.
"""

from __future__ import annotations

import errno
import fcntl
import struct
from typing import NamedTuple

from gearworkers.util import syscalls

_PROJECT_QUOTA = 2
_GETQUOTA = 0x800007
_SETQUOTA = 0x800008
_XGETQSTATV = 0x5808
_STATV_VERSION = 1
_STATV_BYTES = 160
_STATV_FLAGS = struct.Struct("=bxH")
_PROJECT_LIMITS_ENFORCED = 1 << 5  # FS_QUOTA_PDQ_ENFD
_DQBLK = struct.Struct("=8QI4x")
_DQBLK_SPACE, _DQBLK_INODES = 2, 5
_BLOCK_BYTES = 1024
_BLOCK_LIMITS_ARE_VALID = 1  # QIF_BLIMITS

_FSGETXATTR = 0x801C581F
_FSSETXATTR = 0x401C5820
_FSXATTR = struct.Struct("=5I8x")
_INHERITED = 0x200  # FS_XFLAG_PROJINHERIT


class Project(NamedTuple):
    """The project of a directory."""

    id: int
    """0 for none."""
    is_inherited: bool
    """Whether new files in the directory belong to the project."""


def is_enforced(dir_fd: int) -> bool:
    """Whether the file system enforces the limits of projects."""
    request = struct.pack("=b", _STATV_VERSION).ljust(_STATV_BYTES, b"\0")
    try:
        reply = syscalls.quotactl_fd(dir_fd, _command(_XGETQSTATV), 0, request)
    except OSError:
        return False
    return bool(_STATV_FLAGS.unpack_from(reply)[1] & _PROJECT_LIMITS_ENFORCED)


def is_used(dir_fd: int, id: int) -> bool:
    """Whether a file of the file system belongs to the project; a limit alone does not count."""
    try:
        found = _DQBLK.unpack(syscalls.quotactl_fd(dir_fd, _command(_GETQUOTA), id, bytes(_DQBLK.size)))
    except OSError as exc:
        if exc.errno == errno.ENOENT:  # xfs has no record of the project
            return False
        raise
    return bool(found[_DQBLK_SPACE] or found[_DQBLK_INODES])


def limit(dir_fd: int, id: int, size_bytes: int) -> None:
    """Limit the project to *size_bytes*, rounded up to 1024; 0 removes the limit."""
    blocks = -(-size_bytes // _BLOCK_BYTES)
    syscalls.quotactl_fd(
        dir_fd, _command(_SETQUOTA), id, _DQBLK.pack(blocks, blocks, 0, 0, 0, 0, 0, 0, _BLOCK_LIMITS_ARE_VALID)
    )


def project_of(dir_fd: int) -> Project:
    """Return the project of the directory."""
    flags, _, _, id, _ = _FSXATTR.unpack(fcntl.ioctl(dir_fd, _FSGETXATTR, bytes(_FSXATTR.size)))
    return Project(id, bool(flags & _INHERITED))


def assign(dir_fd: int, id: int) -> None:
    """Assign an empty directory, and all new files in it, to the project."""
    flags, extent_bytes, extents, _, copied_extent_bytes = _FSXATTR.unpack(
        fcntl.ioctl(dir_fd, _FSGETXATTR, bytes(_FSXATTR.size))
    )
    fcntl.ioctl(dir_fd, _FSSETXATTR, _FSXATTR.pack(flags | _INHERITED, extent_bytes, extents, id, copied_extent_bytes))


def _command(command: int) -> int:
    return command << 8 | _PROJECT_QUOTA
