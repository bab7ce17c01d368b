"""Rewrite indexes of gearworkers 0.1, whose inodes count from 1, with inode numbers of their own."""

from __future__ import annotations

import os
import secrets
import stat
import time
from pathlib import Path

import xattr

from gearworkers.errors import from_os_error
from gearworkers.layers.diff.upperdir import directories, join
from gearworkers.layers.index import erofs_format
from gearworkers.layers.index.erofs import ImageWriter
from gearworkers.layers.index.erofs_label import read_label
from gearworkers.layers.index.inode_numbers import INDEX_FILE, InodeNumbers
from gearworkers.layers.index.mount import mount_index
from gearworkers.layers.index.tree import Inode
from gearworkers.mounts.overlay import unmount
from gearworkers.util.fs import opened_directory

_TREE = "tree"


def has_own_inode_numbers(index: Path) -> bool:
    """Whether the index has inode numbers of its own; True if the file does not exist.

    Raises:
        GearError: The file cannot be read.
    """
    try:
        return read_label(index) is not None
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError as exc:
        raise from_os_error(exc, f"read {index}") from exc


def renumber(index: Path, inode_numbers: InodeNumbers, build: Path) -> None:
    """Replace the file *index* by the same tree with numbers that no other layer has. Mounts keep the old file.

    Args:
        index: The old index; no other process replaces it at the same time.
        inode_numbers: Provides the new numbers.
        build: An empty directory on the same file system.

    Raises:
        GearError: The old index cannot be read, or the new one cannot be written; the old one stays.

    Crash: leaves the old index, and *build*, where the old index may be mounted at `tree`.
    """
    try:
        (build / _TREE).mkdir()
        mount_index(index, build / _TREE)
        try:
            with opened_directory(build / _TREE) as root_fd:
                root = _tree(root_fd)
        finally:
            unmount(build / _TREE)
        image = ImageWriter(root, uuid=secrets.token_bytes(16), time_ns=time.time_ns())
        inode_numbers.write_index(image, build / INDEX_FILE)
        with open(build / INDEX_FILE, "rb") as file:
            os.fsync(file.fileno())
        (build / INDEX_FILE).rename(index)
    except OSError as exc:
        raise from_os_error(exc, f"give {index} inode numbers of its own") from exc


def _tree(root_fd: int) -> Inode:
    """Return the mounted tree with all attributes."""
    root = _inode(os.fstat(root_fd), b"/proc/self/fd/%d" % root_fd, nofollow=False)
    known = {b"": root}
    linked: dict[int, Inode] = {}
    for path, fd in directories(root_fd):
        directory = known.pop(path)
        assert directory.children is not None
        for name in map(os.fsencode, os.listdir(fd)):
            status = os.stat(name, dir_fd=fd, follow_symlinks=False)
            inode = linked.get(status.st_ino)
            if inode is None:
                inode = _inode(status, b"/proc/self/fd/%d/%s" % (fd, name), nofollow=True)
            directory.children[name] = inode
            if inode.children is not None:
                known[join(path, name)] = inode
            elif status.st_nlink > 1:
                linked[status.st_ino] = inode
    return root


def _inode(status: os.stat_result, path: bytes, *, nofollow: bool) -> Inode:
    inode = Inode(status.st_mode, status.st_uid, status.st_gid, status.st_mtime_ns)
    inode.nlink = status.st_nlink
    if stat.S_ISDIR(status.st_mode):
        inode.children = {}
    elif stat.S_ISREG(status.st_mode):
        inode.size_bytes = status.st_size
    elif stat.S_ISLNK(status.st_mode):
        inode.target = os.readlink(path)
    elif not stat.S_ISFIFO(status.st_mode):
        inode.rdev = erofs_format.encode_device(os.major(status.st_rdev), os.minor(status.st_rdev))
    attributes = dict(xattr.get_all(path, nofollow=nofollow))
    has_metacopy = attributes.pop(erofs_format.METACOPY, None) is not None
    inode.xattrs = erofs_format.encode_xattrs(attributes, metacopy=has_metacopy)
    return inode
