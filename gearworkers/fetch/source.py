"""Where objects come from when they are not here: the interface that fetching is written against.

Glossary: a *source* is one place that may have objects; the *layout* of a large object is the list of the chunks
that make it up; a *chunk* is a piece of it with a digest of its own, so that it can be verified alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from gearworkers.errors import IntegrityError


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a large object."""

    offset: int
    size_bytes: int
    digest: bytes
    """SHA-256 of the piece, 32 bytes."""


Content = bytes | Sequence[Chunk]
"""What is kept under a digest: all of it, or its layout."""


def checked_layout(layout: Sequence[Chunk], size_bytes: int) -> Sequence[Chunk]:
    """*layout*, if its chunks follow each other and make up *size_bytes*.

    Raises:
        IntegrityError: They do not.
    """
    at = 0
    for chunk in layout:
        if chunk.offset != at or chunk.size_bytes <= 0:
            raise IntegrityError(f"layout: a chunk of {chunk.size_bytes} bytes at {chunk.offset}, expected at {at}")
        at += chunk.size_bytes
    if at != size_bytes:
        raise IntegrityError(f"layout: chunks of {at} bytes for an object of {size_bytes}")
    return layout


class Source(Protocol):
    """One place that may have objects; its methods are called from many threads at once.

    A source retries by itself what is worth it, within bounds. What it gives need not be verified: who fetches does.
    """

    def fetch(self, digest: bytes) -> Iterator[bytes]:
        """The object's bytes in pieces.

        Raises:
            NotFound: It is not there.
            Unavailable: The source does not answer, after bounded retries.
        """

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, Content]]:
        """(digest, what is there) of objects and chunks, in one request where the source can.

        Of those that are kept whole the content, of a large object its layout; what is not there is left out. For
        small ones, in any order, but that of *digests* is the one to prefer.
        """

    def layout(self, digest: bytes) -> Sequence[Chunk] | None:
        """The chunks of an object in order of offset; None if it is kept whole or not at all."""

    def chunk(self, digest: bytes) -> bytes:
        """One chunk by its own digest.

        Raises:
            NotFound, Unavailable: As `fetch`.
        """

    def document(self, name: str) -> bytes | None:
        """A small named thing that is kept beside the objects; None if there is none.

        Raises:
            InvalidInput: Nothing can have this name.
            Unavailable: As `fetch`.
        """
