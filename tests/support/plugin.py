"""A client of the plugin protocol that does what dockerd's does, and what it never would."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class UnixHTTPConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout_s: float = 60.0) -> None:
        super().__init__("plugin", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect to the socket."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def read_metrics(path: Path) -> bytes:
    """What the gateway tells Prometheus at the Unix socket *path*."""
    connection = UnixHTTPConnection(path)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read()
    finally:
        connection.close()


@dataclass(frozen=True)
class Plugin:
    """The gateway on the Unix socket *path*; a connection for each call."""

    path: Path

    def request(self, method: str, body: bytes | Iterable[bytes], *, chunked: bool = False) -> tuple[int, bytes]:
        """One POST: HTTP status and body of the answer."""
        connection = UnixHTTPConnection(self.path)
        try:
            headers = {"Transfer-Encoding": "chunked"} if chunked else {}
            connection.request("POST", f"/{method}", body, headers, encode_chunked=chunked)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def call(self, method: str, **arguments: object) -> Any:
        """A call of the driver: the decoded answer."""
        return json.loads(self.request(f"GraphDriver.{method}", json.dumps(arguments).encode())[1])

    def apply_diff(self, id: str, body: Iterable[bytes], parent: str = "") -> tuple[int, Any]:
        """HTTP status and decoded answer."""
        status, answer = self.request(f"GraphDriver.ApplyDiff?id={id}&parent={parent}", body, chunked=True)
        return status, json.loads(answer)

    def diff(self, id: str, parent: str = "") -> tuple[int, bytes]:
        """HTTP status and what was answered; http.client.HTTPException if it was broken off."""
        return self.request("GraphDriver.Diff", json.dumps({"ID": id, "Parent": parent}).encode())

    def begin_apply(self, id: str, first_bytes: bytes) -> socket.socket:
        """The connection of an ApplyDiff that has sent one chunk and holds the rest back."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(60)
        connection.connect(str(self.path))
        head = f"POST /GraphDriver.ApplyDiff?id={id}&parent= HTTP/1.1\r\nHost: p\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head.encode() + b"%x\r\n%s\r\n" % (len(first_bytes), first_bytes))
        return connection

    def begin(self, method: str, id: str) -> socket.socket:
        """The connection of a call that has been sent and of whose answer nothing was read."""
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(60)
        connection.connect(str(self.path))
        body = json.dumps({"ID": id, "Parent": ""}).encode()
        head = f"POST /GraphDriver.{method} HTTP/1.1\r\nHost: p\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def status(self) -> dict[str, str]:
        """What `docker info` would show."""
        return dict(self.call("Status")["Status"])
