"""The objects that an image needs, and which of them this node has; for `gear inspect` and `gear pin`."""

from __future__ import annotations

from rich.filesize import decimal

from gearworkers.cas.refs import OBJECTS_FILE, read_refs
from gearworkers.cas.store import ObjectStore
from gearworkers.layers.pins import Pins
from gearworkers.layers.store import LayerStore
from gearworkers.settings import Settings

Objects = dict[bytes, int]
"""Size in bytes of each distinct object, by its digest."""


class NodeStore:
    """The objects, layers and pins of this node."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.objects = ObjectStore(settings.gear_public_cache_path)
        self.layers = LayerStore(settings, self.objects)
        self.pins = Pins(settings, self.layers, self.objects)

    def objects_of(self, top_layer: str) -> Objects:
        """Return the objects of *top_layer* and of all layers below it."""
        layers = self.layers.layer_chain(top_layer)
        return dict(record for layer in layers for record in read_refs(self.layers.directory(layer) / OBJECTS_FILE))

    def missing(self, objects: Objects) -> Objects:
        """Return those of *objects* that this node does not have."""
        return {digest: size_bytes for digest, size_bytes in objects.items() if not self.objects.has(digest)}


def count_and_size(objects: Objects) -> str:
    """Format the number of *objects* and the sum of their sizes."""
    return f"{len(objects)}, {decimal(sum(objects.values()))}"
