"""Check the features of this kernel and of GEAR_ROOT's file system.

Each check tests one feature that gearworkers needs or benefits from. `gear doctor` prints the checks, and Init fails if
a needed feature is missing.

Source: Linux Documentation/filesystems/overlayfs.rst, "Data-only lower layers"; statfs(2) for the magic numbers.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from gearworkers.digest import METACOPY_XATTR, REDIRECT_XATTR
from gearworkers.errors import FailedPrecondition, GearError, from_os_error
from gearworkers.mounts.overlay import OverlaySpec, detached
from gearworkers.util import syscalls
from gearworkers.util.check import Check
from gearworkers.util.fs import opened_directory

_REDIRECT = b"/\x01a/bcdefghijklmnopqrstu"
"""A redirect of the same length as an object's path."""

_FS_NAMES = {
    0xEF53: "extfs",
    0x58465342: "xfs",
    0x9123683E: "btrfs",
    0x01021994: "tmpfs",
    0x794C7630: "overlayfs",
    0x2FC12FC1: "zfs",
    0xF2F52010: "f2fs",
    0x65735546: "fuse",
    0x6969: "nfs",
    0xCA451A4E: "bcachefs",
    0xFF534D42: "cifs",
    0xFE534D42: "smb2",
}
_NETWORK_FS_NAMES = frozenset(("nfs", "cifs", "smb2"))
_DT_UNKNOWN = 0
_MIN_KERNEL = (6, 5)


def probe(root: Path, *more_checks: Callable[[Path], Check]) -> list[Check]:
    """Check the kernel and the file system of *root*; leave nothing behind.

    Args:
        root: An existing directory: GEAR_ROOT.
        more_checks: Each receives an empty directory in *root*.

    Raises:
        GearError: *root* is not writable.

    Crash: may leave a directory ``.probe-*`` in *root*, with a few files and a mount; both can be removed at any time.
    """
    checks = [_check_kernel(os.uname().release), _check_backing_fs(root)]
    for check in (_check_xattrs, _check_data_only, *more_checks, _check_d_type, _check_inode_size):
        checks.append(run_check(check, root))
    return checks


def run_check(check: Callable[[Path], Check], root: Path) -> Check:
    """Run a check in a new directory in *root*, then remove the directory. Safe to call concurrently.

    Raises, Crash: As `probe`.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".probe-", dir=root) as scratch:
            return check(Path(scratch))
    except OSError as exc:
        raise from_os_error(exc, f"check the file system of {root}") from exc


def require(checks: list[Check]) -> None:
    """Check that no needed feature is missing.

    Raises:
        FailedPrecondition: A needed feature is missing; the error lists all problems.
    """
    missing = [f"{check.name}: {check.found}; {check.advice}" for check in checks if check.needed and not check.ok]
    if missing:
        raise FailedPrecondition("this host lacks features that gearworkers needs: " + " / ".join(missing))


def backing_fs_name(root: Path) -> str:
    """Return Docker's name for the file system of *root*, such as ``extfs`` or ``xfs``, or its magic number."""
    try:
        magic = syscalls.statfs_type(root)
    except OSError as exc:
        raise from_os_error(exc, f"statfs {root}") from exc
    return _FS_NAMES.get(magic, hex(magic))


def kernel_version(release: str) -> tuple[int, int]:
    """Return (major, minor) from a kernel's release text; (0, 0) if it contains neither."""
    numbers = release.split("-", 1)[0].split(".")
    try:
        return int(numbers[0]), int(numbers[1])
    except (IndexError, ValueError):
        return 0, 0


def _check_kernel(release: str) -> Check:
    """Check the kernel's version; not needed, since `_check_data_only` also accepts kernels with backports."""
    ok = kernel_version(release) >= _MIN_KERNEL
    advice = "" if ok else "boot Linux 6.5 or newer; on Debian 12, install linux-image from backports"
    return Check("kernel", ok, False, release, advice)


def _check_backing_fs(root: Path) -> Check:
    name = backing_fs_name(root)
    if name == "overlayfs":
        return Check("backing file system", False, True, name, "put GEAR_ROOT on a disk: overlays cannot be stacked")
    if name in _NETWORK_FS_NAMES:
        return Check("backing file system", False, True, name, "put GEAR_ROOT on a local disk")
    return Check("backing file system", True, True, name)


def _check_xattrs(scratch: Path) -> Check:
    file = scratch / "file"
    file.touch()
    try:
        os.setxattr(file, "trusted.gear.probe", b"x")
        os.setxattr(file, "user.gear.probe", b"x")
    except OSError as exc:
        advice = "use ext4, xfs or btrfs, and run as root with CAP_SYS_ADMIN"
        return Check("trusted and user xattrs", False, True, exc.strerror or str(exc), advice)
    return Check("trusted and user xattrs", True, True, "supported")


def _check_data_only(scratch: Path) -> Check:
    """Read a file through two index trees; its content is in a data-only layer."""
    index, below, data = (scratch / name for name in ("index", "below", "data"))
    content = b"probe"
    target = Path(os.fsdecode(os.fsencode(data) + _REDIRECT))
    advice = "boot Linux 6.5 or newer with overlay's metacopy and redirect_dir (as in Debian 13), and run as root"
    try:
        for directory in (index, below, target.parent):
            directory.mkdir(parents=True)
        target.write_bytes(content)
        _make_index_file(index / "file", len(content))
        with detached(OverlaySpec((index, below), (data,))) as fd:
            seen = _read(fd, "file")
    except GearError as exc:
        return Check("overlay with data-only layers", False, True, str(exc), advice)
    except OSError as exc:
        return Check("overlay with data-only layers", False, True, exc.strerror or str(exc), advice)
    if seen != content:
        return Check("overlay with data-only layers", False, True, "a file of the layer has the wrong content", advice)
    return Check("overlay with data-only layers", True, True, "supported")


def _check_d_type(scratch: Path) -> Check:
    (scratch / "file").touch()
    with opened_directory(scratch) as fd:
        ok = syscalls.entry_types(fd).get(b"file", _DT_UNKNOWN) != _DT_UNKNOWN
    if ok:
        return Check("file types in directories (d_type)", True, True, "reported")
    return Check(
        "file types in directories (d_type)",
        False,
        True,
        "not reported",
        "create the file system again; for xfs, with ftype=1",
    )


def _check_inode_size(scratch: Path) -> Check:
    """Check that the two xattrs of an index file, which has no data, fit into its inode and take no block."""
    file = scratch / "file"
    try:
        _make_index_file(file, 4096)
    except OSError as exc:
        return Check("inode size", False, False, exc.strerror or str(exc), "see the check of xattrs")
    used_bytes = file.stat().st_blocks * 512
    if used_bytes == 0:
        return Check("inode size", True, False, "the xattrs of an index file fit into its inode")
    advice = (
        "create the file system again with larger inodes (mkfs.ext4 -I 256 or more); small inodes cost space and time"
    )
    return Check("inode size", False, False, f"an index file takes {used_bytes} bytes outside its inode", advice)


def _make_index_file(path: Path, size_bytes: int) -> None:
    with path.open("wb") as file:
        file.truncate(size_bytes)
        os.setxattr(file.fileno(), METACOPY_XATTR, b"")
        os.setxattr(file.fileno(), REDIRECT_XATTR, _REDIRECT)


def _read(dir_fd: int, name: str) -> bytes:
    fd = os.open(name, os.O_RDONLY, dir_fd=dir_fd)
    with open(fd, "rb") as file:
        return file.read()
