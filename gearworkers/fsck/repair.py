"""Check a node's objects and layers, and optionally remove damaged objects so that they are fetched again.

Order of a repair: forbid storing in place, mark the layers incomplete, remove the object.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from gearworkers.cas import inplace
from gearworkers.cas.locks import GarbageLock
from gearworkers.cas.push_queue import PushQueue
from gearworkers.cas.refs import OBJECTS_FILE, read_refs
from gearworkers.cas.store import ObjectStore
from gearworkers.fsck.layers import layer_faults
from gearworkers.fsck.objects import damaged_objects
from gearworkers.layers.incomplete import layers_referring_to, mark_incomplete
from gearworkers.layers.store import LayerStore
from gearworkers.remote.push import damaged_entries
from gearworkers.settings import NodeSettings
from gearworkers.util.fs import opened_directory

OnIncomplete = Callable[[str], object]
"""Called with the id of each layer that was marked incomplete."""


class StoreChecker:
    """Checks the objects and layers of one node."""

    def __init__(self, settings: NodeSettings, layers: LayerStore, objects: ObjectStore, push_queue: PushQueue) -> None:
        self._settings = settings
        self._layers = layers
        self._objects = objects
        self._push_queue = push_queue

    def faults(self, *, read_data: bool, repair: bool, on_incomplete: OnIncomplete) -> Iterator[str]:
        """Check every object and layer; yield a line for each fault.

        Args:
            read_data: Whether to read all bytes and compare their digests.
            repair: Whether to remove damaged objects and to mark image layers that lack objects as incomplete, so that
                the objects are fetched again.
            on_incomplete: Called for each layer that was marked.
        """
        damaged: set[bytes] = set()
        for bad in damaged_objects(self._objects, read_data=read_data):
            damaged.add(bad.digest)
            if repair:
                self._push_queue.remove(bad.digest)  # the entry is a link to the same bytes
                self._remove_damaged(bad.path, on_incomplete)
            yield f"object {os.fsdecode(bad.path)}: {bad.reason}" + (" (removed)" if repair else "")
        for digest, why in damaged_entries(self._push_queue) if read_data else ():
            if repair:
                self._push_queue.remove(digest)
            yield f"pending push: {why}" + (" (removed)" if repair else "")
        yield from self._private_faults(read_data=read_data, repair=repair)
        is_undamaged = not damaged
        for fault in layer_faults(self._layers, self._objects, damaged):
            is_undamaged = False
            advice = fault.advice
            if repair and fault.lacks_objects:
                inplace.mark_objects_lost(self._settings.gear_root)
                self._remove_unfinished(fault.id)
                if self._mark(fault.id, on_incomplete):
                    advice = "marked incomplete: its missing objects are fetched from GEAR_REMOTE"
            yield f"layer {fault.id}: {fault.problem}; {advice}"
        if is_undamaged:
            inplace.clear_objects_lost(self._settings.gear_root)

    def _private_faults(self, *, read_data: bool, repair: bool) -> Iterator[str]:
        """Yield a line for each damaged private object. Only a pull of its image restores such an object."""
        for store in self._layers.private_stores.stores():
            for bad in damaged_objects(store, read_data=read_data):
                if repair:
                    Path(os.fsdecode(bad.path)).unlink(missing_ok=True)
                note = " (removed)" if repair else ""
                yield f"private object {os.fsdecode(bad.path)}: {bad.reason}{note}; remove the image and pull it again"

    def _remove_damaged(self, path: bytes, on_incomplete: OnIncomplete) -> None:
        """Mark the layers that refer to a damaged object as incomplete, then remove the object.

        Crash: leaves incomplete layers that lack only damaged objects; the next repair continues.
        """
        settings = self._settings
        path_in_cache = path[len(os.fsencode(settings.gear_public_cache_path)) :]
        name = path_in_cache[2:].replace(b"/", b"")
        inplace.mark_objects_lost(settings.gear_root)
        with GarbageLock(settings.gear_root).exclusive():  # so that no process marks the layers complete meanwhile
            for id in layers_referring_to(settings.gear_images_path, name):
                self._mark(id, on_incomplete)
            for cache in (settings.gear_arrivals_path, settings.gear_public_cache_path):
                Path(os.fsdecode(os.fsencode(cache) + path_in_cache)).unlink(missing_ok=True)

    def _remove_unfinished(self, id: str) -> None:
        """Remove half-written files under the names of the layer's objects, since overlays would open them."""
        records = read_refs(self._settings.gear_images_path / id / OBJECTS_FILE)
        with self._layers.build_directory(id) as build, opened_directory(build) as build_fd:
            inplace.remove_unfinished(self._objects, (digest for digest, _ in records), build_fd)

    def _mark(self, id: str, on_incomplete: OnIncomplete) -> bool:
        root = self._settings.gear_root
        inplace.touch_incomplete_layers(root)
        is_marked = mark_incomplete(self._settings.gear_images_path, id)
        inplace.touch_incomplete_layers(root)  # again, for processes that read the record in between
        on_incomplete(id)
        return is_marked
