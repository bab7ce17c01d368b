"""Indexes of images: find the image for a platform, or all images.

An index may contain further indexes. If an entry names no platform, the image's config does. Entries about other
images, such as attestations and signatures, are not images.

Source: OCI image-spec v1.1, image-index.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from gearworkers.errors import InvalidInput, NotFound
from gearworkers.images import manifest as m
from gearworkers.images.reference import check_digest
from gearworkers.images.source import ImageSource, read_config

MAX_NESTED_INDEXES = 64
"""Limit for one image; its indexes are read one after another."""


class IndexEntry(NamedTuple):
    """An image in an index."""

    descriptor: m.Descriptor
    document: m.JsonObject
    """The whole descriptor as JSON."""


def images_for(source: ImageSource, index: bytes, platform: m.Platform | None, name: str) -> list[IndexEntry]:
    """Return the first image for *platform* in *index* and its nested indexes; all images if *platform* is None.

    Args:
        source: Provides the manifests and configs.
        index: An index of *source*.
        platform: Platform that the image must run on.
        name: Name of the image, for messages.

    Raises:
        NotFound: The index has no such image; the message lists the platforms.
        InvalidInput: A document is malformed, or there are too many indexes.
    """
    entries = [entry for entry in _entries(source, index, name, set()) if entry.descriptor.is_image]
    images = [] if platform else [entry for entry in entries if _platform_of(source, entry.descriptor) is not None]
    if images:
        return images
    platforms: set[str] = set()
    entries.sort(key=lambda entry: not entry.descriptor.names_platform)  # reads configs only if needed
    for entry in entries:
        found = _platform_of(source, entry.descriptor)
        if found is not None and platform is not None and platform.runs(found):
            return [entry]
        if found is not None:
            platforms.add(str(found) or "one without a platform")
    shown = ", ".join(sorted(platforms)) or "none"
    raise NotFound(f"{name} has no image for {platform or 'any platform'}; it has: {shown}")


def _entries(source: ImageSource, index: bytes, label: str, seen: set[str]) -> Iterator[IndexEntry]:
    """Yield all entries that are not indexes, in order; read each index once."""
    documents = msgspec.json.decode(index).get("manifests") or []
    for child, document in zip(m.decode_index(index, label).manifests, documents, strict=True):
        if child.media_type not in m.INDEXES:
            yield IndexEntry(child, document)
        elif child.digest not in seen:
            seen.add(child.digest)
            if len(seen) > MAX_NESTED_INDEXES:
                raise InvalidInput(f"{label}: more than {MAX_NESTED_INDEXES} nested indexes")
            yield from _entries(source, source.manifest(child.digest)[0], f"index {child.digest}", seen)


def _platform_of(source: ImageSource, image: m.Descriptor) -> m.Platform | None:
    """Return the platform from the index or the config; None if *image* is not an image."""
    if image.names_platform:
        return image.platform
    label = f"manifest {image.digest}"
    config = m.decode(source.manifest(image.digest)[0], m.Manifest, label).config
    if config.media_type not in m.CONFIGS:
        return None
    check_digest(config.digest)
    return m.decode(read_config(source, config), m.Config, f"config {config.digest}").platform
