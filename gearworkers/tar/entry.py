"""One entry of a tar, and the few constants every part of the archive package shares."""

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
"""No content follows these in the archive, whatever their size field says (as Go's archive/tar)."""

_SHOWN_BYTES = 200


class TarEntry(msgspec.Struct, gc=False):
    """What a tar says of one file; made by the reader, taken by the writer.

    `xattrs` has the names without the SCHILY.xattr prefix. `sparse` lists the (offset, length) of the data of
    a sparse file, in order; the stored content is these segments one after the other. `gear` is the (digest,
    size in bytes) of content that lies elsewhere; the stored content may then be empty. `guard` marks a hard link to
    nothing, at which programs fail that do not know `gear`; the reader checks it and hands none out.
    """

    name: bytes
    """As the archive has it, long names resolved, not normalised; never with a NUL."""
    type: int = REG
    """REG, HARDLINK, SYMLINK, CHAR, BLOCK, DIR or FIFO."""
    linkname: bytes = b""
    mode: int = 0o644
    """The 07777 bits."""
    uid: int = 0
    gid: int = 0
    size_bytes: int = 0
    """Of the file: of a sparse one expanded, of one with `gear` what that says. 0 for all types but REG."""
    mtime_ns: int = 0
    atime_ns: int | None = None
    devmajor: int = 0
    devminor: int = 0
    xattrs: dict[bytes, bytes] | None = None
    sparse: tuple[tuple[int, int], ...] | None = None
    gear: tuple[bytes, int] | None = None
    guard: bool = False
    stored_bytes: int = 0
    """Of the content in the archive: size_bytes but for sparse files, and 0 where only `gear` names it."""
    header_offset: int = 0
    """Of the entry's own header block (behind its extended headers) in the tar."""


def shown(name: bytes) -> str:
    """*name* for an error message: quoted, printable, not too long."""
    text = repr(name[:_SHOWN_BYTES].decode("utf-8", "backslashreplace"))
    return text if len(name) <= _SHOWN_BYTES else f"{text}… ({len(name)} bytes)"


def clean_name(name: bytes) -> tuple[bytes, bytes]:
    """Parent and last component of *name*, cleaned as a path below the layer's root; ``..`` stops there.

    Returns:
        Both empty for the root itself.
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
