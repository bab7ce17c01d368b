"""A client of the plugin protocol: dockerd's calls, and malformed calls."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gearworkers.util.unix_http import UnixHTTPConnection

TIMEOUT_S = 60.0


def read_metrics(path: Path) -> bytes:
    """Return the gateway's Prometheus metrics from the Unix socket *path*."""
    connection = UnixHTTPConnection(path, TIMEOUT_S)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read()
    finally:
        connection.close()


@dataclass(frozen=True)
class Plugin:
    """A client of the gateway on the Unix socket *path*; each call opens a connection."""

    path: Path

    def request(self, method: str, body: bytes | Iterable[bytes], *, chunked: bool = False) -> tuple[int, bytes]:
        """Send a POST; return HTTP status and body of the answer."""
        connection = UnixHTTPConnection(self.path, TIMEOUT_S)
        try:
            headers = {"Transfer-Encoding": "chunked"} if chunked else {}
            connection.request("POST", f"/{method}", body, headers, encode_chunked=chunked)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def call(self, method: str, **arguments: object) -> Any:
        """Call a method of the driver; return the decoded answer."""
        return json.loads(self.request(f"GraphDriver.{method}", json.dumps(arguments).encode())[1])

    def apply_diff(self, id: str, body: Iterable[bytes], parent: str = "") -> tuple[int, Any]:
        """Call ApplyDiff; return HTTP status and decoded answer."""
        status, answer = self.request(f"GraphDriver.ApplyDiff?id={id}&parent={parent}", body, chunked=True)
        return status, json.loads(answer)

    def diff(self, id: str, parent: str = "") -> tuple[int, bytes]:
        """Call Diff; return HTTP status and body of the answer.

        Raises:
            http.client.HTTPException: The connection broke.
        """
        return self.request("GraphDriver.Diff", json.dumps({"ID": id, "Parent": parent}).encode())

    def begin_apply(self, id: str, first_bytes: bytes) -> socket.socket:
        """Start an ApplyDiff and send only its first chunk; return the connection."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(self.path))
        head = f"POST /GraphDriver.ApplyDiff?id={id}&parent= HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"%x\r\n%s\r\n" % (len(first_bytes), first_bytes))
        return connection

    def begin(self, method: str, id: str) -> socket.socket:
        """Send a call; return the connection without reading the answer."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT_S)
        connection.connect(str(self.path))
        body = json.dumps({"ID": id, "Parent": ""}).encode()
        head = f"POST /GraphDriver.{method} HTTP/1.1\r\nHost: p\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def status(self) -> dict[str, str]:
        """Return the status that `docker info` shows."""
        return dict(self.call("Status")["Status"])
