"""SHA-256 digests of contents and the object paths made of them.

An object is named by 21 characters (126 bits) of its digest's base64url, behind a reserved byte:
``/\\x01a/bcd…``, 24 bytes in all. The reserved byte keeps a file of a lower layer from standing at an
object's path (an absolute overlay redirect is looked up in the normal layers first); the length lets the
redirect still fit into a 256-byte ext4 inode beside the metacopy mark. The full digest stands in the
object's xattr and in every layer's `objects` list, so two contents that meet on one name are told apart.
"""

from __future__ import annotations

import binascii
import re

DIGEST_BYTES = 32
RESERVED = b"\x01"
DIGEST_XATTR = "trusted.gear.sha256"
"""The object's full digest, 32 raw bytes."""

METACOPY_XATTR = "trusted.overlay.metacopy"
REDIRECT_XATTR = "trusted.overlay.redirect"
OPAQUE_XATTR = "trusted.overlay.opaque"

ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
"""base64url; an object's directory is RESERVED + one of these."""

OBJECT_PATH = re.compile(rb"/\x01([A-Za-z0-9_-])/([A-Za-z0-9_-]{20})")
"""What `object_path` gives; its two groups make up the name."""

_URLSAFE = bytes.maketrans(b"+/", b"-_")


def object_name(digest: bytes) -> bytes:
    """The 21 base64url characters that name the content with this 32-byte SHA-256."""
    return binascii.b2a_base64(digest[:16], newline=False)[:21].translate(_URLSAFE)


def object_path(digest: bytes) -> bytes:
    """The object's path inside a cache, absolute as the overlay redirect has it: 24 bytes."""
    name = object_name(digest)
    return b"/\x01" + name[:1] + b"/" + name[1:]
