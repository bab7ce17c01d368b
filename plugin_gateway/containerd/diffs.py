"""Apply and Diff: jobs for the node's workers, on the layers of snapshots.

Apply reads a blob from containerd's content directory; Diff stores one in containerd's content store. No byte of a
layer passes through this process.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from gearworkers.errors import GearError, Unavailable, by_name
from gearworkers.images.manifest import LAYERS
from gearworkers.workers.messages import ApplyDiff, Diff, JobResult, NewBlob, StoredBlob
from plugin_gateway.containerd.early_apply import EarlyApplies
from plugin_gateway.containerd.image_blobs import ImageBlobs
from plugin_gateway.containerd.snapshot_table import AppliedBlob
from plugin_gateway.containerd.snapshots import Mount, Snapshots
from plugin_gateway.dispatch.dispatcher import Dispatcher
from plugin_gateway.metrics import GatewayMetrics

_T = TypeVar("_T")
_TAR = "application/vnd.oci.image.layer.v1.tar"


class Unsupported(GearError):
    """This differ cannot handle the call: the mounts do not belong to gearworkers, or the media type is unknown."""


class StoredDiff(NamedTuple):
    """A descriptor of a blob or a tar."""

    media_type: str
    digest: str
    size_bytes: int


class Diffs:
    """Answers the differ's calls. Call from any thread except the event loop's.

    Args:
        root: GEAR_ROOT.
        snapshots: Resolves mounts to layers.
        dispatcher: Runs the jobs.
        blobs: Finds containerd's blobs.
        early: Applies the layers of an image before containerd asks for them.
        address: containerd's socket, on which Diff stores its blob.
        loop: The event loop on which jobs run.
        metrics: Counts the applied layers.
    """

    def __init__(
        self,
        root: Path,
        snapshots: Snapshots,
        dispatcher: Dispatcher,
        blobs: ImageBlobs,
        early: EarlyApplies,
        address: Path,
        loop: asyncio.AbstractEventLoop,
        metrics: GatewayMetrics,
    ) -> None:
        self._root = root
        self._snapshots = snapshots
        self._dispatcher = dispatcher
        self._blobs = blobs
        self._early = early
        self._address = address
        self._loop = loop
        self._metrics = metrics

    def apply(self, media_type: str, digest: str, mounts: Sequence[Mount]) -> StoredDiff:
        """Fill the layer that *mounts* show from a blob; return the tar's digest (the diff ID) and its size.

        Raises:
            Unsupported: The mounts do not belong to gearworkers, or the media type is unknown.
            NotFound: The blob is missing.
            AlreadyExists: The layer has content.
            FailedPrecondition: The mounts are not of an active snapshot.
            IntegrityError, InvalidInput: The blob is damaged or not a valid layer.
        """
        layer = self._snapshots.layer_of(mounts)
        if not layer:
            raise Unsupported("the mounts are not of a snapshot of gearworkers")
        if media_type not in LAYERS:
            raise Unsupported(f"layers of media type {media_type} are not supported")
        path = self._blobs.path(digest)
        parent = self._snapshots.prepare_apply(layer)
        applied = self._snapshots.copy_applied(layer, digest)
        if applied is not None:
            self._metrics.applies.labels("copied").inc()
        else:
            applied = self._run(self._apply(layer, parent, digest, path))
        self._snapshots.note_applied(applied)
        return StoredDiff(_TAR, applied.diff_id, applied.tar_bytes)

    async def _apply(self, layer: str, parent: str, digest: str, path: Path) -> AppliedBlob:
        """Fill *layer* from a blob, or from the early layer of that blob."""
        self._early.begin(digest, *self._snapshots.place_of(layer))
        found = await self._early.take(digest)
        if found is not None:
            try:
                if await asyncio.to_thread(self._snapshots.copy, layer, found):
                    self._metrics.applies.labels("early").inc()
                    return found._replace(layer=layer)
            finally:
                await self._early.remove(found)
        job = ApplyDiff(gear_root=str(self._root), id=layer, parent=parent)
        await self._early.slots.occupy()
        try:
            result = (await self._dispatcher.run(job, StoredBlob(str(path)))).result
        finally:
            await self._early.slots.release()
        _raise_error(result)
        self._metrics.applies.labels("requested").inc()
        return AppliedBlob(digest, layer, result.digest, result.stream_bytes)

    def diff(
        self,
        left: Sequence[Mount],
        right: Sequence[Mount],
        *,
        media_type: str,
        ref: str,
        labels: Mapping[str, str],
        namespace: str,
        max_mtime_ns: int | None = None,
    ) -> StoredDiff:
        """Store the difference of two trees in containerd's content store and return the blob.

        Args:
            left: The older tree.
            right: The newer one.
            media_type: The blob's media type; empty for a gzip layer.
            ref: The name of the write; empty for one of our own.
            labels: The blob's labels.
            max_mtime_ns: As for `Engine.diff`.
            namespace: containerd's, as the request's metadata has it; empty to take it from the snapshot's name.

        Raises:
            Unsupported: The mounts do not belong to gearworkers, or the media type is unknown.
        """
        older, newer = self._snapshots.layer_of(left), self._snapshots.layer_of(right)
        if older is None or not newer:
            raise Unsupported("the mounts are not of snapshots of gearworkers")
        media_type = media_type or f"{_TAR}+gzip"
        if media_type not in LAYERS:
            raise Unsupported(f"layers of media type {media_type} are not supported")
        stream = NewBlob(
            address=str(self._address),
            namespace=namespace or self._snapshots.namespace_of(newer),
            ref=ref,
            media_type=media_type,
            labels=dict(labels),
            max_mtime_ns=max_mtime_ns,
        )
        job = Diff(gear_root=str(self._root), id=newer, parent=older)
        result = self._run(self._dispatcher.run(job, stream)).result
        _raise_error(result)
        return StoredDiff(media_type, result.digest, result.stream_bytes)

    def _run(self, job: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(job, self._loop).result()


def _raise_error(result: JobResult) -> None:
    if result.error:
        kind = by_name(result.error_kind)
        raise (Unavailable if kind is GearError and result.retryable else kind)(result.error)
