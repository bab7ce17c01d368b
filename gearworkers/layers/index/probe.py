"""Whether this kernel mounts what layers are made of: an EROFS index, from its file or by a loop device."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import BinaryIO

from gearworkers.digest import object_path
from gearworkers.errors import GearError
from gearworkers.layers.idmap import IdMaps
from gearworkers.layers.index.erofs import SLOTS_PER_BLOCK
from gearworkers.layers.index.mount import mount_index
from gearworkers.layers.index.tree import LayerTree
from gearworkers.mounts.overlay import OverlaySpec, detached, unmount
from gearworkers.mounts.probe import Check, run_check
from gearworkers.tar.entry import TarEntry

CHECK_NAME = "EROFS indexes"
_CONTENT = b"trial"
_LOOP_MAJOR = 7


def check_index(scratch: Path) -> Check:
    """Read a file through an index and a data-only layer, as a container does.

    Args:
        scratch: An empty directory below GEAR_ROOT; files are left in it.
    """
    advice = "boot a kernel with CONFIG_EROFS_FS, 6.12 or newer; before it loop devices are needed, too"
    try:
        mode, seen = _read_through(scratch)
    except (GearError, OSError) as exc:
        return Check(CHECK_NAME, False, True, str(exc), advice)
    if seen != _CONTENT:
        return Check(CHECK_NAME, False, True, "a file of the index reads as something else", advice)
    return Check(CHECK_NAME, True, True, mode)


class IndexMountMode:
    """How indexes are mounted below one root; run_check when it is asked for, until it works. From any thread."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._known = ""

    def get(self) -> str:
        """In words, or why they cannot be mounted."""
        with self._lock:
            if self._known:
                return self._known
            try:
                check = run_check(check_index, self._root)
            except GearError as exc:
                return str(exc)
            if check.ok:
                self._known = check.found
            return check.found


def _opened(name: str, dir_fd: int) -> BinaryIO:
    return open(os.open(name, os.O_RDONLY, dir_fd=dir_fd), "rb")


def _read_through(scratch: Path) -> tuple[str, bytes]:
    digest = bytes(32)
    index = LayerTree(IdMaps(), time_ns=0)
    index.add(TarEntry(b"file", size_bytes=len(_CONTENT)), digest)
    image, tree, data = (scratch / name for name in ("index.erofs", "tree", "data"))
    with open(image, "xb") as file:
        index.image(bytes(16)).write(file, SLOTS_PER_BLOCK)
    target = data / os.fsdecode(object_path(digest)[1:])
    for directory in (tree, target.parent):
        directory.mkdir(parents=True)
    target.write_bytes(_CONTENT)
    mount_index(image, tree)
    try:
        by_loop = os.major(tree.stat().st_dev) == _LOOP_MAJOR
        with detached(OverlaySpec((tree,), (data,))) as root_fd, _opened("file", root_fd) as file:
            return "mounted by loop devices" if by_loop else "mounted from their files", file.read()
    finally:
        unmount(tree)
