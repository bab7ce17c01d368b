"""The marker of a private layer: an entry ``.gear-private`` at the top of its tar, before all contents.

The layer with the marker and all layers above it are private. Docker passes layers to a driver, but not the labels of
images, so the marker is a file: ``RUN touch /.gear-private``. It must come first, so that no content is shared before
the marker is read.
"""

from __future__ import annotations

from typing import NoReturn

from gearworkers.errors import InvalidInput
from gearworkers.tar.entry import TarEntry, clean_name, shown
from gearworkers.tar.reader import TarReader

MARKER = b".gear-private"


def is_marker(name: bytes) -> bool:
    """Whether an entry of this name marks its layer as private: it is the marker or a file below it."""
    return MARKER in name and b"/".join(clean_name(name)).lstrip(b"/").partition(b"/")[0] == MARKER


def starts_with_marker(reader: TarReader) -> bool:
    """Whether the tar has the marker before all contents. Reads the tar up to the first content.

    Raises:
        InvalidInput, IntegrityError: The tar is malformed or ends early.
    """
    for entry in reader:
        if is_marker(entry.name):
            return True
        if entry.size_bytes:
            return False
    return False


def reject_late_marker(entry: TarEntry) -> NoReturn:
    """Reject a marker that comes after a content, since the content may have been shared.

    Raises:
        InvalidInput: Always.
    """
    raise InvalidInput(
        f"tar entry {shown(entry.name)}: it marks the layer as private but comes after contents, which may "
        "have been shared already; create it in a separate layer below this one"
    )


def reject_hidden_marker() -> NoReturn:
    """Reject a marker that was created through a symlink, so that no entry has its name.

    Raises:
        InvalidInput: Always.
    """
    raise InvalidInput(
        f"the layer has {shown(MARKER)} at its top level, created through a symlink; it marks the layer as private, "
        "but the layer's contents may have been shared already; create it in a separate layer below this one"
    )
