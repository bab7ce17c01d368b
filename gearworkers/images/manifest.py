"""Manifests, indexes and configs: what of them is read, and which types there are.

Source: OCI image-spec v1.1 (descriptor.md, manifest.md, image-index.md, config.md); Docker image manifest version 2,
schema 2.
"""

from __future__ import annotations

import hashlib
import platform
from typing import Any, TypeVar

import msgspec

from gearworkers.errors import IntegrityError, InvalidInput
from gearworkers.images.reference import check_digest

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
"""By their compression."""

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
"""Those that registries are asked not to hold ("foreign") among them: a Gear layer has none of their contents."""

GEAR_MARK = "io.gearworkers.image"
"""Label of a Gear image's config, and annotation of its OCI manifest; its value is "1"."""

MAX_MANIFEST_BYTES = 4 << 20
MAX_CONFIG_BYTES = 16 << 20

_ATTESTATION = "vnd.docker.reference.type"
_ENCRYPTED = "+encrypted"
_OF_OLD_BYTES = frozenset(("data", "urls"))
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386", "loongarch64": "loong64"}
_USUAL_VARIANTS = {"arm64": "v8", "arm": "v7", "amd64": "v1"}
"""As containerd takes an image that says none."""

Document = dict[str, Any]
_T = TypeVar("_T")


class Platform(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an image runs on."""

    architecture: str = ""
    os: str = ""
    variant: str = ""

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Read ``OS/ARCHITECTURE[/VARIANT]``.

        Raises:
            InvalidInput: It is not of that form.
        """
        os, *rest = text.split("/")
        if not os or len(rest) not in (1, 2) or not all(rest):
            raise InvalidInput(f"{text!r} is no platform: OS/ARCHITECTURE[/VARIANT], as linux/arm64")
        return cls(rest[0], os, rest[1] if len(rest) == 2 else "")

    @classmethod
    def here(cls) -> Platform:
        """This machine's, for Linux images."""
        machine = platform.machine()
        return cls(_MACHINES.get(machine, machine), "linux")

    def runs(self, other: Platform) -> bool:
        """Whether an image for *other* is one for this; no variant stands for any here, and for the usual one there."""
        variant = other.variant or _USUAL_VARIANTS.get(other.architecture, "")
        return (self.os, self.architecture) == (other.os, other.architecture) and self.variant in ("", variant)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.architecture, self.variant) if part)


_UNKNOWN = Platform("unknown", "unknown")


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """What names a blob or a manifest."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] | None = None

    @property
    def is_image(self) -> bool:
        """Whether it names a manifest that is not said to be about another one, as BuildKit's provenance is."""
        about_another = _ATTESTATION in (self.annotations or {}) or self.platform == _UNKNOWN
        return self.media_type in MANIFESTS and not about_another

    @property
    def names_platform(self) -> bool:
        """Whether it says what the image runs on."""
        return self.platform is not None and bool(self.platform.os and self.platform.architecture)


class Manifest(msgspec.Struct, frozen=True, rename="camel"):
    """One image."""

    config: Descriptor
    layers: tuple[Descriptor, ...] = ()


class Index(msgspec.Struct, frozen=True, rename="camel"):
    """Manifests of one name, by platform."""

    manifests: tuple[Descriptor, ...] = ()


class _RootFs(msgspec.Struct, frozen=True):
    diff_ids: tuple[str, ...] = ()


class RunConfig(msgspec.Struct, frozen=True):
    """What of a config's ``config``, or of dockerd's ``Config``, is needed here."""

    labels: dict[str, str] | None = msgspec.field(name="Labels", default=None)

    @property
    def is_gear(self) -> bool:
        """Whether the image says that it is a Gear image."""
        return (self.labels or {}).get(GEAR_MARK) == "1"


class Config(msgspec.Struct, frozen=True):
    """What of an image's config is needed here."""

    rootfs: _RootFs = _RootFs()
    config: RunConfig | None = None
    architecture: str = ""
    os: str = ""
    variant: str = ""

    @property
    def platform(self) -> Platform:
        """What the image runs on."""
        return Platform(self.architecture, self.os, self.variant)

    @property
    def is_gear(self) -> bool:
        """Whether the image says that it is a Gear image."""
        return self.config is not None and self.config.is_gear


class _Typed(msgspec.Struct, frozen=True, rename="camel"):
    media_type: str = ""
    schema_version: int = 2


def decode(data: bytes, of: type[_T], what: str) -> _T:
    """*data* as JSON of the struct *of*; a null is what Go, which wrote most, takes it for: a value not given.

    Raises:
        InvalidInput: It is not JSON, or not of that shape; the message begins with *what*.
    """
    try:
        return msgspec.convert(_without_nulls(msgspec.json.decode(data)), of)
    except (ValueError, RecursionError) as exc:
        raise InvalidInput(f"{what}: {exc}") from exc


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def encode(document: Document) -> bytes:
    """*document* as compact JSON; the same document always gives the same bytes."""
    return msgspec.json.encode(document)


def decode_index(data: bytes, what: str) -> Index:
    """An index, each digest in it checked for its form.

    Raises:
        InvalidInput: It is none.
    """
    found = decode(data, Index, what)
    for child in found.manifests:
        check_digest(child.digest)
    return found


def decode_manifest(data: bytes, what: str) -> Manifest:
    """A manifest whose layers are tars; each digest in it checked for its form.

    Raises:
        InvalidInput: It is none, or a layer is of another kind.
    """
    found = decode(data, Manifest, what)
    for blob in (found.config, *found.layers):
        check_digest(blob.digest)
        if blob.size < 0:
            raise InvalidInput(f"{what}: the size of {blob.digest} is negative")
    for layer in found.layers:
        if layer.media_type.endswith(_ENCRYPTED):
            raise InvalidInput(f"{what}: layer {layer.digest} is encrypted; decrypt the image first")
        if layer.media_type not in LAYERS:
            raise InvalidInput(
                f"{what}: layer {layer.digest} is {layer.media_type!r}; a layer is a tar, plain, gzip or zstd"
            )
    return found


def decode_config(data: bytes, manifest: Manifest, what: str) -> Config:
    """The config of *manifest*.

    Raises:
        InvalidInput: It is none, or has another number of layers than the manifest.
    """
    found = decode(data, Config, what)
    for diff_id in found.rootfs.diff_ids:
        check_digest(diff_id)
    if len(found.rootfs.diff_ids) != len(manifest.layers):
        raise InvalidInput(
            f"{what}: the config knows {len(found.rootfs.diff_ids)} layers, the manifest {len(manifest.layers)}"
        )
    return found


def media_type_of(data: bytes, told: str, what: str) -> str:
    """The kind of manifest that *data* is: what it says itself, else what was told of it.

    Raises:
        InvalidInput: It is none that this version reads, as Docker's schema 1.
    """
    typed = decode(data, _Typed, what)
    media_type = typed.media_type or told.partition(";")[0].strip()
    if typed.schema_version != 2 or media_type not in MANIFESTS | INDEXES:
        raise InvalidInput(f"{what}: a manifest of type {media_type!r}, version {typed.schema_version}, is not read")
    return media_type


def renamed(descriptor: Document, data: bytes) -> Document:
    """*descriptor* for *data*, which takes the place of what it named."""
    kept = {key: value for key, value in descriptor.items() if key not in _OF_OLD_BYTES}
    return kept | {"digest": digest_of(data), "size": len(data)}


def digest_of(data: bytes) -> str:
    """``sha256:…`` of *data*."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def verified(data: bytes, digest: str, what: str) -> bytes:
    """*data* if its digest is *digest*.

    Raises:
        IntegrityError: It is another.
    """
    found = digest_of(data)
    if found != digest:
        raise IntegrityError(f"{what}: {digest} was asked for, and {len(data)} bytes of {found} came")
    return data
