"""Check whether this kernel mounts EROFS indexes, from the file or through a loop device, and with other owners."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from gearworkers.digest import object_path
from gearworkers.errors import GearError
from gearworkers.layers.idmap import NO_MAPS, IdMaps, IdRange, shown_tree
from gearworkers.layers.index.erofs_format import SLOTS_PER_BLOCK
from gearworkers.layers.index.mount import mount_index
from gearworkers.layers.index.tree import LayerTree
from gearworkers.mounts.overlay import OverlaySpec, detached, unmount
from gearworkers.mounts.probe import run_check
from gearworkers.tar.entry import TarEntry
from gearworkers.util.check import Check

CHECK_NAME = "EROFS indexes"
IDMAPPED_CHECK_NAME = "user namespaces"
_CONTENT = b"trial"
_LOOP_MAJOR = 7
_TRIAL_IDS = IdMaps((IdRange(0, 100_000, 1),), (IdRange(0, 100_000, 1),))


def check_index(scratch: Path) -> Check:
    """Read a file through an index and a data-only layer, as a container does.

    Args:
        scratch: An empty directory below GEAR_ROOT; the check leaves files in it.
    """
    advice = "boot a kernel with CONFIG_EROFS_FS, 6.12 or newer; older kernels also need loop devices"
    try:
        mode, content = _read_through_index(scratch)
    except (GearError, OSError) as exc:
        return Check(CHECK_NAME, False, True, str(exc), advice)
    if content != _CONTENT:
        return Check(CHECK_NAME, False, True, "a file of the index has wrong content", advice)
    return Check(CHECK_NAME, True, True, mode)


def check_idmapped(scratch: Path) -> Check:
    """Read the owners of an index and of a plain directory through an overlay that maps them; not needed for all uses.

    Args:
        scratch: As for `check_index`.
    """
    advice = "run as root with CAP_SETUID and CAP_SETGID, and put GEAR_ROOT on ext4, xfs or btrfs"
    below = scratch / "below"
    try:
        with _trial_index(scratch) as (tree, data):
            (below / "directory").mkdir(parents=True)
            lowers = tuple(shown_tree(path, NO_MAPS, _TRIAL_IDS) for path in (tree, below))
            with detached(OverlaySpec(lowers, (data,))) as root_fd:
                owners = {os.stat(name, dir_fd=root_fd).st_uid for name in ("file", "directory")}
                with _open_at("file", root_fd) as file:
                    content = file.read()
    except (GearError, OSError) as exc:
        return Check(IDMAPPED_CHECK_NAME, False, False, str(exc), advice)
    if content != _CONTENT or owners != {_TRIAL_IDS.root[0]}:
        return Check(IDMAPPED_CHECK_NAME, False, False, "a file has a wrong content or owner", advice)
    return Check(IDMAPPED_CHECK_NAME, True, False, "supported")


class IndexMountMode:
    """How this kernel mounts indexes below one root. Checked on demand until the check succeeds; from any thread."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._known = ""

    def get(self) -> str:
        """Return the mode in words, or the reason why indexes cannot be mounted."""
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


def _open_at(name: str, dir_fd: int) -> BinaryIO:
    return open(os.open(name, os.O_RDONLY, dir_fd=dir_fd), "rb")


def _read_through_index(scratch: Path) -> tuple[str, bytes]:
    with _trial_index(scratch) as (tree, data):
        by_loop = os.major(tree.stat().st_dev) == _LOOP_MAJOR
        with detached(OverlaySpec((tree,), (data,))) as root_fd, _open_at("file", root_fd) as file:
            return "mounted through loop devices" if by_loop else "mounted from their files", file.read()


@contextmanager
def _trial_index(scratch: Path) -> Iterator[tuple[Path, Path]]:
    """Yield the mounted tree of an index with one file, owned by root, and the data layer with its content."""
    digest = bytes(32)
    layer_tree = LayerTree(NO_MAPS, time_ns=0)
    layer_tree.add(TarEntry(b"file", size_bytes=len(_CONTENT)), digest)
    image, tree, data = (scratch / name for name in ("index.erofs", "tree", "data"))
    with open(image, "xb") as file:
        layer_tree.image(bytes(16)).write(file, SLOTS_PER_BLOCK)
    target = data / os.fsdecode(object_path(digest)[1:])
    for directory in (tree, target.parent):
        directory.mkdir(parents=True)
    target.write_bytes(_CONTENT)
    mount_index(image, tree)
    try:
        yield tree, data
    finally:
        unmount(tree)
