"""The marker of a private layer: an entry ``.gear-private`` at the top of its tar, before all contents.

The layer with the marker and all layers above it are private. Docker gives a driver layers, but not images with their
labels, so the marker is a file: ``RUN touch /.gear-private``. It comes first so that no content was shared before it is
read.
"""

from __future__ import annotations

from typing import NoReturn

from gearworkers.errors import InvalidInput
from gearworkers.tar.entry import TarEntry, clean_name, shown
from gearworkers.tar.reader import TarReader

MARK = b".gear-private"


def is_mark(name: bytes) -> bool:
    """Whether an entry of this name marks its layer as private: the marker, or a file below it."""
    return MARK in name and b"/".join(clean_name(name)).lstrip(b"/").partition(b"/")[0] == MARK


def starts_with_mark(reader: TarReader) -> bool:
    """Whether the tar has the marker before all contents; read no further than the first content.

    Raises:
        InvalidInput, IntegrityError: The tar is malformed or ends early.
    """
    for entry in reader:
        if is_mark(entry.name):
            return True
        if entry.size_bytes:
            return False
    return False


def reject_late_mark(entry: TarEntry) -> NoReturn:
    """Reject a marker that comes after a content, since the content may have been shared.

    Raises:
        InvalidInput: Always.
    """
    raise InvalidInput(
        f"tar entry {shown(entry.name)}: it marks the layer as private but comes after contents, which may "
        "have been shared already; create it in a layer of its own below"
    )


def reject_hidden_mark() -> NoReturn:
    """Reject a marker that the entries' names did not show, because it was created through a symlink.

    Raises:
        InvalidInput: Always.
    """
    raise InvalidInput(
        f"the layer has {shown(MARK)} at its top, created through a symlink; it marks the layer as private, but its "
        "contents may have been shared already"
    )
