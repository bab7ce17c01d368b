"""HTTP calls to a manager in a process of its own."""

from __future__ import annotations

import hashlib
import http.client
import random
from collections.abc import Mapping
from pathlib import Path

from tests.support.remotes import Service

LARGE = random.Random(7).randbytes(3 << 20)


def sha256(content: bytes) -> str:
    """Return the digest of *content* in hex."""
    return hashlib.sha256(content).hexdigest()


def call(
    server: Service, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, Mapping[str, str], bytes]:
    """Send one request; return the status, the headers with lower-case names, and the body."""
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    try:
        connection.request(method, path, body, dict(headers or {}))
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def push(server: Service, content: bytes) -> str:
    """Put an object; return its digest in hex."""
    assert call(server, "PUT", f"/v1/objects/{sha256(content)}", content)[0] in (200, 201)
    return sha256(content)


def address(server: Service) -> tuple[str, int]:
    """Return the manager's host and port."""
    host, _, port = server.url.removeprefix("http://").rpartition(":")
    return host, int(port)


def peak_bytes(server: Service) -> int:
    """Return the peak of the manager's resident memory."""
    status = Path(f"/proc/{server.daemon.pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10
