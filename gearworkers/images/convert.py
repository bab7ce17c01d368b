"""Convert one layer of an image to a Gear layer.

A conversion has three steps: `plan.plan_conversion` reads the image, `convert_layer` converts each distinct layer, on
any host with a worker, and `gear_manifest.finish_conversion` pushes config, manifest, index and tag.

The remote keeps a *record* of each converted layer, a small document that names the Gear layer. A layer with a record
is not converted again. A private layer (tar.private_marker) is copied unchanged: its contents stay in it and never
reach the remote.

Order of writes: contents, then the layer's blob, then its record; after all layers config, manifest and index, and the
tag last. So a crash leaves no incomplete image, and the next run reuses finished layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

import msgspec

from gearworkers.errors import FailedPrecondition, IntegrityError, InvalidInput, NotFound, Unavailable
from gearworkers.images.gear_layer import FORMAT, INLINE_BYTES, write_gear_layer
from gearworkers.images.layer_reader import unpacked
from gearworkers.images.plan import LayerJob
from gearworkers.images.reference import Reference
from gearworkers.images.registry import Repository
from gearworkers.images.source import ImageSource, open_source
from gearworkers.images.upload import ContentUploader, unnamed_file, uploading
from gearworkers.remote.remote import Remote
from gearworkers.settings import Settings
from gearworkers.tar.reader import Readable

Progress = Callable[[int], None]
"""Called with the number of bytes read so far of a layer's compressed blob."""

LayerProgress = Callable[[str, int], None]
"""The same for many layers: called with a layer's digest and the number of bytes read so far."""

_COPY_BYTES = 1 << 20


class ConvertedLayer(msgspec.Struct, frozen=True):
    """The result of converting one layer; JSON in Celery's results and in records."""

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
    """Whether an earlier conversion produced the layer."""
    private: bool = False
    """Whether the layer was copied unchanged."""


class _Record(msgspec.Struct, frozen=True):
    """The document in the remote about a converted layer."""

    done: ConvertedLayer
    repository: str
    """Repository that the layer's blob was pushed to: ``HOST/NAME``."""


def convert_layer(settings: Settings, remote: Remote, job: LayerJob, progress: Progress) -> ConvertedLayer:
    """Push the Gear layer of *job* to the target, and its contents and the record to the remote; idempotent.

    Raises:
        IntegrityError, InvalidInput: The layer differs from its digest, or is malformed.
        NotFound, Unavailable, FailedPrecondition: Source, target or remote fails.

    Crash: leaves objects in the remote that no image names yet, and an upload that the registry discards by itself.
    """
    repository = Repository.of(settings.registry, Reference.parse(job.target))
    if job.private:
        return _copy_unchanged(settings, job, repository, progress)
    name = record_name(job)
    record = None if job.again else _read_record(remote, name)
    if record is not None and _reuse(settings, repository, record):
        progress(job.size_bytes)
        return msgspec.structs.replace(record.done, new_objects=0, new_bytes=0, reused=True)
    with unnamed_file("a layer", settings.gear_converting_path) as file:
        with uploading(remote, settings.gear_converting_path) as uploader:
            source = open_source(settings.registry, job.source)
            converted = _write_gear_layer(source, uploader, job, file, progress)
        repository.put_blob(converted.digest, file, converted.size_bytes)
    record = _Record(converted, f"{repository.registry.reference.host}/{repository.name}")
    remote.put_document(name, msgspec.json.encode(record))
    return converted


def record_name(job: LayerJob) -> str:
    """Return the name of a layer's record; each format version of Gear layers has its own records."""
    return f"layer-{FORMAT}-{INLINE_BYTES}-{job.digest.removeprefix('sha256:')}"


def _read_record(remote: Remote, name: str) -> _Record | None:
    """Return the record; None if it is missing or malformed."""
    data = remote.document(name)
    try:
        return msgspec.json.decode(data, type=_Record) if data is not None else None
    except ValueError:
        return None


def _reuse(settings: Settings, repository: Repository, record: _Record) -> bool:
    """Put the recorded layer's blob into *repository*; return False if the blob can no longer be read."""
    digest = record.done.digest
    if repository.has_blob(digest):
        return True
    origin = Reference.parse(record.repository)
    try:
        if origin.host == repository.registry.reference.host and repository.mount(digest, origin.repository):
            return True
        blob = Repository.of(settings.registry, origin).blob(digest, record.done.size_bytes)
        with unnamed_file("a layer", settings.gear_converting_path) as file:
            _copy(blob, file)
            repository.put_blob(digest, file, record.done.size_bytes)
    except (NotFound, FailedPrecondition, Unavailable, InvalidInput, IntegrityError):
        return False
    return True


def _copy_unchanged(settings: Settings, job: LayerJob, repository: Repository, progress: Progress) -> ConvertedLayer:
    source = open_source(settings.registry, job.source)
    if not repository.has_blob(job.digest):
        with unnamed_file("a layer", settings.gear_converting_path) as file:
            _copy(_ProgressReader(source.blob(job.digest, job.size_bytes), progress), file)
            repository.put_blob(job.digest, file, job.size_bytes)
    progress(job.size_bytes)
    return ConvertedLayer(
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


def _write_gear_layer(
    source: ImageSource, uploader: ContentUploader, job: LayerJob, file: BinaryIO, progress: Progress
) -> ConvertedLayer:
    """Write the layer's Gear tar to *file*; return when the remote has all of its contents."""
    blob = _ProgressReader(source.blob(job.digest, job.size_bytes), progress)
    with unpacked(blob, job.diff_id) as tar:
        written = write_gear_layer(tar, file, uploader)
        uploaded = uploader.finish()
    return ConvertedLayer(
        source_digest=job.digest,
        digest=written.digest,
        size_bytes=written.size_bytes,
        diff_id=written.diff_id,
        files=written.files,
        objects=uploaded.objects,
        object_bytes=uploaded.object_bytes,
        new_objects=uploaded.new_objects,
        new_bytes=uploaded.new_bytes,
    )


class _ProgressReader:
    """A blob that reports the bytes read so far."""

    def __init__(self, blob: Readable, progress: Progress) -> None:
        self._blob = blob
        self._progress = progress
        self._read_bytes = 0

    def readinto(self, buffer: memoryview, /) -> int:
        """Read from the blob, and report the progress."""
        count = self._blob.readinto(buffer) or 0
        self._read_bytes += count
        self._progress(self._read_bytes)
        return count
