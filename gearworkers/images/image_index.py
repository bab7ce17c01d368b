"""Indexes: the images in one, and the one for a platform.

An index may hold further indexes, and entries that name no platform: then the image's config does. An entry about other
images, such as an attestation or a signature, is not an image.

Source: OCI image-spec v1.1, image-index.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from gearworkers.errors import InvalidInput, NotFound
from gearworkers.images import manifest as m
from gearworkers.images.reference import check_digest
from gearworkers.images.source import Source, small_blob

_MOST_INDEXES = 64
"""In one image; they are read one by one."""


class Entry(NamedTuple):
    """An image of an index."""

    descriptor: m.Descriptor
    document: m.Document
    """All of the descriptor."""


def images_for(source: Source, index: bytes, platform: m.Platform | None, name: str) -> list[Entry]:
    """The image for *platform* in *index* and the indexes below it, the first of several; all images for None.

    Args:
        source: Where manifests and configs are read.
        index: An index of *source*.
        platform: What the image is to run on.
        name: Of the image, for messages.

    Raises:
        NotFound: There is no such image; the message names the platforms.
        InvalidInput: A document is malformed, or there are too many indexes.
    """
    entries = [entry for entry in _entries(source, index, name, set()) if entry.descriptor.is_image]
    images = [] if platform else [one for one in entries if _platform_of(source, one.descriptor) is not None]
    if images:
        return images
    there: set[str] = set()
    for entry in sorted(entries, key=lambda entry: not entry.descriptor.names_platform):  # no config unless needed
        theirs = _platform_of(source, entry.descriptor)
        if theirs is not None and platform is not None and platform.runs(theirs):
            return [entry]
        if theirs is not None:
            there.add(str(theirs) or "one that names no platform")
    shown = ", ".join(sorted(there)) or "none"
    raise NotFound(f"{name} has no image for {platform or 'any platform'}; there are: {shown}")


def _entries(source: Source, index: bytes, what: str, seen: set[str]) -> Iterator[Entry]:
    """All entries that are not indexes, in order; each index is read once."""
    documents = msgspec.json.decode(index).get("manifests") or []
    for child, document in zip(m.decode_index(index, what).manifests, documents, strict=True):
        if child.media_type not in m.INDEXES:
            yield Entry(child, document)
        elif child.digest not in seen:
            seen.add(child.digest)
            if len(seen) > _MOST_INDEXES:
                raise InvalidInput(f"{what}: more than {_MOST_INDEXES} indexes lie below it")
            yield from _entries(source, source.manifest(child.digest)[0], f"index {child.digest}", seen)


def _platform_of(source: Source, image: m.Descriptor) -> m.Platform | None:
    """What the index or the config says; None for what is not an image."""
    if image.names_platform:
        return image.platform
    what = f"manifest {image.digest}"
    config = m.decode(source.manifest(image.digest)[0], m.Manifest, what).config
    if config.media_type not in m.CONFIGS:
        return None
    check_digest(config.digest)
    return m.decode(small_blob(source, config), m.Config, f"config {config.digest}").platform
