"""Finish a conversion: push the Gear image's config, manifest, index and tag, if it has a target.

The documents keep all fields of the source's, except digests, sizes and diff IDs, and add the label of a Gear image.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from gearworkers.images import manifest as m
from gearworkers.images.layer_records import ConvertedLayer
from gearworkers.images.plan import ConversionPlan, ImagePlan
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.images.source import ImageSource, open_source, read_config
from gearworkers.settings import RegistrySettings


class ConversionReport(msgspec.Struct, frozen=True):
    """The result of a conversion; the sums are over the distinct layers."""

    target: str
    """Name of the Gear image; empty if the source was indexed only."""
    digest: str
    """Digest of the Gear image, or of the indexed one."""
    bytes_before: int
    converted: list[ConvertedLayer]
    """The distinct layers."""

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.converted)

    @property
    def reused_layers(self) -> int:
        """Number of layers that an earlier conversion produced."""
        return sum(layer.reused for layer in self.converted)

    @property
    def private_layers(self) -> int:
        """Number of layers that were left or copied unchanged."""
        return sum(layer.private for layer in self.converted)

    @property
    def bytes_after(self) -> int:
        """Size of all layers, compressed."""
        return sum(layer.size_bytes for layer in self.converted)

    @property
    def objects(self) -> int:
        """Number of contents."""
        return sum(layer.objects for layer in self.converted)

    @property
    def object_bytes(self) -> int:
        """Size of all contents."""
        return sum(layer.object_bytes for layer in self.converted)

    @property
    def new_objects(self) -> int:
        """Number of contents that the remote lacked."""
        return sum(layer.new_objects for layer in self.converted)

    @property
    def new_bytes(self) -> int:
        """Size of the contents that the remote lacked."""
        return sum(layer.new_bytes for layer in self.converted)


def finish_conversion(
    settings: RegistrySettings, plan: ConversionPlan, layers: Iterable[ConvertedLayer]
) -> ConversionReport:
    """Push config and manifest of each image, then the index; the tag is pushed last. Idempotent.

    Args:
        settings: Credentials and proxy.
        plan: The plan whose layers were converted.
        layers: The results of `plan.jobs()`, in any order.

    Raises:
        GearError: As `convert.convert_layer`.

    Crash: leaves blobs and manifests that no tag names; the registry's garbage collection removes them.
    """
    converted = {layer.source_digest: layer for layer in layers}
    digest = _push(settings, plan, converted) if plan.target else plan.digest
    return ConversionReport(plan.target, digest, sum(job.size_bytes for job in plan.jobs()), list(converted.values()))


def _push(settings: RegistrySettings, plan: ConversionPlan, converted: Mapping[str, ConvertedLayer]) -> str:
    """Push the Gear image; return its digest."""
    target = Reference.parse(plan.target)
    repository = Repository.of(settings, target)
    source = open_source(settings, plan.source)
    pushed = [_push_image(source, repository, image, converted) for image in plan.images]
    data, media_type = _gear_index(source, plan, pushed) if plan.is_index else pushed[0]
    return repository.put_manifest(target.tag_or_digest, media_type, data)


def _push_image(
    source: ImageSource, repository: Repository, plan: ImagePlan, converted: Mapping[str, ConvertedLayer]
) -> tuple[bytes, str]:
    """Push config and manifest of one image by their digests; return the manifest and its type."""
    data, _ = source.manifest(plan.manifest)
    manifest = m.decode_manifest(data, f"manifest {plan.manifest}")
    layers = [converted[job.digest] for job in plan.layers]
    config = _gear_config(read_config(source, manifest.config), layers)
    repository.put_blob(m.digest_of(config), io.BytesIO(config), len(config))
    gear_manifest = _gear_manifest(msgspec.json.decode(data), plan.media_type, config, layers)
    repository.put_manifest(m.digest_of(gear_manifest), plan.media_type, gear_manifest)
    return gear_manifest, plan.media_type


def _gear_config(data: bytes, layers: list[ConvertedLayer]) -> bytes:
    """Return the config *data* with the Gear layers' diff IDs and the label; keep the rest, such as the history."""
    document: m.JsonObject = msgspec.json.decode(data)
    diff_ids = [layer.diff_id for layer in layers]
    document["rootfs"] = {"type": "layers"} | (document.get("rootfs") or {}) | {"diff_ids": diff_ids}
    run_config: dict[str, Any] = document.get("config") or {}
    run_config["Labels"] = {**(run_config.get("Labels") or {}), **_mark(layers)}
    document["config"] = run_config
    return m.encode(document)


def _mark(layers: Iterable[ConvertedLayer]) -> dict[str, str]:
    """Return the label that marks a Gear image; empty if all of its layers are private."""
    return {} if all(layer.private for layer in layers) else {m.GEAR_LABEL: "1"}


def _gear_manifest(document: m.JsonObject, media_type: str, config: bytes, layers: list[ConvertedLayer]) -> bytes:
    """Return the manifest *document* with the Gear image's config and layers, in the same schema.

    ``subject`` is removed: it relates the source, not the Gear image, to another manifest.
    """
    oci = media_type == m.OCI_MANIFEST
    document["mediaType"] = media_type
    document["config"] = m.with_digest_of(document["config"], config)
    kind = m.OCI_LAYER_GZIP if oci else m.DOCKER_LAYER_GZIP
    document["layers"] = [
        old if layer.private else _gear_descriptor(layer, old, kind)
        for layer, old in zip(layers, document.get("layers") or [], strict=True)
    ]
    document.pop("subject", None)
    if oci:
        document["annotations"] = {**(document.get("annotations") or {}), **_mark(layers)}
    return m.encode(document)


def _gear_descriptor(layer: ConvertedLayer, old: m.JsonObject, kind: str) -> m.JsonObject:
    annotations = {"annotations": old["annotations"]} if old.get("annotations") else {}
    return {"mediaType": kind, "digest": layer.digest, "size": layer.size_bytes} | annotations


def _gear_index(source: ImageSource, plan: ConversionPlan, pushed: list[tuple[bytes, str]]) -> tuple[bytes, str]:
    """Return an index of the Gear images only, with nested indexes flattened, and its type."""
    data, media_type = source.manifest(plan.digest)
    document: m.JsonObject = msgspec.json.decode(data)
    document["manifests"] = [
        m.with_digest_of(image.entry, manifest) for image, (manifest, _) in zip(plan.images, pushed, strict=True)
    ]
    document["mediaType"] = media_type
    document.pop("subject", None)
    return m.encode(document), media_type
