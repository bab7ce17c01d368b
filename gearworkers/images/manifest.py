"""Manifests, indexes and configs of images: their media types, and the fields that gearworkers reads.

Source: OCI image-spec v1.1 (descriptor.md, manifest.md, image-index.md, config.md); Docker image manifest version 2,
schema 2.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec

from gearworkers.errors import IntegrityError, InvalidInput
from gearworkers.images.reference import check_digest
from gearworkers.util.architecture import go_architecture

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"
DOCKER_LAYERS = {"gzip": DOCKER_LAYER_GZIP, "zstd": DOCKER_LAYER_ZSTD}
"""Media types by compression."""

MANIFESTS = frozenset((OCI_MANIFEST, DOCKER_MANIFEST))
INDEXES = frozenset((OCI_INDEX, DOCKER_INDEX))
CONFIGS = frozenset((OCI_CONFIG, DOCKER_CONFIG))
LAYERS = frozenset(
    f"application/vnd.{kind}{suffix}"
    for kind, suffixes in {
        "oci.image.layer.v1.tar": ("", "+gzip", "+zstd"),
        "oci.image.layer.nondistributable.v1.tar": ("", "+gzip", "+zstd"),
        "docker.image.rootfs.diff.tar": ("", ".gzip", ".zstd"),
        "docker.image.rootfs.foreign.diff.tar": ("", ".gzip", ".zstd"),
    }.items()
    for suffix in suffixes
)
"""Media types of layers. "Foreign" layers, which registries are asked not to store, are included: a Gear layer holds
none of their contents."""

GEAR_LABEL = "io.gearworkers.image"
"""Label of a Gear image's config, and annotation of its OCI manifest, with the value "1"."""

MAX_MANIFEST_BYTES = 4 << 20
MAX_CONFIG_BYTES = 16 << 20

_ATTESTATION = "vnd.docker.reference.type"
_ENCRYPTED = "+encrypted"
_CONTENT_KEYS = frozenset(("data", "urls"))
_DEFAULT_VARIANTS = {"arm64": "v8", "arm": "v7", "amd64": "v1"}
"""Variants that containerd assumes for an image without one."""

JsonObject = dict[str, Any]
_T = TypeVar("_T")


class Platform(msgspec.Struct, frozen=True, omit_defaults=True):
    """An operating system and an architecture that an image runs on."""

    architecture: str = ""
    os: str = ""
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read ``OS/ARCHITECTURE[/VARIANT]``.

        Raises:
            InvalidInput: The text has another form.
        """
        os, *rest = text.split("/")
        if not os or len(rest) not in (1, 2) or not all(rest):
            raise InvalidInput(f"{text!r} is not a platform; give OS/ARCHITECTURE[/VARIANT], such as linux/arm64")
        return cls(rest[0], os, rest[1] if len(rest) == 2 else "")

    @classmethod
    def here(cls) -> Platform:
        """Return this machine's platform, for Linux images."""
        return cls(go_architecture(), "linux")

    def runs(self, other: Platform) -> bool:
        """Return whether an image for *other* runs on this platform.

        Without a variant this platform runs all variants; without one *other* has the architecture's default.
        """
        variant = other.variant or _DEFAULT_VARIANTS.get(other.architecture, "")
        return (self.os, self.architecture) == (other.os, other.architecture) and self.variant in ("", variant)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


_UNKNOWN = Platform("unknown", "unknown")


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """The type, digest and size of a blob or a manifest."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] | None = None

    @property
    def is_image(self) -> bool:
        """Whether it describes an image, and not a manifest about another one, such as BuildKit's provenance."""
        is_about_another = _ATTESTATION in (self.annotations or {}) or self.platform == _UNKNOWN
        return self.media_type in MANIFESTS and not is_about_another

    @property
    def names_platform(self) -> bool:
        """Whether it includes the image's platform."""
        return self.platform is not None and bool(self.platform.os and self.platform.architecture)


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """One image."""

    config: Descriptor
    layers: tuple[Descriptor, ...] = ()


class ImageIndex(msgspec.Struct, frozen=True, rename="camel"):
    """The manifests of a multi-platform image."""

    manifests: tuple[Descriptor, ...] = ()


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: tuple[str, ...] = ()


class RunConfig(msgspec.Struct, frozen=True):
    """The labels in a config's ``config``, and in dockerd's ``Config``."""

    labels: dict[str, str] | None = msgspec.field(name="Labels", default=None)

    @property
    def is_gear(self) -> bool:
        """Whether the image is marked as a Gear image."""
        return (self.labels or {}).get(GEAR_LABEL) == "1"


class Config(msgspec.Struct, frozen=True):
    """The fields of an image's config that gearworkers reads."""

    rootfs: _RootFs = _RootFs()
    config: RunConfig | None = None
    architecture: str = ""
    os: str = ""
    variant: str = ""

    @property
    def platform(self) -> Platform:
        """The platform that the image runs on."""
        return Platform(self.architecture, self.os, self.variant)

    @property
    def is_gear(self) -> bool:
        """Whether the image is marked as a Gear image."""
        return self.config is not None and self.config.is_gear


class _Run(msgspec.Struct, frozen=True):
    entrypoint: tuple[str, ...] = msgspec.field(name="Entrypoint", default=())
    cmd: tuple[str, ...] = msgspec.field(name="Cmd", default=())


class _Runnable(msgspec.Struct, frozen=True):
    config: _Run = _Run()


class _Typed(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str = ""
    schema_version: int = 2


def decode(data: bytes, of: type[_T], label: str) -> _T:
    """Decode JSON *data* as the struct *of*. A null counts as a missing value, as in Go.

    Raises:
        InvalidInput: The data are not JSON, or do not match *of*; the message begins with *label*.
    """
    try:
        return msgspec.convert(_without_nulls(msgspec.json.decode(data)), of)
    except (ValueError, RecursionError) as exc:
        raise InvalidInput(f"{label}: {exc}") from exc


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def encode(document: JsonObject) -> bytes:
    """Encode *document* as compact JSON; the same document always gives the same bytes."""
    return msgspec.json.encode(document)


def decode_index(data: bytes, label: str) -> ImageIndex:
    """Decode an index; check the form of each digest in it.

    Raises:
        InvalidInput: The data are not an index; the message begins with *label*.
    """
    found = decode(data, ImageIndex, label)
    for child in found.manifests:
        check_digest(child.digest)
    return found


def decode_manifest(data: bytes, label: str) -> Manifest:
    """Decode a manifest with tars as layers; check the form of each digest in it.

    Raises:
        InvalidInput: The data are not a manifest, or a layer has another type; the message begins with *label*.
    """
    found = decode(data, Manifest, label)
    for blob in (found.config, *found.layers):
        check_digest(blob.digest)
        if blob.size < 0:
            raise InvalidInput(f"{label}: the size of {blob.digest} is negative")
    for layer in found.layers:
        if layer.media_type.endswith(_ENCRYPTED):
            raise InvalidInput(f"{label}: layer {layer.digest} is encrypted; decrypt the image first")
        if layer.media_type not in LAYERS:
            raise InvalidInput(
                f"{label}: layer {layer.digest} has the type {layer.media_type!r}; only tars can be converted, "
                "uncompressed or with gzip or zstd"
            )
    return found


def decode_config(data: bytes, manifest: Manifest, label: str) -> Config:
    """Decode the config of *manifest*.

    Raises:
        InvalidInput: The data are not a config, or have another number of layers than the manifest.
    """
    found = decode(data, Config, label)
    for diff_id in found.rootfs.diff_ids:
        check_digest(diff_id)
    if len(found.rootfs.diff_ids) != len(manifest.layers):
        raise InvalidInput(
            f"{label}: the config has {len(found.rootfs.diff_ids)} layers, but the manifest has {len(manifest.layers)}"
        )
    return found


def decode_command(data: bytes, label: str) -> tuple[str, ...]:
    """Return entrypoint and command from a config.

    Raises:
        InvalidInput: The data are not a config; the message begins with *label*.
    """
    run = decode(data, _Runnable, label).config
    return run.entrypoint + run.cmd


def media_type_of(data: bytes, declared: str, label: str) -> str:
    """Return the media type of a manifest or index: its own ``mediaType``, else the *declared* one.

    Raises:
        InvalidInput: The type is not supported, such as Docker's schema 1.
    """
    typed = decode(data, _Typed, label)
    media_type = typed.media_type or declared.partition(";")[0].strip()
    if typed.schema_version != 2 or media_type not in MANIFESTS | INDEXES:
        raise InvalidInput(
            f"{label}: manifests of type {media_type!r}, version {typed.schema_version}, are not supported"
        )
    return media_type


def with_digest_of(descriptor: JsonObject, data: bytes) -> JsonObject:
    """Return *descriptor* with the digest and size of *data*, without its embedded data and URLs."""
    kept = {key: value for key, value in descriptor.items() if key not in _CONTENT_KEYS}
    return kept | {"digest": digest_of(data), "size": len(data)}


def digest_of(data: bytes) -> str:
    """Return the digest of *data*, ``sha256:…``."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def chain_id(diff_ids: Sequence[str]) -> str:
    """Return the chain ID of the topmost of some layers, the lowest first; empty without layers.

    Source: OCI image-spec v1.1, config.md, "Layer ChainID".
    """
    chain = ""
    for diff_id in diff_ids:
        chain = digest_of(f"{chain} {diff_id}".encode()) if chain else diff_id
    return chain


def verified(data: bytes, digest: str, label: str) -> bytes:
    """Return *data* if its digest is *digest*.

    Raises:
        IntegrityError: The data have another digest.
    """
    found = digest_of(data)
    if found != digest:
        raise IntegrityError(f"{label}: received {len(data)} bytes with digest {found} instead of {digest}")
    return data
