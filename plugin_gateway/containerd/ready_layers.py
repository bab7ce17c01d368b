"""Layers that containerd need not download: their contents are on this host, or their index is in the remote.

At the Prepare of a layer to unpack, labels name the snapshot that containerd will commit (its chain ID), the layer's
blob and those above it. If the layer can be made without its blob, it is committed at once, and Prepare is answered
with ALREADY_EXISTS. containerd then finds the snapshot by its label and parent, and skips the download.

If the blob is in the content store, in whichever namespace, containerd downloads nothing either way. Then Apply makes
the layer, so that the blob is there for a push or a save from this namespace as well.

The chain ID must result from the parent's and from the diff ID that we know of the layer. So an image whose config
claims another layer's chain ID is downloaded, and rejected by containerd.

Source: containerd's core/metadata/snapshot.go, "createSnapshot"; the OCI image specification, "Layer ChainID".
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import structlog

from gearworkers.errors import GearError
from gearworkers.util.keyed_locks import KeyedLocks
from plugin_gateway.containerd.early_apply import EarlyApplies
from plugin_gateway.containerd.image_blobs import ImageBlobs
from plugin_gateway.containerd.layer_indexes import LayerIndexes
from plugin_gateway.containerd.snapshot_table import REF, AppliedBlob, committed_name, is_unpack_key, key_of
from plugin_gateway.containerd.snapshots import Snapshots
from plugin_gateway.metrics import GatewayMetrics

_log = structlog.stdlib.get_logger(__name__)

_LAYER = "containerd.io/snapshot/cri.layer-digest"
_MANIFEST = "containerd.io/snapshot/cri.manifest-digest"
_LAYERS = "containerd.io/snapshot/cri.image-layers"
"""The layers of the image from this one on, as far as the label's length allows."""


class _Wanted(NamedTuple):
    """A layer that containerd is about to unpack."""

    key: str
    parent: str
    chain_id: str
    digest: str
    layers: tuple[str, ...]
    """The digests of this layer and those above it."""
    labels: Mapping[str, str]

    def has_diff_id(self, diff_id: str) -> bool:
        """Whether the layer's chain ID results from this diff ID."""
        if not self.parent:
            return self.chain_id == diff_id
        chain = f"{key_of(self.parent)} {diff_id}"
        return self.chain_id == f"sha256:{hashlib.sha256(chain.encode()).hexdigest()}"


class ReadyLayers:
    """Commits layers that need no download. Call from any thread except the event loop's.

    Args:
        snapshots: Receives the committed snapshots.
        early: Makes layers from indexes.
        indexes: Finds the indexes.
        blobs: Finds containerd's blobs.
        loop: The event loop of *early*.
        metrics: Counts the layers.
        report: Called with the topmost layer of an image, and the image's command.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        early: EarlyApplies,
        indexes: LayerIndexes,
        blobs: ImageBlobs,
        loop: asyncio.AbstractEventLoop,
        metrics: GatewayMetrics,
        report: Callable[[str, str], None],
    ) -> None:
        self._snapshots = snapshots
        self._early = early
        self._indexes = indexes
        self._blobs = blobs
        self._loop = loop
        self._metrics = metrics
        self._report = report
        self._locks = KeyedLocks()

    def commit(self, key: str, parent: str, labels: Mapping[str, str]) -> bool:
        """Commit the layer that Prepare is about, if that needs no download; return whether it is committed.

        Args:
            key, parent, labels: Prepare's.
        """
        wanted = _wanted(key, parent, labels)
        if wanted is None or self._has_blob(wanted.digest):
            return False
        with self._locks.held(wanted.digest):  # several images with this layer may be pulled at once
            how = self._commit(wanted)
        if how:
            self._metrics.applies.labels(how).inc()
            self._report_command(wanted)
        return bool(how)

    def _report_command(self, wanted: _Wanted) -> None:
        """Let the lazy file server fetch the programs that the image's containers run first."""
        manifest = wanted.labels.get(_MANIFEST)
        if len(wanted.layers) > 1 or not manifest:
            return
        try:
            layer = self._snapshots.stat(committed_name(wanted.key, wanted.chain_id)).layer
            self._report(layer, " ".join(self._blobs.command(manifest)))
        except GearError as exc:
            _log.info("the programs of an image are not fetched ahead", manifest=manifest, reason=str(exc))

    def _has_blob(self, digest: str) -> bool:
        """Whether the content store has the blob; True also if containerd does not answer."""
        try:
            return self._blobs.path(digest).exists()
        except GearError as exc:
            _log.info("a layer is downloaded as usual", layer=digest, reason=str(exc))
            return True

    def _commit(self, wanted: _Wanted) -> str:
        """Return how the layer was found; empty if it is not committed."""
        if any(wanted.has_diff_id(blob.diff_id) for blob in self._snapshots.unpacked(wanted.chain_id, wanted.parent)):
            return "shared"
        if any(self._copy(wanted, blob) for blob in self._snapshots.applied(wanted.digest)):
            return "copied"
        return "indexed" if self._commit_indexed(wanted) else ""

    def _commit_indexed(self, wanted: _Wanted) -> bool:
        if not self._indexes.allow(wanted.labels):
            return False
        found = self._indexes.find(wanted.layers)
        index = found.get(wanted.digest)
        if index is None or (wanted.parent and self._snapshots.is_private(self._snapshots.stat(wanted.parent).layer)):
            return False
        if not wanted.has_diff_id(index.diff_id):
            _log.warning("the index of a layer is for another diff ID than the image's", layer=wanted.digest)
            self._indexes.forget(wanted.digest)
            self._loop.call_soon_threadsafe(self._early.drop, wanted.digest)
            return False
        self._loop.call_soon_threadsafe(self._early.begin_indexed, found)
        taken = asyncio.run_coroutine_threadsafe(self._early.take(wanted.digest, indexed=True), self._loop).result()
        if taken is None:
            self._indexes.forget(wanted.digest)
            return False
        try:
            return self._copy(wanted, taken)
        finally:
            asyncio.run_coroutine_threadsafe(self._early.remove(taken), self._loop).result()

    def _copy(self, wanted: _Wanted, blob: AppliedBlob) -> bool:
        if not wanted.has_diff_id(blob.diff_id):
            return False
        return self._snapshots.commit_copy(wanted.key, wanted.parent, wanted.chain_id, wanted.labels, blob)


def _wanted(key: str, parent: str, labels: Mapping[str, str]) -> _Wanted | None:
    """Return the layer that Prepare is about; None if labels are missing."""
    chain_id, digest = labels.get(REF, ""), labels.get(_LAYER, "")
    if not chain_id or not digest or not is_unpack_key(key):
        return None
    layers = dict.fromkeys((digest, *filter(None, labels.get(_LAYERS, "").split(","))))
    return _Wanted(key, parent, chain_id, digest, tuple(layers), labels)
