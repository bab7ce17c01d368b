"""Directories by descriptor."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opened_directory(path: Path, flags: int = 0) -> Iterator[int]:
    """A descriptor of the directory while the context lasts.

    Args:
        path: Of the directory.
        flags: Such as O_NOFOLLOW, where others choose what stands at the path.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | flags)
    try:
        yield fd
    finally:
        os.close(fd)
