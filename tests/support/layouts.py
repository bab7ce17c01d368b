"""OCI image layouts made blob by blob, for images that `Image` cannot describe."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from gearworkers.images import manifest as m
from tests.support.images import descriptor, tar_of

OCI_LAYER = "application/vnd.oci.image.layer"
AMD64, ARM64, ARMV7 = (m.Platform.parse(f"linux/{name}") for name in ("amd64", "arm64", "arm/v7"))
CONTENT = hashlib.shake_256(b"content").digest(1000)
TAR = tar_of([("file", CONTENT)])
"""A layer with one file."""


class Layout:
    """An OCI layout that tests fill blob by blob."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "blobs" / "sha256").mkdir(parents=True)

    def put(self, data: bytes, media_type: str, **more: Any) -> m.JsonObject:
        """Store *data*; return its descriptor."""
        (self.path / "blobs" / "sha256" / hashlib.sha256(data).hexdigest()).write_bytes(data)
        return descriptor(data, media_type) | more

    def image(
        self,
        *layers: tuple[bytes, str],
        platform: m.Platform | None = AMD64,
        config: m.JsonObject | None = None,
        more: m.JsonObject | None = None,
    ) -> m.JsonObject:
        """Store an image of *layers*; return the descriptor of its manifest.

        Args:
            layers: Uncompressed tars, each with its media type.
            platform: The platform in the config; None to leave it out.
            config: Changes to the config.
            more: Changes to the manifest.
        """
        runs_on = {"os": platform.os, "architecture": platform.architecture} if platform else {}
        if platform and platform.variant:
            runs_on["variant"] = platform.variant
        rootfs = {"type": "layers", "diff_ids": [m.digest_of(tar) for tar, _ in layers]}
        whole_config = {"config": {"Cmd": ["x"]}, "rootfs": rootfs} | runs_on | (config or {})
        document = {
            "schemaVersion": 2,
            "mediaType": m.OCI_MANIFEST,
            "config": self.put(m.encode(whole_config), m.OCI_CONFIG),
            "layers": [self.put(tar, media_type) for tar, media_type in layers],
        }
        return self.put(m.encode(document | (more or {})), m.OCI_MANIFEST)

    def image_for(self, platform: m.Platform | None) -> m.JsonObject:
        """Store an image with one file, which is named after *platform*; return its descriptor."""
        return self.image((tar_of([(str(platform), b"")]), f"{OCI_LAYER}.v1.tar"), platform=platform)

    def index(self, *children: m.JsonObject, **more: Any) -> m.JsonObject:
        """Store an index of *children*; return its descriptor."""
        document = {"schemaVersion": 2, "mediaType": m.OCI_INDEX, "manifests": list(children)} | more
        return self.put(m.encode(document), m.OCI_INDEX)

    def source(self, *children: m.JsonObject) -> str:
        """Write index.json with *children*; return the layout's name."""
        document = {"schemaVersion": 2, "manifests": list(children)}
        (self.path / "index.json").write_bytes(m.encode(document))
        return f"oci:{self.path}"


def entry_for(platform: m.Platform | None, image: m.JsonObject) -> m.JsonObject:
    """Return the entry of *image* in an index, with *platform*."""
    return image | {"platform": msgspec.to_builtins(platform)}
