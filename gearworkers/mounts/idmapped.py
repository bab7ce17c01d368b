"""Trees whose files have other owners in a mount than on the disk: idmapped mounts.

Source: Linux Documentation/filesystems/idmappings.rst; mount_setattr(2), "ID-mapped mounts"; user_namespaces(7).
"""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from gearworkers.util import syscalls


class OwnerMap(NamedTuple):
    """Which owners a mount shows, in the format of /proc/PID/uid_map.

    Each line is STORED SHOWN SIZE: the id STORED + n on the disk is SHOWN + n in the mount, for n below SIZE. An id
    outside all lines is shown as the overflow id (65534), and nobody can give it to a file.
    """

    uids: bytes
    gids: bytes


class MappedTree(NamedTuple):
    """A directory whose files have other owners in an overlay."""

    path: Path
    owners: OwnerMap


def mapped_clone(path: Path, userns_fd: int) -> int:
    """Return a detached mount of *path* that shows the owners as a `user_namespace` maps them.

    Raises:
        OSError: The file system of *path* supports no idmapped mounts.
    """
    mount_fd = syscalls.clone_mount(path)
    try:
        syscalls.map_owners(mount_fd, userns_fd)
    except BaseException:
        os.close(mount_fd)
        raise
    return mount_fd


@contextmanager
def user_namespace(owners: OwnerMap) -> Iterator[int]:
    """Yield a descriptor of a new user namespace with these maps. Idmapped mounts outlive it.

    A child process holds the namespace until the maps are written. It ends with this context, or with this process.

    Raises:
        OSError: The kernel refuses the namespace, or the maps, which take CAP_SETUID and CAP_SETGID.
    """
    pipe = subprocess.PIPE
    with subprocess.Popen(["unshare", "--user", "cat"], bufsize=0, stdin=pipe, stdout=pipe, stderr=pipe) as holder:
        assert holder.stdin is not None and holder.stdout is not None and holder.stderr is not None
        with suppress(BrokenPipeError):
            holder.stdin.write(b"\n")
        if not holder.stdout.read(1):  # the answer of cat, in the new namespace; none if unshare has failed
            reason = holder.stderr.read().decode(errors="replace").strip()
            raise OSError(errno.EPERM, f"make a user namespace: {reason}")
        for name, text in zip(("uid_map", "gid_map"), owners, strict=True):
            try:
                with open(f"/proc/{holder.pid}/{name}", "wb", buffering=0) as file:  # the kernel wants a single write
                    file.write(text)
            except OSError as exc:
                raise OSError(exc.errno, f"write the {name} of a user namespace") from exc
        userns_fd = os.open(f"/proc/{holder.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield userns_fd
    finally:
        os.close(userns_fd)
