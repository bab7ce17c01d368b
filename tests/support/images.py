"""Images for tests, pushed to a registry or written as archives; and images pulled back."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from gearworkers.images import manifest as m
from gearworkers.images.layer_reader import read_all, unpacked
from gearworkers.images.registry import Repository
from gearworkers.remote.remote import Remote
from gearworkers.tar.entry import TarEntry
from tests.support.tars import Trickle, read_tar

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "zstd": zstandard.compress,
}

Member = tuple[str, bytes] | tarfile.TarInfo


def tar_of(members: Iterable[Member]) -> bytes:
    """Return a PAX tar; a pair is a regular file."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                tar.addfile(info, io.BytesIO(member[1]))
    return file.getvalue()


@dataclass(frozen=True)
class Image:
    """An image: the tars of its layers, their compression and the config."""

    tars: Sequence[bytes]
    compression: str = "gzip"
    oci: bool = False
    architecture: str = "amd64"
    labels: dict[str, str] | None = None
    command: tuple[str, ...] = ("true",)
    history: tuple[dict[str, Any], ...] = ({"created_by": "tests"},)
    blobs: dict[str, bytes] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for data in (*(COMPRESS[self.compression](tar) for tar in self.tars), self.config, self.manifest):
            self.blobs[m.digest_of(data)] = data

    @property
    def config(self) -> bytes:
        """The bytes of the config."""
        document = {
            "architecture": self.architecture,
            "os": "linux",
            "config": {"Cmd": list(self.command), "Labels": self.labels},
            "history": list(self.history),
            "rootfs": {"type": "layers", "diff_ids": [m.digest_of(tar) for tar in self.tars]},
        }
        return m.encode(document)

    @property
    def media_type(self) -> str:
        """The media type of the manifest."""
        return m.OCI_MANIFEST if self.oci else m.DOCKER_MANIFEST

    @property
    def manifest(self) -> bytes:
        """The bytes of the manifest."""
        layers = [COMPRESS[self.compression](tar) for tar in self.tars]
        kind = "application/vnd.oci.image.layer.v1.tar" if self.oci else m.DOCKER_LAYER
        suffix = {"": "", "gzip": "+gzip", "zstd": "+zstd"}[self.compression]
        kind += suffix if self.oci else suffix.replace("+", ".")
        config_type = m.OCI_CONFIG if self.oci else m.DOCKER_CONFIG
        document = {
            "schemaVersion": 2,
            "mediaType": self.media_type,
            "config": descriptor(self.config, config_type),
            "layers": [descriptor(layer, kind) for layer in layers],
        }
        return m.encode(document)

    def push(self, target: Repository, version: str = "") -> str:
        """Push blobs and manifest; return the manifest's digest."""
        for digest, data in self.blobs.items():
            if data != self.manifest:
                target.put_blob(digest, io.BytesIO(data), len(data))
        return target.put_manifest(version or m.digest_of(self.manifest), self.media_type, self.manifest)

    def write_layout(self, directory: Path, names: Sequence[str] = ()) -> None:
        """Write an OCI layout that has the image under each of *names*, or once without a name."""
        (directory / "blobs" / "sha256").mkdir(parents=True)
        for digest, data in self.blobs.items():
            (directory / "blobs" / "sha256" / digest.removeprefix("sha256:")).write_bytes(data)
        named = [{"annotations": {"org.opencontainers.image.ref.name": name}} for name in names] or [{}]
        found = [descriptor(self.manifest, self.media_type) | more for more in named]
        (directory / "index.json").write_bytes(m.encode({"schemaVersion": 2, "manifests": found}))

    def saved(self, *tags: str) -> bytes:
        """Return an archive like that of `docker save`, with compressed layers."""
        layers = [(f"{at}/layer.tar", COMPRESS[self.compression](tar)) for at, tar in enumerate(self.tars)]
        document = [{"Config": "config.json", "RepoTags": list(tags) or None, "Layers": [name for name, _ in layers]}]
        return tar_of([*layers, ("config.json", self.config), ("manifest.json", m.encode(document))])  # type: ignore[arg-type]  # a list of one document


def descriptor(data: bytes, media_type: str) -> dict[str, Any]:
    """Return the descriptor of *data*."""
    return {"mediaType": media_type, "digest": m.digest_of(data), "size": len(data)}


def push_index(target: Repository, version: str, images: Sequence[Image], attestations: Sequence[Image] = ()) -> bytes:
    """Push an OCI index of *images* by architecture; return its bytes."""
    children = []
    for image in images:
        image.push(target)
        platform = {"architecture": image.architecture, "os": "linux"}
        children.append(descriptor(image.manifest, image.media_type) | {"platform": platform})
    for image in attestations:
        image.push(target)
        annotations = {"vnd.docker.reference.type": "attestation-manifest"}
        unknown = {"architecture": "unknown", "os": "unknown"}
        children.append(
            descriptor(image.manifest, image.media_type) | {"platform": unknown, "annotations": annotations}
        )
    data = m.encode({"schemaVersion": 2, "mediaType": m.OCI_INDEX, "manifests": children, "annotations": {"a": "b"}})
    target.put_manifest(version, m.OCI_INDEX, data)
    return data


@dataclass(frozen=True)
class Pulled:
    """An image from a registry, with every digest checked."""

    manifest: dict[str, Any]
    config: dict[str, Any]
    tars: list[bytes]


def pull(source: Repository, version: str) -> Pulled:
    """Pull an image of one platform."""
    data, _ = source.manifest(version)
    manifest = msgspec.json.decode(data)
    config = msgspec.json.decode(_blob(source, manifest["config"]))
    tars = []
    for layer, diff_id in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
        with unpacked(Trickle(_blob(source, layer), 1 << 20), diff_id) as tar:
            tars.append(read_all(tar))
    return Pulled(manifest, config, tars)


def contents_of(tar: bytes, remote: Remote | None = None) -> list[tuple[TarEntry, bytes]]:
    """Return the entries of a tar with their contents; contents that a Gear layer names come from *remote*."""
    entries = []
    for entry, content in read_tar(tar).files:
        if entry.gear is not None:
            assert remote is not None and not content
            content = b"".join(remote.fetch(entry.gear[0]))
            assert len(content) == entry.gear[1]
        entry.gear, entry.stored_bytes, entry.header_offset, entry.sparse = None, 0, 0, None
        entries.append((entry, content))
    return entries


def _blob(source: Repository, blob: dict[str, Any]) -> bytes:
    return read_all(source.blob(blob["digest"], blob["size"]))
