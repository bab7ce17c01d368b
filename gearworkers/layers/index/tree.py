"""A layer's tree from the entries of a tar, in memory, and its image: the layer's index.

What a name means is what Docker's overlay2 makes of it: cleaned lexically, ``..`` stops at the layer's root, a
parent that is a symlink is followed inside the layer, missing parents are made (0755), the last entry of a name
wins, ``.wh.x`` becomes a 0:0 device and ``.wh..wh..opq`` marks its directory opaque. Nothing is looked up in a file
system, so no name leads out of the layer.

A regular file of the index has its size, owner, mode, time and attributes; its bytes are an object's, named by the
overlay marks metacopy and redirect.
"""

from __future__ import annotations

import stat

from gearworkers.digest import RESERVED, object_path
from gearworkers.errors import InvalidInput, ResourceExhausted
from gearworkers.layers.idmap import IdMaps
from gearworkers.layers.index import erofs
from gearworkers.tar import whiteouts
from gearworkers.tar.entry import BLOCK, CHAR, DIR, FIFO, HARDLINK, REG, SYMLINK, TarEntry, clean_name, shown
from gearworkers.util.fs import MAX_PATH_BYTES

MAX_INODES = 4_000_000
"""About 2 GB of memory while the layer is made."""
MAX_EXTRA_BYTES = 512 << 20
"""Of extended attributes and symlinks' targets; they are in memory up to three times."""
_MAX_KNOWN = 1 << 16

_FORMATS = {CHAR: stat.S_IFCHR, BLOCK: stat.S_IFBLK, FIFO: stat.S_IFIFO}
_FORBIDDEN_XATTRS = (b"trusted.overlay.", b"trusted.gear.")
_LEFT_OUT: dict[int, tuple[bytes, ...]] = {
    stat.S_IFDIR: (),
    stat.S_IFREG: (b"system.posix_acl_default",),
    stat.S_IFLNK: (b"user.", b"system.posix_acl_"),
}
"""What the kernel takes at no file of this type: it would list it and not give it, so no container could change one."""
_LEFT_OUT_OF_OTHERS = (b"user.", b"system.posix_acl_default")
_CAPABILITY = b"security.capability"
_REDIRECT = b"trusted.overlay.redirect"
_OPAQUE = b"trusted.overlay.opaque"
_LONGEST_NAME_BYTES = 255
_MAX_SYMLINKS = 40
_NO_ID = (1 << 32) - 1  # what chown(2) takes for "leave it"
_DEVICE_LIMITS = (1 << 12, 1 << 20)  # majors and minors of Linux


_REDIRECTED = erofs.encode_xattrs({_REDIRECT: object_path(bytes(32))}, metacopy=True)[: -len(object_path(bytes(32)))]
"""The attributes of a file that has no others than the overlay's marks, up to the object's path."""


class Inode:
    """An inode of the index; `erofs.ErofsInode`."""

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
    """Takes the entries of one tar; `image` is what they make. After an error it is to be thrown away."""

    def __init__(self, ids: IdMaps, *, time_ns: int) -> None:
        self._ids = ids
        self._time_ns = time_ns
        self._root = self._new_directory(0o755, *ids.root, time_ns)
        self._known: dict[bytes, Inode] = {b"": self._root}
        self._inodes = 1
        self._extra_bytes = 0
        self._owners: dict[tuple[int, int], tuple[int, int]] = {}

    def add(self, entry: TarEntry, digest: bytes | None) -> None:
        """Put *entry* into the tree.

        Args:
            entry: As the reader gave it.
            digest: SHA-256 of a regular file's content; None for an empty one and for all other types.

        Raises:
            InvalidInput: Docker would refuse it too, or it would reach into the object store.
            ResourceExhausted: The layer has more than MAX_INODES files.
        """
        try:
            self._add(entry, digest)
        except InvalidInput as exc:
            raise InvalidInput(f"tar entry {shown(entry.name)}: {exc}") from exc

    def has_at_top(self, name: bytes) -> bool:
        """Whether something of this name stands at the layer's top; a whiteout is nothing."""
        assert self._root.children is not None
        found = self._root.children.get(name)
        return found is not None and (found.mode, found.rdev) != (stat.S_IFCHR, 0)

    def size_bytes(self) -> int:
        """The layer's size as Docker's overlay2 counts it: st_size of all but directories, each inode once."""
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

    def image(self, uuid: bytes) -> erofs.ImageWriter:
        """The EROFS image, to be written; for once, at the end."""
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
        return erofs.ImageWriter(self._root, uuid=uuid, time_ns=self._time_ns)

    # -- entries

    def _add(self, entry: TarEntry, digest: bytes | None) -> None:
        parent_path, name = clean_name(entry.name)
        if not name:
            return
        if entry.xattrs:
            _check_xattrs(entry.xattrs)
        name_bytes = len(name) - len(whiteouts.PREFIX) if name.startswith(whiteouts.PREFIX) else len(name)
        if name_bytes > _LONGEST_NAME_BYTES or len(parent_path) + name_bytes >= MAX_PATH_BYTES:
            raise InvalidInput("its name is too long for a file system")
        parent = self._known.get(parent_path)
        if parent is None:
            parent = self._directory(parent_path, entry.mtime_ns)
        if name.startswith((whiteouts.PREFIX, RESERVED)) and not self._is_plain(entry, parent, name):
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
            raise ResourceExhausted(f"tar entry {shown(name)}: a layer has {MAX_INODES} files at most")

    def _count_extra(self, entry: TarEntry) -> None:
        self._extra_bytes += len(entry.linkname)
        self._extra_bytes += sum(len(name) + len(value) for name, value in (entry.xattrs or {}).items())
        if self._extra_bytes > MAX_EXTRA_BYTES:
            most = f"{MAX_EXTRA_BYTES} bytes of extended attributes and symlinks' targets"
            raise ResourceExhausted(f"tar entry {shown(entry.name)}: a layer has {most} at most")

    def _owner(self, entry: TarEntry) -> tuple[int, int]:
        key = entry.uid, entry.gid
        owner = self._owners.get(key)
        if owner is None:
            owner = self._owners[key] = self._host_owner(*key)
        return owner

    def _host_owner(self, uid: int, gid: int) -> tuple[int, int]:
        uid, gid = self._ids.to_host(uid, gid)
        if not (0 <= uid < _NO_ID and 0 <= gid < _NO_ID):
            raise InvalidInput(f"its owner, uid {uid} and gid {gid}, is none that Linux has")
        return uid, gid

    def _place(self, parent: Inode, name: bytes, inode: Inode) -> None:
        assert parent.children is not None
        if name in parent.children:
            self._remove(parent, name)
        parent.children[name] = inode

    def _remove(self, parent: Inode, name: bytes) -> None:
        """Remove what an earlier entry made of this name."""
        assert parent.children is not None
        gone = parent.children.pop(name, None)
        if gone is None:
            return
        if gone.children is not None or gone.target:
            self._known = {b"": self._root}
        stack = [gone]
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
        # What stands at the name goes first, as with Docker: a link to itself finds nothing.
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

    def _is_plain(self, entry: TarEntry, parent: Inode, name: bytes) -> bool:
        """Whether a name with a special beginning is a file all the same; a whiteout is dealt with here."""
        assert parent.children is not None
        if name.startswith(RESERVED):
            self._refuse_reserved(parent, name)
            return True
        if whiteouts.is_opaque(name):
            parent.attributes = {**(parent.attributes or {}), _OPAQUE: b"y"}
            return False
        hidden = whiteouts.removed_name(name)
        if hidden is not None:
            self._refuse_reserved(parent, hidden)
            if hidden in parent.children:
                raise InvalidInput("it is a whiteout of a name that the same layer holds")
            whiteout = self._inode(entry, stat.S_IFCHR, 0)
            whiteout.attributes = None
            parent.children[hidden] = whiteout
        return False

    def _refuse_reserved(self, parent: Inode, name: bytes) -> None:
        if parent is self._root and name.startswith(RESERVED):
            raise InvalidInput("a top-level name must not begin with the byte 0x01: the object store is reached by it")

    # -- directories

    def _new_directory(self, mode: int, uid: int, gid: int, mtime_ns: int) -> Inode:
        directory = Inode(stat.S_IFDIR | mode, uid, gid, mtime_ns)
        directory.children = {}
        return directory

    def _directory(self, path: bytes, mtime_ns: int) -> Inode:
        """The directory that *path* leads to; what is missing of it is made."""
        found = self._walk(path, mtime_ns)
        if found is None or found.children is None:
            raise InvalidInput(f"its parent {shown(path)} is not a directory of this layer")
        self._remember(path, found)
        return found

    def _remember(self, path: bytes, directory: Inode) -> None:
        """A path of thousands of bytes may lead to each of millions of directories."""
        if len(self._known) >= _MAX_KNOWN:
            self._known = {b"": self._root}
        self._known[path] = directory

    def _find(self, path: bytes) -> Inode | None:
        return self._known.get(path) or self._walk(path, None)

    def _walk(self, path: bytes, mtime_ns: int | None) -> Inode | None:
        """Follow *path*, symlinks in the layer included; make missing directories if *mtime_ns* says of when."""
        trail = [self._root]
        left = path.split(b"/")[::-1]
        symlinks = linked = 0  # linked: how many of the components left are of a symlink's target
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
                child = self._implied(here, name, mtime_ns)
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

    def _implied(self, parent: Inode, name: bytes, mtime_ns: int) -> Inode:
        assert parent.children is not None
        self._refuse_reserved(parent, name)
        if len(name) > _LONGEST_NAME_BYTES:
            raise InvalidInput("its name is too long for a file system")
        self._count_inode(name)
        made = parent.children[name] = self._new_directory(0o755, *self._ids.root, mtime_ns)
        return made


def _device(entry: TarEntry) -> int:
    major, minor = entry.devmajor, entry.devminor
    if not (0 <= major < _DEVICE_LIMITS[0] and 0 <= minor < _DEVICE_LIMITS[1]):
        raise InvalidInput(f"its device number {major}:{minor} is none that Linux has")
    return erofs.encode_device(major, minor)


def _storable(attributes: dict[bytes, bytes], left_out: tuple[bytes, ...] = ()) -> dict[bytes, bytes]:
    """Without those that no file system here knows, and whose names begin so, as Docker leaves them out."""
    return {
        name: value for name, value in attributes.items() if erofs.is_storable(name) and not name.startswith(left_out)
    }


def _encode(inode: Inode) -> None:
    """Set the attributes as they are written."""
    left_out = _LEFT_OUT.get(stat.S_IFMT(inode.mode), _LEFT_OUT_OF_OTHERS)
    attributes = _storable(inode.attributes, left_out) if inode.attributes else {}
    if inode.digest is not None:
        marks = {_REDIRECT: object_path(inode.digest)}
        inode.xattrs = erofs.encode_xattrs({**attributes, **marks}, metacopy=True)
    elif attributes:
        inode.xattrs = erofs.encode_xattrs(attributes)


def _is_capability(value: bytes) -> bool:
    """Whether the kernel would set it: revision 2, or 3 with the root of a user namespace."""
    return (len(value), value[1:4]) in ((20, b"\0\0\2"), (24, b"\0\0\3")) and value[0] <= 1


def _check_xattrs(xattrs: dict[bytes, bytes]) -> None:
    for name in xattrs:
        if name.startswith(_FORBIDDEN_XATTRS):
            raise InvalidInput(f"its extended attribute {shown(name)} would redirect reads to other layers' files")
    if _CAPABILITY in xattrs and not _is_capability(xattrs[_CAPABILITY]):
        raise InvalidInput(f"its {shown(_CAPABILITY)} is malformed")
    erofs.encode_xattrs(_storable(xattrs))  # here, where an error still has the entry's name
