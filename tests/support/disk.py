"""A freshly made ext4, so that results do not depend on the host's file system or on what was deleted there."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def mount_fresh(image: Path, target: Path, size_bytes: int) -> None:
    """Make an ext4 in the sparse file *image* and mount it on *target*; it goes with the mount namespace."""
    with image.open("xb") as file:
        os.truncate(file.fileno(), size_bytes)
    # The inode tables of a sparse file are zero already; a background thread that writes them would disturb timings.
    options = "lazy_itable_init=1,lazy_journal_init=1,nodiscard"
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", "-i", "8192", "-E", options, str(image)], check=True)
    target.mkdir(parents=True, exist_ok=True)
    # Direct I/O: written bytes do not also fill the page cache of the file, as on a disk.
    attach = ["losetup", "--find", "--show", "--direct-io=on", str(image)]
    device = subprocess.run(attach, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    try:
        subprocess.run(["mount", "-o", "noinit_itable", device, str(target)], check=True)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)  # with the unmount, if mounted


MAKE = {
    "xfs": ("mkfs.xfs", "-q", "-d", "size=320m"),
    "ext4": ("mkfs.ext4", "-q", "-O", "project,quota", "-E", "quotatype=prjquota"),
}
"""How a small file system is made that can have project quotas."""
LIMITING = {"xfs": "pquota", "ext4": "prjquota"}
"""With which mount option they hold."""


def mount_small(directory: Path, fs: str, options: str) -> Path:
    """Make one of MAKE's in a sparse file in *directory*, and mount it with *options*; where.

    Raises:
        subprocess.CalledProcessError: This kernel has no such file system, or not with these options.
    """
    image, target = directory / f"{fs}.img", directory / fs
    with image.open("xb") as file:
        os.truncate(file.fileno(), 320 << 20)
    subprocess.run([*MAKE[fs], str(image)], check=True)
    target.mkdir()
    subprocess.run(["mount", "-o", f"loop,{options}", str(image), str(target)], check=True, stderr=subprocess.DEVNULL)
    return target


def used_bytes(path: Path) -> int:
    """Bytes in use on the file system that holds *path*, everything written."""
    os.sync()
    status = os.statvfs(path)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def tree_bytes(path: Path) -> int:
    """Bytes allocated below *path*, each inode once, mounts below it left out; files may go away meanwhile."""
    command = ["du", "-sx", "--block-size=1", str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return int(done.stdout.split()[0])


def file_bytes(path: Path) -> int:
    """Sizes of the files below *path*, added up."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
