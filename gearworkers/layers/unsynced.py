"""Check the objects that a power cut may have damaged.

Objects that were fetched for an incomplete layer or a pin are not synced one by one. After a power cut such an object
may have its name but not its bytes. The objects of a complete layer were synced before the layer was complete.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import structlog

from gearworkers.cas.refs import OBJECTS_FILE
from gearworkers.cas.store import ObjectStore, verify_file
from gearworkers.errors import IntegrityError
from gearworkers.layers.incomplete import IncompleteLayers
from gearworkers.layers.object_list import ObjectList
from gearworkers.util.open_file import ObjectFile

_log = structlog.get_logger(__name__)


def verify_unsynced_objects(images: Path, store: ObjectStore, pinned: Iterable[bytes] = ()) -> int:
    """Compare the objects that only incomplete layers and pins refer to with their digests; remove damaged ones.

    Args:
        images: The directory of the image layers.
        store: Contains the objects.
        pinned: The digests of pinned objects.

    Returns:
        The number of objects removed.
    """
    incomplete = IncompleteLayers(images)
    incomplete_ids = incomplete.ids()
    complete_lists = [
        ObjectList.open(path / OBJECTS_FILE) for path in images.iterdir() if path.name not in incomplete_ids
    ]
    removed = 0
    for digest in incomplete.digests().union(pinned):
        if any(objects is not None and objects.has(digest) for objects in complete_lists):
            continue
        try:
            if store.has(digest):
                object = ObjectFile(store.open(digest))
                verify_file(object.fd, digest)
        except IntegrityError as exc:
            _log.warning("an object was damaged by a power cut; it is removed", error=str(exc))
            store.remove(digest)
            removed += 1
    return removed
