"""Build the tree of a layer from tar entries, in memory, and make its index.

Names have the meaning that Docker's overlay2 gives them: they are cleaned lexically, ``..`` stops at the layer's root,
a parent that is a symlink is followed inside the layer, missing parents are created (0755), the last entry of a name
wins, ``.wh.x`` becomes a 0:0 device, and ``.wh..wh..opq`` marks its directory opaque. Names are never looked up in a
file system, so no name leads out of the layer.

A regular file of the index has its size, owner, mode, time and attributes. The overlay marks metacopy and redirect name
the object that contains its bytes.
"""

from __future__ import annotations

import stat

from gearworkers.digest import OPAQUE_XATTR, REDIRECT_XATTR, RESERVED, object_path
from gearworkers.errors import InvalidInput, ResourceExhausted
from gearworkers.layers.idmap import IdMaps
from gearworkers.layers.index import erofs_format
from gearworkers.layers.index.erofs import ImageWriter
from gearworkers.layers.index.tree_xattrs import check_xattrs, stored_xattrs
from gearworkers.tar import whiteouts
from gearworkers.tar.entry import BLOCK, CHAR, DIR, FIFO, HARDLINK, REG, SYMLINK, TarEntry, clean_name, shown
from gearworkers.util.fs import MAX_PATH_BYTES

MAX_INODES = 4_000_000
"""A layer of this size takes about 2 GB of memory."""
MAX_EXTRA_BYTES = 512 << 20
"""Limit of extended attributes and symlink targets together; memory holds up to three copies of them."""
MAX_CACHED_DIRECTORIES = 1 << 16

_FORMATS = {CHAR: stat.S_IFCHR, BLOCK: stat.S_IFBLK, FIFO: stat.S_IFIFO}
_REDIRECT = REDIRECT_XATTR.encode()
_OPAQUE = OPAQUE_XATTR.encode()
_MAX_NAME_BYTES = 255
_MAX_SYMLINKS = 40
_NO_ID = (1 << 32) - 1  # chown(2) keeps the owner for this id
_DEVICE_LIMITS = (1 << 12, 1 << 20)  # majors and minors of Linux


_REDIRECTED = erofs_format.encode_xattrs({_REDIRECT: object_path(bytes(32))}, metacopy=True)[
    : -len(object_path(bytes(32)))
]
"""Encoded attributes of a file that has only the overlay's marks, up to the path of the object."""


class Inode:
    """An inode of the index; implements `erofs.ErofsInode`."""

    __slots__ = (
        "attributes",
        "children",
        "digest",
        "gid",
        "mode",
        "mtime_ns",
        "nid",
        "nlink",
        "rdev",
        "size_bytes",
        "target",
        "uid",
        "xattrs",
    )

    def __init__(self, mode: int, uid: int, gid: int, mtime_ns: int) -> None:
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.mtime_ns = mtime_ns
        self.size_bytes = 0
        self.nlink = 1
        self.rdev = 0
        self.target = b""
        self.digest: bytes | None = None
        self.attributes: dict[bytes, bytes] | None = None
        self.xattrs = b""
        self.nid = 0
        self.children: dict[bytes, Inode] | None = None


class LayerTree:
    """The tree that the entries of one tar make. After an error the tree is invalid; discard it."""

    def __init__(self, ids: IdMaps, *, time_ns: int) -> None:
        self._ids = ids
        self._time_ns = time_ns
        self._root = self._new_directory(0o755, *ids.root, time_ns)
        self._known: dict[bytes, Inode] = {b"": self._root}
        self._inodes = 1
        self._extra_bytes = 0
        self._owners: dict[tuple[int, int], tuple[int, int]] = {}

    def add(self, entry: TarEntry, digest: bytes | None) -> None:
        """Add *entry* to the tree.

        Args:
            entry: An entry from the reader.
            digest: SHA-256 of a regular file's content; None for an empty file and for all other types.

        Raises:
            InvalidInput: Docker would reject the entry too, or the entry would reach into the object store.
            ResourceExhausted: The layer has more than MAX_INODES files or MAX_EXTRA_BYTES of other data.
        """
        try:
            self._add(entry, digest)
        except InvalidInput as exc:
            raise InvalidInput(f"tar entry {shown(entry.name)}: {exc}") from exc

    def has_at_top(self, name: bytes) -> bool:
        """Whether the top directory has an entry of this name; a whiteout does not count."""
        assert self._root.children is not None
        found = self._root.children.get(name)
        return found is not None and (found.mode, found.rdev) != (stat.S_IFCHR, 0)

    def size_bytes(self) -> int:
        """Return the size as Docker's overlay2 counts it: st_size of all except directories, each inode once."""
        total = 0
        seen: set[int] = set()
        stack = [self._root]
        while stack:
            for child in (stack.pop().children or {}).values():
                if child.children is not None:
                    stack.append(child)
                elif child.nlink == 1 or id(child) not in seen:
                    seen.add(id(child))
                    total += child.size_bytes + len(child.target)
        return total

    def image(self, uuid: bytes) -> ImageWriter:
        """Return a writer of the EROFS image. Call once, after the last entry."""
        stack = [self._root]
        while stack:
            inode = stack.pop()
            if inode.attributes:
                _encode(inode)
            if inode.children is not None:
                inode.nlink = 2
                for child in inode.children.values():
                    if child.children is not None:
                        inode.nlink += 1
                    stack.append(child)
        return ImageWriter(self._root, uuid=uuid, time_ns=self._time_ns)

    # -- entries

    def _add(self, entry: TarEntry, digest: bytes | None) -> None:
        parent_path, name = clean_name(entry.name)
        if not name:
            return
        if entry.xattrs:
            check_xattrs(entry.xattrs)
        name_bytes = len(name) - len(whiteouts.PREFIX) if name.startswith(whiteouts.PREFIX) else len(name)
        if name_bytes > _MAX_NAME_BYTES or len(parent_path) + name_bytes >= MAX_PATH_BYTES:
            raise InvalidInput("its name is too long for a file system")
        parent = self._known.get(parent_path)
        if parent is None:
            parent = self._directory(parent_path, entry.mtime_ns)
        if name.startswith((whiteouts.PREFIX, RESERVED)) and not self._is_ordinary(entry, parent, name):
            return
        kind = entry.type
        if kind == REG:
            inode = self._inode(entry, stat.S_IFREG)
            inode.size_bytes, inode.digest = entry.size_bytes, digest
            if digest is not None:
                inode.xattrs = _REDIRECTED + object_path(digest)
        elif kind == DIR:
            self._add_directory(entry, parent, parent_path, name)
            return
        elif kind == HARDLINK:
            self._add_link(entry, parent, name)
            return
        elif kind == SYMLINK:
            if not 0 < len(entry.linkname) <= MAX_PATH_BYTES:
                raise InvalidInput("its link target is empty or too long")
            inode = self._inode(entry, stat.S_IFLNK, 0o777)
            inode.target = entry.linkname
        else:
            inode = self._inode(entry, _FORMATS[kind])
            inode.rdev = _device(entry) if kind != FIFO else 0
        self._place(parent, name, inode)

    def _inode(self, entry: TarEntry, format: int, mode: int | None = None) -> Inode:
        self._count_inode(entry.name)
        if entry.xattrs or format == stat.S_IFLNK:
            self._count_extra(entry)
        uid, gid = self._owner(entry)
        inode = Inode(format | (entry.mode if mode is None else mode), uid, gid, entry.mtime_ns)
        if entry.xattrs:
            inode.attributes = dict(entry.xattrs)
        return inode

    def _count_inode(self, name: bytes) -> None:
        self._inodes += 1
        if self._inodes > MAX_INODES:
            raise ResourceExhausted(f"tar entry {shown(name)}: a layer can have at most {MAX_INODES} files")

    def _count_extra(self, entry: TarEntry) -> None:
        self._extra_bytes += len(entry.linkname)
        self._extra_bytes += sum(len(name) + len(value) for name, value in (entry.xattrs or {}).items())
        if self._extra_bytes > MAX_EXTRA_BYTES:
            limit = f"{MAX_EXTRA_BYTES} bytes of extended attributes and symlink targets"
            raise ResourceExhausted(f"tar entry {shown(entry.name)}: a layer can have at most {limit}")

    def _owner(self, entry: TarEntry) -> tuple[int, int]:
        key = entry.uid, entry.gid
        owner = self._owners.get(key)
        if owner is None:
            owner = self._owners[key] = self._host_owner(*key)
        return owner

    def _host_owner(self, uid: int, gid: int) -> tuple[int, int]:
        uid, gid = self._ids.to_host(uid, gid)
        if not (0 <= uid < _NO_ID and 0 <= gid < _NO_ID):
            raise InvalidInput(f"its owner, uid {uid} and gid {gid}, is outside the range of Linux")
        return uid, gid

    def _place(self, parent: Inode, name: bytes, inode: Inode) -> None:
        assert parent.children is not None
        if name in parent.children:
            self._remove(parent, name)
        parent.children[name] = inode

    def _remove(self, parent: Inode, name: bytes) -> None:
        """Remove the file that an earlier entry of this name created."""
        assert parent.children is not None
        removed = parent.children.pop(name, None)
        if removed is None:
            return
        if removed.children is not None or removed.target:
            self._known = {b"": self._root}
        stack = [removed]
        while stack:
            inode = stack.pop()
            inode.nlink -= 1
            if inode.children:
                stack += inode.children.values()

    def _add_directory(self, entry: TarEntry, parent: Inode, parent_path: bytes, name: bytes) -> None:
        assert parent.children is not None
        made = self._inode(entry, stat.S_IFDIR)
        before = parent.children.get(name)
        if before is not None and before.children is not None:
            before.mode, before.uid, before.gid, before.mtime_ns = made.mode, made.uid, made.gid, made.mtime_ns
            if made.attributes:
                before.attributes = {**(before.attributes or {}), **made.attributes}
            return
        made.children = {}
        self._place(parent, name, made)
        self._remember(parent_path + b"/" + name if parent_path else name, made)

    def _add_link(self, entry: TarEntry, parent: Inode, name: bytes) -> None:
        target_parent, target_name = clean_name(entry.linkname)
        # Remove an earlier file of this name first, as Docker does: a link to itself finds nothing.
        self._remove(parent, name)
        directory = self._find(target_parent)
        target = None if directory is None or directory.children is None else directory.children.get(target_name)
        if target is None or not target_name:
            raise InvalidInput(f"it is a hard link to {shown(entry.linkname)}, which is not in this layer")
        if target.children is not None:
            raise InvalidInput(f"it is a hard link to {shown(entry.linkname)}, which is a directory")
        target.nlink += 1
        target.uid, target.gid = self._owner(entry)
        if not target.target:
            target.mode = stat.S_IFMT(target.mode) | entry.mode
            target.mtime_ns = entry.mtime_ns
        if entry.xattrs:
            self._count_extra(entry)
            target.attributes = {**(target.attributes or {}), **entry.xattrs}
        assert parent.children is not None
        parent.children[name] = target

    def _is_ordinary(self, entry: TarEntry, parent: Inode, name: bytes) -> bool:
        """Whether a name with a special prefix is an ordinary file; whiteouts are handled here."""
        assert parent.children is not None
        if name.startswith(RESERVED):
            self._reject_reserved(parent, name)
            return True
        if whiteouts.is_opaque(name):
            parent.attributes = {**(parent.attributes or {}), _OPAQUE: b"y"}
            return False
        hidden = whiteouts.removed_name(name)
        if hidden is not None:
            self._reject_reserved(parent, hidden)
            if hidden in parent.children:
                raise InvalidInput("it is a whiteout of a name in the same layer")
            whiteout = self._inode(entry, stat.S_IFCHR, 0)
            whiteout.attributes = None
            parent.children[hidden] = whiteout
        return False

    def _reject_reserved(self, parent: Inode, name: bytes) -> None:
        if parent is self._root and name.startswith(RESERVED):
            raise InvalidInput("a top-level name must not begin with the byte 0x01, which leads to the object store")

    # -- directories

    def _new_directory(self, mode: int, uid: int, gid: int, mtime_ns: int) -> Inode:
        directory = Inode(stat.S_IFDIR | mode, uid, gid, mtime_ns)
        directory.children = {}
        return directory

    def _directory(self, path: bytes, mtime_ns: int) -> Inode:
        """Return the directory at *path*, whose symlinks are followed; create missing directories."""
        found = self._walk(path, mtime_ns)
        if found is None or found.children is None:
            raise InvalidInput(f"its parent {shown(path)} is not a directory of this layer")
        self._remember(path, found)
        return found

    def _remember(self, path: bytes, directory: Inode) -> None:
        """Cache the directory of a path. The cache is bounded: a tar may have millions of long paths."""
        if len(self._known) >= MAX_CACHED_DIRECTORIES:
            self._known = {b"": self._root}
        self._known[path] = directory

    def _find(self, path: bytes) -> Inode | None:
        return self._known.get(path) or self._walk(path, None)

    def _walk(self, path: bytes, mtime_ns: int | None) -> Inode | None:
        """Follow *path* and its symlinks; create missing directories with the time *mtime_ns* unless that is None."""
        trail = [self._root]
        left = path.split(b"/")[::-1]
        symlinks = linked = 0  # linked: the number of remaining components that come from a symlink's target
        while left:
            name = left.pop()
            is_linked = linked > 0
            linked -= is_linked
            here = trail[-1]
            if here.children is None:
                return None
            if name in (b"", b"."):
                continue
            if name == b"..":
                if len(trail) > 1:
                    trail.pop()
                continue
            child = here.children.get(name)
            if child is None:
                if mtime_ns is None or is_linked:
                    return None
                child = self._create_implied(here, name, mtime_ns)
            if child.target:
                symlinks += 1
                if symlinks > _MAX_SYMLINKS:
                    raise InvalidInput(f"its parent {shown(path)} goes through too many symbolic links")
                target = child.target.split(b"/")[::-1]
                left += target
                linked += len(target)
                if child.target.startswith(b"/"):
                    trail = [self._root]
            else:
                trail.append(child)
        return trail[-1]

    def _create_implied(self, parent: Inode, name: bytes, mtime_ns: int) -> Inode:
        assert parent.children is not None
        self._reject_reserved(parent, name)
        if len(name) > _MAX_NAME_BYTES:
            raise InvalidInput("its name is too long for a file system")
        self._count_inode(name)
        made = parent.children[name] = self._new_directory(0o755, *self._ids.root, mtime_ns)
        return made


def _device(entry: TarEntry) -> int:
    major, minor = entry.devmajor, entry.devminor
    if not (0 <= major < _DEVICE_LIMITS[0] and 0 <= minor < _DEVICE_LIMITS[1]):
        raise InvalidInput(f"its device number {major}:{minor} is outside the range of Linux")
    return erofs_format.encode_device(major, minor)


def _encode(inode: Inode) -> None:
    """Encode the attributes of an inode for the image."""
    attributes = stored_xattrs(inode.mode, inode.attributes) if inode.attributes else {}
    if inode.digest is not None:
        marks = {_REDIRECT: object_path(inode.digest)}
        inode.xattrs = erofs_format.encode_xattrs({**attributes, **marks}, metacopy=True)
    elif attributes:
        inode.xattrs = erofs_format.encode_xattrs(attributes)
