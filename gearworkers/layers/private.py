"""private/: what private layers keep to themselves, a directory a layer, laid out as the public cache.

Which layers are private says tar.private_marker; a layer that has contents of its own has their list, PRIVATE_FILE.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gearworkers.cas.store import ObjectStore
from gearworkers.layers.apply import PRIVATE, PRIVATE_FILE


class PrivateStores:
    """Those of one root's layers."""

    def __init__(self, directory: Path, images: Path) -> None:
        self._directory = directory
        self._images = images

    def prepare(self) -> None:
        """Make the directory if it is missing."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def path(self, id: str) -> Path:
        """Where the layer's own contents lie; nothing is there if it has none."""
        return self._directory / id

    def store(self, id: str) -> ObjectStore:
        """The same as a store."""
        return ObjectStore(self.path(id))

    def stores(self) -> Iterator[ObjectStore]:
        """Those of all layers."""
        return (ObjectStore(path) for path in self._directory.iterdir())

    def ownerless(self) -> list[Path]:
        """What belongs to no layer: a crash was ahead of the rename that makes the layer visible."""
        return [path for path in self._directory.iterdir() if not self._is_owned(path.name)]

    @contextmanager
    def placed(self, build: Path, id: str) -> Iterator[None]:
        """Within it the layer's own contents are in their place; they stay there unless it fails.

        What goes back goes to *build*: where that was taken away, private/<id> is none of this import's.
        """
        place = self.path(id)
        os.rename(build / PRIVATE, place)
        try:
            yield
        except BaseException:
            if not self._is_owned(id):
                with suppress(OSError):
                    os.rename(place, build / PRIVATE)
            raise

    def _is_owned(self, id: str) -> bool:
        return (self._images / id / PRIVATE_FILE).exists()
