"""The blobs of an image in containerd's content store."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from gearworkers.containerd.client import connected
from gearworkers.errors import InvalidInput, NotFound
from gearworkers.images.manifest import MAX_MANIFEST_BYTES, decode_command, decode_manifest
from gearworkers.util.fs import read_small
from plugin_gateway.containerd.content_root import ContentRoot

_DIGEST = re.compile(r"(sha256|sha384|sha512):([0-9a-f]{64,128})")
_LAYER_LABEL = "containerd.io/gc.ref.content.l"
"""containerd labels a manifest's blob with the digest of each layer, by its number."""


class ImageBlob(NamedTuple):
    """A layer of an image as containerd stores it."""

    digest: str
    size_bytes: int
    path: Path
    """The file does not exist while the blob is downloaded."""


class ImageBlobs:
    """Finds the layers of an image through one of them.

    Args:
        address: containerd's socket.
        content_root: Finds the content directory.
    """

    def __init__(self, address: Path, content_root: ContentRoot) -> None:
        self._address = address
        self._content_root = content_root

    def path(self, digest: str) -> Path:
        """Return the path of a blob.

        Raises:
            Unavailable: containerd does not answer.
            InvalidInput: The digest is malformed.
        """
        parsed = _DIGEST.fullmatch(digest)
        if parsed is None:
            raise InvalidInput(f"blob digest {digest!r} is not valid")
        return self._content_root.get() / "blobs" / parsed[1] / parsed[2]

    def command(self, manifest: str) -> tuple[str, ...]:
        """Return entrypoint and command of the image with this manifest, given by digest.

        Raises:
            GearError: containerd does not answer, or manifest or config are missing or malformed.
        """
        config = decode_manifest(self._read(manifest), f"manifest {manifest}").config.digest
        return decode_command(self._read(config), f"config {config}")

    def _read(self, digest: str) -> bytes:
        return read_small(self.path(digest), MAX_MANIFEST_BYTES)

    def of_image(self, digest: str, position: int, namespace: str) -> list[ImageBlob]:
        """Return the image's layers from *digest* to the topmost.

        Args:
            digest: A layer's digest.
            position: The number of layers below it.
            namespace: containerd's.

        Raises:
            NotFound: No manifest in the content store has this layer at this position.
            GearError: containerd does not answer, or the manifest is malformed.
        """
        with connected(self._address, namespace) as client:
            for manifest in client.list_content(f'labels."{_LAYER_LABEL}.{position}"=={digest}'):
                layers = decode_manifest(self._read(manifest), f"manifest {manifest}").layers[position:]
                return [ImageBlob(layer.digest, layer.size, self.path(layer.digest)) for layer in layers]
        raise NotFound(f"no manifest has layer {digest}")
