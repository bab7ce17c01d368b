"""What there is of an image ahead of its conversion: the manifests and configs for the platforms, private layers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from gearworkers.errors import IntegrityError, InvalidInput, NotFound
from gearworkers.images import manifest as m
from gearworkers.images.image_index import images_for
from gearworkers.images.layer_reader import Beginning
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.images.source import Source, is_local, small_blob
from gearworkers.settings import RegistrySettings
from gearworkers.tar.private_marker import starts_with_mark
from gearworkers.tar.reader import TarReader

_LOOKS_AT_ONCE = 8


class Image(NamedTuple):
    """One manifest, read with its config."""

    manifest: str
    media_type: str
    layers: list[tuple[m.Descriptor, str]]
    """With their diff IDs, the lowest first."""
    config: m.Config
    entry: m.Document
    """The descriptor in the index; empty for the image of a single platform."""


class Survey(NamedTuple):
    """What a name stands for."""

    digest: str
    is_index: bool
    images: list[Image]


def survey(source: Source, name: str, platform: m.Platform | None, *, all_platforms: bool) -> Survey:
    """Read manifests and configs.

    Args:
        source: Of the image.
        name: Of the image, for messages.
        platform: What the image has to run on. None: this host for an index; any for the image of a single platform.
        all_platforms: Take all images of an index.

    Raises:
        NotFound: There is no such image, or none for *platform*.
        InvalidInput, IntegrityError: A document is malformed or not what its digest says.
    """
    data, media_type = source.root()
    digest = m.digest_of(data)
    if media_type in m.INDEXES:
        entries = images_for(source, data, None if all_platforms else platform or m.Platform.here(), name)
        images = [_decoded(source, *source.manifest(one.descriptor.digest), one.document) for one in entries]
        return Survey(digest, True, images)
    image = _decoded(source, data, media_type, {})
    if platform is not None and not platform.runs(image.config.platform):
        there = str(image.config.platform) or "an image that names no platform"
        raise NotFound(f"{name} has no image for {platform}; there is: {there}")
    return Survey(digest, False, [image])


def private_layers(source: Source, images: Sequence[Image]) -> set[str]:
    """The digests of the layers that have the mark or lie above one that has it, in any of the images.

    Raises:
        InvalidInput, IntegrityError: A layer does not begin as a tar does; the message names it.
    """
    distinct = {layer.digest: layer for one in images for layer, _ in one.layers}
    with ThreadPoolExecutor(_LOOKS_AT_ONCE) as pool:
        looks = pool.map(lambda layer: _has_mark(source, layer), distinct.values())
        marked = {digest for digest, has_mark in zip(distinct, looks, strict=True) if has_mark}
    private: set[str] = set()
    for one in images:
        digests = [layer.digest for layer, _ in one.layers]
        first = next((at for at, digest in enumerate(digests) if digest in marked), len(digests))
        private.update(digests[first:])
    return private


def refuse_to_replace(settings: RegistrySettings, source: str, target: Reference, found: Survey) -> None:
    """Have *target* be another tag than that of *source*: only Gear hosts could run the image from then on.

    A Gear image may take its own place.

    Args:
        settings: Credentials and proxy.
        source: The name that was surveyed.
        target: With a tag.
        found: The survey.

    Raises:
        InvalidInput: It is the same tag, or the one that a digest in *source* belongs to.
    """
    if is_local(source) or all(image.config.is_gear for image in found.images):
        return
    origin = Reference.parse(source)
    if origin.is_in_repository_of(target) and (
        origin.tag == target.tag or (origin.tag is None and _is_named(settings, target, found.digest))
    ):
        raise InvalidInput(
            f"{target} is the image to be converted, and only hosts with gearworkers could run what takes its place; "
            f"name another tag, such as {target}-gear"
        )


def _decoded(source: Source, data: bytes, media_type: str, entry: m.Document) -> Image:
    digest = m.digest_of(data)
    manifest = m.decode_manifest(data, f"manifest {digest}")
    config = m.decode_config(small_blob(source, manifest.config), manifest, f"config {manifest.config.digest}")
    return Image(digest, media_type, list(zip(manifest.layers, config.rootfs.diff_ids, strict=True)), config, entry)


def _has_mark(source: Source, layer: m.Descriptor) -> bool:
    try:
        return starts_with_mark(TarReader(Beginning(source.blob(layer.digest, layer.size))))
    except (InvalidInput, IntegrityError) as exc:
        raise type(exc)(f"layer {layer.digest}: {exc}") from exc


def _is_named(settings: RegistrySettings, target: Reference, digest: str) -> bool:
    """Whether the tag *target* stands for the manifest *digest* now."""
    try:
        return m.digest_of(Repository.of(settings, target).manifest(target.version)[0]) == digest
    except NotFound:
        return False
