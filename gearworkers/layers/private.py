"""private/: the object stores of private layers, one directory per layer, with the layout of the public cache.

`tar.private_marker` decides which layers are private. A layer with private objects has a list of them, PRIVATE_FILE.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gearworkers.cas.store import ObjectStore
from gearworkers.layers.apply import PRIVATE, PRIVATE_FILE


class PrivateStores:
    """The private object stores of one GEAR_ROOT."""

    def __init__(self, directory: Path, images: Path) -> None:
        self._directory = directory
        self._images = images

    def prepare(self) -> None:
        """Create the directory if it is missing."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, id: str) -> Path:
        """Return the directory of the layer's private objects; it exists only if the layer has such objects."""
        return self._directory / id

    def store(self, id: str) -> ObjectStore:
        """Return the store of the layer's private objects."""
        return ObjectStore(self.path(id))

    def stores(self) -> Iterator[ObjectStore]:
        """Yield the stores of all layers."""
        return (ObjectStore(path) for path in self._directory.iterdir())

    def orphans(self) -> list[Path]:
        """Return the directories that belong to no layer: a crash prevented the rename that publishes the layer."""
        return [path for path in self._directory.iterdir() if not self._is_owned(path.name)]

    @contextmanager
    def moved_into_place(self, build: Path, id: str) -> Iterator[None]:
        """Move the layer's private objects from *build* to private/<id>; move them back if the context fails.

        They are not moved back if *build* was removed, since private/<id> may then belong to another import.
        """
        target = self.path(id)
        os.rename(build / PRIVATE, target)
        try:
            yield
        except BaseException:
            if not self._is_owned(id):
                with suppress(OSError):
                    os.rename(target, build / PRIVATE)
            raise

    def _is_owned(self, id: str) -> bool:
        return (self._images / id / PRIVATE_FILE).exists()
