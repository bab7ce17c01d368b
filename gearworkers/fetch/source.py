"""The interface of a remote, as fetching sees it.

Glossary: a *source* is one place that may have objects. Large objects are kept in *chunks*: pieces that have their own
digests, so that each can be verified alone. The *layout* of a large object is the list of its chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from gearworkers.errors import IntegrityError


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an object."""

    offset: int
    size_bytes: int
    digest: bytes
    """SHA-256 of the piece, 32 bytes."""


BytesOrLayout = bytes | Sequence[Chunk]
"""The answer of a source for one digest: all bytes of an object or chunk, or the layout of a large object."""


def checked_layout(layout: Sequence[Chunk], size_bytes: int) -> Sequence[Chunk]:
    """Return *layout* after checking that its chunks follow each other and add up to *size_bytes*.

    Raises:
        IntegrityError: The chunks have a gap or an overlap, or the wrong total size.
    """
    end = 0
    for chunk in layout:
        if chunk.offset != end or chunk.size_bytes <= 0:
            raise IntegrityError(f"layout: a chunk of {chunk.size_bytes} bytes at {chunk.offset}, expected at {end}")
        end += chunk.size_bytes
    if end != size_bytes:
        raise IntegrityError(f"layout: chunks of {end} bytes for an object of {size_bytes}")
    return layout


class ObjectSource(Protocol):
    """One place that may have objects; many threads call its methods at once.

    A source retries by itself, within bounds. The fetcher verifies everything that a source returns.
    """

    def fetch(self, digest: bytes) -> Iterator[bytes]:
        """Yield the bytes of an object, piece by piece.

        Raises:
            NotFound: The source does not have it.
            Unavailable: The source does not answer, after bounded retries.
        """

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, BytesOrLayout]]:
        """Yield (digest, bytes or layout) of small objects, large objects and chunks, in one request if possible.

        The answer for a large object is its layout, for all others their bytes. Missing ones are left out. Any order
        is allowed; the order of *digests* is preferred.
        """

    def layout(self, digest: bytes) -> Sequence[Chunk] | None:
        """Return the chunks of an object in order of offset; None if the source does not keep it in chunks."""

    def chunk(self, digest: bytes) -> bytes:
        """Return the bytes of a chunk, given the chunk's own digest.

        Raises:
            NotFound, Unavailable: As `fetch`.
        """

    def document(self, name: str) -> bytes | None:
        """Return a small named document that is kept beside the objects; None if there is none.

        Raises:
            InvalidInput: The name is not valid.
            Unavailable: As `fetch`.
        """
