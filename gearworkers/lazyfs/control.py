"""The lazy file server's own socket: its status, its metrics, orders to prefetch; HTTP over a Unix socket.

GET  /status      `LazyStatus` as JSON
GET  /metrics     the same for Prometheus
POST /prefetch    `Layers` → `Coming`
POST /image       `Image` → `Known`
POST /reads       `Objects` → `Reads`
"""

from __future__ import annotations

import http
import os
import socketserver
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from gearworkers.errors import GearError
from gearworkers.lazyfs.client import LazyStatus
from gearworkers.util.prometheus import METRICS_CONTENT_TYPE

_MOST_BODY_BYTES = 1 << 20
_TIMEOUT_S = 10.0
_METRIC_PREFIX = "gear_lazy_"


Order = Callable[[bytes], object]
"""Given a request's body: the answer, for JSON; raises msgspec.DecodeError or GearError for what is wrong with it."""


class ControlServer:
    """Answers on the socket from its own threads while the context lasts."""

    def __init__(self, path: Path, status: Callable[[], LazyStatus], orders: Mapping[str, Order]) -> None:
        """
        Args:
            path: Of the socket.
            status: What GET is told.
            orders: What is done for POST, by its path.
        """
        self._path = path
        self._status = status
        self._orders = orders

    def __enter__(self) -> ControlServer:
        self._path.unlink(missing_ok=True)
        self._server = _Server(os.fspath(self._path), _handler(self._status, self._orders))
        self._path.chmod(0o600)
        self._thread = threading.Thread(target=self._server.serve_forever, name="control", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._path.unlink(missing_ok=True)
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    """So many may ask before the first is heard, as containers do that start at once; the kernel refuses one more."""


def _handler(status: Callable[[], LazyStatus], orders: Mapping[str, Order]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _TIMEOUT_S

        def do_GET(self) -> None:
            if self.path == "/status":
                self._answer(msgspec.json.encode(status()), "application/json")
            elif self.path == "/metrics":
                self._answer(metrics_page(status()), METRICS_CONTENT_TYPE)
            else:
                self.send_error(http.HTTPStatus.NOT_FOUND)

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            order = orders.get(self.path)
            if order is None or length > _MOST_BODY_BYTES:
                self.send_error(http.HTTPStatus.NOT_FOUND)
                return
            try:
                self._answer(msgspec.json.encode(order(self.rfile.read(length))), "application/json")
            except (msgspec.DecodeError, GearError) as exc:
                self._answer(str(exc).encode(errors="replace"), "text/plain", http.HTTPStatus.BAD_REQUEST)

        def _answer(self, content: bytes, kind: str, code: http.HTTPStatus = http.HTTPStatus.OK) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing: it is asked every few seconds."""

    return Handler


def metrics_page(status: LazyStatus) -> bytes:
    """*status* as Prometheus reads it."""
    gauges = {
        "incomplete_layers": ("Layers that lack objects.", status.incomplete_layers),
        "arriving_objects": ("Objects on their way.", status.arriving),
        "serving_objects": ("Large objects read through the lazy file system.", status.serving),
        "failing_objects": ("Objects whose last fetch failed.", len(status.failures)),
    }
    counters = {
        "lookups": ("Objects looked up.", status.lookups),
        "fetched_objects": ("Objects fetched.", status.fetched_objects),
        "received_bytes": ("Bytes received from sources.", status.received_bytes),
        "reused_bytes": ("Bytes of chunks found in other large objects of this host.", status.reused_bytes),
        "failures": ("Fetches that failed.", status.failed),
        "corrupt": ("Objects, chunks and layouts that came wrong.", status.corrupt),
        "on_demand_requests": ("Requests that somebody waited for.", status.on_demand),
        "prefetched_contents": ("Objects and chunks that came in requests for many.", status.prefetched),
        "prefetched_bytes": ("Their bytes.", status.prefetched_bytes),
        "profiles_found": ("Profiles that were prefetched.", status.profiles_found),
        "profiles_absent": ("Images that started without a profile.", status.profiles_absent),
    }

    class Collector:
        def collect(self) -> list[GaugeMetricFamily | CounterMetricFamily]:
            return [
                *(
                    GaugeMetricFamily(_METRIC_PREFIX + name, text, value=value)
                    for name, (text, value) in gauges.items()
                ),
                *(
                    CounterMetricFamily(_METRIC_PREFIX + name, text, value=value)
                    for name, (text, value) in counters.items()
                ),
            ]

    registry = CollectorRegistry()
    registry.register(Collector())
    return generate_latest(registry)
