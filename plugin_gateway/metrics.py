"""The gateway's Prometheus metrics, and the HTTP server that shows them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gearworkers.errors import InvalidInput, from_os_error
from gearworkers.util.net import parse_host_port
from gearworkers.util.prometheus import METRICS_CONTENT_TYPE
from plugin_gateway.sockets import listen

_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 30, 120)


class GatewayMetrics:
    """The metrics of one gateway, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.calls = Counter(
            "gear_calls", "Calls of Docker and containerd", ["method", "outcome"], registry=self._registry
        )
        self.seconds = Histogram(
            "gear_call_seconds", "Duration of calls", ["method"], buckets=_SECONDS, registry=self._registry
        )
        self.jobs = Counter(
            "gear_orders",
            "Heavy calls and maintenance, by the process that did them",
            ["call", "by"],
            registry=self._registry,
        )
        self.running = Gauge(
            "gear_orders_in_progress", "Heavy calls and maintenance in progress", ["by"], registry=self._registry
        )
        self.stalled = Gauge(
            "gear_orders_stalled", "Calls in progress that wait for their caller", ["by"], registry=self._registry
        )
        self.pushed = Counter("gear_pushed_objects", "Objects that the remote has confirmed", registry=self._registry)
        self.refused = Gauge(
            "gear_push_refused_objects", "Objects that the last push could not push", registry=self._registry
        )
        self.applies = Counter(
            "gear_containerd_applies",
            "Layers of containerd: requested, early, copied from the same blob, shared, or made from an index",
            ["how"],
            registry=self._registry,
        )
        self.degraded = Gauge("gear_degraded", "1 while the gateway does the workers' jobs", registry=self._registry)

    def observe(self, method: str, seconds: float, failed: bool) -> None:
        """Count one call of Docker or containerd."""
        self.calls.labels(method, "error" if failed else "ok").inc()
        self.seconds.labels(method).observe(seconds)

    def text(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class MetricsServer:
    """Serves ``/metrics``.

    Args:
        address: An absolute path for a Unix socket, or host:port.
        metrics: The metrics to serve.
        update: Called before each response.
        grace_s: Seconds for requests in progress to end when the server closes.
    """

    def __init__(
        self, address: str, metrics: GatewayMetrics, update: Callable[[], Awaitable[object]], grace_s: float
    ) -> None:
        self._address = address
        self._metrics = metrics
        self._update = update
        app = web.Application()
        app.router.add_get("/metrics", self._answer)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=grace_s)
        self._socket: Path | None = None

    async def open(self) -> None:
        """Begin to serve.

        Raises:
            FailedPrecondition: Another gateway listens at the address.
            GearError: The address is malformed, or the kernel refuses it.
        """
        await self._runner.setup()
        site: web.BaseSite
        if self._address.startswith("/"):
            site = web.SockSite(self._runner, listen(Path(self._address)))
            self._socket = Path(self._address)
        else:
            site = web.TCPSite(self._runner, *_host_and_port(self._address))
        try:
            await site.start()
        except OSError as exc:
            raise from_os_error(exc, f"serve metrics at {self._address}") from exc

    async def close(self) -> None:
        """Finish the requests in progress and remove the socket."""
        await self._runner.cleanup()
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)

    async def _answer(self, request: web.Request) -> web.Response:
        await self._update()
        return web.Response(body=self._metrics.text(), headers={"Content-Type": METRICS_CONTENT_TYPE})


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        host, port = parse_host_port(address)
    except ValueError as exc:
        raise InvalidInput(f"GEAR_METRICS_LISTEN={address}: expected host:port or an absolute path") from exc
    return host or "127.0.0.1", port
