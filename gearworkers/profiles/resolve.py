"""Find the name of an image's profile, and the object of an opened file.

Every node that has an image knows the name of its profile. The name is derived from the `objects` files of the image's
layers, which are the same on all nodes with these layers.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

from gearworkers.cas.refs import OBJECTS_FILE
from gearworkers.digest import OBJECT_PATH, REDIRECT_XATTR
from gearworkers.layers.object_list import ObjectList
from gearworkers.layers.record import LayerKind
from gearworkers.layers.store import LayerStore
from gearworkers.util import syscalls

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_RESOLVE = syscalls.Resolve.BENEATH | syscalls.Resolve.NO_SYMLINKS


def top_image_layer(layers: LayerStore, id: str) -> str:
    """Return the id of the topmost image layer of the layer chain; empty if the chain has no image layer.

    Raises:
        NotFound: A layer is missing.
    """
    return next((layer.id for layer in layers.layer_chain(id) if layer.kind is LayerKind.IMAGE), "")


def profile_name(layers: LayerStore, id: str) -> str:
    """Return the name of the document with the profile of the image that has this topmost layer.

    Raises:
        NotFound: The layer or a parent is missing.
    """
    hasher = hashlib.sha256()
    for path in _lists(layers, id):
        with open(path, "rb") as file:
            hasher.update(hashlib.file_digest(file, "sha256").digest())
    return f"profiles/{hasher.hexdigest()}"


def image_object_lists(layers: LayerStore, id: str) -> list[ObjectList]:
    """Return the object lists of the image's layers, the topmost first."""
    return [found for path in _lists(layers, id) if (found := ObjectList.open(path)) is not None]


def _lists(layers: LayerStore, id: str) -> list[Path]:
    images = [layer for layer in layers.layer_chain(id) if layer.kind is LayerKind.IMAGE and layer.objects]
    return [layers.directory(layer) / OBJECTS_FILE for layer in images]


class ObjectResolver:
    """Finds the object of a file that was opened in an overlay of an image's layers; a context manager.

    It looks paths up in the layers' indexes and never accesses the overlay. It does not find a file that was renamed
    inside the container.
    """

    def __init__(self, trees: Sequence[Path], lists: Sequence[ObjectList], merged: Path) -> None:
        """
        Args:
            trees: The mounted indexes, the topmost first.
            lists: From `image_object_lists`.
            merged: The mount point of the overlay.
        """
        self._trees = trees
        self._lists = lists
        self._prefix = os.fsencode(merged.parent.resolve() / merged.name) + b"/"  # as the kernel reports paths
        self._seen: set[tuple[int, int]] = set()
        self._stack = ExitStack()
        self._tree_fds: list[int] = []

    def __enter__(self) -> ObjectResolver:
        for tree in self._trees:
            fd = os.open(tree, _DIRECTORY)
            self._stack.callback(os.close, fd)
            self._tree_fds.append(fd)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def resolve(self, file_fd: int) -> tuple[bytes, int] | None:
        """Return (digest, size in bytes) of an open file; None if it is not in the image or was resolved before."""
        status = os.fstat(file_fd)
        key = status.st_dev, status.st_ino
        if key in self._seen:
            return None
        self._seen.add(key)
        try:
            path = os.readlink(b"/proc/self/fd/%d" % file_fd).removeprefix(self._prefix).lstrip(b"/")
        except OSError:
            return None  # the path is too long
        for tree_fd in self._tree_fds:
            redirect = _redirect(tree_fd, path)
            if redirect is not None:
                return self._named(redirect)
        return None

    def _named(self, redirect: bytes) -> tuple[bytes, int] | None:
        found = OBJECT_PATH.fullmatch(redirect)
        if found is None:
            return None
        name = found[1] + found[2]
        return next((record for known in self._lists if (record := known.named(name)) is not None), None)


def _redirect(tree_fd: int, path: bytes) -> bytes | None:
    """Return the redirect of the file at *path* in an index; None if it does not exist, empty if it has no object."""
    try:
        fd = syscalls.openat2(tree_fd, path, os.O_PATH | os.O_NOFOLLOW, resolve=_RESOLVE)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b""
        return os.getxattr(b"/proc/self/fd/%d" % fd, REDIRECT_XATTR)
    except OSError:
        return b""  # the file is empty
    finally:
        os.close(fd)
