"""`gear inspect`, `gear pin`, `gear unpin`: an image's files on this node, as a user sees them.

An image that dockerd has is asked for there, and its layers' lists of objects say what it needs. One that was not
pulled is read in its registry: the layers of a Gear image are small, and name all that they need.
"""

from __future__ import annotations

from collections.abc import Iterable

from rich.filesize import decimal

from gearworkers.cas.refs import OBJECTS_FILE, read_refs
from gearworkers.cas.store import ObjectStore
from gearworkers.cli.docker_api import LocalImage, local_image
from gearworkers.errors import NotFound, Unavailable
from gearworkers.images import manifest as m
from gearworkers.images.gear_layer import INLINE_BYTES
from gearworkers.images.image_index import images_for
from gearworkers.images.layer_reader import unpacked
from gearworkers.images.source import Source, open_source, small_blob
from gearworkers.layers.pins import Pin, Pins
from gearworkers.layers.store import LayerStore
from gearworkers.lazyfs.client import read_status
from gearworkers.settings import Settings
from gearworkers.tar.reader import TarReader

Objects = dict[bytes, int]
"""Distinct contents: size in bytes by digest."""


class Node:
    """The store of this node."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.objects = ObjectStore(settings.gear_public_cache_path)
        self.layers = LayerStore(settings, self.objects)
        self.pins = Pins(settings, self.layers, self.objects)


def inspect(settings: Settings, name: str) -> Iterable[tuple[str, str]]:
    """What there is to say of an image, as pairs of a key and a value.

    Raises:
        NotFound: Neither dockerd nor the registry has it.
        GearError: What kept it from being read.
    """
    node = Node(settings)
    try:
        image = local_image(settings, name)
    except Unavailable:
        image = None  # a node without dockerd can still ask the registry
    if image is None:
        return _inspect_remote(node, name)
    return _inspect_local(node, name, image)


def pin(settings: Settings, name: str) -> Iterable[tuple[str, str]]:
    """Keep all files of an image that was pulled, and have those fetched that are missing.

    Raises:
        NotFound: It was not pulled.
        Unavailable: No dockerd answers.
    """
    node = Node(settings)
    image = local_image(settings, name)
    if image is None:
        raise NotFound(f"{name} is not here; pull it first")
    node.pins.add(Pin(name, image.id), image.top_layer)
    missing = _missing(node, _objects_of(node, image))
    yield "Pinned", name
    yield "Missing", _sum(missing)
    if missing and read_status(settings.lazyfs_socket) is None:
        yield "Note", "they are fetched as soon as `gear lazyfs` runs"


def unpin(settings: Settings, name: str) -> Iterable[tuple[str, str]]:
    """Let go of an image that was pinned.

    Raises:
        NotFound: It was not.
    """
    for found in Node(settings).pins.remove(name):
        yield "Unpinned", found.name


def _inspect_local(node: Node, name: str, image: LocalImage) -> Iterable[tuple[str, str]]:
    layers = list(node.layers.layer_chain(image.top_layer))
    complete = sum(layer.complete for layer in layers)
    yield "Image", f"{name}, pulled"
    yield "Id", image.id
    yield "Gear image", "yes" if image.is_gear else "no"
    yield "Layers", f"{len(layers)}, {complete} of them complete"
    private = node.layers.private_layers(image.top_layer)
    if private:
        files = f"{sum(one.private_objects for one in private)}, {decimal(sum(one.private_bytes for one in private))}"
        yield "Private", f"{len(private)} of the layers, with files of their own: {files}"
    yield from _contents(node, _objects_of(node, image))
    if any(known.image == image.id for known in node.pins.all()):
        yield "Kept whole", "yes, until `gear unpin`"
    else:
        yield "Kept whole", "no; `gear pin` does"


def _inspect_remote(node: Node, name: str) -> Iterable[tuple[str, str]]:
    source = open_source(node.settings.registry, name)
    data, media_type = source.root()
    if media_type in m.INDEXES:
        (ours,) = images_for(source, data, m.Platform.here(), name)
        data, _ = source.manifest(ours.descriptor.digest)
    manifest = m.decode_manifest(data, name)
    config = m.decode_config(small_blob(source, manifest.config), manifest, name)
    yield "Image", f"{name}, not pulled here"
    yield "Id", manifest.config.digest
    yield "Gear image", "yes" if config.is_gear else "no"
    yield "Layers", f"{len(manifest.layers)}, {decimal(sum(layer.size for layer in manifest.layers))} compressed"
    if not config.is_gear:
        return
    objects: Objects = {}
    plain = 0
    for layer, diff_id in zip(manifest.layers, config.rootfs.diff_ids, strict=True):
        plain += not _add_named(source, layer, diff_id, objects)
    if plain:
        yield "Not converted", f"{plain} layers, which hold their files themselves"
    yield from _contents(node, objects)


def _contents(node: Node, objects: Objects) -> Iterable[tuple[str, str]]:
    missing = _missing(node, objects)
    pinned = {digest for digest, _ in node.pins.objects()}
    yield "Distinct files", _sum(objects)
    yield "Here", _sum({digest: size for digest, size in objects.items() if digest not in missing})
    yield "Missing", _sum(missing)
    yield "Pinned", _sum({digest: size for digest, size in objects.items() if digest in pinned})


def _objects_of(node: Node, image: LocalImage) -> Objects:
    layers = node.layers.layer_chain(image.top_layer)
    return dict(record for layer in layers for record in read_refs(node.layers.directory(layer) / OBJECTS_FILE))


def _add_named(source: Source, layer: m.Descriptor, diff_id: str, objects: Objects) -> bool:
    """Add what a Gear layer names to *objects*; False, and no more is read, if it holds contents of its own."""
    with unpacked(source.blob(layer.digest, layer.size), diff_id) as tar:
        reader = TarReader(tar)
        for entry in reader:
            if entry.stored_bytes > INLINE_BYTES:
                return False
            if entry.gear is not None:
                objects[entry.gear[0]] = entry.gear[1]
        reader.finish()
    return True


def _missing(node: Node, objects: Objects) -> Objects:
    return {digest: size_bytes for digest, size_bytes in objects.items() if not node.objects.has(digest)}


def _sum(objects: Objects) -> str:
    return f"{len(objects)}, {decimal(sum(objects.values()))}"
