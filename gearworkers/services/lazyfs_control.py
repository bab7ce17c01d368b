"""The lazy file server's own socket: its status, its metrics, orders to prefetch; HTTP over a Unix socket.

GET  /status      `LazyStatus` as JSON
GET  /metrics     the same for Prometheus
POST /prefetch    {"layers": ["id", …]} → {"objects": how many are missing and will come}
"""

from __future__ import annotations

import http.client
import os
import socket
import socketserver
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from gearworkers.errors import GearError, InvalidInput, Unavailable

_MOST_BODY_BYTES = 1 << 20
_TIMEOUT_S = 10.0
_METRIC_PREFIX = "gear_lazy_"


class LazyStatus(msgspec.Struct, frozen=True):
    """What the lazy file server has done since it began, and what it cannot get."""

    incomplete_layers: int
    lookups: int
    arriving: int
    serving: int
    fetched_objects: int
    received_bytes: int
    failed: int
    corrupt: int
    failures: dict[str, str]
    """Digest in hex to why, of the objects whose last fetch failed."""


class _Order(msgspec.Struct, frozen=True):
    layers: list[str]


class ControlServer:
    """Answers on the socket from its own threads while the context lasts."""

    def __init__(self, path: Path, status: Callable[[], LazyStatus], prefetch: Callable[[Sequence[str]], int]) -> None:
        self._path = path
        self._status = status
        self._prefetch = prefetch

    def __enter__(self) -> ControlServer:
        self._path.unlink(missing_ok=True)
        self._server = _Server(os.fspath(self._path), _handler(self._status, self._prefetch))
        self._path.chmod(0o600)
        self._thread = threading.Thread(target=self._server.serve_forever, name="control", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._path.unlink(missing_ok=True)
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def read_status(path: Path) -> LazyStatus | None:
    """What the server at this socket tells; None if none runs."""
    try:
        return msgspec.json.decode(_ask(path, "GET", "/status", b""), type=LazyStatus)
    except Unavailable:
        return None


def order_prefetch(path: Path, layers: Sequence[str]) -> int:
    """Have the layers' missing objects fetched behind what containers read; how many they are.

    Raises:
        Unavailable: No server runs.
    """
    told = msgspec.json.decode(_ask(path, "POST", "/prefetch", msgspec.json.encode(_Order(list(layers)))))
    return int(told["objects"])


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("lazyfs", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(os.fspath(self._path))


def _ask(path: Path, method: str, url: str, body: bytes) -> bytes:
    connection = _Connection(path)
    try:
        connection.request(method, url, body)
        response = connection.getresponse()
        content = response.read()
    except (OSError, http.client.HTTPException) as exc:
        raise Unavailable(f"the lazy file server does not answer at {path} ({exc}); start `gear lazyfs`") from exc
    finally:
        connection.close()
    if response.status != http.HTTPStatus.OK:
        raise InvalidInput(f"{method} {url}: {content.decode(errors='replace')}")
    return content


def _handler(
    status: Callable[[], LazyStatus], prefetch: Callable[[Sequence[str]], int]
) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _TIMEOUT_S

        def do_GET(self) -> None:
            if self.path == "/status":
                self._answer(msgspec.json.encode(status()), "application/json")
            elif self.path == "/metrics":
                self._answer(metrics_page(status()), "text/plain; version=0.0.4")
            else:
                self.send_error(http.HTTPStatus.NOT_FOUND)

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            if self.path != "/prefetch" or length > _MOST_BODY_BYTES:
                self.send_error(http.HTTPStatus.NOT_FOUND)
                return
            try:
                order = msgspec.json.decode(self.rfile.read(length), type=_Order)
                self._answer(msgspec.json.encode({"objects": prefetch(order.layers)}), "application/json")
            except (msgspec.DecodeError, GearError) as exc:
                self.send_error(http.HTTPStatus.BAD_REQUEST, explain=str(exc))

        def _answer(self, content: bytes, kind: str) -> None:
            self.send_response(http.HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def address_string(self) -> str:
            return "unix"

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
        "failures": ("Fetches that failed.", status.failed),
        "corrupt": ("Objects, chunks and layouts that came wrong.", status.corrupt),
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
