"""Incomplete layers: layers that refer to objects that are not in the public cache.

The lazy file server learns from `IncompleteLayers` which objects it may request and which layers have become complete.
Layers may be added and removed at any time. The state "incomplete" is part of a layer's record.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from gearworkers.cas.collector import publishing
from gearworkers.cas.refs import OBJECTS_FILE
from gearworkers.cas.store import ObjectStore
from gearworkers.errors import GearError, NotFound, from_os_error
from gearworkers.layers.object_list import ObjectList, find_named
from gearworkers.layers.record import RECORD_FILE, LayerKind, read_record
from gearworkers.util import syscalls as kernel
from gearworkers.util.fs import opened_directory
from gearworkers.util.writing import replace_file

_log = structlog.get_logger(__name__)
_OBJECTS_PER_STEP = 5000


@dataclass(slots=True)
class _IncompleteLayer:
    objects: ObjectList
    present: int = 0
    """The first objects of the list that are known to be in the store."""


class IncompleteLayers:
    """The incomplete layers of one GEAR_ROOT. Call from any thread; GearError if the lists cannot be read."""

    def __init__(self, images: Path) -> None:
        self._images = images
        self._layers: dict[str, _IncompleteLayer] = {}
        self._seen_ns = -1
        self._lock = threading.Lock()

    def ids(self) -> list[str]:
        """Return the ids of the incomplete layers."""
        self._refresh()
        return list(self._layers)

    def refer_to(self, digest: bytes) -> bool:
        """Whether an incomplete layer refers to the object; True if the lists cannot be read."""
        try:
            return bool(self._find(digest, digest))
        except GearError as exc:
            _log.error("cannot read the object lists of incomplete layers", error=str(exc))
            return True

    def find_named(self, name: bytes) -> tuple[bytes, int] | None:
        """Return (digest, size in bytes) of the object with this name of 21 characters; None if no layer has it."""
        return find_named(self.objects_between, name)

    def objects_between(self, first: bytes, last: bytes) -> list[tuple[bytes, int]]:
        """Return the distinct objects in a range of digests, as `ObjectList.between`.

        Complete layers are searched if no incomplete layer has such an object. That takes longer; it is needed
        because a layer may become complete while one of its files is open.
        """
        found = self._find(first, last)
        if not found:
            with _os_errors_translated():
                for path in self._images.iterdir():
                    objects = ObjectList.open(path / OBJECTS_FILE)
                    found = found or (objects.between(first, last) if objects is not None else [])
        return found

    def digests(self) -> set[bytes]:
        """Return the digests of all objects that the incomplete layers refer to."""
        self._refresh()
        lists = [layer.objects for layer in self._layers.values()]
        return {objects.record(at)[0] for objects in lists for at in objects.positions}

    def missing(self, id: str, store: ObjectStore) -> list[tuple[bytes, int]]:
        """Return (digest, size in bytes) of the layer's missing objects; none if the layer is not incomplete."""
        self._refresh()
        layer = self._layers.get(id)
        if layer is None:
            return []
        return [record for record in map(layer.objects.record, layer.objects.positions) if not store.has(record[0])]

    def newly_complete(self, store: ObjectStore) -> list[str]:
        """Return the layers that now have all objects. A call checks some thousand objects, and each object once."""
        self._refresh()
        complete = []
        for id, layer in list(self._layers.items()):
            for at in layer.objects.positions[layer.present : layer.present + _OBJECTS_PER_STEP]:
                if not _is_present(store, layer.objects.record(at)[0]):
                    break
                layer.present += 1
            if layer.present == len(layer.objects.positions):
                complete.append(id)
        return complete

    def mark_complete(self, id: str, store: ObjectStore) -> bool:
        """Check all objects of the layer once more, then mark it complete durably; return whether it is complete."""
        is_complete = mark_complete(self._images, id, store)
        with self._lock:
            self._layers = {known: layer for known, layer in self._layers.items() if known != id}
            self._seen_ns = -1  # read the records again: the layer may have lost an object before or after the check
        return is_complete

    def _find(self, first: bytes, last: bytes) -> list[tuple[bytes, int]]:
        self._refresh()
        found = self._search(first, last)
        if not found and self._refresh(even_if_unchanged=True):
            found = self._search(first, last)
        return found

    def _search(self, first: bytes, last: bytes) -> list[tuple[bytes, int]]:
        found: dict[bytes, int] = {}
        for layer in tuple(self._layers.values()):
            found.update(layer.objects.between(first, last))
        return list(found.items())

    def _refresh(self, *, even_if_unchanged: bool = False) -> bool:
        """Look for new and removed layers; return whether any were found.

        The modification time of the directory shows changes. Two changes within one tick of the kernel's clock look
        like one, so `_find` refreshes once more before it reports that nothing was found.
        """
        try:
            with _os_errors_translated():
                seen_ns = self._images.stat().st_mtime_ns
        except NotFound:
            return False  # the gateway has not started yet
        if seen_ns == self._seen_ns and not even_if_unchanged:
            return False
        with self._lock, _os_errors_translated():
            before = self._layers
            ids = [id for id in os.listdir(self._images) if _is_incomplete(self._images / id)]
            layers = {id: before.get(id) or self._open(id) for id in ids}
            self._layers = {id: layer for id, layer in layers.items() if layer is not None}
            self._seen_ns = seen_ns
            return self._layers.keys() != before.keys()

    def _open(self, id: str) -> _IncompleteLayer | None:
        objects = ObjectList.open(self._images / id / OBJECTS_FILE)
        return None if objects is None else _IncompleteLayer(objects)


@contextmanager
def _os_errors_translated() -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise from_os_error(exc, "read the object lists of incomplete layers") from exc


def _is_present(store: ObjectStore, digest: bytes) -> bool:
    try:
        return store.has(digest)
    except GearError as exc:
        _log.error("cannot look up an object", error=str(exc))
        return False


def _is_incomplete(directory: Path) -> bool:
    try:
        layer = read_record(directory)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except msgspec.DecodeError as exc:
        _log.error("the record of a layer is damaged", layer=directory.name, error=str(exc))
        return False
    return layer.kind is LayerKind.IMAGE and not layer.complete


def mark_complete(images: Path, id: str, store: ObjectStore) -> bool:
    """Mark a layer complete, durably, if all its objects are in the store. Later mounts omit the lazy file system.

    Returns:
        Whether the layer exists and has all its objects.

    Raises:
        GearError: The record cannot be written; the layer stays incomplete.

    Crash: the layer is incomplete before the rename and complete after it. Its objects are synced before the rename.
    """
    with publishing(images.parent, store):
        objects = ObjectList.open(images / id / OBJECTS_FILE)
        if objects is None or not all(_is_present(store, objects.record(at)[0]) for at in objects.positions):
            return False
        with opened_directory(images) as images_fd:
            kernel.syncfs(images_fd)
        return _mark(images, id, complete=True)


def mark_incomplete(images: Path, id: str) -> bool:
    """Mark a layer incomplete before some of its objects are removed; return whether the layer exists.

    The caller forbids storing in place before the call (`cas.inplace.mark_objects_lost`).
    """
    exists = _mark(images, id, complete=False)
    os.utime(images)  # makes the lazy file server read the records again
    return exists


def layers_referring_to(images: Path, name: bytes) -> list[str]:
    """Return the ids of the image layers that refer to an object with this name of 21 characters."""
    found = []
    for directory in images.iterdir():
        objects = ObjectList.open(directory / OBJECTS_FILE)
        if objects is not None and objects.named(name) is not None:
            found.append(directory.name)
    return found


def _mark(images: Path, id: str, *, complete: bool) -> bool:
    directory = images / id
    try:
        record = msgspec.structs.replace(read_record(directory), complete=complete)
        replace_file(directory / RECORD_FILE, msgspec.json.encode(record), sync=True)  # an empty record loses the layer
    except FileNotFoundError:
        return False  # the layer was removed meanwhile
    except OSError as exc:
        raise from_os_error(exc, f"write the record of layer {id}") from exc
    return True
