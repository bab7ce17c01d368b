"""Reach the limits of a manager: body sizes, stalled clients, memory, open files."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import socket
import urllib.request
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.manager_calls import LARGE, address, call, peak_bytes, push, sha256
from tests.support.remotes import Service, manager_server

pytestmark = pytest.mark.slow


def test_too_large_requests_are_rejected(server: Service) -> None:
    content = bytes(9 << 20)
    assert call_or_break(server, "PUT", f"/v1/objects/{sha256(content)}", content) == 413
    assert call(server, "HEAD", f"/v1/objects/{sha256(content)}")[0] == 404
    assert call_or_break(server, "POST", "/v1/query", b" " * (3 << 20)) == 413
    assert call(server, "GET", "/healthz", headers={"X": "x" * 20_000})[0] == 400
    many = json.dumps({"digests": [sha256(b"x")] * 10_001}).encode()
    assert call(server, "POST", "/v1/query", many)[0] == 400


def test_a_stalled_client_is_dropped(tmp_path: Path) -> None:
    beginnings = [
        b"",
        b"GET /healthz HTTP/1.1\r\nX: ",
        b"POST /v1/query HTTP/1.1\r\nHost: m\r\nContent-Length: 100\r\n\r\n{",
    ]
    with manager_server(tmp_path, {"GEAR_MANAGER_CLIENT_TIMEOUT_S": "2"}) as server:
        for beginning in beginnings:
            with socket.create_connection(address(server), timeout=60) as client:
                client.sendall(beginning)
                while client.recv(4096):
                    pass


def test_a_client_that_reads_nothing_does_not_delay_others(server: Service) -> None:
    digest = push(server, LARGE)
    request = f"GET /v1/objects/{digest} HTTP/1.1\r\nHost: m\r\n\r\n".encode()
    slow = [socket.create_connection(address(server)) for _ in range(50)]
    try:
        for client in slow:
            client.sendall(request)
        assert call(server, "GET", f"/v1/objects/{digest}")[2] == LARGE
    finally:
        for client in slow:
            client.close()


def test_memory_does_not_grow_with_the_size_of_an_object(tmp_path: Path) -> None:
    with manager_server(tmp_path) as server:
        push(server, LARGE)
        before = peak_bytes(server)
        path = tmp_path / "sparse"
        with path.open("wb") as file:
            file.truncate(600 << 20)
        digest = hashlib.sha256()
        for _ in range(600):
            digest.update(bytes(1 << 20))
        with path.open("rb") as file:
            request = urllib.request.Request(f"{server.url}/v1/objects/{digest.hexdigest()}", file, method="PUT")
            request.add_header("Content-Length", str(600 << 20))
            assert urllib.request.urlopen(request).status == 201
        with urllib.request.urlopen(f"{server.url}/v1/objects/{digest.hexdigest()}") as answer:
            pulled = hashlib.sha256()
            while piece := answer.read(1 << 20):
                pulled.update(piece)
        assert pulled.digest() == digest.digest()
        assert peak_bytes(server) - before < 100 << 20


def test_the_manager_serves_more_clients_than_the_soft_limit_on_files(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = max(map(int, os.listdir("/proc/self/fd"))) + 64  # this process has the limit too, while the server starts
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        with manager_server(tmp_path) as server, ExitStack() as idle:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for _ in range(few + 64):
                idle.enter_context(socket.create_connection(address(server)))
            assert call(server, "GET", "/healthz")[0] == 200
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def call_or_break(server: Service, method: str, path: str, body: bytes) -> int:
    """Return the status; a server that answers before it has read the whole body may break the connection."""
    try:
        return call(server, method, path, body)[0]
    except ConnectionError:
        return 413
