"""Image sources: read a named image from a registry or an archive.

    name                     stored as                                        class
    [HOST/]NAME[:TAG]        a repository of a registry                       RegistrySource
    oci:PATH[:TAG]           an OCI image layout, a directory or a tar        archives.OciLayout
    docker-archive:PATH[…]   a tar that `docker save` wrote, or its files     archives.DockerArchive
    content:PATH@DIGEST      containerd's content store                       archives.OciLayout

The images of this host's dockerd and containerd get such names in `cli.local_source`.
A source returns the manifest or index of the name, further manifests by digest, and blobs by digest. It verifies
everything that it reads by digest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from gearworkers.errors import InvalidInput
from gearworkers.images import manifest as m
from gearworkers.images.archive_files import open_archive
from gearworkers.images.archives import DockerArchive, OciLayout
from gearworkers.images.layer_reader import read_all
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.settings import RegistrySettings
from gearworkers.tar.reader import Readable

OCI = "oci:"
DOCKER_ARCHIVE = "docker-archive:"
CONTENT = "content:"


class ImageSource(Protocol):
    """One named image; many threads may call its methods at once.

    All methods raise NotFound, InvalidInput, IntegrityError, Unavailable or FailedPrecondition.
    """

    def root(self) -> tuple[bytes, str]:
        """Return the manifest or index of the name, and its media type."""

    def manifest(self, digest: str) -> tuple[bytes, str]:
        """Return the manifest or index with this digest, verified, and its media type."""

    def blob(self, digest: str, size_bytes: int) -> Readable:
        """Return the bytes of a blob, which are verified as they are read."""


@dataclass(frozen=True, slots=True)
class RegistrySource:
    """An image in a registry."""

    repository: Repository
    tag_or_digest: str

    def root(self) -> tuple[bytes, str]:
        """As `ImageSource.root`."""
        return self.manifest(self.tag_or_digest)

    def manifest(self, digest: str) -> tuple[bytes, str]:
        """As `ImageSource.manifest`; takes a tag as well."""
        data, content_type = self.repository.manifest(digest)
        return data, m.media_type_of(data, content_type, f"manifest {digest} of {self.repository.name}")

    def blob(self, digest: str, size_bytes: int) -> Readable:
        """As `ImageSource.blob`."""
        return self.repository.blob(digest, size_bytes)


def open_source(settings: RegistrySettings, name: str) -> ImageSource:
    """Open the image *name*, in one of the forms above; do not connect to a registry yet.

    Raises:
        InvalidInput: The name is malformed, or the tag is missing or wrong.
        NotFound: The path does not exist.
    """
    if name.startswith(OCI):
        return OciLayout.named(*open_archive(name.removeprefix(OCI)))
    if name.startswith(DOCKER_ARCHIVE):
        return DockerArchive(*open_archive(name.removeprefix(DOCKER_ARCHIVE)))
    if name.startswith(CONTENT):
        path, _, digest = name.removeprefix(CONTENT).rpartition("@")
        return OciLayout.in_content_store(open_archive(path)[0], digest)
    reference = Reference.parse(name)
    return RegistrySource(Repository.of(settings, reference), reference.tag_or_digest)


def is_local(name: str) -> bool:
    """Return whether *name* is a path of this host, which workers elsewhere cannot read."""
    return name.startswith((OCI, DOCKER_ARCHIVE, CONTENT))


def reject_path(name: str) -> None:
    """Reject a path: a worker must not read files of its host for others.

    Raises:
        InvalidInput: *name* is a path.
    """
    if is_local(name):
        raise InvalidInput(
            f"{name[:200]}: workers read images from registries only; run `gear convert` on the host that has the path"
        )


def read_config(source: ImageSource, descriptor: m.Descriptor) -> bytes:
    """Return the contents of a config.

    Raises:
        InvalidInput: The descriptor's size is above MAX_CONFIG_BYTES.
    """
    if descriptor.size > m.MAX_CONFIG_BYTES:
        raise InvalidInput(f"config {descriptor.digest}: larger than {m.MAX_CONFIG_BYTES} bytes")
    return read_all(source.blob(descriptor.digest, descriptor.size))
