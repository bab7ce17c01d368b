"""Where objects come from when they are not here: the interface that fetching is written against.

Glossary: a *source* is one place that may have objects; the *layout* of a large object is the list of the chunks
that make it up; a *chunk* is a piece of it with a digest of its own, so that it can be verified alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gearworkers.errors import NotFound, from_os_error
from gearworkers.objects.retry import retried

_PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a large object."""

    offset: int
    size_bytes: int
    digest: bytes
    """SHA-256 of the piece, 32 bytes."""


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

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """(digest, whole content) of those of *digests* that are there, in one request where the source can.

        For small objects; in any order.
        """

    def layout(self, digest: bytes) -> Sequence[Chunk] | None:
        """The chunks of an object in order of offset; None if it is kept whole or not at all."""

    def chunk(self, digest: bytes) -> bytes:
        """One chunk by its own digest.

        Raises:
            NotFound, Unavailable: As `fetch`.
        """


class DirectorySource:
    """A directory of whole objects under their full digest in hex, ``ab/abcd…``, local or on NFS."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def fetch(self, digest: bytes) -> Iterator[bytes]:
        """Piece by piece."""
        path = self._path(digest)
        offset = 0
        while piece := _read_piece(path, offset):
            yield piece
            offset += len(piece)

    def fetch_many(self, digests: Sequence[bytes]) -> Iterator[tuple[bytes, bytes]]:
        """One after the other."""
        for digest in digests:
            try:
                yield digest, b"".join(self.fetch(digest))
            except NotFound:
                continue

    def layout(self, digest: bytes) -> Sequence[Chunk] | None:
        """None: objects are whole here."""
        return None

    def chunk(self, digest: bytes) -> bytes:
        """There are none."""
        raise NotFound(f"chunk {digest.hex()}: {self._root} keeps whole objects only")

    def _path(self, digest: bytes) -> Path:
        name = digest.hex()
        return self._root / name[:2] / name


@retried
def _read_piece(path: Path, offset: int) -> bytes:
    """Opened anew for each piece: after NFS's ESTALE the same path works again."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(_PIECE_BYTES)
    except OSError as exc:
        raise from_os_error(exc, f"fetch {path}") from exc
