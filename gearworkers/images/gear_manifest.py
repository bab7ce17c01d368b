"""Finish a conversion: push the Gear image's config, manifest, index and tag.

The documents keep all fields of the source's, except digests, sizes and diff IDs, and add the label of a Gear image.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from gearworkers.images import manifest as m
from gearworkers.images.convert import ConvertedLayer
from gearworkers.images.plan import ConversionPlan, ImagePlan
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.images.source import ImageSource, open_source, read_config
from gearworkers.settings import RegistrySettings


class ConversionReport(msgspec.Struct, frozen=True):
    """The result of a conversion; sums over the distinct layers."""

    target: str
    digest: str
    layers: int
    reused_layers: int
    private_layers: int
    """Layers that were copied unchanged."""
    bytes_before: int
    bytes_after: int
    objects: int
    new_objects: int
    object_bytes: int
    new_bytes: int


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
    target = Reference.parse(plan.target)
    repository = Repository.of(settings, target)
    source = open_source(settings, plan.source)
    pushed = [_push_image(source, repository, image, converted) for image in plan.images]
    if plan.index:
        data, media_type = _gear_index(source, plan, pushed)
    else:
        data, media_type = pushed[0]
    digest = repository.put_manifest(target.tag_or_digest, media_type, data)
    return _report(plan, digest, converted.values())


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
    data, media_type = source.manifest(plan.index)
    document: m.JsonObject = msgspec.json.decode(data)
    document["manifests"] = [
        m.with_digest_of(image.entry, manifest) for image, (manifest, _) in zip(plan.images, pushed, strict=True)
    ]
    document["mediaType"] = media_type
    document.pop("subject", None)
    return m.encode(document), media_type


def _report(plan: ConversionPlan, digest: str, converted: Iterable[ConvertedLayer]) -> ConversionReport:
    layers = list(converted)
    return ConversionReport(
        target=plan.target,
        digest=digest,
        layers=len(layers),
        reused_layers=sum(layer.reused for layer in layers),
        private_layers=sum(layer.private for layer in layers),
        bytes_before=sum(job.size_bytes for job in plan.jobs()),
        bytes_after=sum(layer.size_bytes for layer in layers),
        objects=sum(layer.objects for layer in layers),
        new_objects=sum(layer.new_objects for layer in layers),
        object_bytes=sum(layer.object_bytes for layer in layers),
        new_bytes=sum(layer.new_bytes for layer in layers),
    )
