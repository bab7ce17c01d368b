"""Select the extended attributes of a file that a layer's tar contains.

A tar contains file capabilities, POSIX ACLs, ``user.*``, and ``trusted.*`` except the attributes of overlays and of
gearworkers. Labels of the host (SELinux, IMA, EVM) are omitted, since the next host sets its own. Attributes with a "="
in the name are omitted, since a PAX record cannot express them.

Source: capabilities(7), "File capability extended attribute versioning"; moby pkg/archive,
ReadSecurityXattrToTarHeader, for the capabilities of a user namespace.
"""

from __future__ import annotations

import errno

import xattr

from gearworkers.digest import INTERNAL_XATTRS
from gearworkers.layers.index.tree_xattrs import CAPABILITY

_KEPT_PREFIXES = (b"user.", b"trusted.", b"system.posix_acl_")
_VERSION_BYTE = 3
_REVISION_2 = 2
_REVISION_3 = 3
_REVISION_2_BYTES = 20


def kept_xattrs(dir_fd: int, name: bytes) -> dict[bytes, bytes]:
    """Return the attributes of *name* in the directory, sorted by name; symlinks are not followed."""
    return _kept(b"/proc/self/fd/%d/%s" % (dir_fd, name))


def kept_xattrs_of(fd: int) -> dict[bytes, bytes]:
    """Return the attributes of an open file, sorted by name."""
    return _kept(fd)


def _kept(target: int | bytes) -> dict[bytes, bytes]:
    try:
        found: list[tuple[bytes, bytes]] = xattr.get_all(target, nofollow=not isinstance(target, int))
    except OSError as exc:
        if exc.errno == errno.ENOTSUP:
            return {}
        raise
    return {name: _portable(value) if name == CAPABILITY else value for name, value in sorted(found) if _is_kept(name)}


def _is_kept(name: bytes) -> bool:
    if b"=" in name:
        return False
    return name == CAPABILITY or (name.startswith(_KEPT_PREFIXES) and not name.startswith(INTERNAL_XATTRS))


def _portable(capability: bytes) -> bytes:
    """Return a capability as revision 2; revision 3 also has the root of a user namespace of this host."""
    if len(capability) > _REVISION_2_BYTES and capability[_VERSION_BYTE] == _REVISION_3:
        return capability[:_VERSION_BYTE] + bytes((_REVISION_2,)) + capability[_VERSION_BYTE + 1 : _REVISION_2_BYTES]
    return capability
