"""The plan of a conversion: which manifests and layers of an image are converted.

Glossary: a *plan* lists the images of one name and their layers; a *layer job* is one distinct layer. Any host can
convert any job, in any order. Both are sent as JSON in Celery's messages.
"""

from __future__ import annotations

import msgspec

from gearworkers.errors import InvalidInput
from gearworkers.images import manifest as m
from gearworkers.images.reference import Reference
from gearworkers.images.source import open_source
from gearworkers.images.survey import private_layers, reject_replacing_source, survey
from gearworkers.settings import RegistrySettings


class LayerJob(msgspec.Struct, frozen=True):
    """One distinct layer to convert."""

    source: str
    """Name of the image, as `open_source` takes it."""
    target: str
    """Name of the Gear image; empty to store the layer in the remote only."""
    digest: str
    size_bytes: int
    diff_id: str
    again: bool = False
    """Whether to convert the layer even if a record of it exists."""
    private: bool = False
    """Whether the layer, or a layer below it in any of the images, is marked private."""


class ImagePlan(msgspec.Struct, frozen=True):
    """One manifest to convert."""

    manifest: str
    """Its digest."""
    media_type: str
    layers: tuple[LayerJob, ...]
    """In the manifest's order; a layer may occur twice."""
    entry: m.JsonObject = {}
    """Its descriptor in the index; empty for a single-platform image."""


class ConversionPlan(msgspec.Struct, frozen=True):
    """The images and layers of one conversion."""

    source: str
    target: str
    """Name of the Gear image; empty to index *source* without making another image."""
    digest: str
    """Digest of the source's manifest or index."""
    is_index: bool
    """Whether *digest* is that of an index, which is converted with all its platforms."""
    images: tuple[ImagePlan, ...]

    def jobs(self) -> list[LayerJob]:
        """Return the distinct layers, the largest first, since they take longest."""
        distinct = {job.digest: job for image in self.images for job in image.layers}
        return sorted(distinct.values(), key=lambda job: (-job.size_bytes, job.digest))


def plan_conversion(
    settings: RegistrySettings,
    source: str,
    target: str,
    platform: m.Platform | None = None,
    *,
    all_platforms: bool = False,
    again: bool = False,
    name: str = "",
) -> ConversionPlan:
    """Plan a conversion: read manifests, configs and the first bytes of layers; change nothing.

    Args:
        settings: Credentials and proxy.
        source: As `open_source` takes it.
        target: Name in a registry, with or without a tag, but without a digest; empty to index the image only.
        platform: As `survey` takes it.
        all_platforms: Convert all images of an index.
        again: Also convert layers that are already converted.
        name: Name of the image in a registry, if *source* is where a daemon of this host has it.

    Raises:
        InvalidInput, IntegrityError: A name is malformed, the image cannot be converted, or *target* would replace it.
        NotFound: The image does not exist, or not for *platform*.
    """
    named = Reference.parse(target) if target else None
    if named is not None and named.digest:
        raise InvalidInput(f"{target}: the digest of a new image cannot be chosen; give a tag instead")
    image = open_source(settings, source)
    found = survey(image, name or source, platform, all_platforms=all_platforms)
    if named is not None:
        reject_replacing_source(settings, name or source, named, found)
    target = str(named or "")
    private = private_layers(image, found.images)

    def job(layer: m.Descriptor, diff_id: str) -> LayerJob:
        return LayerJob(source, target, layer.digest, layer.size, diff_id, again, layer.digest in private)

    plans = (
        ImagePlan(
            surveyed.manifest, surveyed.media_type, tuple(job(*layer) for layer in surveyed.layers), surveyed.entry
        )
        for surveyed in found.images
    )
    return ConversionPlan(source, target, found.digest, found.is_index and all_platforms, tuple(plans))
