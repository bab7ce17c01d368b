"""A layer's record, the file `layer.json`: identity, kind, sizes and state of one layer."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path

import msgspec

from gearworkers.layers.apply import Applied
from gearworkers.layers.idmap import NO_MAPS, IdMaps
from gearworkers.util.writing import write_synced

RECORD_FILE = "layer.json"


class LayerKind(StrEnum):
    """Whether a layer is new, an image layer or a container layer."""

    NEW = "new"
    IMAGE = "image"
    CONTAINER = "container"


class Layer(msgspec.Struct, frozen=True, omit_defaults=True):
    """The content of `layer.json`."""

    id: str
    parent: str
    kind: LayerKind
    mount_label: str = ""
    created_s: float = 0.0
    dedupable: bool = msgspec.field(default=False, name="absorbable")
    """Whether the layer was created as a new layer. It does not change after it is written and its Diff is taken."""
    mount_ids: IdMaps = NO_MAPS
    """How the layer's mount shows the owners of the layers below it. The files in its upper have the shown owners."""
    size_limit_bytes: int = 0
    """Size limit of a container; 0 for no limit."""
    project: int = 0
    """Number of the quota project of a container with a size limit; see `layers.quotas`."""
    size_bytes: int = 0
    objects: int = 0
    object_bytes: int = 0
    new_objects: int = 0
    new_bytes: int = 0
    complete: bool = True
    """Whether all objects of the layer are in the object store."""
    private: bool = False
    """Whether the contents of the layer's tar are in private/<id>: this layer or one below it has the marker."""
    private_objects: int = 0
    private_bytes: int = 0
    from_index: bool = False
    """Whether the layer was made from a Gear layer in place of its own tar. Its Diff is then made from its tree."""
    index_digest: bytes = b""
    """SHA-256 of an index without a label. An index with a label contains its digest."""


def new_layer(
    id: str,
    parent: str,
    kind: LayerKind,
    mount_label: str,
    size_limit_bytes: int = 0,
    mount_ids: IdMaps = NO_MAPS,
) -> Layer:
    """Return the record of a layer that is created now."""
    return Layer(
        id=id,
        parent=parent,
        kind=kind,
        mount_label=mount_label,
        created_s=time.time(),
        dedupable=kind is LayerKind.NEW,
        size_limit_bytes=size_limit_bytes,
        mount_ids=mount_ids,
    )


def image_layer(layer: Layer, applied: Applied, *, from_index: bool = False) -> Layer:
    """Return the record of *layer* after a tar has filled it. The index has the tar's owners, so it maps no ids."""
    return Layer(
        id=layer.id,
        parent=layer.parent,
        kind=LayerKind.IMAGE,
        mount_label=layer.mount_label,
        created_s=layer.created_s,
        size_bytes=applied.size_bytes,
        objects=applied.objects,
        object_bytes=applied.object_bytes,
        new_objects=applied.new_objects,
        new_bytes=applied.new_bytes,
        complete=applied.complete,
        private=applied.private,
        private_objects=applied.private_objects,
        private_bytes=applied.private_bytes,
        from_index=from_index,
    )


def read_record(directory: Path) -> Layer:
    """Read `layer.json` in a layer's directory.

    Raises:
        OSError: The file cannot be read.
        msgspec.DecodeError: The file is damaged.
    """
    return msgspec.json.decode((directory / RECORD_FILE).read_bytes(), type=Layer)


def write_record(directory: Path, layer: Layer, *, sync: bool = False) -> None:
    """Write `layer.json` into the new directory of a layer; its bytes survive a power cut if *sync* is set."""
    data = msgspec.json.encode(layer)
    if sync:
        write_synced(directory / RECORD_FILE, data)
    else:
        (directory / RECORD_FILE).write_bytes(data)
