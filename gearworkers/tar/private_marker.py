"""The mark of a private layer: an entry ``.gear-private`` at the top of its tar, ahead of all contents.

A layer with the mark and all layers above it are private. Docker hands a driver layers, not images with their labels,
so the mark is a file: ``RUN touch /.gear-private``. It comes first so that nothing has been shared when it is read.
"""

from __future__ import annotations

from typing import NoReturn

from gearworkers.errors import InvalidInput
from gearworkers.tar.entry import TarEntry, clean_name, shown
from gearworkers.tar.reader import TarReader

MARK = b".gear-private"


def is_mark(name: bytes) -> bool:
    """Whether an entry of this name marks its layer: the mark itself, or what makes a directory of it."""
    return MARK in name and b"/".join(clean_name(name)).lstrip(b"/").partition(b"/")[0] == MARK


def starts_with_mark(reader: TarReader) -> bool:
    """Whether the tar has the mark where it belongs; nothing is read behind the first content.

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
    """The mark stands behind a content, which may have been shared.

    Raises:
        InvalidInput: Always.
    """
    raise InvalidInput(
        f"tar entry {shown(entry.name)}: it marks the layer private, but comes after contents of the layer, which may "
        "have been shared by now; make it in a layer of its own below"
    )


def reject_hidden_mark() -> NoReturn:
    """The layer has the mark by a name that did not tell.

    Raises:
        InvalidInput: Always.
    """
    raise InvalidInput(
        f"the layer has {shown(MARK)} at its top, which marks it private, by way of a symlink; its contents may have "
        "been shared by now"
    )
