"""Extended attributes in an index: which attributes of a tar entry are rejected, omitted or stored."""

from __future__ import annotations

import stat

from gearworkers.digest import INTERNAL_XATTRS
from gearworkers.errors import InvalidInput
from gearworkers.layers.index import erofs_format
from gearworkers.tar.entry import shown

_OMITTED: dict[int, tuple[bytes, ...]] = {
    stat.S_IFDIR: (),
    stat.S_IFREG: (b"system.posix_acl_default",),
    stat.S_IFLNK: (b"user.", b"system.posix_acl_"),
}
"""By file type. The kernel would list such an attribute but not return it, so no container could change the file."""
_OMITTED_OF_OTHERS = (b"user.", b"system.posix_acl_default")
CAPABILITY = b"security.capability"


def check_xattrs(xattrs: dict[bytes, bytes]) -> None:
    """Check the attributes of a tar entry.

    Raises:
        InvalidInput: An attribute would redirect reads, is malformed or cannot be stored.
    """
    for name in xattrs:
        if name.startswith(INTERNAL_XATTRS):
            raise InvalidInput(f"its extended attribute {shown(name)} would redirect reads to other layers' files")
    if CAPABILITY in xattrs and not _is_capability(xattrs[CAPABILITY]):
        raise InvalidInput(f"its {shown(CAPABILITY)} is malformed")
    erofs_format.encode_xattrs(_storable(xattrs))  # raises here, where the error still has the entry's name


def stored_xattrs(mode: int, xattrs: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """Return the attributes that a file of this type keeps in the index."""
    return _storable(xattrs, _OMITTED.get(stat.S_IFMT(mode), _OMITTED_OF_OTHERS))


def _storable(xattrs: dict[bytes, bytes], omitted: tuple[bytes, ...] = ()) -> dict[bytes, bytes]:
    """Omit attributes that EROFS cannot store, as Docker does, and attributes with one of the *omitted* prefixes."""
    return {
        name: value for name, value in xattrs.items() if erofs_format.is_storable(name) and not name.startswith(omitted)
    }


def _is_capability(value: bytes) -> bool:
    """Whether the kernel accepts the value: revision 2, or revision 3 with the root of a user namespace."""
    return (len(value), value[1:4]) in ((20, b"\0\0\2"), (24, b"\0\0\3")) and value[0] <= 1
