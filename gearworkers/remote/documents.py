"""Documents in a directory or bucket: each version has a name of its own, and the newest is what the document holds.

Order of writes: the new version, created whole; then what is older than the one before goes, since somebody may be
about to read that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from gearworkers.errors import AlreadyExists, NotFound, Unavailable
from gearworkers.remote.blobstore import Document

_MARK = "@"
_LOOKS = 3
"""At a document that others keep replacing, before whoever asks is told to come again."""


class Versions(Protocol):
    """A place that keeps the versions of documents side by side."""

    where: str
    """What errors call it."""

    def versions(self, name: str) -> list[int]:
        """Those that are there of a document, in any order."""

    def read_version(self, name: str, version: int) -> bytes:
        """
        Raises:
            NotFound: It is not there, or not any more.
        """

    def create_version(self, name: str, document: Document) -> None:
        """Durable when it returns.

        Raises:
            AlreadyExists: It is there; that one stays.
        """

    def remove_version(self, name: str, version: int) -> None:
        """One that is gone, or cannot be removed, is garbage and no error."""


def version_name(name: str, version: int) -> str:
    """Where a version lies below the place's root."""
    return f"{directory_name(name)}/{_MARK}{version:010d}"


def directory_name(name: str) -> str:
    """Where all versions of a document lie, and the documents whose names begin with this one's."""
    return f"documents/{name}"


def versions_among(names: Iterable[str]) -> list[int]:
    """The versions among what lies in a document's directory; a document's name begins with no mark."""
    return [int(name[1:]) for name in names if name[:1] == _MARK and name[1:].isdigit()]


def newest(place: Versions, name: str) -> Document | None:
    """What a document holds; None if there is none.

    Raises:
        Unavailable: Its newest version is listed, and not there when it is read, each time.
    """
    for _ in range(_LOOKS):
        version = max(place.versions(name), default=0)
        if not version:
            return None
        try:
            return Document(place.read_version(name, version), version)
        except NotFound:
            continue  # replaced twice since it was listed, or the listing is wrong
    raise Unavailable(
        f"document {name} of {place.where}: version {version} is listed and cannot be read; "
        f"if it stays so, remove {version_name(name, version)}"
    )


def put_version(place: Versions, name: str, document: Document) -> None:
    """Have a document hold this.

    Raises:
        AlreadyExists: There is this version already, or a later one.

    Crash: may leave older versions, which the next put removes.
    """
    versions = place.versions(name)
    if any(version >= document.version for version in versions):
        raise AlreadyExists(f"document {name} of {place.where} has version {max(versions)} already")
    place.create_version(name, document)
    for version in versions:
        if version < document.version - 1:
            place.remove_version(name, version)
