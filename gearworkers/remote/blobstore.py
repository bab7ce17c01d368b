"""The interface that every kind of remote storage and every decorator around it implements.

Glossary:
    content   Bytes identified by their SHA-256: a whole object, or a chunk of a large one.
    chunk     A piece of a large object, cut at positions that the content defines and stored under its own digest.
              Objects share chunks.
    layout    The list of the chunks that make up a large object.
    blob      The bytes stored under a digest: a content, compressed where that makes it smaller, or a layout
              (`encoding`).
    document  A small named value beside the blobs, such as a profile. A document can be replaced, a blob cannot.
    remote    Contents and documents over a store of blobs: `Remote`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from gearworkers.errors import InvalidInput

_NAME_PART = "[A-Za-z0-9_][A-Za-z0-9._:@+-]{0,199}"  # a valid file name in every file system
DOCUMENT_NAME = re.compile(f"{_NAME_PART}(/{_NAME_PART})*")
MAX_NAME_CHARS = 512

MAX_DOCUMENT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """The content of a document and its version, which counts from 1."""

    data: bytes
    version: int


class BlobStore(Protocol):
    """A place that keeps blobs and documents; many threads call its methods at once.

    Blobs are idempotent: a digest has one content, and storing it again changes nothing.
    They are atomic: only whole blobs are visible. They are durable once `put_many` has returned.
    A store does not verify blobs: `Remote` verifies them, and the manager verifies them before it stores them.
    All methods raise GearError; Unavailable where a retry may help.
    """

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """Return the *digests* that have a blob."""

    def get(self, digest: bytes) -> bytes:
        """Return the blob of *digest*.

        Raises:
            NotFound: The store has no such blob.
        """

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """Yield (digest, blob) of the *digests* that the store has, in any order; in one request where possible."""

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """Store each (digest, blob); after an error some may be stored.

        Crash: may leave temporary files, but no partial blob.
        """

    def get_document(self, name: str) -> Document | None:
        """Return the newest version; None if there is no such document."""

    def put_document(self, name: str, document: Document) -> None:
        """Store *document* under its version; atomic.

        Raises:
            AlreadyExists: Another writer has stored that version first.
        """

    def close(self) -> None:
        """Release connections and threads; no call may follow."""


def blob_name(digest: bytes) -> str:
    """Return the path of a blob below the root of a directory or bucket: ``objects/ab/abcd…``, SHA-256 in hex."""
    name = digest.hex()
    return f"objects/{name[:2]}/{name}"


def checked_document_name(name: str) -> str:
    """Return *name* if it is valid: parts of at most 200 letters, digits and ``._:@+-``, joined by slashes.

    Raises:
        InvalidInput: The name is invalid.
    """
    if len(name) > MAX_NAME_CHARS or not DOCUMENT_NAME.fullmatch(name):
        raise InvalidInput(f"invalid document name {name[:MAX_NAME_CHARS]!r}")
    return name
