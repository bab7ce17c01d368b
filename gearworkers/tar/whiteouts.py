"""Whiteouts: names in a layer's tar that remove files of the layers below.

`.wh.NAME` removes NAME. `.wh..wh..opq` hides all files of the layers below in its directory. Other names that begin
with `.wh..wh.` are AUFS's own files.

Source: OCI image-spec v1.1, layer.md, "Whiteouts"; moby pkg/archive for the AUFS names.
"""

from __future__ import annotations

from gearworkers.errors import InvalidInput

PREFIX = b".wh."
OPAQUE = b".wh..wh..opq"
META_PREFIX = b".wh..wh."

_INVALID_NAMES = frozenset((b"", b".", b".."))


def is_opaque(base: bytes) -> bool:
    """Whether the last component of an entry's name marks its directory opaque."""
    return base == OPAQUE


def removed_name(base: bytes) -> bytes | None:
    """Return the name that the whiteout *base* removes from its directory; None if *base* removes no name.

    Raises:
        InvalidInput: The whiteout would remove its own directory or the parent directory.
    """
    if not base.startswith(PREFIX) or base.startswith(META_PREFIX):
        return None
    name = base[len(PREFIX) :]
    if name in _INVALID_NAMES:
        raise InvalidInput(f"the whiteout {base!r} does not name a file")
    return name


def whiteout_name(name: bytes) -> bytes:
    """Return the last component of the entry that removes *name*."""
    return PREFIX + name
