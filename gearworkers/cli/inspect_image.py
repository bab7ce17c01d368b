"""`gear inspect`: an image's layers, and how many of its files are on this node.

dockerd or containerd names the layers of a pulled image, and the layers' lists of objects name its files. An image that
was not pulled is read from its registry: the layers of a Gear image are small, and name all files.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from typing import Annotated

import typer
from rich.filesize import decimal

from gearworkers.cli.image_names import NamespaceOption, find_image, in_namespace, names_daemon
from gearworkers.cli.image_objects import NodeStore, Objects, count_and_size
from gearworkers.cli.local_images import LocalImage
from gearworkers.cli.output import print_pairs
from gearworkers.errors import NotFound, Unavailable
from gearworkers.images import manifest as m
from gearworkers.images.image_index import images_for
from gearworkers.images.layer_reader import unpacked
from gearworkers.images.layer_records import INLINE_BYTES, read_record
from gearworkers.images.source import ImageSource, open_source, read_config
from gearworkers.remote.factory import open_remote
from gearworkers.settings import Settings
from gearworkers.tar.reader import TarReader
from gearworkers.util.log import command_settings


def command(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE",
            help="Name or id of a pulled image, as in `docker images` or `ctr images ls`; else a name in a registry. "
            "docker:NAME and containerd:NAME ask only that daemon.",
        ),
    ],
    namespace: NamespaceOption = "",
) -> None:
    """Show whether an image is a Gear image, and how many of its files are here, missing and pinned."""
    print_pairs(inspect(*in_namespace(command_settings(), image, namespace)))


def inspect(settings: Settings, name: str) -> Iterable[tuple[str, str]]:
    """Describe an image as pairs of a key and a value.

    Raises:
        NotFound: Neither this node nor the registry has the image; or the named daemon does not.
        GearError: The image cannot be read.
    """
    node = NodeStore(settings)
    try:
        return _describe_pulled(node, name, find_image(settings, name))
    except (NotFound, Unavailable):
        if names_daemon(name):
            raise
    return _describe_remote(settings, node, name, open_source(settings.registry, name))


def _describe_pulled(node: NodeStore, name: str, image: LocalImage) -> Iterable[tuple[str, str]]:
    layers = list(node.layers.layer_chain(image.top_layer))
    complete = sum(layer.complete for layer in layers)
    yield "Image", name
    yield "Pulled", "yes"
    yield "Id", image.id
    yield "Gear image", "yes" if image.is_gear else "no"
    yield "Layers", f"{len(layers)} ({complete} complete)"
    if from_index := sum(layer.from_index for layer in layers):
        yield "Not downloaded", f"{from_index} layers, which were made from indexes"
    private = node.layers.private_layers(image.top_layer)
    if private:
        files = sum(layer.private_objects for layer in private)
        size = decimal(sum(layer.private_bytes for layer in private))
        yield "Private", f"{len(private)} of the layers, with files of their own: {files}, {size}"
    yield from _describe_objects(node, node.objects_of(image.top_layer))
    is_pinned = any(pin.image == image.id for pin in node.pins.all())
    yield "Image pinned", "yes" if is_pinned else "no"


def _describe_remote(settings: Settings, node: NodeStore, name: str, source: ImageSource) -> Iterable[tuple[str, str]]:
    data, media_type = source.root()
    if media_type in m.INDEXES:
        (entry,) = images_for(source, data, m.Platform.here(), name)
        data, _ = source.manifest(entry.descriptor.digest)
    manifest = m.decode_manifest(data, name)
    config = m.decode_config(read_config(source, manifest.config), manifest, name)
    yield "Image", name
    yield "Pulled", "no"
    yield "Id", manifest.config.digest
    yield "Gear image", "yes" if config.is_gear else "no"
    yield "Layers", f"{len(manifest.layers)}, {decimal(sum(layer.size for layer in manifest.layers))} compressed"
    if not config.is_gear:
        if settings.remote.url:
            yield "Indexed", f"{_indexed_layers(settings, manifest)} of the layers"
        return
    objects: Objects = {}
    ordinary = 0
    for layer, diff_id in zip(manifest.layers, config.rootfs.diff_ids, strict=True):
        ordinary += not _add_named_objects(source, layer, diff_id, objects)
    if ordinary:
        yield "Not converted", f"{ordinary} layers, which hold their files themselves"
    yield from _describe_objects(node, objects)


def _indexed_layers(settings: Settings, manifest: m.Manifest) -> int:
    """Return the number of layers that have an index in the remote."""
    with closing(open_remote(settings)) as remote:
        records = [read_record(remote.document, layer.digest) for layer in manifest.layers]
    return sum(record is not None and record.has_index for record in records)


def _describe_objects(node: NodeStore, objects: Objects) -> Iterable[tuple[str, str]]:
    missing = node.missing(objects)
    pinned = {digest for digest, _ in node.pins.objects()}
    yield "Distinct files", count_and_size(objects)
    yield "On this node", count_and_size({digest: size for digest, size in objects.items() if digest not in missing})
    yield "Missing", count_and_size(missing)
    yield "Pinned files", count_and_size({digest: size for digest, size in objects.items() if digest in pinned})


def _add_named_objects(source: ImageSource, layer: m.Descriptor, diff_id: str, objects: Objects) -> bool:
    """Add the objects that a Gear layer names to *objects*; return False, and stop reading, for an ordinary layer."""
    with unpacked(source.blob(layer.digest, layer.size), diff_id) as tar:
        reader = TarReader(tar)
        for entry in reader:
            if entry.stored_bytes > INLINE_BYTES:
                return False
            if entry.gear is not None:
                objects[entry.gear[0]] = entry.gear[1]
        reader.finish()
    return True
