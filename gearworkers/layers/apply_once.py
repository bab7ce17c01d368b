"""A layer takes one tar, and only while the gateway that answered its Create runs.

dockerd answers a broken connection with another request, whose body is what is left of the tar: nothing, which is an
empty layer, or a rest that may read as a tar of its own. Nobody would notice: dockerd's digest covers what it sent.

So Create leaves a file in the layer's directory, an ApplyDiff begins by renaming it, and the starts of gateway and
dockerd remove it, since the gateway before may have received a part of the tar.
"""

from __future__ import annotations

import os
from pathlib import Path

from gearworkers.errors import FailedPrecondition

FRESH_FILE = "fresh"
"""None of the tar has come."""
APPLYING_FILE = "applying"
"""What that file becomes when an ApplyDiff begins; it goes with the unfinished layer."""


def allow(directory: Path) -> None:
    """Let the new layer in *directory* take a tar."""
    (directory / FRESH_FILE).touch(mode=0o600)


def is_allowed(directory: Path) -> bool:
    """Whether the layer may take a tar."""
    return (directory / FRESH_FILE).exists()


def forbid(directory: Path) -> None:
    """Let the layer take none any more; it may be written through a mount. Needs no space."""
    (directory / FRESH_FILE).unlink(missing_ok=True)


def begin(directory: Path) -> None:
    """Let the caller alone fill the layer in *directory*.

    Raises:
        FailedPrecondition: An ApplyDiff has begun, or the gateway or dockerd was restarted since Create.
    """
    try:
        os.rename(directory / FRESH_FILE, directory / APPLYING_FILE)
    except FileNotFoundError as exc:
        raise FailedPrecondition(
            f"layer {directory.name}: a part of its tar may be gone: an ApplyDiff into it is under way or was broken "
            "off, or the gateway was restarted; remove the layer and start again"
        ) from exc


def refuse_unfinished(directory: Path) -> None:
    """
    Raises:
        FailedPrecondition: An ApplyDiff into the layer has begun and not finished.
    """
    if is_unfinished(directory):
        raise FailedPrecondition(f"layer {directory.name}: its ApplyDiff has not finished; remove it and pull again")


def is_unfinished(directory: Path) -> bool:
    """Whether an ApplyDiff into the layer has begun and not finished."""
    return (directory / APPLYING_FILE).exists()
