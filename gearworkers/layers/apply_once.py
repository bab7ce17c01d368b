"""A layer accepts one tar, and only while the gateway that answered its Create runs.

After a broken connection dockerd sends the rest of the tar as a new request. The rest may be empty, which is a valid
empty layer, or may be a valid tar by chance. The loss would go unnoticed, since dockerd's digest covers the bytes that
it sent.

So Create leaves a file in the layer's directory, and ApplyDiff begins by renaming it. A start of the gateway or dockerd
removes the file, because the previous gateway may have received a part of the tar.
"""

from __future__ import annotations

import os
from pathlib import Path

from gearworkers.errors import FailedPrecondition

FRESH_FILE = "fresh"
"""Exists until an ApplyDiff begins."""
APPLYING_FILE = "applying"
"""FRESH_FILE after an ApplyDiff has begun; removed with the unfinished layer."""


def allow_apply(directory: Path) -> None:
    """Allow one ApplyDiff into the new layer in *directory*."""
    (directory / FRESH_FILE).touch(mode=0o600)


def is_allowed(directory: Path) -> bool:
    """Whether an ApplyDiff into the layer is allowed."""
    return (directory / FRESH_FILE).exists()


def forbid_apply(directory: Path) -> None:
    """Forbid ApplyDiff into the layer; it may still be written through a mount. Needs no disk space."""
    (directory / FRESH_FILE).unlink(missing_ok=True)


def begin(directory: Path, *, again: bool = False) -> None:
    """Begin the only ApplyDiff into the layer in *directory*.

    Args:
        directory: The layer's.
        again: Also begin after an interrupted ApplyDiff or a restart: the caller has the whole tar.

    Raises:
        FailedPrecondition: An ApplyDiff has begun, or the gateway or dockerd was restarted since Create.
    """
    try:
        os.rename(directory / FRESH_FILE, directory / APPLYING_FILE)
    except FileNotFoundError as exc:
        if again:
            (directory / APPLYING_FILE).touch(mode=0o600)
            return
        raise FailedPrecondition(
            f"layer {directory.name}: a part of its tar may be lost: an ApplyDiff is running or was interrupted, "
            "or the gateway was restarted; pull or build again"
        ) from exc


def require_finished(directory: Path) -> None:
    """Check that no ApplyDiff into the layer is unfinished.

    Raises:
        FailedPrecondition: An ApplyDiff has begun and not finished.
    """
    if is_unfinished(directory):
        raise FailedPrecondition(f"layer {directory.name}: its ApplyDiff has not finished; pull or build again")


def is_unfinished(directory: Path) -> bool:
    """Whether an ApplyDiff into the layer has begun and not finished."""
    return (directory / APPLYING_FILE).exists()
