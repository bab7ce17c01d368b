"""How a layer's tar says that something below it is gone.

`.wh.NAME` removes NAME of the layers below; `.wh..wh..opq` hides all that lies below in its directory; what else
begins with `.wh..wh.` is AUFS's own bookkeeping.

Source: OCI image-spec v1.1, layer.md, "Whiteouts"; moby pkg/archive for the AUFS names.
"""

from __future__ import annotations

from gearworkers.errors import InvalidInput

PREFIX = b".wh."
OPAQUE = b".wh..wh..opq"
META_PREFIX = b".wh..wh."

_NO_NAMES = frozenset((b"", b".", b".."))


def is_opaque(base: bytes) -> bool:
    """Whether the last component of an entry's name marks its directory opaque."""
    return base == OPAQUE


def removed_name(base: bytes) -> bytes | None:
    """The name that the whiteout *base* removes from its directory; None if *base* is no such whiteout.

    Raises:
        InvalidInput: It would remove the directory itself, or the one above.
    """
    if not base.startswith(PREFIX) or base.startswith(META_PREFIX):
        return None
    name = base[len(PREFIX) :]
    if name in _NO_NAMES:
        raise InvalidInput(f"the whiteout {base!r} names nothing that can be removed")
    return name


def whiteout_name(name: bytes) -> bytes:
    """The last component of the entry that removes *name*."""
    return PREFIX + name
