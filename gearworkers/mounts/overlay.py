"""Mount overlays: index trees over data-only object stores.

Glossary: a *lower* is the read-only tree of a layer. A *data* layer contains objects that are reached only through
redirects. *Upper* and *work* receive the writes of a mount. *Merged* is the view that the mount shows.

Source: Linux Documentation/filesystems/overlayfs.rst, "Data-only lower layers", "Metadata only copy up",
"Redirected directories" ("renaming directories"), "Volatile mount", "Inode properties".
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gearworkers.errors import GearError, InvalidInput, from_os_error
from gearworkers.mounts.idmapped import MappedTree, mapped_clone, user_namespace
from gearworkers.util import syscalls

_OPTIONS = (
    ("metacopy", b"on"),
    ("redirect_dir", b"on"),
    ("index", b"off"),
)
_LAYER_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class OverlaySpec:
    """The description of an overlay; paths are existing directories."""

    lowers: tuple[Path | MappedTree, ...]
    """Read-only trees, the topmost first."""
    data: tuple[Path, ...] = ()
    """Data-only layers, searched in this order for an absolute redirect. Their files' owners are irrelevant."""
    upper: Path | None = None
    work: Path | None = None
    """On upper's file system. Upper and work are both set or both None."""
    context: str = ""
    """SELinux label of all files in the mount, as in the option ``context=``."""
    volatile: bool = False
    """Never sync the upper. Call `clear_volatile` before the upper is mounted again."""
    xino: bool = False
    """Compose inode numbers from layer and file: all files have the mount's st_dev, and numbers exceed 2^53."""


def mount(spec: OverlaySpec, target: Path) -> None:
    """Mount the overlay at the directory *target*; an error leaves nothing mounted.

    Raises:
        GearError: The kernel refused; the error contains the kernel's message.
    """
    try:
        mount_fd = _create_mount(spec, attributes=0)
        try:
            syscalls.move_mount(mount_fd, target)
        finally:
            os.close(mount_fd)
    except OSError as exc:
        raise _refused(exc, f"mount {_description(spec)} at {target}") from exc


@contextmanager
def detached(spec: OverlaySpec) -> Iterator[int]:
    """Yield a directory descriptor of a read-only mount of *spec* that has no mount point.

    The upper becomes the topmost lower, so that a layer that is mounted elsewhere can be read. The mount ends with the
    context, or with the process.

    Raises:
        GearError: As `mount`.
    """
    with contextlib.ExitStack() as stack:
        try:
            mount_fd = _create_mount(_read_only(spec), attributes=syscalls.MOUNT_ATTR_RDONLY)
            stack.callback(os.close, mount_fd)
            root_fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount_fd)
            stack.callback(os.close, root_fd)
        except OSError as exc:
            raise _refused(exc, f"mount {_description(spec)} detached") from exc
        yield root_fd


def unmount(target: Path) -> None:
    """Unmount *target*; do nothing if it is not mounted or does not exist.

    Open files keep the file system alive until they are closed, as with overlay2.
    """
    try:
        syscalls.umount2(target)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOENT):
            raise from_os_error(exc, f"unmount {target}") from exc


def is_mounted(target: Path) -> bool:
    """Whether a file system is mounted at *target*; compares its device with its parent's by two stat calls."""
    try:
        return os.lstat(target).st_dev != os.lstat(target.parent).st_dev
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise from_os_error(exc, f"stat {target}") from exc


def clear_volatile(work: Path) -> None:
    """Remove the mark that a volatile mount leaves in *work*, so that its upper can be mounted again.

    The caller guarantees that the upper is undamaged (no crash or power cut since the volatile mount began) or that its
    content will be created again.
    """
    try:
        shutil.rmtree(work / "work" / "incompat")
    except FileNotFoundError:
        return
    except OSError as exc:
        raise from_os_error(exc, f"remove the volatile mark in {work}") from exc


def _read_only(spec: OverlaySpec) -> OverlaySpec:
    if spec.upper is None:
        return spec
    return OverlaySpec((spec.upper, *spec.lowers), spec.data, context=spec.context, xino=spec.xino)


def _create_mount(spec: OverlaySpec, attributes: int) -> int:
    """Create a detached mount of *spec*; return an O_PATH descriptor."""
    if not spec.lowers or (spec.upper is None) != (spec.work is None):
        raise InvalidInput(f"{_description(spec)}: it needs at least one lower, and both upper and work or neither")
    context_fd = syscalls.fsopen("overlay")
    try:
        _set_options(context_fd, spec)
        with _layers_added(context_fd, spec):
            syscalls.fsconfig_create(context_fd)
        return syscalls.fsmount(context_fd, attributes)
    finally:
        os.close(context_fd)


def _set_options(context_fd: int, spec: OverlaySpec) -> None:
    syscalls.fsconfig_string(context_fd, "source", b"overlay")
    for key, value in _OPTIONS:
        syscalls.fsconfig_string(context_fd, key, value)
    # Set in both cases: the default depends on the kernel's configuration.
    syscalls.fsconfig_string(context_fd, "xino", b"on" if spec.xino else b"off")
    if spec.context:
        syscalls.fsconfig_string(context_fd, "context", os.fsencode(spec.context))
    if spec.volatile:
        syscalls.fsconfig_flag(context_fd, "volatile")


@contextmanager
def _layers_added(context_fd: int, spec: OverlaySpec) -> Iterator[None]:
    """Add the layers. Create the superblock inside the context, while the empty lower and mapped clones exist."""
    with contextlib.ExitStack() as stack:
        maps = {lower.owners for lower in spec.lowers if isinstance(lower, MappedTree)}
        namespaces = {owners: stack.enter_context(user_namespace(owners)) for owners in maps}
        for lower in spec.lowers:
            if isinstance(lower, MappedTree):
                stack.callback(os.close, _add_mapped_tree(context_fd, lower, namespaces[lower.owners]))
            else:
                _add_directory(context_fd, "lowerdir+", lower)
        if spec.upper is None and len(spec.lowers) + len(spec.data) == 1:
            stack.callback(os.close, _add_empty_lower(context_fd))
        for data in spec.data:
            _add_directory(context_fd, "datadir+", data)
        if spec.upper is not None and spec.work is not None:
            _add_directory(context_fd, "upperdir", spec.upper)
            _add_directory(context_fd, "workdir", spec.work)
        yield


def _add_directory(context_fd: int, key: str, path: Path) -> None:
    layer_fd = os.open(path, _LAYER_FLAGS)
    try:
        _add_fd(context_fd, key, layer_fd, os.fsencode(path))
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, os.fspath(path)) from None
    finally:
        os.close(layer_fd)


def _add_mapped_tree(context_fd: int, lower: MappedTree, userns_fd: int) -> int:
    """Add a tree with mapped owners; return its mount. Keep it open until the superblock is created."""
    try:
        mount_fd = mapped_clone(lower.path, userns_fd)
    except OSError as exc:
        raise OSError(exc.errno, f"map the owners: {exc.strerror}", os.fspath(lower.path)) from None
    try:
        _add_fd(context_fd, "lowerdir+", mount_fd)
    except OSError:
        os.close(mount_fd)
        raise
    return mount_fd


def _add_fd(context_fd: int, key: str, layer_fd: int, path: bytes = b"") -> None:
    """Add a layer by its descriptor. Before Linux 6.13 options are text only: add the descriptor's path in /proc.

    mountinfo shows that text. `mountinfo.is_data_layer` looks for data layers by path, so a data layer is added by its
    *path* if that is short enough.
    """
    try:
        syscalls.fsconfig_fd(context_fd, key, layer_fd)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.EBADF):
            raise
        by_path = key == "datadir+" and 0 < len(path) <= syscalls.MAX_OPTION_BYTES
        syscalls.fsconfig_string(context_fd, key, path if by_path else b"/proc/self/fd/%d" % layer_fd)


def _add_empty_lower(context_fd: int) -> int:
    """Add an empty tmpfs below a single lower, since the kernel refuses one lower without an upper.

    Returns:
        A descriptor of the tmpfs; keep it open until the superblock is created.
    """
    tmpfs_fd = syscalls.fsopen("tmpfs")
    try:
        syscalls.fsconfig_create(tmpfs_fd)
        empty_fd = syscalls.fsmount(tmpfs_fd, syscalls.MOUNT_ATTR_RDONLY)
    finally:
        os.close(tmpfs_fd)
    try:
        _add_fd(context_fd, "lowerdir+", empty_fd)
    except OSError:
        os.close(empty_fd)
        raise
    return empty_fd


def _refused(exc: OSError, action: str) -> GearError:
    path = f" {os.fsdecode(exc.filename)}" if exc.filename else ""
    step = exc.strerror if exc.strerror and exc.strerror != os.strerror(exc.errno or 0) else "looking up"
    return from_os_error(exc, f"{action}: {step}{path}")


def _description(spec: OverlaySpec) -> str:
    top: Path | MappedTree | None = spec.upper or (spec.lowers[0] if spec.lowers else None)
    top = top.path if isinstance(top, MappedTree) else top
    return f"an overlay of {len(spec.lowers)} lower and {len(spec.data)} data layers under {top}"
