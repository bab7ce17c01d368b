"""Survey an image before its conversion: read its manifests and configs, and find private layers."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from gearworkers.errors import IntegrityError, InvalidInput, NotFound
from gearworkers.images import manifest as m
from gearworkers.images.image_index import images_for
from gearworkers.images.layer_reader import TarPreview
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.images.source import ImageSource, is_local, read_config
from gearworkers.settings import RegistrySettings
from gearworkers.tar.private_marker import starts_with_marker
from gearworkers.tar.reader import TarReader

_LAYERS_AT_ONCE = 8


class SurveyedImage(NamedTuple):
    """One manifest and its config."""

    manifest: str
    """Its digest."""
    media_type: str
    layers: list[tuple[m.Descriptor, str]]
    """Each with its diff ID, the lowest first."""
    config: m.Config
    entry: m.JsonObject
    """Its descriptor in the index; empty for a single-platform image."""


class Survey(NamedTuple):
    """The images that a name refers to, and the digest of their manifest or index."""

    digest: str
    is_index: bool
    images: list[SurveyedImage]


def survey(source: ImageSource, name: str, platform: m.Platform | None, *, all_platforms: bool) -> Survey:
    """Read the manifests and configs of an image.

    Args:
        source: The image.
        name: Name of the image, for messages.
        platform: Platform that the image must run on. None: this host's in an index; any for a single-platform image.
        all_platforms: Read all images of an index.

    Raises:
        NotFound: The image does not exist, or not for *platform*.
        InvalidInput, IntegrityError: A document is malformed or differs from its digest.
    """
    data, media_type = source.root()
    digest = m.digest_of(data)
    if media_type in m.INDEXES:
        entries = images_for(source, data, None if all_platforms else platform or m.Platform.here(), name)
        images = [_decoded(source, *source.manifest(entry.descriptor.digest), entry.document) for entry in entries]
        return Survey(digest, True, images)
    image = _decoded(source, data, media_type, {})
    if platform is not None and not platform.runs(image.config.platform):
        found = str(image.config.platform) or "one without a platform"
        raise NotFound(f"{name} has no image for {platform}; it has: {found}")
    return Survey(digest, False, [image])


def private_layers(source: ImageSource, images: Sequence[SurveyedImage]) -> set[str]:
    """Return the digests of layers that are marked private, or are above a marked layer in any of the images.

    Raises:
        InvalidInput, IntegrityError: The start of a layer is not a tar's; the message names the layer.
    """
    distinct = {layer.digest: layer for image in images for layer, _ in image.layers}
    with ThreadPoolExecutor(_LAYERS_AT_ONCE) as pool:
        results = pool.map(lambda layer: _has_mark(source, layer), distinct.values())
        marked = {digest for digest, has_mark in zip(distinct, results, strict=True) if has_mark}
    private: set[str] = set()
    for image in images:
        digests = [layer.digest for layer, _ in image.layers]
        first = next((position for position, digest in enumerate(digests) if digest in marked), len(digests))
        private.update(digests[first:])
    return private


def reject_replacing_source(settings: RegistrySettings, source: str, target: Reference, found: Survey) -> None:
    """Reject a *target* that is the tag of *source*: afterwards only hosts with gearworkers could run that image.

    A Gear image may replace itself.

    Args:
        settings: Credentials and proxy.
        source: The name of the surveyed image, in a registry or on this host.
        target: The Gear image's name, with a tag.
        found: The survey.

    Raises:
        InvalidInput: *target* is the tag in *source*, or names the digest in *source*.
    """
    if is_local(source) or all(image.config.is_gear for image in found.images):
        return
    try:
        origin = Reference.parse(source)
    except InvalidInput:
        return  # a name of containerd, which no registry can have
    if origin.is_in_repository_of(target) and (
        origin.tag == target.tag or (origin.tag is None and _names_digest(settings, target, found.digest))
    ):
        raise InvalidInput(
            f"{target} is the image to convert, and only hosts with gearworkers could run the Gear image; "
            f"choose another tag, such as {target}-gear"
        )


def _decoded(source: ImageSource, data: bytes, media_type: str, entry: m.JsonObject) -> SurveyedImage:
    digest = m.digest_of(data)
    manifest = m.decode_manifest(data, f"manifest {digest}")
    config = m.decode_config(read_config(source, manifest.config), manifest, f"config {manifest.config.digest}")
    return SurveyedImage(
        digest, media_type, list(zip(manifest.layers, config.rootfs.diff_ids, strict=True)), config, entry
    )


def _has_mark(source: ImageSource, layer: m.Descriptor) -> bool:
    try:
        return starts_with_marker(TarReader(TarPreview(source.blob(layer.digest, layer.size))))
    except (InvalidInput, IntegrityError) as exc:
        raise type(exc)(f"layer {layer.digest}: {exc}") from exc


def _names_digest(settings: RegistrySettings, target: Reference, digest: str) -> bool:
    """Return whether the tag *target* currently names the manifest *digest*."""
    try:
        return m.digest_of(Repository.of(settings, target).manifest(target.tag_or_digest)[0]) == digest
    except NotFound:
        return False
