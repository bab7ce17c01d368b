"""New file systems for tests and benchmarks, so that results do not depend on the state of the host's file system."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


def mount_fresh(image: Path, target: Path, size_bytes: int) -> None:
    """Make an ext4 in the sparse file *image* and mount it on *target*; the mount ends with the mount namespace."""
    with image.open("xb") as file:
        os.truncate(file.fileno(), size_bytes)
    # The inode tables of a sparse file are already zero; the kernel thread that writes them would disturb timings.
    options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-i", "8192", "-E", options, str(image)], check=True)
    target.mkdir(parents=True, exist_ok=True)
    # With direct I/O, writes do not fill the page cache of the image file as well.
    attach = ["losetup", "--find", "--show", "--direct-io=on", str(image)]
    device = subprocess.run(attach, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    try:
        subprocess.run(["mount", "-o", "noinit_itable", device, str(target)], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)  # takes effect at the unmount, if mounted


MKFS_COMMANDS = {
    "xfs": ("mkfs.xfs", "-q", "-d", "size=320m"),
    "ext4": ("mkfs.ext4", "-q", "-O", "project,quota", "-E", "quotatype=prjquota"),
}
"""Commands that make a small file system with support for project quotas."""
QUOTA_OPTIONS = {"xfs": "pquota", "ext4": "prjquota"}
"""Mount options that enforce project quotas."""


def mount_small(directory: Path, fs: str, options: str) -> Path:
    """Make a file system of MKFS_COMMANDS in a sparse file in *directory* and mount it; return the mount point.

    Skip the test if the kernel was built without project quotas: it can then mount the file system only read-only.
    """
    image, target = directory / f"{fs}.img", directory / fs
    with image.open("xb") as file:
        os.truncate(file.fileno(), 320 << 20)
    subprocess.run([*MKFS_COMMANDS[fs], str(image)], check=True)
    target.mkdir()
    mount = ["mount", "-t", fs, str(image), str(target), "-o"]
    if subprocess.run([*mount, f"loop,{options}"]).returncode:
        subprocess.run([*mount, "loop,ro"], check=True)
        subprocess.run(["umount", str(target)], check=True)
        pytest.skip(f"this kernel was built without project quotas on {fs}")
    return target


def used_bytes(path: Path) -> int:
    """Write all dirty pages; return the bytes in use on the file system of *path*."""
    os.sync()
    status = os.statvfs(path)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def tree_bytes(path: Path) -> int:
    """Return the bytes allocated below *path*, each inode once, without other file systems; files may disappear."""
    command = ["du", "-sx", "--block-size=1", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return int(done.stdout.split()[0])


def file_bytes(path: Path) -> int:
    """Return the sum of the sizes of the files below *path*."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
