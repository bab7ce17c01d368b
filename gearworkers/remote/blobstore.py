"""What a remote is made of: the interface that each kind of store and each decorator implements.

Glossary:
    content   bytes that are known by their SHA-256: a whole object, or a chunk of a large one.
    chunk     a piece of a large object, cut where its content says so, and kept under its own digest; objects share it.
    layout    the list of the chunks that make up a large object.
    blob      what is stored under a digest: a content, compressed where that makes it smaller, or a layout (`codec`).
    document  a small named thing beside the blobs, such as a profile; it can be replaced, blobs cannot.
    remote    contents and documents over a store of blobs: `Remote`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from gearworkers.errors import InvalidInput

_NAME_PART = "[A-Za-z0-9_][A-Za-z0-9._:@+-]{0,199}"  # what a file's name may be, in every file system
DOCUMENT_NAME = re.compile(f"{_NAME_PART}(/{_NAME_PART})*")
MOST_NAME_CHARS = 512

MOST_DOCUMENT_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Document:
    """What a document holds, and its version: 1 for the first, then one more each time."""

    data: bytes
    version: int


class BlobStore(Protocol):
    """A place that keeps blobs and documents; its methods are called from many threads at once.

    Blobs are idempotent: under one digest there is one content, and putting it again changes nothing.
    They are atomic: a blob is visible only when whole. They are durable once `put` or `put_many` has returned.
    A store does not verify: `Remote` does, and so does the manager before it stores.
    All methods raise GearError; Unavailable where trying again may help.
    """

    def present(self, digests: Sequence[bytes]) -> set[bytes]:
        """Those of *digests* that have a blob."""

    def get(self, digest: bytes) -> bytes:
        """The blob of *digest*.

        Raises:
            NotFound: There is none.
        """

    def get_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """(digest, blob) of those of *digests* that are there, in any order; in one request where the store can."""

    def put_many(self, blobs: Sequence[tuple[bytes, bytes]]) -> None:
        """Store each (digest, blob); after an error some may be stored.

        Crash: may leave temporary files; no blob in part.
        """

    def get_document(self, name: str) -> Document | None:
        """The newest version, or None."""

    def put_document(self, name: str, document: Document) -> None:
        """Store *document* as the version it says; atomic.

        Raises:
            AlreadyExists: There is that version already: somebody was quicker.
        """

    def close(self) -> None:
        """Let go of connections and threads; nothing is asked after that."""


def blob_name(digest: bytes) -> str:
    """Where a blob lies below the root of a directory or bucket: ``objects/ab/abcd…``, SHA-256 in hex."""
    name = digest.hex()
    return f"objects/{name[:2]}/{name}"


def checked_name(name: str) -> str:
    """*name*, if a document may have it: parts of letters, digits and ``._:@+-``, 200 at most, slashes between.

    Raises:
        InvalidInput: It may not.
    """
    if len(name) > MOST_NAME_CHARS or not DOCUMENT_NAME.fullmatch(name):
        raise InvalidInput(f"document {name[:MOST_NAME_CHARS]!r}: no document can have this name")
    return name
