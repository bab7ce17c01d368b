"""The control socket of the lazy file server: HTTP over a Unix socket.

GET  /status      `LazyStatus` as JSON
GET  /metrics     `LazyStatus` in Prometheus' text format
POST /prefetch    `PrefetchRequest` → `PrefetchReply`
POST /image       `ImageEvent` → `ProfileStatus`
POST /reads       `ReadsRequest` → `ReadRanges`
POST /indexes     `IndexesRequest` → `LayerIndex` by the layer's digest
POST /fetch-index `FetchIndexRequest` → null, when the file is written
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

_MAX_BODY_BYTES = 1 << 20
_TIMEOUT_S = 10.0
_METRIC_PREFIX = "gear_lazy_"


PostHandler = Callable[[bytes], object]
"""Takes the body of a POST and returns the answer, to be sent as JSON.

Raises msgspec.DecodeError or GearError if the request is wrong.
"""


class ControlServer:
    """A context manager that answers on the socket, in threads of its own."""

    def __init__(self, path: Path, status: Callable[[], LazyStatus], handlers: Mapping[str, PostHandler]) -> None:
        """
        Args:
            path: The socket's path.
            status: Returns the answer to GET.
            handlers: The handlers of POST, by URL path.
        """
        self._path = path
        self._status = status
        self._handlers = handlers

    def __enter__(self) -> ControlServer:
        self._path.unlink(missing_ok=True)
        self._server = _Server(os.fspath(self._path), _request_handler(self._status, self._handlers))
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
    """Limit of connections that wait to be accepted, such as those of containers that start at the same time."""


def _request_handler(
    status: Callable[[], LazyStatus], handlers: Mapping[str, PostHandler]
) -> type[BaseHTTPRequestHandler]:
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
            handler = handlers.get(self.path)
            if handler is None or length > _MAX_BODY_BYTES:
                self.send_error(http.HTTPStatus.NOT_FOUND)
                return
            try:
                self._answer(msgspec.json.encode(handler(self.rfile.read(length))), "application/json")
            except (msgspec.DecodeError, GearError) as exc:
                self._answer(str(exc).encode(errors="replace"), "text/plain", http.HTTPStatus.BAD_REQUEST)

        def _answer(self, content: bytes, kind: str, code: http.HTTPStatus = http.HTTPStatus.OK) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: requests arrive every few seconds."""

    return Handler


def metrics_page(status: LazyStatus) -> bytes:
    """Return *status* in Prometheus' text format."""
    gauges = {
        "incomplete_layers": ("Layers that lack objects.", status.incomplete_layers),
        "arriving_objects": ("Objects that are being fetched.", status.arriving),
        "serving_objects": ("Large objects read through the lazy file system.", status.serving),
        "failing_objects": ("Objects whose last fetch failed.", len(status.failures)),
    }
    counters = {
        "lookups": ("Objects looked up.", status.lookups),
        "fetched_objects": ("Objects fetched.", status.fetched_objects),
        "received_bytes": ("Bytes received from sources.", status.received_bytes),
        "reused_bytes": ("Bytes of chunks found in other large objects of this host.", status.reused_bytes),
        "failures": ("Fetches that failed.", status.failed),
        "corrupt": ("Objects, chunks and layouts that did not match their digest.", status.corrupt),
        "on_demand_requests": ("Requests with a waiting reader.", status.on_demand),
        "prefetched_contents": ("Objects and chunks that batch requests delivered.", status.prefetched),
        "prefetched_bytes": ("Bytes of objects and chunks that batch requests delivered.", status.prefetched_bytes),
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
