"""Copy an image layer by hard links: the same blob is needed under another parent, or in another namespace."""

from __future__ import annotations

import os
import time

import msgspec

from gearworkers.errors import FailedPrecondition, NotFound, from_os_error
from gearworkers.layers.record import RECORD_FILE, Layer, LayerKind
from gearworkers.layers.store import LayerStore


def copy_layer(layers: LayerStore, source: Layer, id: str, parent: str) -> None:
    """Fill the empty layer *id* with the files of *source*.

    Both layers have one index file, and therefore the same inode numbers. That is safe: in a chain that has both, the
    upper one hides each file of the lower one.

    Args:
        layers: The node's.
        source: An image layer that is not private. If it is incomplete, so is the copy, even if all objects have
            arrived since: the lazy file server then finds the copy complete.
        id: The empty layer's id.
        parent: The id of the empty layer's parent; not private.

    Raises:
        NotFound: The source was removed meanwhile. The empty layer accepts another apply.
        FailedPrecondition: The source or the parent does not allow it.

    Crash: as in `LayerStore.publish`.
    """
    if source.kind is not LayerKind.IMAGE or source.private or layers.is_private(parent):
        raise FailedPrecondition(f"layer {source.id} cannot be copied to {id}")
    empty = layers.begin_apply(id, parent, again=True)
    with layers.build_directory(id) as build:
        try:
            for path in layers.directory(source).iterdir():
                if path.is_file() and not path.name.startswith(RECORD_FILE):  # also not a record that is being replaced
                    os.link(path, build / path.name)
        except FileNotFoundError as exc:
            raise NotFound(f"layer {source.id} was removed while it was copied") from exc
        except OSError as exc:
            raise from_os_error(exc, f"copy layer {source.id} to {id}") from exc
        record = msgspec.structs.replace(
            source,
            id=id,
            parent=parent,
            mount_label=empty.mount_label,
            created_s=time.time(),
            new_objects=0,
            new_bytes=0,
        )
        layers.publish(build, record, is_synced=True)
