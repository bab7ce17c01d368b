"""Check every layer: its parent, objects, index and exact stream exist and are undamaged."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from gearworkers.cas.refs import OBJECTS_FILE, read_refs
from gearworkers.cas.store import ObjectStore
from gearworkers.errors import GearError, IntegrityError
from gearworkers.layers import apply_once
from gearworkers.layers.apply import PRIVATE_FILE, STREAM_FILE
from gearworkers.layers.index.erofs_label import verify_index
from gearworkers.layers.index.inode_numbers import INDEX_FILE
from gearworkers.layers.index.renumber import has_own_inode_numbers
from gearworkers.layers.record import Layer, LayerKind
from gearworkers.layers.store import LayerStore
from gearworkers.tar.tar_split import TarSplitReader


class LayerFault(NamedTuple):
    """A fault of a layer."""

    id: str
    problem: str
    advice: str
    lacks_objects: bool = False
    """Whether only objects of the layer are missing or damaged."""


def layer_faults(layers: LayerStore, store: ObjectStore, bad_digests: Collection[bytes]) -> Iterator[LayerFault]:
    """Yield the faults of all layers.

    Args:
        layers: The layers.
        store: Contains their objects.
        bad_digests: The digests of damaged objects.
    """
    for id in layers.ids():
        try:
            layer = layers.get(id)
            if layer.parent:
                layers.get(layer.parent)
        except GearError as exc:
            yield LayerFault(id, str(exc), "remove the image or container that it belongs to")
            continue
        if layer.kind is LayerKind.IMAGE:
            yield from _image_faults(layers, layer, store, bad_digests)
        elif apply_once.is_unfinished(layers.directory(layer)):
            yield LayerFault(id, "its ApplyDiff did not finish or is still running", "dockerd removes the layer")


def _image_faults(
    layers: LayerStore, layer: Layer, store: ObjectStore, bad_digests: Collection[bytes]
) -> Iterator[LayerFault]:
    directory = layers.directory(layer)
    refetch = "remove the image and pull it again"
    own = layers.private_stores.store(layer.id)
    own_missing = sum(not _is_present(own, digest) for digest, _ in read_refs(directory / PRIVATE_FILE))
    if own_missing:
        yield LayerFault(layer.id, f"{own_missing} of its private objects are missing", refetch)
    missing = damaged = 0
    records = list(read_refs(directory / OBJECTS_FILE))
    if (len(records), sum(size_bytes for _, size_bytes in records)) != (layer.objects, layer.object_bytes):
        yield LayerFault(layer.id, f"its list {OBJECTS_FILE} is damaged", refetch)
    for digest, _ in records:
        if digest in bad_digests:
            damaged += 1
        elif layer.complete and not _is_present(store, digest):
            missing += 1
    if missing or damaged:
        yield LayerFault(
            layer.id, f"{missing} of its objects are missing, {damaged} damaged", refetch, lacks_objects=True
        )
    try:
        _check_index(directory / INDEX_FILE, layer)
    except (IntegrityError, OSError) as exc:
        yield LayerFault(layer.id, str(exc), refetch)
    try:
        with open(directory / STREAM_FILE, "rb") as file:
            for _ in TarSplitReader(file):
                pass
    except (IntegrityError, OSError) as exc:
        yield LayerFault(layer.id, str(exc), refetch)


def _check_index(index: Path, layer: Layer) -> None:
    """Verify the digest of an index. For an index of gearworkers 0.1, the layer's record has the digest."""
    if has_own_inode_numbers(index) or not layer.index_digest:
        verify_index(index)
        return
    with open(index, "rb") as file:
        if hashlib.file_digest(file, "sha256").digest() != layer.index_digest:
            raise IntegrityError(f"{index} is damaged")


def _is_present(store: ObjectStore, digest: bytes) -> bool:
    """Whether the object is present; False for a wrong digest, which `damaged_objects` reports."""
    try:
        return store.has(digest)
    except IntegrityError:
        return False
