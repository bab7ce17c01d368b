"""An entry of a tar, and the constants that all modules of the package share."""

from __future__ import annotations

import msgspec

BLOCK_BYTES = 512

REG = ord("0")
HARDLINK = ord("1")
SYMLINK = ord("2")
CHAR = ord("3")
BLOCK = ord("4")
DIR = ord("5")
FIFO = ord("6")

CONTENTLESS = frozenset((HARDLINK, SYMLINK, CHAR, BLOCK, DIR, FIFO))
"""Types without content in the archive; their size field is ignored, as in Go's archive/tar."""

_SHOWN_BYTES = 200


class TarEntry(msgspec.Struct, gc=False):
    """The description of one file in a tar; the reader creates it, the writer writes it.

    `xattrs` has names without the prefix SCHILY.xattr. `sparse` lists the (offset, length) of the data segments of a
    sparse file, in order; the stored content is the concatenation of these segments. `gear` is the (digest, size in
    bytes) of a content that is stored elsewhere; the stored content may then be empty. `guard` marks a hard link
    without a target, so that programs without support for `gear` fail; the reader checks it and does not return it.
    """

    name: bytes
    """The name in the archive: long names are resolved; not normalised; without NUL."""
    type: int = REG
    """REG, HARDLINK, SYMLINK, CHAR, BLOCK, DIR or FIFO."""
    linkname: bytes = b""
    mode: int = 0o644
    """The bits 07777."""
    uid: int = 0
    gid: int = 0
    size_bytes: int = 0
    """Size of the file: expanded if sparse, from `gear` if set. 0 for all types except REG."""
    mtime_ns: int = 0
    atime_ns: int | None = None
    devmajor: int = 0
    devminor: int = 0
    xattrs: dict[bytes, bytes] | None = None
    sparse: tuple[tuple[int, int], ...] | None = None
    gear: tuple[bytes, int] | None = None
    guard: bool = False
    stored_bytes: int = 0
    """Size of the content in the archive: size_bytes except for sparse files, and 0 if only `gear` names it."""
    header_offset: int = 0
    """Offset in the tar of the entry's header block, which follows its extended headers."""


def shown(name: bytes) -> str:
    """Return *name* for an error message: quoted, printable, shortened."""
    text = repr(name[:_SHOWN_BYTES].decode("utf-8", "backslashreplace"))
    return text if len(name) <= _SHOWN_BYTES else f"{text}… ({len(name)} bytes)"


def clean_name(name: bytes) -> tuple[bytes, bytes]:
    """Return the parent and the last component of *name*, a path below the layer's root.

    The result contains no "." or ".."; ".." does not leave the root. Both parts are empty for the root.
    """
    if b"//" in name or b"/." in name or name.startswith(b"."):
        kept: list[bytes] = []
        for part in name.split(b"/"):
            if part == b"..":
                del kept[-1:]
            elif part and part != b".":
                kept.append(part)
        name = b"/".join(kept)
    parent, _, last = name.strip(b"/").rpartition(b"/")
    return parent, last
