"""Records of converted layers: documents in the remote, by the digest of the original layer.

A record leads from an original layer to its Gear layer, whose blob is an object of the remote, the *index* of the
layer. A conversion that meets the layer again reads it no more, and a node makes the layer from the index alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec

FORMAT = 2
"""Version of the format of Gear layers; increase it when the same layer gives other bytes."""
INLINE_BYTES = 256
"""Contents up to this size stay in the layer. The Gear layer of a Debian root file system (94 MB compressed) has 708 KB
with 0, 703 KB with 128, 712 KB with 256 and 1,037 KB with 1024; 256 saves 8 % of the objects."""
MAX_INDEX_BYTES = 32 << 20
"""A larger Gear layer is not stored in the remote. An index takes about 80 bytes a file (708 KB for Debian's 9,000)."""

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class ConvertedLayer(msgspec.Struct, frozen=True):
    """The result of converting one layer; JSON in Celery's results and in records."""

    source_digest: str
    digest: str
    size_bytes: int
    diff_id: str
    files: int
    objects: int
    object_bytes: int
    new_objects: int
    new_bytes: int
    reused: bool = False
    """Whether an earlier conversion produced the layer."""
    private: bool = False
    """Whether the layer was left or copied unchanged."""

    @property
    def object_digest(self) -> bytes:
        """The SHA-256 of the Gear layer's blob."""
        return bytes.fromhex(self.digest.removeprefix("sha256:"))


class LayerRecord(msgspec.Struct, frozen=True):
    """The document about a converted layer."""

    converted: ConvertedLayer
    source_diff_id: str
    """The digest of the original layer's tar."""
    source_tar_bytes: int
    has_index: bool
    """Whether the remote has the Gear layer's blob, as an object; False above MAX_INDEX_BYTES."""


def record_name(digest: str) -> str:
    """Return the document's name for the layer *digest*; each format version of Gear layers has its own records."""
    return f"layer-{FORMAT}-{INLINE_BYTES}-{digest.removeprefix('sha256:')}"


def read_record(document: Callable[[str], bytes | None], digest: str) -> LayerRecord | None:
    """Return the record of the layer *digest*; None if there is none, or if it is malformed.

    Args:
        document: Returns a document of the remote, as `Remote.document`.
        digest: The original layer's; ``sha256:…``.
    """
    if not _DIGEST.fullmatch(digest):
        return None
    data = document(record_name(digest))
    try:
        record = msgspec.json.decode(data, type=LayerRecord) if data is not None else None
    except ValueError:
        return None
    return record if record is not None and _is_valid(record, digest) else None


def _is_valid(record: LayerRecord, digest: str) -> bool:
    made = record.converted
    digests = (made.digest, made.diff_id, record.source_diff_id)
    return made.source_digest == digest and made.size_bytes > 0 and all(map(_DIGEST.fullmatch, digests))
