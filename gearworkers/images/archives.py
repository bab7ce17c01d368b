"""Images in archives: OCI image layouts, containerd's content store, and the tars that `docker save` writes.

Source: OCI image-spec v1.1, image-layout.md; Docker image specification v1.2, "Combined Image JSON + Filesystem
Changeset Format".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import msgspec

from gearworkers.errors import InvalidInput, NotFound
from gearworkers.images import manifest as m
from gearworkers.images.archive_files import ArchiveFiles, FileSlice
from gearworkers.images.layer_reader import MAGIC_BYTES, VerifiedBlob, compression_of, read_all
from gearworkers.images.reference import check_digest
from gearworkers.tar.reader import Readable

_REF_NAME = "org.opencontainers.image.ref.name"
_CONTAINERD_NAME = "io.containerd.image.name"


class OciLayout:
    """An image in an OCI layout, or in containerd's content store; an `ImageSource`."""

    def __init__(self, files: ArchiveFiles, root: m.Descriptor, index: bytes = b"") -> None:
        """
        Args:
            files: The layout.
            root: The image's manifest or index.
            index: The root's bytes, if it is not one of the layout's blobs.
        """
        self._files = files
        self._root = root
        self._index = index

    @classmethod
    def named(cls, files: ArchiveFiles, tag: str) -> OciLayout:
        """Return an image of a layout.

        Several manifests of one name for different platforms are one image: its root is an index of them.

        Args:
            files: The layout.
            tag: Name or tag of the image; empty if the layout holds only one.

        Raises:
            InvalidInput: The layout is malformed, or the tag names no image or several.
        """
        data = _read_small(files.open("index.json"), m.MAX_MANIFEST_BYTES)
        descriptors = m.decode_index(data, f"{files.path}: index.json").manifests
        names = [_names_in_layout(descriptor) for descriptor in descriptors]
        matches = _matching(names, tag)
        if not _are_platforms_of_one_image(matches, descriptors, names):
            return cls(files, descriptors[_choose(names, tag, files.path)])
        documents = msgspec.json.decode(data)["manifests"]
        index = m.encode(
            {"schemaVersion": 2, "mediaType": m.OCI_INDEX, "manifests": [documents[position] for position in matches]}
        )
        return cls(files, m.Descriptor(m.OCI_INDEX, m.digest_of(index), len(index)), index)

    @classmethod
    def in_content_store(cls, files: ArchiveFiles, digest: str) -> OciLayout:
        """Return an image in containerd's content store, which is a layout without an index.json.

        Args:
            files: The store.
            digest: Of the manifest or index.

        Raises:
            NotFound: The store does not have it.
            InvalidInput: The digest or the document is malformed.
        """
        data = _read_small(files.open(_blob_path(digest)), m.MAX_MANIFEST_BYTES)
        is_index = bool(m.decode(data, m.ImageIndex, f"manifest {digest}").manifests)
        return cls(files, m.Descriptor(m.OCI_INDEX if is_index else m.OCI_MANIFEST, digest, len(data)))

    def root(self) -> tuple[bytes, str]:
        """As `ImageSource.root`."""
        return self.manifest(self._root.digest)

    def manifest(self, digest: str) -> tuple[bytes, str]:
        """As `ImageSource.manifest`."""
        is_root = digest == self._root.digest
        data = self._index if is_root and self._index else _read_small(self._open(digest), m.MAX_MANIFEST_BYTES)
        label = f"manifest {digest} of {self._files.path}"
        declared_type = self._root.media_type if is_root else ""
        return m.verified(data, digest, label), m.media_type_of(data, declared_type or m.OCI_MANIFEST, label)

    def blob(self, digest: str, size_bytes: int) -> Readable:
        """As `ImageSource.blob`."""
        return VerifiedBlob(self._open(digest), digest, size_bytes)

    def _open(self, digest: str) -> FileSlice:
        return self._files.open(_blob_path(digest))


class DockerArchive:
    """An image in a tar that `docker save` wrote; an `ImageSource`. Its manifest is generated."""

    def __init__(self, files: ArchiveFiles, tag: str) -> None:
        """
        Args:
            files: The archive.
            tag: Name or tag of the image; empty if the archive holds only one.

        Raises:
            InvalidInput: The archive is malformed, or the tag names no image or several.
        """
        self._files = files
        data = _read_small(files.open("manifest.json"), m.MAX_MANIFEST_BYTES)
        images = m.decode(data, list[_SavedImage], f"{files.path}: manifest.json")
        saved = images[_choose([image.tags or () for image in images], tag, files.path)]
        config = _read_small(files.open(saved.config), m.MAX_CONFIG_BYTES)
        self._names = {m.digest_of(config): saved.config}
        """The file of each blob, by digest."""
        self._manifest = self._make_manifest(config, saved)

    def root(self) -> tuple[bytes, str]:
        """As `ImageSource.root`."""
        return self._manifest, m.DOCKER_MANIFEST

    def manifest(self, digest: str) -> tuple[bytes, str]:
        """As `ImageSource.manifest`; there is only one."""
        return m.verified(self._manifest, digest, f"manifest of {self._files.path}"), m.DOCKER_MANIFEST

    def blob(self, digest: str, size_bytes: int) -> Readable:
        """As `ImageSource.blob`."""
        if digest not in self._names:
            raise NotFound(f"{self._files.path}: no blob {digest}")
        return VerifiedBlob(self._files.open(self._names[digest]), digest, size_bytes)

    def _make_manifest(self, config: bytes, saved: _SavedImage) -> bytes:
        label = f"{self._files.path}: {saved.config}"
        diff_ids = m.decode(config, m.Config, label).rootfs.diff_ids
        if len(diff_ids) != len(saved.layers):
            raise InvalidInput(f"{label}: {len(diff_ids)} layers, but manifest.json has {len(saved.layers)}")
        layers = [self._layer(name, diff_id) for name, diff_id in zip(saved.layers, diff_ids, strict=True)]
        head = {"mediaType": m.DOCKER_CONFIG, "size": len(config), "digest": m.digest_of(config)}
        return m.encode({"schemaVersion": 2, "mediaType": m.DOCKER_MANIFEST, "config": head, "layers": layers})

    def _layer(self, name: str, diff_id: str) -> m.JsonObject:
        """Return the descriptor of a layer.

        Docker writes plain tars, whose digest is the diff ID. Layers that other programs compressed are hashed.
        """
        size_bytes = self._files.open(name).size_bytes
        digest, media_type = check_digest(diff_id), m.DOCKER_LAYER
        head = memoryview(bytearray(MAGIC_BYTES))
        compressed_type = m.DOCKER_LAYERS.get(compression_of(bytes(head[: self._files.open(name).readinto(head)])))
        if compressed_type is not None:
            digest, media_type = _digest_of_file(self._files.open(name)), compressed_type
        self._names[digest] = name
        return {"mediaType": media_type, "size": size_bytes, "digest": digest}


class _SavedImage(msgspec.Struct, frozen=True):
    config: str = msgspec.field(name="Config")
    layers: tuple[str, ...] = msgspec.field(name="Layers", default=())
    tags: tuple[str, ...] | None = msgspec.field(name="RepoTags", default=None)


def _blob_path(digest: str) -> str:
    return f"blobs/sha256/{check_digest(digest).removeprefix('sha256:')}"


def _read_small(file: FileSlice, limit_bytes: int) -> bytes:
    if file.size_bytes > limit_bytes:
        raise InvalidInput(
            f"a JSON file of the image archive has {file.size_bytes} bytes; the limit is {limit_bytes} bytes"
        )
    return read_all(file)


def _digest_of_file(file: FileSlice) -> str:
    hasher = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    while count := file.readinto(buffer):
        hasher.update(buffer[:count])
    return f"sha256:{hasher.hexdigest()}"


def _names_in_layout(descriptor: m.Descriptor) -> tuple[str, ...]:
    annotations = descriptor.annotations or {}
    return tuple(annotations[key] for key in (_REF_NAME, _CONTAINERD_NAME) if key in annotations)


def _choose(names: Sequence[Sequence[str]], tag: str, path: Path) -> int:
    """Return the position of the image with this name or tag; if *tag* is empty, of the only image."""
    matches = _matching(names, tag)
    if len(matches) == 1:
        return matches[0]
    shown = ", ".join(name for known in names for name in known) or "without names"
    problem = f"{len(matches)} of them match {tag}" if tag else "choose one with PATH:TAG"
    raise InvalidInput(f"{path} holds {len(names)} images ({shown}); {problem}")


def _matching(names: Sequence[Sequence[str]], tag: str) -> list[int]:
    """Return the positions of the images with this name or tag; if *tag* is empty, of all images."""
    return [position for position, known in enumerate(names) if not tag or any(_matches(name, tag) for name in known)]


def _matches(name: str, tag: str) -> bool:
    return tag in (name, name.rpartition(":")[2])


def _are_platforms_of_one_image(
    matches: Sequence[int], descriptors: Sequence[m.Descriptor], names: Sequence[Sequence[str]]
) -> bool:
    """Return whether *matches* are several manifests with equal names, or none, for different platforms."""
    platforms = {descriptors[position].platform for position in matches}
    return len({tuple(names[position]) for position in matches}) == 1 < len(matches) == len(platforms)
