"""containerd's front door as a whole, for the gateway."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from gearworkers.settings import Settings
from plugin_gateway.containerd.content_root import ContentRoot
from plugin_gateway.containerd.diffs import Diffs
from plugin_gateway.containerd.early_apply import EarlyApplies
from plugin_gateway.containerd.image_blobs import ImageBlobs
from plugin_gateway.containerd.layer_indexes import LayerIndexes
from plugin_gateway.containerd.ready_layers import ReadyLayers
from plugin_gateway.containerd.server import ContainerdServer, SnapshotEvents
from plugin_gateway.containerd.snapshots import Snapshots
from plugin_gateway.dispatch.dispatcher import Dispatcher
from plugin_gateway.dispatch.maintenance import Maintenance
from plugin_gateway.engines import Engines
from plugin_gateway.metrics import GatewayMetrics

_log = structlog.stdlib.get_logger(__name__)


class ContainerdDoor:
    """Serves containerd on one socket, always from the GEAR_ROOT of the settings.

    Args:
        path: The socket.
        settings: The node's settings.
        engines: The gateway's engines.
        dispatcher: Runs the heavy calls.
        metrics: Counts the calls.
    """

    def __init__(
        self, path: Path, settings: Settings, engines: Engines, dispatcher: Dispatcher, metrics: GatewayMetrics
    ) -> None:
        self._path = path
        self._settings = settings
        self._engines = engines
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._maintenance = Maintenance(dispatcher, lambda: settings, metrics)
        self._snapshots: Snapshots | None = None
        self._early: EarlyApplies | None = None
        self._server: ContainerdServer | None = None

    async def open(self) -> None:
        """Open the store and answer calls.

        Raises:
            FailedPrecondition: Another process listens on the socket.
            GearError: GEAR_ROOT or the socket cannot be used.
        """
        loop = asyncio.get_running_loop()
        engine = await asyncio.to_thread(self._engines.open, self._settings)
        self._snapshots = Snapshots(engine)
        await asyncio.to_thread(self._snapshots.open)
        address = self._settings.containerd_address
        blobs = ImageBlobs(address, ContentRoot(address))
        indexes = LayerIndexes(self._settings, engine.layers)
        snapshots = self._snapshots
        self._early = EarlyApplies(
            engine, self._dispatcher, blobs, indexes, lambda digest: bool(snapshots.applied(digest))
        )
        root = engine.settings.gear_root
        parts = (root, self._snapshots, self._dispatcher, blobs, self._early, address, loop, self._metrics)
        diffs = Diffs(*parts)
        self._server = ContainerdServer(
            self._path,
            snapshots,
            ReadyLayers(
                snapshots, self._early, indexes, blobs, loop, self._metrics, engine.profile_hooks.layer_applied
            ),
            diffs,
            self._metrics,
            SnapshotEvents(
                removed=lambda: loop.call_soon_threadsafe(self._maintenance.layer_removed),
                applied=lambda: loop.call_soon_threadsafe(self._maintenance.layer_stored),
                written=lambda layer: loop.call_soon_threadsafe(self._maintenance.dedupe, layer),
            ),
        )
        self._server.open()
        _log.info("gateway listens for containerd", socket=str(self._path), root=str(engine.settings.gear_root))

    async def close(self) -> None:
        """Accept no new calls, let running calls finish within their grace, remove the socket."""
        if self._server is not None:
            await self._server.close()
        await self._maintenance.close()
        if self._early is not None:
            await self._early.close()
        if self._snapshots is not None:
            self._snapshots.close()
