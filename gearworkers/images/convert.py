"""Convert one layer of an image to a Gear layer.

A conversion has three steps: `plan.plan_conversion` reads the image, `convert_layer` converts each distinct layer, on
any host with a worker, and `gear_manifest.finish_conversion` pushes config, manifest, index and tag.

A layer with a record in the remote (`layer_records`) is not converted again. A private layer (tar.private_marker) is
copied unchanged: its contents stay in it and never reach the remote.

`gear index` does the same without a target: nothing is pushed to a registry.

Order of writes: contents, then the layer's index and its blob, then its record; after all layers config, manifest and
image index, and the tag last. So a crash leaves no incomplete image, and the next run reuses finished layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO

import msgspec

from gearworkers.errors import IntegrityError, NotFound
from gearworkers.images.gear_layer import write_gear_layer
from gearworkers.images.layer_reader import unpacked
from gearworkers.images.layer_records import (
    MAX_INDEX_BYTES,
    ConvertedLayer,
    LayerRecord,
    read_record,
    record_name,
)
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


def convert_layer(settings: Settings, remote: Remote, job: LayerJob, progress: Progress) -> ConvertedLayer:
    """Store the contents, the index and the record of *job* in the remote, and push its Gear layer; idempotent.

    Raises:
        IntegrityError, InvalidInput: The layer differs from its digest, or is malformed.
        NotFound, Unavailable, FailedPrecondition: Source, target or remote fails.

    Crash: leaves objects in the remote that no image names yet, and an upload that the registry discards by itself.
    """
    repository = Repository.of(settings.registry, Reference.parse(job.target)) if job.target else None
    if job.private:
        return _keep_unchanged(settings, job, repository, progress)
    record = None if job.again else read_record(remote.document, job.digest)
    if record is not None and _is_reusable(settings, remote, record, repository):
        progress(job.size_bytes)
        return msgspec.structs.replace(record.converted, new_objects=0, new_bytes=0, reused=True)
    with unnamed_file("a layer", settings.gear_converting_path) as file:
        with uploading(remote, settings.gear_converting_path) as uploader:
            source = open_source(settings.registry, job.source)
            record = _write_gear_layer(source, uploader, job, file, progress)
        converted = record.converted
        if record.has_index:
            file.flush()
            remote.put(converted.object_digest, file.fileno())
        if repository is not None:
            repository.put_blob(converted.digest, file, converted.size_bytes)
    remote.put_document(record_name(job.digest), msgspec.json.encode(record))
    return converted


def _is_reusable(settings: Settings, remote: Remote, record: LayerRecord, repository: Repository | None) -> bool:
    """Put the recorded layer's blob into *repository*; return False if the layer must be converted again."""
    layer = record.converted
    if record.has_index and not remote.has([layer.object_digest]):
        return False
    if repository is None or repository.has_blob(layer.digest):
        return True
    if not record.has_index:
        return False
    try:
        with unnamed_file("a layer", settings.gear_converting_path) as file:
            for piece in remote.fetch(layer.object_digest):
                file.write(piece)
            repository.put_blob(layer.digest, file, layer.size_bytes)
    except (NotFound, IntegrityError):
        return False
    return True


def _keep_unchanged(
    settings: Settings, job: LayerJob, repository: Repository | None, progress: Progress
) -> ConvertedLayer:
    if repository is not None and not repository.has_blob(job.digest):
        source = open_source(settings.registry, job.source)
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
) -> LayerRecord:
    """Write the layer's Gear tar to *file*; return its record when the remote has all of its contents."""
    blob = _ProgressReader(source.blob(job.digest, job.size_bytes), progress)
    with unpacked(blob, job.diff_id) as tar:
        written = write_gear_layer(tar, file, uploader)
        uploaded = uploader.finish()
    converted = ConvertedLayer(
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
    return LayerRecord(
        converted,
        source_diff_id=tar.digest,
        source_tar_bytes=tar.read_bytes,
        has_index=written.size_bytes <= MAX_INDEX_BYTES,
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
