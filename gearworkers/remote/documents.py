"""Documents in a directory or bucket: each version has a name of its own, and the newest is the current one.

Order of writes: the new version is created whole; then all versions older than its predecessor are removed. The
predecessor stays, since a reader may have listed it and not read it yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from gearworkers.errors import AlreadyExists, NotFound, Unavailable
from gearworkers.remote.blobstore import Document

_MARK = "@"
_READ_ATTEMPTS = 3
"""Attempts to read a document that others keep replacing."""


class VersionStore(Protocol):
    """A place that keeps the versions of documents side by side."""

    location: str
    """The place's name in errors."""

    def versions(self, name: str) -> list[int]:
        """Return the versions that a document has, in any order."""

    def read_version(self, name: str, version: int) -> bytes:
        """Return the content of a version.

        Raises:
            NotFound: The version does not exist, or was removed.
        """

    def create_version(self, name: str, document: Document) -> None:
        """Store a new version, durably.

        Raises:
            AlreadyExists: The version exists; it is unchanged.
        """

    def remove_version(self, name: str, version: int) -> None:
        """Remove a version; ignore a version that is missing or cannot be removed."""


def version_name(name: str, version: int) -> str:
    """Return the path of a version below the place's root."""
    return f"{directory_name(name)}/{_MARK}{version:010d}"


def directory_name(name: str) -> str:
    """Return the directory of a document's versions, and of the documents whose names begin with its name."""
    return f"documents/{name}"


def versions_among(names: Iterable[str]) -> list[int]:
    """Return the versions among the names in a document's directory; names of documents never begin with the mark."""
    return [int(name[1:]) for name in names if name[:1] == _MARK and name[1:].isdigit()]


def newest_version(place: VersionStore, name: str) -> Document | None:
    """Return the newest version of a document; None if it has none.

    Raises:
        Unavailable: The newest version is listed, but cannot be read, at each attempt.
    """
    for _ in range(_READ_ATTEMPTS):
        version = max(place.versions(name), default=0)
        if not version:
            return None
        try:
            return Document(place.read_version(name, version), version)
        except NotFound:
            continue  # two versions were stored since the listing, or the listing is wrong
    raise Unavailable(
        f"document {name} of {place.location}: version {version} is listed and cannot be read; "
        f"if this persists, remove {version_name(name, version)}"
    )


def put_version(place: VersionStore, name: str, document: Document) -> None:
    """Store a new version of a document.

    Raises:
        AlreadyExists: The document has this version or a later one.

    Crash: may leave older versions, which the next put removes.
    """
    versions = place.versions(name)
    if any(version >= document.version for version in versions):
        raise AlreadyExists(f"document {name} of {place.location} already has version {max(versions)}")
    place.create_version(name, document)
    for version in versions:
        if version < document.version - 1:
            place.remove_version(name, version)
