"""Overlay mounts of index trees, snapshots of trees, and an independent implementation of applying a layer's tar."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from gearworkers.digest import METACOPY_XATTR, REDIRECT_XATTR, object_path
from gearworkers.mounts.overlay import OverlaySpec, detached, mount, unmount

_XATTR_RECORD = "SCHILY.xattr."
_COMPARED_XATTRS = ("user.", "trusted.test", "security.capability", "system.posix_acl")


class Node(NamedTuple):
    """Everything that a user can see of one path, except inode number and access time."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    rdev: int
    content: bytes
    xattrs: tuple[tuple[str, bytes], ...]
    links: frozenset[bytes]


@dataclass(frozen=True)
class Overlay:
    """A mounted container: index trees over an object store, and a read-write layer on top."""

    root: Path
    parent_fd: int
    merged_fd: int
    spec: OverlaySpec

    @property
    def upper(self) -> Path:
        return self.root / "upper"

    @property
    def merged(self) -> Path:
        return self.root / "merged"

    @property
    def objects(self) -> Path:
        return self.root / "public"


@contextlib.contextmanager
def mounted(root: Path, layers: list[Callable[[Path], None]]) -> Iterator[Overlay]:
    """Mount an overlay in the empty directory *root*; each of *layers*, lowest first, fills a plain tree."""
    for name in ("public", "upper", "work", "merged"):
        (root / name).mkdir()
    lowers: list[Path] = []
    for number, fill in enumerate(layers):
        tree = root / f"layer{number}"
        tree.mkdir()
        fill(tree)
        make_index(tree, root / "public")
        lowers.insert(0, tree)
    spec = OverlaySpec(tuple(lowers), (root / "public",), root / "upper", root / "work")
    parent = OverlaySpec(spec.lowers, spec.data)
    mount(spec, root / "merged")
    try:
        merged_fd = os.open(root / "merged", os.O_RDONLY | os.O_DIRECTORY)
        try:
            with detached(parent) as parent_fd:
                yield Overlay(root, parent_fd, merged_fd, spec)
        finally:
            os.close(merged_fd)
    finally:
        unmount(root / "merged")


def make_index(tree: Path, objects: Path) -> None:
    """Turn each file of the plain *tree* into an index inode that redirects to an object."""
    for directory, _, names in os.walk(os.fsencode(tree)):
        for name in names:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            if stat.S_ISREG(status.st_mode) and status.st_size and not _is_index_inode(path):
                _move_content(path, status, objects)


def _is_index_inode(path: bytes) -> bool:
    return METACOPY_XATTR in os.listxattr(path)


def _move_content(path: bytes, status: os.stat_result, objects: Path) -> None:
    xattrs = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    with open(path, "rb+") as file:
        content = file.read()
        file.truncate(0)
        file.truncate(status.st_size)
    for name, value in xattrs.items():  # truncate removes capabilities
        os.setxattr(path, name, value)
    redirect = object_path(hashlib.sha256(content).digest())
    target = os.fsencode(objects) + redirect
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target, "wb") as stored:
        stored.write(content)
    os.setxattr(path, METACOPY_XATTR, b"")
    os.setxattr(path, REDIRECT_XATTR, redirect)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def snapshot(root: int | Path) -> dict[bytes, Node]:
    """Return everything below *root* by path, without the root itself, like a layer's tar."""
    top = b"/proc/self/fd/%d/" % root if isinstance(root, int) else os.fsencode(root) + b"/"
    nodes: dict[bytes, Node] = {}
    groups: dict[tuple[int, int], set[bytes]] = {}
    for directory, subdirectories, names in os.walk(top):
        for name in subdirectories + names:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            relative = path[len(top) :]
            if not stat.S_ISDIR(status.st_mode):
                groups.setdefault((status.st_dev, status.st_ino), set()).add(relative)
            nodes[relative] = _node(path, status)
    for group in groups.values():
        for path in group:
            nodes[path] = nodes[path]._replace(links=frozenset(group))
    return nodes


def _node(path: bytes, status: os.stat_result) -> Node:
    content = b""
    if stat.S_ISREG(status.st_mode):
        content = hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).digest()
    elif stat.S_ISLNK(status.st_mode):
        content = os.readlink(path)
    names = [name for name in os.listxattr(path, follow_symlinks=False) if name.startswith(_COMPARED_XATTRS)]
    xattrs = tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in sorted(names))
    return Node(
        status.st_mode,
        status.st_uid,
        status.st_gid,
        status.st_mtime_ns,
        status.st_rdev,
        content,
        xattrs,
        frozenset(),
    )


def apply_tar(parent_fd: int, tar: bytes, target: Path) -> dict[bytes, Node]:
    """Copy the parent to the new directory *target* and apply *tar* to it; return a snapshot of the result."""
    target.mkdir()
    source = f"/proc/self/fd/{parent_fd}/."
    subprocess.run(["cp", "-a", "--", source, target], check=True, pass_fds=(parent_fd,))
    times: dict[bytes, int] = {}
    with tarfile.open(fileobj=io.BytesIO(tar), errors="surrogateescape") as archive:
        for member in archive:
            _extract(archive, member, os.fsencode(target), times)
    for path, mtime_ns in times.items():
        os.utime(path, ns=(mtime_ns, mtime_ns))
    return snapshot(target)


def _extract(archive: tarfile.TarFile, member: tarfile.TarInfo, root: bytes, times: dict[bytes, int]) -> None:
    path = os.path.join(root, os.fsencode(member.name))
    directory, name = os.path.split(path)
    if name == b".wh..wh..opq":
        for child in os.listdir(directory):
            _remove(os.path.join(directory, child))
        return
    if name.startswith(b".wh."):
        hidden = os.path.join(directory, name[4:])
        assert os.path.lexists(hidden), f"{member.name} hides nothing"
        _remove(hidden)
        return
    if os.path.lexists(path) and not (member.isdir() and stat.S_ISDIR(os.lstat(path).st_mode)):
        _remove(path)
    _create(archive, member, root, path)
    _set_metadata(member, path, times)


def _remove(path: bytes) -> None:
    if stat.S_ISDIR(os.lstat(path).st_mode):
        shutil.rmtree(path)
    else:
        os.unlink(path)


def _create(archive: tarfile.TarFile, member: tarfile.TarInfo, root: bytes, path: bytes) -> None:
    if member.isdir():
        os.makedirs(path, exist_ok=True)
    elif member.issym():
        os.symlink(os.fsencode(member.linkname), path)
    elif member.islnk():
        os.link(os.path.join(root, os.fsencode(member.linkname)), path, follow_symlinks=False)
    elif member.isfifo():
        os.mkfifo(path)
    elif member.isdev():
        kind = stat.S_IFCHR if member.ischr() else stat.S_IFBLK
        os.mknod(path, kind, os.makedev(member.devmajor, member.devminor))
    else:
        extracted = archive.extractfile(member)
        assert extracted is not None
        with open(path, "wb") as file:
            shutil.copyfileobj(extracted, file)


def _set_metadata(member: tarfile.TarInfo, path: bytes, times: dict[bytes, int]) -> None:
    os.chown(path, member.uid, member.gid, follow_symlinks=False)
    if not os.path.islink(path):
        os.chmod(path, member.mode)
    if not member.islnk():  # a hard link has those of its first name
        _replace_xattrs(member, path)
    mtime_ns = int(Decimal(member.pax_headers.get("mtime", member.mtime)) * 1_000_000_000)
    if member.isdir():
        times[path] = mtime_ns
    os.utime(path, ns=(mtime_ns, mtime_ns), follow_symlinks=False)


def _replace_xattrs(member: tarfile.TarInfo, path: bytes) -> None:
    for name in os.listxattr(path, follow_symlinks=False):
        if name.startswith(_COMPARED_XATTRS):
            os.removexattr(path, name, follow_symlinks=False)
    for record, value in member.pax_headers.items():
        if record.startswith(_XATTR_RECORD):
            raw = value.encode("utf-8", "surrogateescape")
            os.setxattr(path, record[len(_XATTR_RECORD) :], raw, follow_symlinks=False)
