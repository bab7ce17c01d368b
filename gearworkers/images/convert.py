"""An image becomes a Gear image: planned once, converted layer by layer wherever there is a worker, then named.

Glossary: a *plan* is what `plan_conversion` finds out about an image; a *layer job* is one distinct layer of it,
which needs nothing but itself; a *record* is the small document in the remote that says what a layer became, so
that nobody converts it again.

A private layer (tar.private_marker) is copied as it is: its contents stay in it, and none goes to the remote.

Order of writes: contents, then the layer's blob, then its record; when all layers are there, config, manifest,
index, and the tag last. So a run that dies leaves nothing wrong, and its finished layers are found done.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

import msgspec

from gearworkers.errors import FailedPrecondition, IntegrityError, InvalidInput, NotFound, Unavailable
from gearworkers.images import manifest as m
from gearworkers.images.gear_layer import FORMAT, INLINE_BYTES, GearTar, write_gear_layer
from gearworkers.images.layer_reader import unpacked
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.images.source import Source, open_source, small_blob
from gearworkers.images.survey import private_layers, refuse_to_replace, survey
from gearworkers.images.upload import Contents, nameless_file, storing
from gearworkers.remote.remote import Remote
from gearworkers.settings import RegistrySettings, Settings
from gearworkers.tar.reader import Readable

Progress = Callable[[int], None]
"""Called with the bytes of a layer, as the source has it, that have been read so far."""

Told = Callable[[str, int], None]
"""The same of many layers: called with a layer's digest before."""

_COPY_BYTES = 1 << 20


class LayerJob(msgspec.Struct, frozen=True):
    """One distinct layer of an image, to be converted anywhere."""

    source: str
    target: str
    digest: str
    size_bytes: int
    diff_id: str
    again: bool = False
    """Whether to convert it though there is a record of it."""
    private: bool = False
    """Whether it, or a layer below it in any of the images, is marked private."""


class LayerDone(msgspec.Struct, frozen=True):
    """What a layer became."""

    source_digest: str
    digest: str
    size_bytes: int
    diff_id: str
    files: int
    objects: int
    object_bytes: int
    new_objects: int
    new_bytes: int
    reused: bool = False
    """Whether it had been converted before."""
    private: bool = False
    """Whether it was copied as it is."""


class ImagePlan(msgspec.Struct, frozen=True):
    """One manifest of what is converted."""

    manifest: str
    media_type: str
    layers: tuple[LayerJob, ...]
    """In the manifest's order; a layer may come twice."""
    entry: m.Document = {}
    """Its descriptor in the index; empty for the image of a single platform."""


class Plan(msgspec.Struct, frozen=True):
    """All of a conversion; JSON, for the tasks."""

    source: str
    target: str
    index: str
    """The digest of the index that is converted whole; empty for one image."""
    images: tuple[ImagePlan, ...]

    def jobs(self) -> list[LayerJob]:
        """The distinct layers, the largest first, since they take longest."""
        distinct = {job.digest: job for image in self.images for job in image.layers}
        return sorted(distinct.values(), key=lambda job: (-job.size_bytes, job.digest))


class Report(msgspec.Struct, frozen=True):
    """What a conversion came to; sums over the distinct layers."""

    target: str
    digest: str
    layers: int
    reused_layers: int
    private_layers: int
    """So many were copied as they are."""
    bytes_before: int
    bytes_after: int
    objects: int
    new_objects: int
    object_bytes: int
    new_bytes: int


class _Record(msgspec.Struct, frozen=True):
    """What the remote knows of a converted layer."""

    done: LayerDone
    repository: str
    """Where the layer's blob was pushed: ``HOST/NAME``."""


def plan_conversion(
    settings: RegistrySettings,
    source: str,
    target: str,
    platform: m.Platform | None = None,
    *,
    all_platforms: bool = False,
    again: bool = False,
) -> Plan:
    """Find out what there is to convert; reads manifests, configs and how the layers begin, changes nothing.

    Args:
        settings: Credentials and proxy.
        source: As `open_source` takes it.
        target: A reference to a registry, with a tag or without, but not by digest.
        platform: As `survey` takes it.
        all_platforms: Convert all images of an index.
        again: Convert also what was converted before.

    Raises:
        InvalidInput, IntegrityError: A name is malformed, the image cannot be converted, or *target* is its own name.
        NotFound: It is not there, or not for *platform*.
    """
    named = Reference.parse(target)
    if named.digest:
        raise InvalidInput(f"{target}: a digest cannot be chosen; name a tag")
    image = open_source(settings, source)
    found = survey(image, source, platform, all_platforms=all_platforms)
    refuse_to_replace(settings, source, named, found)
    private = private_layers(image, found.images)

    def job(layer: m.Descriptor, diff_id: str) -> LayerJob:
        return LayerJob(source, str(named), layer.digest, layer.size, diff_id, again, layer.digest in private)

    plans = (
        ImagePlan(one.manifest, one.media_type, tuple(job(*layer) for layer in one.layers), one.entry)
        for one in found.images
    )
    index = found.digest if found.is_index and all_platforms else ""
    return Plan(source, str(named), index, tuple(plans))


def convert_layer(settings: Settings, remote: Remote, job: LayerJob, progress: Progress) -> LayerDone:
    """Have the target hold the Gear layer of *job*, and the remote its contents and the record; idempotent.

    Raises:
        IntegrityError, InvalidInput: The layer is not what its digest says, or no layer.
        NotFound, Unavailable, FailedPrecondition: Source, target or remote do not do what is asked of them.

    Crash: leaves objects in the remote that no image names yet, and an upload that the registry ends by itself.
    """
    repository = Repository.of(settings.registry, Reference.parse(job.target))
    if job.private:
        return _copied(settings, open_source(settings.registry, job.source), repository, job, progress)
    name = record_name(job)
    known = None if job.again else _known(remote, name)
    if known is not None and _taken_over(settings, repository, known):
        progress(job.size_bytes)
        return msgspec.structs.replace(known.done, new_objects=0, new_bytes=0, reused=True)
    with nameless_file("a layer", settings.gear_converting_path) as file:
        with storing(remote, settings.gear_converting_path) as contents:
            done = _converted(open_source(settings.registry, job.source), contents, job, file, progress)
        repository.put_blob(done.digest, file, done.size_bytes)
    record = _Record(done, f"{repository.registry.reference.host}/{repository.name}")
    remote.put_document(name, msgspec.json.encode(record))
    return done


def finish_conversion(settings: RegistrySettings, plan: Plan, layers: Iterable[LayerDone]) -> Report:
    """Push config and manifest of each image, then the index; the tag comes last. Idempotent.

    Args:
        settings: Credentials and proxy.
        plan: What was planned.
        layers: What became of `plan.jobs()`, in any order.

    Raises:
        As `convert_layer`.
    """
    done = {layer.source_digest: layer for layer in layers}
    target = Reference.parse(plan.target)
    repository = Repository.of(settings, target)
    source = open_source(settings, plan.source)
    pushed = [_push_image(source, repository, image, done) for image in plan.images]
    if plan.index:
        data, media_type = _gear_index(source, plan, pushed)
    else:
        data, media_type = pushed[0]
    digest = repository.put_manifest(target.version, media_type, data)
    return _report(plan, digest, done.values())


def record_name(job: LayerJob) -> str:
    """The document that says what a layer became; another format or threshold has another."""
    return f"layer-{FORMAT}-{INLINE_BYTES}-{job.digest.removeprefix('sha256:')}"


def _known(remote: Remote, name: str) -> _Record | None:
    """The record; one that cannot be read is as good as none."""
    data = remote.document(name)
    try:
        return msgspec.json.decode(data, type=_Record) if data is not None else None
    except ValueError:
        return None


def _taken_over(settings: Settings, repository: Repository, known: _Record) -> bool:
    """Have the blob of a layer converted before in *repository*; False if it is nowhere to be had whole any more."""
    digest = known.done.digest
    if repository.has_blob(digest):
        return True
    origin = Reference.parse(known.repository)
    try:
        if origin.host == repository.registry.reference.host and repository.mount(digest, origin.repository):
            return True
        blob = Repository.of(settings.registry, origin).blob(digest, known.done.size_bytes)
        with nameless_file("a layer", settings.gear_converting_path) as file:
            _copy(blob, file)
            repository.put_blob(digest, file, known.done.size_bytes)
    except (NotFound, FailedPrecondition, Unavailable, InvalidInput, IntegrityError):
        return False
    return True


def _copied(settings: Settings, source: Source, repository: Repository, job: LayerJob, progress: Progress) -> LayerDone:
    """The layer as it is in the target."""
    if not repository.has_blob(job.digest):
        with nameless_file("a layer", settings.gear_converting_path) as file:
            _copy(_Counted(source.blob(job.digest, job.size_bytes), progress), file)
            repository.put_blob(job.digest, file, job.size_bytes)
    progress(job.size_bytes)
    return LayerDone(
        source_digest=job.digest,
        digest=job.digest,
        size_bytes=job.size_bytes,
        diff_id=job.diff_id,
        files=0,
        objects=0,
        object_bytes=0,
        new_objects=0,
        new_bytes=0,
        private=True,
    )


def _copy(blob: Readable, file: BinaryIO) -> None:
    buffer = memoryview(bytearray(_COPY_BYTES))
    while count := blob.readinto(buffer):
        file.write(buffer[:count])


def _converted(source: Source, contents: Contents, job: LayerJob, file: BinaryIO, progress: Progress) -> LayerDone:
    """The layer's Gear tar in *file*, once all of its contents are in the remote."""
    blob = _Counted(source.blob(job.digest, job.size_bytes), progress)
    with unpacked(blob, job.diff_id) as tar:
        made: GearTar = write_gear_layer(tar, file, contents)
        stored = contents.finish()
    return LayerDone(
        source_digest=job.digest,
        digest=made.digest,
        size_bytes=made.size_bytes,
        diff_id=made.diff_id,
        files=made.files,
        objects=stored.objects,
        object_bytes=stored.object_bytes,
        new_objects=stored.new_objects,
        new_bytes=stored.new_bytes,
    )


class _Counted:
    """A blob that tells how much of it was read."""

    def __init__(self, blob: Readable, progress: Progress) -> None:
        self._blob = blob
        self._progress = progress
        self._read_bytes = 0

    def readinto(self, buffer: memoryview, /) -> int:
        """As the blob's."""
        count = self._blob.readinto(buffer) or 0
        self._read_bytes += count
        self._progress(self._read_bytes)
        return count


def _push_image(
    source: Source, repository: Repository, plan: ImagePlan, done: Mapping[str, LayerDone]
) -> tuple[bytes, str]:
    """Config and manifest of one image, by their digests; the manifest and its type."""
    data, _ = source.manifest(plan.manifest)
    manifest = m.decode_manifest(data, f"manifest {plan.manifest}")
    layers = [done[job.digest] for job in plan.layers]
    config = _gear_config(small_blob(source, manifest.config), layers)
    repository.put_blob(m.digest_of(config), io.BytesIO(config), len(config))
    made = _gear_manifest(msgspec.json.decode(data), plan.media_type, config, layers)
    repository.put_manifest(m.digest_of(made), plan.media_type, made)
    return made, plan.media_type


def _gear_config(data: bytes, layers: list[LayerDone]) -> bytes:
    """The config with the Gear layers' diff IDs and the mark; history and all else stay."""
    document: m.Document = msgspec.json.decode(data)
    diff_ids = [layer.diff_id for layer in layers]
    document["rootfs"] = {"type": "layers"} | (document.get("rootfs") or {}) | {"diff_ids": diff_ids}
    run: dict[str, Any] = document.get("config") or {}
    run["Labels"] = {**(run.get("Labels") or {}), **_mark(layers)}
    document["config"] = run
    return m.encode(document)


def _mark(layers: Iterable[LayerDone]) -> dict[str, str]:
    """What says that it is a Gear image; nothing if all of its layers are private."""
    return {} if all(layer.private for layer in layers) else {m.GEAR_MARK: "1"}


def _gear_manifest(document: m.Document, media_type: str, config: bytes, layers: list[LayerDone]) -> bytes:
    """The manifest of the same schema; what it says of other manifests is not true of this one and is left out."""
    oci = media_type == m.OCI_MANIFEST
    document["mediaType"] = media_type
    document["config"] = m.renamed(document["config"], config)
    kind = m.OCI_LAYER_GZIP if oci else m.DOCKER_LAYER_GZIP
    document["layers"] = [
        old if layer.private else _gear_descriptor(layer, old, kind)
        for layer, old in zip(layers, document.get("layers") or [], strict=True)
    ]
    document.pop("subject", None)
    if oci:
        document["annotations"] = {**(document.get("annotations") or {}), **_mark(layers)}
    return m.encode(document)


def _gear_descriptor(layer: LayerDone, old: m.Document, kind: str) -> m.Document:
    annotations = {"annotations": old["annotations"]} if old.get("annotations") else {}
    return {"mediaType": kind, "digest": layer.digest, "size": layer.size_bytes} | annotations


def _gear_index(source: Source, plan: Plan, pushed: list[tuple[bytes, str]]) -> tuple[bytes, str]:
    """The index with the Gear images in the place of the originals, also of those in indexes below, and no more."""
    data, media_type = source.manifest(plan.index)
    document: m.Document = msgspec.json.decode(data)
    document["manifests"] = [m.renamed(image.entry, made) for image, (made, _) in zip(plan.images, pushed, strict=True)]
    document["mediaType"] = media_type
    document.pop("subject", None)
    return m.encode(document), media_type


def _report(plan: Plan, digest: str, done: Iterable[LayerDone]) -> Report:
    layers = list(done)
    return Report(
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
