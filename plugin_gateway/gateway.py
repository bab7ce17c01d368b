"""The gateway from start to SIGTERM: front doors over one dispatcher, and the metrics server.

A front door answers one protocol. `GraphDriverServer` answers Docker's graphdriver plugin calls, `ContainerdDoor`
containerd's snapshots and diff services.
"""

from __future__ import annotations

import asyncio
import signal
from typing import Protocol

import structlog

from gearworkers.errors import from_os_error
from gearworkers.settings import Settings
from gearworkers.util.process import notify_ready
from plugin_gateway.dispatch.dispatcher import Dispatcher
from plugin_gateway.dispatch.maintenance import Maintenance
from plugin_gateway.graphdriver.calls import Driver
from plugin_gateway.graphdriver.server import LIGHT_GRACE_S, GraphDriverServer
from plugin_gateway.metrics import GatewayMetrics, MetricsServer

_log = structlog.stdlib.get_logger(__name__)


class FrontDoor(Protocol):
    """A server of one protocol."""

    async def open(self) -> None:
        """Answer calls; GearError if the socket or GEAR_ROOT cannot be used."""

    async def close(self) -> None:
        """Finish running calls within their grace; do nothing if the door is not open."""


class Gateway:
    """Runs the front doors, the dispatcher, maintenance and the metrics server.

    Args:
        settings: The node's settings.
        driver: Answers Docker's light calls.
        metrics: The gateway's.
        dispatcher: Runs the heavy calls and maintenance; uses the same metrics.
        containerd: containerd's front door; None to leave it closed.
        light_grace_s: Seconds for light calls in progress to end when the gateway stops.
    """

    def __init__(
        self,
        settings: Settings,
        driver: Driver,
        metrics: GatewayMetrics,
        dispatcher: Dispatcher,
        containerd: FrontDoor | None = None,
        *,
        light_grace_s: float = LIGHT_GRACE_S,
    ) -> None:
        self._settings = settings
        self._driver = driver
        self._dispatcher = dispatcher
        self._containerd = containerd
        self._maintenance = Maintenance(dispatcher, lambda: driver.settings, metrics)
        socket = settings.effective_plugin_socket
        self._docker = GraphDriverServer(
            socket, driver, dispatcher, self._maintenance, metrics, light_grace_s=light_grace_s
        )
        self._metrics_server = MetricsServer(
            settings.effective_metrics_listen, metrics, dispatcher.check, light_grace_s
        )
        self._is_bound = False
        self._is_prepared = False

    async def serve(self) -> None:
        """Run until SIGTERM or SIGINT, then finish the calls in progress within their grace.

        Raises:
            FailedPrecondition: Another gateway runs here.
            GearError: A socket or GEAR_ROOT cannot be used.
        """
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        try:
            await self.start()
            notify_ready(self._settings.notify_socket)
            await stop.wait()
        finally:
            await self.stop()

    async def start(self) -> None:
        """Repair the leftovers of a crash, then answer calls; raises as `serve`."""
        self._make_run_dir()
        # Both sockets first: they prevent repairs by a second gateway, which would destroy the first one's work.
        self._docker.bind()
        self._is_bound = True
        self._dispatcher.open()
        await asyncio.to_thread(self._driver.prepare)
        self._is_prepared = True
        self._dispatcher.use_broker(self._driver.settings)  # a running dockerd may have named another one
        await self._metrics_server.open()
        await self._docker.open()
        if self._containerd is not None:
            await self._containerd.open()
        self._maintenance.begin()
        settings = self._settings
        _log.info("gateway listens", socket=str(settings.effective_plugin_socket), root=str(settings.gear_root))

    async def stop(self) -> None:
        """Accept no new connections, finish the calls in progress within their grace, remove the sockets."""
        if not self._is_bound:
            return
        await self._docker.close()
        if self._containerd is not None:
            await self._containerd.close()
        await self._maintenance.close()
        await self._metrics_server.close()
        self._dispatcher.close()
        if self._is_prepared:
            await asyncio.to_thread(self._driver.release)
        _log.info("gateway ended")

    def _make_run_dir(self) -> None:
        run_dir = self._settings.run_dir
        try:
            run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as exc:
            raise from_os_error(exc, f"create GEAR_RUN_DIR {run_dir}") from exc
