"""Names and paths of objects, made from the SHA-256 digests of their contents.

An object's path is a reserved byte and 21 characters (126 bits) of its digest in base64url: ``/\\x01a/bcd…``, 24 bytes
in all. The reserved byte keeps files of lower layers from occupying an object's path: overlayfs looks up an absolute
redirect in the normal layers first. The path is short enough for the redirect to fit into a 256-byte ext4 inode beside
the metacopy mark. The full digest is in the object's xattr and in each layer's `objects` list, so two contents with
the same name are distinguished.
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
INTERNAL_XATTRS = (b"trusted.overlay.", b"trusted.gear.")
"""Prefixes of the attributes that only overlays and gearworkers may set."""

ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
"""The base64url alphabet; the directory of an object is RESERVED and one of these characters."""

OBJECT_PATH = re.compile(rb"/\x01([A-Za-z0-9_-])/([A-Za-z0-9_-]{20})")
"""Matches the results of `object_path`; the two groups together are the name."""

_URLSAFE = bytes.maketrans(b"+/", b"-_")


def object_name(digest: bytes) -> bytes:
    """Return the 21 base64url characters that name the content with this 32-byte SHA-256."""
    return binascii.b2a_base64(digest[:16], newline=False)[:21].translate(_URLSAFE)


def object_path(digest: bytes) -> bytes:
    """Return the object's path in a cache, 24 bytes, absolute as in an overlay redirect."""
    name = object_name(digest)
    return b"/\x01" + name[:1] + b"/" + name[1:]


def shard_number(digest: bytes) -> int:
    """Return the position in ALPHABET of the character that names the object's directory."""
    return digest[0] >> 2
