"""Disk usage: the size of the stored objects, and the size of the layers without sharing."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from typing import NamedTuple

from gearworkers.cas.store import ObjectStore
from gearworkers.errors import GearError, from_os_error
from gearworkers.layers.record import LayerKind
from gearworkers.layers.store import LayerStore

_MAX_AGE_S = 60.0
_AGE_PER_COUNT = 50
_BLOCK_BYTES = 512


class StoreUsage(NamedTuple):
    """The content of one GEAR_ROOT."""

    image_layers: int
    other_layers: int
    objects: int
    logical_bytes: int
    """The sum of the image layers' sizes."""
    stored_bytes: int
    """Disk space of the objects, including private objects."""


class UsageMeter:
    """Counts on demand, and caches the result for 50 times the time that the count took, at most a minute.

    So the numbers of a small store are current. A store of a million objects takes seconds to count and is not counted
    too often.
    """

    def __init__(self, layers: LayerStore, store: ObjectStore) -> None:
        self._layers = layers
        self._store = store
        self._lock = threading.Lock()
        self._counted: StoreUsage | None = None
        self._stale_at_s = 0.0

    def get(self) -> StoreUsage:
        """Return the usage, at most a minute old.

        Raises:
            GearError: A directory cannot be read.
        """
        with self._lock:
            begun_s = time.monotonic()
            if self._counted is None or begun_s > self._stale_at_s:
                try:
                    self._counted = self._count()
                except OSError as exc:
                    raise from_os_error(exc, "count the stored objects") from exc
                now_s = time.monotonic()
                self._stale_at_s = now_s + min((now_s - begun_s) * _AGE_PER_COUNT, _MAX_AGE_S)
            return self._counted

    def _count(self) -> StoreUsage:
        images = others = logical_bytes = objects = stored_bytes = 0
        for id in self._layers.ids():
            try:
                layer = self._layers.get(id)
            except GearError:
                continue  # removed meanwhile, or damaged; fsck reports it
            if layer.kind is LayerKind.IMAGE:
                images += 1
                logical_bytes += layer.size_bytes
            else:
                others += 1
        for store in (self._store, *self._layers.private_stores.stores()):
            for shard in store.shards():
                count, taken_bytes = _counted(shard)
                objects, stored_bytes = objects + count, stored_bytes + taken_bytes
        return StoreUsage(images, others, objects, logical_bytes, stored_bytes)


def _counted(shard: bytes) -> tuple[int, int]:
    """Return the number of objects and their disk space; 0 if the layer was removed meanwhile."""
    objects = stored_bytes = 0
    with suppress(FileNotFoundError), os.scandir(shard) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):
                stored_bytes += entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES
                objects += 1
    return objects, stored_bytes
